"""The modules as citizens of Kornia's pipelines, in whatever Kornia release is installed."""

import copy
import gc
import pickle
import weakref

import kornia
import numpy as np
import pytest
import torch
from kornia.augmentation import AugmentationSequential
from kornia.constants import Resample
from kornia.geometry.transform import warp_affine
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as v1

from contrastive_kit.augment import (
    ColorJitter,
    GaussianBlur,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
    SimCLRAugment,
    SimCLRView,
)

OLD = tuple(map(int, kornia.__version__.split(".")[:2])) < (0, 9)
MODULES = {
    "crop": lambda **o: RandomResizedCrop((12, 14), **o),
    "flip": RandomHorizontalFlip,
    "jitter": lambda **o: ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.5, **o),
    "grayscale": lambda **o: RandomGrayscale(p=0.5, **o),
    "blur": lambda **o: GaussianBlur(5, (0.5, 2.0), p=0.5, **o),
    "solarize": lambda **o: RandomSolarize(p=0.5, **o),
    "view": lambda generator=None, **o: SimCLRView(
        SimCLRAugment((12, 14), views=1, blur=True, generator=generator), **o
    ),
}
GATED = ("flip", "jitter", "grayscale", "blur", "solarize")
GEOMETRIC = ("crop", "flip", "view")


@pytest.fixture
def images(make_images):
    return make_images(8, 20, 24)


@pytest.mark.parametrize("name", MODULES)
def test_replay(name, images):
    module = MODULES[name]()
    first = module(images)
    params = module._params
    assert not torch.equal(module(images), first)
    assert torch.equal(module(images, params=params), first)


@pytest.mark.parametrize("name", MODULES)
def test_replay_in_a_container(name, images):
    pipeline = AugmentationSequential(MODULES[name](), data_keys=["input"])
    first = pipeline(images)
    params = pipeline._params
    assert torch.equal(pipeline(images, params=params), first)


@pytest.mark.parametrize("name", GATED)
def test_gate_leaves_samples_alone(name, images):
    module = MODULES[name](generator=torch.Generator().manual_seed(1))
    result = module(images)
    same = (result == images).flatten(1).all(dim=1)
    assert torch.equal(~same, module._params["apply"].bool())
    assert 0 < same.sum() < 8


def test_each_module_is_torchvisions_operation(images, torchvision_jitter):
    jitter = ColorJitter(0.8, 0.8, 0.8, 0.2)
    result, p = jitter(images), jitter._params
    for i, image in enumerate(images):
        factors = [p[name][i] for name in ("brightness", "contrast", "saturation", "hue")]
        torch.testing.assert_close(
            result[i], torchvision_jitter(image, p["order"][i], factors), atol=1e-5, rtol=0
        )
    blur = GaussianBlur(5, p=1.0)
    result = blur(images)
    for i, image in enumerate(images):
        expected = v1.gaussian_blur(image, [5, 5], [float(blur._params["sigma"][i])] * 2)
        torch.testing.assert_close(result[i], expected, atol=1e-5, rtol=0)
    crop = RandomResizedCrop((12, 14))
    result = crop(images)
    for i, image in enumerate(images):
        box = [int(v) for v in crop._params["box"][i]]
        expected = v1.resized_crop(image, *box, [12, 14], antialias=True)
        torch.testing.assert_close(result[i], expected, atol=1e-5, rtol=0)
    assert torch.equal(RandomHorizontalFlip(p=1.0)(images), v1.hflip(images))
    assert torch.equal(RandomSolarize(p=1.0)(images), v1.solarize(images, 0.5))
    torch.testing.assert_close(RandomGrayscale(p=1.0)(images), v1.rgb_to_grayscale(images, 3))


def test_the_view_is_the_recipe(images, torchvision_view):
    view = MODULES["view"]()
    result = view(images)
    expected = [
        torchvision_view(image, row, view.augment.recipe)
        for image, row in zip(images, view._params["table"], strict=True)
    ]
    torch.testing.assert_close(result, torch.stack(expected), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="augment must make one view, got views=2"):
        SimCLRView(SimCLRAugment(8))


def blob(height, width, x, y):
    """An image of one smooth spot, whose center of mass is where it is."""
    ys, xs = torch.arange(height)[:, None], torch.arange(width)
    return torch.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 18.0)[None, None]


def center(image):
    weight = image.flatten(0, 1).sum(0).double()
    ys, xs = torch.arange(weight.shape[0])[:, None], torch.arange(weight.shape[1])
    return torch.stack([(weight * xs).sum(), (weight * ys).sum()]) / weight.sum()


@pytest.mark.parametrize(
    "module",
    [
        RandomResizedCrop((50, 70), scale=(0.8, 1.0)),
        RandomHorizontalFlip(p=1.0),
        SimCLRView(
            SimCLRAugment((70, 50), views=1, scale=(0.8, 1.0), jitter=0, grayscale=0, flip=1.0)
        ),
    ],
    ids=GEOMETRIC,
)
def test_keypoints_boxes_and_the_matrix_follow_the_image(module):
    x, y = 33.0, 29.0
    image = blob(60, 64, x, y)
    keypoints = torch.tensor([[[x, y]]])
    boxes = torch.tensor([[[x - 4, y - 3, x + 4, y + 3]]])
    pipeline = AugmentationSequential(module, data_keys=["input", "keypoints", "bbox_xyxy"])
    for _ in range(5):
        result, moved, moved_boxes = pipeline(image.expand(1, 3, -1, -1), keypoints, boxes)
        found = center(result)
        torch.testing.assert_close(moved[0, 0].double(), found, atol=0.05, rtol=0)
        corners = moved_boxes[0, 0].double()
        # kornia boxes are pixel boxes: their far corner is one pixel further.
        middle = (corners[:2] + corners[2:]) / 2
        torch.testing.assert_close(middle, found, atol=1.0, rtol=0)
        by_matrix = module.transform_matrix[0].double() @ torch.tensor([x, y, 1.0]).double()
        torch.testing.assert_close(by_matrix[:2], found, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_masks_follow_the_image_and_keep_their_labels(name):
    labels = torch.arange(20 * 24).reshape(1, 1, 20, 24).expand(8, 1, -1, -1).float()
    module = MODULES[name]()
    if name == "view":
        module = SimCLRView(SimCLRAugment((12, 14), views=1, jitter=0, grayscale=0))
    pipeline = AugmentationSequential(module, data_keys=["input", "mask"])
    image = (labels / 480).expand(-1, 3, -1, -1)
    result, mask = pipeline(image, labels)
    assert mask.shape[-2:] == result.shape[-2:]
    assert (mask == mask.round()).all()
    # The label of the nearest pixel differs from the interpolated one by half a pixel and the
    # antialias: one row of labels and one label.
    assert ((result[:, :1] * 480 - mask).abs() < 24 * 2 + 2).all()


@pytest.mark.parametrize("name", ["jitter", "grayscale", "blur", "solarize"])
def test_masks_boxes_and_keypoints_are_not_touched_by_colors(name, images):
    pipeline = AugmentationSequential(
        MODULES[name](), data_keys=["input", "mask", "keypoints", "bbox_xyxy"]
    )
    mask = torch.randint(0, 9, (8, 1, 20, 24)).float()
    keypoints = torch.rand(8, 2, 2) * 20
    boxes = torch.tensor([[[1.0, 2, 9, 10]]]).expand(8, 1, 4).clone()
    _, new_mask, new_keypoints, new_boxes = pipeline(images, mask, keypoints, boxes)
    assert torch.equal(new_mask, mask)
    assert torch.equal(new_keypoints, keypoints)
    assert torch.equal(new_boxes, boxes)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_inverse_puts_the_view_back(name):
    image = blob(40, 44, 21.0, 18.0).expand(4, 3, -1, -1)
    modules = {
        "crop": lambda: RandomResizedCrop(64, scale=(0.6, 1.0)),
        "flip": lambda: RandomHorizontalFlip(p=0.5),
        "view": lambda: SimCLRView(
            SimCLRAugment(64, views=1, scale=(0.6, 1.0), jitter=0, grayscale=0, blur=False)
        ),
    }
    module = modules[name]()
    view = module(image)
    back = module.inverse(view)
    assert back.shape == image.shape
    inside = warp_affine(
        torch.ones_like(view),
        torch.linalg.inv(module.transform_matrix)[:, :2],
        (40, 44),
        align_corners=True,
    )
    whole = inside > 0.99
    assert whole.double().mean() > 0.4
    torch.testing.assert_close(back[whole], image[whole], atol=0.05, rtol=0)
    pipeline = AugmentationSequential(modules[name](), data_keys=["input"])
    assert pipeline.inverse(pipeline(image)).shape == image.shape


@pytest.mark.parametrize("name", MODULES)
def test_same_on_batch(name, make_images):
    image = make_images(1, 20, 24).expand(6, -1, -1, -1)
    for module in (
        MODULES[name](same_on_batch=True),
        AugmentationSequential(MODULES[name](), data_keys=["input"], same_on_batch=True),
    ):
        result = module(image)
        torch.testing.assert_close(result, result[:1].expand_as(result), atol=1e-6, rtol=0)
    result = MODULES[name]()(image)
    assert not torch.equal(result, result[:1].expand_as(result))


@pytest.mark.parametrize("name", MODULES)
def test_keepdim(name, images):
    assert MODULES[name](keepdim=True)(images[0]).ndim == 3
    assert MODULES[name]()(images[0]).ndim == 4
    pipeline = AugmentationSequential(MODULES[name](), data_keys=["input"], keepdim=True)
    assert pipeline(images[0]).ndim == 3


@pytest.mark.parametrize("name", MODULES)
def test_own_generator_is_independent_of_the_global_one(name, images):
    module = MODULES[name](generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    first = module(images)
    assert torch.equal(torch.get_rng_state(), state)
    again = MODULES[name](generator=torch.Generator().manual_seed(1))
    torch.rand(3)
    assert torch.equal(again(images), first)


@pytest.mark.parametrize("name", MODULES)
def test_probability_does_not_shift_the_stream(name, images):
    module = MODULES[name]()
    torch.manual_seed(0)
    module(images)
    torch.manual_seed(0)
    expected = torch.rand(8, module._param_generator.columns)
    after = torch.rand(1)
    torch.manual_seed(0)
    module(images)
    assert torch.equal(torch.rand(1), after)
    assert expected.shape[0] == 8


@pytest.mark.parametrize("name", MODULES)
def test_pickle_deepcopy_state_dict_and_to(name, images):
    module = MODULES[name](generator=torch.Generator().manual_seed(7))
    twin, thawed = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    expected = module(images)
    assert torch.equal(twin(images), expected)
    assert torch.equal(thawed(images), expected)
    assert repr(thawed) == repr(module)
    assert not module.state_dict()
    wide = module.to(torch.float64)(images.double())
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("name", MODULES)
def test_gradient_reaches_the_images(name, images):
    images.requires_grad_()
    MODULES[name]()(images).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0


@pytest.mark.skipif(OLD, reason="Kornia's bases compile without a graph break since 0.9")
@pytest.mark.parametrize("name", MODULES)
def test_fullgraph_compile(name, images):
    module = MODULES[name]()
    params = module.forward_parameters(images.shape)
    expected = module(images, params=params)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, params=params), expected, atol=1e-5, rtol=0)
    assert compiled(images).shape == expected.shape


@pytest.mark.parametrize("name", MODULES)
def test_the_images_are_not_kept_alive(name, make_images):
    images = make_images(4, 20, 24)
    watch = weakref.ref(images)
    module = MODULES[name]()
    result = module(images)
    del images
    gc.collect()
    assert watch() is None
    assert result.shape[0] == 4
    assert module.transform_matrix.shape == (4, 3, 3)


@pytest.mark.parametrize("name", MODULES)
def test_uint8_is_scaled(name, images):
    narrow = (images * 255).round().byte()
    module = MODULES[name]()
    result = module(narrow)
    assert result.dtype == torch.float32
    expected = module(narrow.float() / 255, params=module._params)
    torch.testing.assert_close(result, expected, atol=0.02 if name == "view" else 1e-6, rtol=0)
    in_container = AugmentationSequential(MODULES[name](), data_keys=["input"])(narrow)
    assert in_container.dtype == torch.float32
    assert 0.05 < in_container.mean() < 1


@pytest.mark.parametrize("name", MODULES)
def test_uint8_under_autocast_is_not_cast_back(name, images):
    narrow = (images * 255).round().byte()
    module = MODULES[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = module(narrow)
    assert result.dtype == torch.float32
    assert torch.equal(result, module(narrow, params=module._params))


@pytest.mark.parametrize("name", GEOMETRIC)
def test_uint8_images_beside_masks_are_an_error_not_black_masks(name, images):
    narrow = (images * 255).round().byte()
    pipeline = AugmentationSequential(MODULES[name](), data_keys=["input", "mask"])
    mask = torch.full((8, 1, 20, 24), 0.5)
    try:
        _, result = pipeline(narrow, mask)
    except TypeError as error:
        assert "masks must be floating" in str(error)  # noqa: PT017
    else:
        assert result.unique().tolist() == [0.5]
    _, result = pipeline(images, mask)
    assert result.unique().tolist() == [0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_masks_of_any_dtype_as_documented(name, narrow, dtype, images):
    given = (images * 255).round().byte() if narrow else images
    mask = torch.ones(8, 1, 20, 24).to(dtype)
    pipeline = AugmentationSequential(MODULES[name](), data_keys=["input", "mask"])
    if narrow and (OLD or dtype == torch.float32):
        with pytest.raises(TypeError, match="masks must be floating"):
            pipeline(given, mask)
    else:
        result = pipeline(given, mask)[1]
        assert result.dtype == dtype
        assert result.all()


@pytest.mark.parametrize("name", GATED)
def test_uint8_with_a_gate_scales_all_rows(name, images):
    narrow = (images * 255).round().byte()
    assert MODULES[name]()(narrow).max() <= 1


def test_among_kornias_own(images):
    from kornia.augmentation import RandomErasing, RandomRotation

    pipeline = AugmentationSequential(
        RandomResizedCrop((16, 16)),
        RandomRotation(20.0),
        RandomHorizontalFlip(),
        ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        RandomGrayscale(p=0.2),
        GaussianBlur(3),
        RandomErasing(p=0.5),
        data_keys=["input", "mask", "keypoints", "bbox_xyxy"],
    )
    mask = torch.ones(8, 1, 20, 24)
    keypoints = torch.rand(8, 3, 2) * 20
    boxes = torch.tensor([[[1.0, 2, 9, 10]]]).expand(8, 1, 4).clone()
    first = pipeline((images * 255).byte().float() / 255, mask, keypoints, boxes)
    again = pipeline(
        (images * 255).byte().float() / 255, mask, keypoints, boxes, params=pipeline._params
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert first[0].shape == (8, 3, 16, 16)


def test_empty_batch():
    for make in (MODULES["crop"], MODULES["jitter"], MODULES["view"]):
        assert make()(torch.empty(0, 3, 20, 24)).shape[0] == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RandomHorizontalFlip(p="0.2"), "p must be a number, got '0.2'"),
        (lambda: RandomGrayscale(p=None), "p must be a number, got None"),
        (lambda: RandomSolarize(p=True), "p must be a number, got True"),
        (lambda: RandomSolarize(None), "threshold must be a number, got None"),
        (lambda: RandomSolarize(1j), "threshold must be a number, got 1j"),
        (lambda: ColorJitter(None), "brightness must be a number, got None"),
        (lambda: ColorJitter(contrast="0.4"), "contrast must be a number, got '0.4'"),
        (lambda: ColorJitter(hue=(0.1, None)), "hue must be a number, got None"),
        (lambda: ColorJitter(p=[0.5]), "p must be a number"),
        (lambda: GaussianBlur(3, None), "sigma must be a number, got None"),
        (lambda: GaussianBlur(3, "1"), "sigma must be a number, got '1'"),
        (lambda: GaussianBlur(None), "kernel_size must be an integer, got None"),
        (lambda: GaussianBlur((3, 3.0)), r"kernel_size must be an integer, got \(3, 3.0\)"),
        (lambda: RandomResizedCrop(8, scale=None), "scale must hold several numbers, got None"),
        (lambda: RandomResizedCrop(8, antialias="no"), "antialias must be True or False"),
        (lambda: RandomHorizontalFlip(same_on_batch="no"), "same_on_batch must be True or False"),
        (lambda: RandomHorizontalFlip(keepdim=1), "keepdim must be True or False, got 1"),
        *(
            (lambda make=make: make()(None), "images must be a tensor, got NoneType")
            for make in MODULES.values()
        ),
    ],
)
def test_errors_of_another_type_name_the_argument(call, words):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize("name", MODULES)
def test_pil_images_where_kornia_takes_them(name):
    """In its containers, before 0.9 by themselves too; elsewhere they are named."""
    picture = Image.new("RGB", (24, 20), (255, 128, 0))
    size = (12, 14) if name in ("crop", "view") else (20, 24)
    pipeline = AugmentationSequential(MODULES[name](), data_keys=["input"])
    assert pipeline(picture).shape == (1, 3, *size)
    if OLD:
        assert MODULES[name]()(picture).shape == (1, 3, *size)
    else:
        with pytest.raises(TypeError, match="images must be a tensor, got Image"):
            MODULES[name]()(picture)


def test_what_torchvision_and_kornia_accept(images):
    """Numbers of any kind, one number for a range, pairs, the names of the interpolations."""
    tensor, double = torch.tensor, np.float32
    for p in (tensor(0.25), double(0.25), np.array(0.25)):
        for make in (RandomHorizontalFlip, RandomGrayscale):
            assert repr(make(p)) == repr(make(0.25))
        assert repr(RandomSolarize(p, p=p)) == repr(RandomSolarize(0.25, p=0.25))
        assert repr(ColorJitter(p, (p, 1), [p, 2], p, p=p)) == repr(
            ColorJitter(0.25, (0.25, 1.0), (0.25, 2.0), 0.25, p=0.25)
        )
        assert repr(GaussianBlur(3, p, p=p)) == repr(GaussianBlur(3, (0.25, 0.25), p=0.25))
    assert repr(GaussianBlur(3, tensor([0.5, 2.0]))) == repr(GaussianBlur(3, (0.5, 2.0)))
    fixed = GaussianBlur([3, np.int64(5)], sigma=1.0, p=1.0)
    expected = v1.gaussian_blur(images, [5, 3], [1.0, 1.0])
    torch.testing.assert_close(fixed(images), expected, atol=1e-5, rtol=0)
    params = RandomResizedCrop(8).forward_parameters(images.shape)
    for size in (np.int64(8), [8, 8], np.array([8, 8]), (np.int32(8), 8), torch.Size((8, 8))):
        for interpolation in (InterpolationMode.BICUBIC, Resample.BICUBIC, "BICUBIC", "bicubic"):
            crop = RandomResizedCrop(size, interpolation=interpolation)
            bicubic = RandomResizedCrop(8, interpolation="bicubic")
            assert torch.equal(crop(images, params=params), bicubic(images, params=params))


def test_repr():
    assert repr(RandomResizedCrop(8)) == (
        "RandomResizedCrop(size=8, scale=(0.08, 1.0), ratio=(0.75, 1.3333333333333333), "
        "interpolation='bilinear')"
    )
    assert repr(RandomHorizontalFlip()) == "RandomHorizontalFlip(p=0.5)"
    assert repr(GaussianBlur(9)) == "GaussianBlur(kernel_size=9, sigma=(0.1, 2.0), p=0.5)"
    assert "views=1" in repr(MODULES["view"]())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RandomResizedCrop(0), "size must be a positive int"),
        (lambda: RandomResizedCrop(8, scale=(2.0, 1.0)), "scale must be a range"),
        (lambda: RandomResizedCrop(8, interpolation="nearest"), "'bilinear' or 'bicubic'"),
        (lambda: RandomHorizontalFlip(p=2), "p must be a probability"),
        (lambda: RandomGrayscale(p=-1), "p must be a probability"),
        (lambda: ColorJitter(-1.0), "brightness must not be negative, got -1.0"),
        (lambda: ColorJitter(hue=0.6), "hue must be a number or a finite range within -0.5"),
        (lambda: ColorJitter(contrast=(2.0, 1.0)), "contrast must be a number or a finite range"),
        (lambda: GaussianBlur(4), "kernel_size must be odd"),
        (lambda: GaussianBlur(3, (0.0, 1.0)), "sigma must be a positive number or a finite range"),
        (lambda: RandomSolarize(2.0), r"threshold must be in \[0, 1\]"),
        (lambda: GaussianBlur(9)(torch.rand(1, 3, 4, 4)), "kernel_size must be below 8"),
        (lambda: GaussianBlur((3, 4)), "kernel_size must be odd"),
        (lambda: GaussianBlur((3, 3, 3)), "kernel_size must be odd and positive, for both"),
        (lambda: GaussianBlur(3, (1.0, 2.0, 3.0)), "sigma must be a positive number or a finite"),
        (lambda: GaussianBlur(3, float("nan")), "sigma must be a positive number or a finite"),
        (lambda: RandomHorizontalFlip(p=float("nan")), "p must be a probability"),
        (lambda: RandomResizedCrop(8, interpolation=InterpolationMode.NEAREST), "'bicubic', got"),
        (lambda: RandomResizedCrop(8, interpolation=2), "'bilinear' or 'bicubic', got 2"),
        (lambda: RandomResizedCrop(8, interpolation=None), "'bilinear' or 'bicubic', got None"),
        (lambda: ColorJitter(0.5)(torch.rand(1, 1, 4, 4)), "images must have 3 channels"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
