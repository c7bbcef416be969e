"""The whole view against torchvision's pipeline, and what the module promises around it."""

import copy
import dataclasses
import inspect
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode

from contrastive_kit import SimCLRAugment
from contrastive_kit.augment.parameters import unpack
from contrastive_kit.augment.recipe import (
    BYOL,
    CIFAR,
    GOOGLE_RESEARCH,
    IMAGENET,
    IMAGENET_NORMALIZATION,
    Recipe,
)


def expected_views(augment, images, params, oracle):
    rows = params.flatten(0, 1)
    views = [oracle(images[i % len(images)], row, augment.recipe) for i, row in enumerate(rows)]
    return torch.stack(views)


CASES = {
    "32 from 32": (32, (40, 32, 32), {"blur": True}),
    "33x20 from 50x41": ((33, 20), (12, 50, 41), {"blur": True, "kernel_size": 5}),
    "96 from 64x128": (96, (6, 64, 128), {}),
    "224 from 256": (224, (4, 256, 256), {}),
    "normalized": (40, (12, 50, 60), {"blur": True, "normalize": IMAGENET_NORMALIZATION}),
    "bicubic": (24, (8, 60, 40), {"blur": True, "interpolation": "bicubic"}),
    "strong hue, solarized": (
        16,
        (16, 30, 30),
        {"blur": True, "colors": (0.8, 0.8, 0.8, 0.5), "solarize": 0.5},
    ),
}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_equals_torchvision(case, dtype, backend, make_images, torchvision_view, poisoned_empty):
    size, shape, options = CASES[case]
    augment = SimCLRAugment(size, backend=backend, **options)
    images = make_images(*shape, dtype)
    before = images.clone()
    views, params = augment(images, return_params=True)
    assert torch.equal(images, before)
    expected = expected_views(augment, images, params, torchvision_view)
    result = torch.cat(views)
    if dtype == torch.uint8:
        # Half a gray level may round the other way, and the colors may amplify that 1.8^3 times.
        assert (result - expected).abs().mean() < 1e-3
    else:
        atol = 1e-5 / (0.225 if augment.recipe.normalize else 1)
        torch.testing.assert_close(result, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("size", [32, (9, 1), (1, 9)], ids=str)
@pytest.mark.parametrize("shape", [(40, 40), (48, 48), (60, 44), (33, 2)], ids=str)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_uint8_is_cropped_alike_by_all_backends(interpolation, antialias, shape, size, make_images):
    """Whatever the size decides: noise, whose bicubic overshoots are large, to two roundings."""
    options = {
        "interpolation": interpolation,
        "antialias": antialias,
        "jitter": 0,
        "grayscale": 0,
        "blur": False,
    }
    augment = SimCLRAugment(size, backend="cpu", **options)
    images = torch.randint(0, 256, (6, 3, *shape), dtype=torch.uint8)
    views, params = augment(images, return_params=True, concat=True)
    torch.testing.assert_close((views * 255).round() / 255, views, atol=1e-6, rtol=0)
    listed = augment(list(images), params=params, concat=True)
    batched = SimCLRAugment(size, backend="torch", **options)
    eager = batched(images, params=params, concat=True)
    for other in (listed, eager):
        off = (views - other).abs() * 255
        assert off.max() < 2.01
        assert off.mean() < 0.05


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_google_research_flavour(backend, make_images):
    """Its operations one by one through `functional`, which has its own oracles."""
    from contrastive_kit.augment import functional as ck

    augment = SimCLRAugment(32, recipe=GOOGLE_RESEARCH, blur=True, backend=backend)
    images = make_images(10, 50, 44)
    result, params = augment(images, return_params=True, concat=True)
    for number, row in enumerate(params.flatten(0, 1)):
        p = unpack(row[None])
        x = images[number % 10][None]
        x = ck.crop_resize(x, p.box, 32, flip=p.flip, interpolation="bicubic", antialias=False)
        x = x.clamp(0, 1)
        for operation in p.order[0].tolist() if p.jitter else ():
            if operation == 0:
                x = ck.adjust_brightness(x, p.brightness)
            elif operation == 1:
                x = ck.adjust_contrast(x, p.contrast, mean="channel")
            elif operation == 2:
                x = ck.adjust_saturation(x, p.saturation, mode="hsv")
            else:
                x = ck.adjust_hue(x, p.hue)
        x = ck.grayscale(x, apply=p.grayscale)
        x = ck.gaussian_blur(x, p.sigma, kernel_size=3, padding="zeros", apply=p.blur)
        torch.testing.assert_close(result[number], x[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_an_image_is_checked_once(backend, make_images):
    """A batch by one check and a list by one an image, however many views and steps follow."""
    images = make_images(5, 40, 36, torch.uint8)
    augment = SimCLRAugment(64, recipe=BYOL, normalize=IMAGENET_NORMALIZATION, backend=backend)
    params = augment.draw(images)
    called = []

    def note(frame, event, _):
        if event == "call":
            called.append(frame.f_code.co_name)

    for given, checks in ((images, 1), (list(images), 5)):
        called.clear()
        sys.setprofile(note)
        augment(given)
        augment(given, params=params)
        sys.setprofile(None)
        assert called.count("check_images") == 2 * checks


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_images_of_different_sizes(backend, make_images, torchvision_view):
    shapes = [(40, 52), (33, 31), (64, 20), (9, 80)]
    images = [make_images(1, *shape, torch.uint8, seed=i)[0] for i, shape in enumerate(shapes)]
    augment = SimCLRAugment(24, views=3, backend=backend, blur=True)
    views, params = augment(images, return_params=True)
    assert len(views) == 3
    expected = expected_views(augment, images, params, torchvision_view)
    torch.testing.assert_close(torch.cat(views), expected, atol=1e-5, rtol=0)
    assert unpack(params).box[..., 2:].amax(dim=(0, 2)).gt(9).all()


def test_replay_is_exact_and_the_draw_follows_the_generator(make_images):
    images = make_images(6, 40, 40, torch.uint8)
    augment = SimCLRAugment(32, generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    first, params = augment(images, return_params=True)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    second, other = augment(images, return_params=True)
    assert not torch.equal(params, other)
    assert all(map(torch.equal, augment(images, params=params), first))
    assert all(map(torch.equal, augment(images, params=other), second))
    augment.generator.manual_seed(3)
    assert all(map(torch.equal, augment(images), first))


def test_the_default_generator_is_torch_manual_seed(make_images):
    images = make_images(2, 20, 20)
    augment = SimCLRAugment(16)
    torch.manual_seed(5)
    first = augment(images)
    torch.manual_seed(5)
    assert all(map(torch.equal, augment(images), first))


def test_backends_make_the_same_views_of_floats(make_images):
    images = make_images(8, 48, 40)
    params = SimCLRAugment(64).draw(images)
    cpu = SimCLRAugment(64, backend="cpu")(images, params=params, concat=True)
    batched = SimCLRAugment(64, backend="torch")(images, params=params, concat=True)
    torch.testing.assert_close(cpu, batched, atol=1e-5, rtol=0)


def test_views_share_one_buffer(make_images):
    images = make_images(3, 20, 20)
    augment = SimCLRAugment(16, views=4)
    views, params = augment(images, return_params=True)
    batch = augment(images, params=params, concat=True)
    assert batch.shape == (12, 3, 16, 16)
    assert torch.equal(torch.cat(views), batch)
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_memory_format_of_the_views(dtype, memory_format, backend, make_images):
    images = make_images(4, 70, 66, torch.uint8)
    options = {"normalize": IMAGENET_NORMALIZATION, "backend": backend}
    plain = SimCLRAugment(64, **options)
    params = plain.draw(images)
    augment = SimCLRAugment(64, dtype=dtype, memory_format=memory_format, **options)
    for view, wide in zip(
        augment(images, params=params), plain(images, params=params), strict=True
    ):
        assert view.dtype == dtype
        assert view.is_contiguous(memory_format=memory_format)
        assert torch.equal(view, wide.to(dtype))


def test_source_memory_formats_and_narrow_floats(make_images):
    images = make_images(4, 50, 60, torch.uint8)
    augment = SimCLRAugment(32)
    params = augment.draw(images)
    expected = augment(images, params=params, concat=True)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(last, params=params, concat=True), expected)
    cut = torch.nn.functional.pad(images, (3, 2, 1, 4))[:, :, 1:-4, 3:-2]
    assert torch.equal(augment(cut, params=params, concat=True), expected)
    mixed = [images[0], last[1], images[2], last[3]]
    assert torch.equal(augment(mixed, params=params, concat=True), expected)
    half = make_images(4, 50, 60).half()
    wide = augment(half.float(), params=params, concat=True)
    assert torch.equal(augment(half, params=params, concat=True), wide)
    alone = augment(list(half), params=params, concat=True)
    torch.testing.assert_close(alone, wide, atol=1e-6, rtol=0)


def test_gradient_reaches_the_images(make_images):
    images = make_images(3, 24, 24).requires_grad_()
    augment = SimCLRAugment(16, blur=True)
    torch.cat(augment(images)).square().sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="backend 'cpu' cannot run here: it is not differentiable"):
        SimCLRAugment(16, backend="cpu")(images)
    with torch.no_grad():
        SimCLRAugment(16, backend="cpu")(images)


def test_which_backend_says_what_runs_and_why(make_images):
    images = make_images(2, 20, 20)
    assert SimCLRAugment(16).which_backend(images) == ("cpu", {})
    name, refusals = SimCLRAugment(16).which_backend(list(images.double()))
    assert name == "torch"
    assert refusals == {
        "cpu": "it takes uint8, float32 and half precision, got float64",
        "triton": "it takes one batch tensor, got a list of images",
    }
    named = SimCLRAugment(16, backend="cpu")
    assert named.which_backend(images) == ("cpu", {})
    with pytest.raises(ValueError, match="backend 'cpu' cannot run here: it takes uint8, float32"):
        named.which_backend(images.double())
    with pytest.raises(ValueError, match="images must have 3 channels"):
        named.which_backend(images[:, :2])


def test_autocast_changes_nothing(make_images):
    images = make_images(4, 40, 40, torch.uint8)
    for backend in ("cpu", "torch"):
        augment = SimCLRAugment(64, backend=backend)
        params = augment.draw(images)
        expected = augment(images, params=params, concat=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = augment(images, params=params, concat=True)
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)


def test_the_images_are_not_kept_alive(make_images):
    import weakref

    augment = SimCLRAugment(16)
    images = make_images(4, 20, 20)
    watch = weakref.ref(images)
    views = augment(images)
    del images
    assert watch() is None
    del views


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_continue_where_the_original_is(duplicate, make_images):
    images = make_images(4, 20, 20)
    augment = SimCLRAugment(16, generator=torch.Generator().manual_seed(1))
    augment(images)
    twin = duplicate(augment)
    assert all(map(torch.equal, twin(images), augment(images)))
    assert repr(twin) == repr(augment)
    plain = duplicate(SimCLRAugment(16))
    assert plain.generator is None


class Views(torch.utils.data.Dataset):
    def __init__(self):
        self.augment = SimCLRAugment(16)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.full((1, 3, 20, 20), index * 30, dtype=torch.uint8)
        return self.augment(image, concat=True), self.augment.draw(image)


def test_in_dataloader_workers():
    loader = torch.utils.data.DataLoader(Views(), batch_size=4, num_workers=2)
    views, params = zip(*loader, strict=True)
    assert torch.cat(views).shape == (8, 2, 3, 16, 16)
    assert torch.cat(params).unique(dim=0).shape[0] == 8


def test_fullgraph_compile(make_images):
    images = make_images(4, 24, 24)
    augment = SimCLRAugment(16, blur=True)
    params = augment.draw(images)
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(images, params=params, concat=True),
        augment(images, params=params, concat=True),
        atol=1e-5,
        rtol=0,
    )
    torch.manual_seed(0)
    first, second = compiled(images)
    assert first.shape == second.shape == (4, 3, 16, 16)
    assert not torch.equal(first, second)


def test_recipes():
    assert [SimCLRAugment(s).recipe.taps for s in (32, 63, 64, 96, 224)] == [0, 0, 7, 9, 23]
    assert IMAGENET.size == (224, 224)
    assert IMAGENET.color_ranges[0] == pytest.approx((0.2, 1.8))
    assert CIFAR.color_ranges[3] == pytest.approx((-0.1, 0.1))
    assert CIFAR.taps == 0
    assert SimCLRAugment(8, strength=2.0).recipe.color_ranges[1] == (0.0, 2.6)
    for make in (SimCLRAugment, lambda *_, **options: Recipe(**options)):
        with pytest.raises(TypeError, match="color"):
            make(8, color=1)


def test_options_replace_those_of_the_recipe():
    augment = SimCLRAugment(32, recipe=BYOL, strength=0.5, solarize=0.1)
    expected = dataclasses.replace(BYOL, size=32, strength=0.5, solarize=0.1)
    assert augment.recipe == expected
    assert expected.blur == BYOL.blur
    assert expected.color_ranges[3] == (-0.05, 0.05)
    assert dataclasses.replace(CIFAR, size=64, blur="auto").taps == 7, "decided by the new size"
    with pytest.raises(dataclasses.FrozenInstanceError):
        expected.strength = 1.0
    with pytest.raises(TypeError, match="recipe must be a Recipe, got str"):
        SimCLRAugment(32, recipe="cifar")


def test_the_signature_names_the_options_of_a_recipe():
    options = {f.name for f in dataclasses.fields(Recipe) if f.init}
    parameters = inspect.signature(SimCLRAugment).parameters
    own = {"recipe", "generator", "backend", "dtype", "memory_format", "check_values"}
    assert set(parameters) == options | own
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "size")

    class Fixed(SimCLRAugment):
        def __init__(self, size):
            super().__init__(size, recipe=CIFAR)

    assert list(inspect.signature(Fixed).parameters) == ["size"]


def test_byol_pair_is_asymmetric(make_images):
    augment = SimCLRAugment(64, recipe=BYOL)
    p = unpack(augment.draw(make_images(1, 64, 64).expand(4000, -1, -1, -1)))
    assert p.blur[0].mean() == 1
    assert p.blur[1].mean() == pytest.approx(0.1, abs=0.03)
    assert p.solarize[0].sum() == 0
    assert p.solarize[1].mean() == pytest.approx(0.2, abs=0.03)


def test_repr_tells_the_recipe():
    text = repr(
        SimCLRAugment(
            96,
            recipe=BYOL,
            kernel_size=9,
            normalize=IMAGENET_NORMALIZATION,
            dtype=torch.float16,
        )
    )
    for part in (
        "size=(96, 96)",
        "views=2",
        "blur=(1.0, 0.1)",
        "kernel_size=9",
        "solarize=(0.0, 0.2)",
        "colors=(0.4, 0.4, 0.2, 0.1)",
        "interpolation='bicubic'",
        "0.485",
        "torch.float16",
    ):
        assert part in text
    text = repr(SimCLRAugment(32, recipe=CIFAR))
    assert "size=(32, 32), strength=0.5, views=2, blur=0.0, dtype" in text


def test_views_follow_the_dtype_of_the_model_that_holds_the_augmentation():
    model = torch.nn.ModuleDict({"augment": SimCLRAugment(8), "encoder": torch.nn.Conv2d(3, 4, 3)})
    for cast, dtype in (
        (lambda: model.to(torch.bfloat16), torch.bfloat16),
        (lambda: model.to("cpu"), torch.bfloat16),
        (model.half, torch.float16),
        (lambda: model.double().to_empty(device="cpu"), torch.float64),
        (model.float, torch.float32),
    ):
        cast()
        (v1, _) = model["augment"](torch.rand(2, 3, 9, 9))
        assert v1.dtype == dtype
        assert model["encoder"](v1).dtype == dtype


def test_empty_batch():
    views = SimCLRAugment(16)(torch.empty(0, 3, 20, 20))
    assert [view.shape for view in views] == [(0, 3, 16, 16)] * 2


IMAGES = torch.rand(2, 3, 20, 20)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"size": 0}, ValueError, "size must be a positive int"),
        ({"size": (8, 8, 8)}, ValueError, "size must be a positive int"),
        ({"size": 8.0}, ValueError, "size must be a positive int"),
        ({"strength": -1}, ValueError, "strength must be finite and not negative, got -1"),
        ({"strength": float("nan")}, ValueError, "strength must be finite"),
        ({"strength": 3}, ValueError, "strength times the hue"),
        ({"views": 0}, ValueError, "views must be a positive int, got 0"),
        ({"views": True}, ValueError, "views must be a positive int, got True"),
        ({"size": (8, True)}, ValueError, "size must be a positive int"),
        ({"antialias": "no"}, TypeError, "antialias must be True or False, got 'no'"),
        ({"check_values": "no"}, TypeError, "check_values must be True or False, got 'no'"),
        ({"dtype": "float32"}, TypeError, "dtype must be floating: .* got float32"),
        ({"dtype": torch.float8_e5m2}, TypeError, "dtype must be floating: .* got torch.float8"),
        ({"blur": None}, TypeError, "blur must be a number, got None"),
        ({"solarize": None}, TypeError, "solarize must be a number, got None"),
        ({"solarize": "no"}, TypeError, "solarize must be a number, got 'no'"),
        ({"flip": True}, TypeError, "flip must be a number, got True"),
        ({"solarize": np.True_}, TypeError, "solarize must be a number, got "),
        ({"strength": 1 + 0j}, TypeError, "strength must be a number, got"),
        ({"views": 2.0}, ValueError, "views must be a positive int, got 2.0"),
        ({"views": "2"}, ValueError, "views must be a positive int, got '2'"),
        ({"blur": True, "kernel_size": (3, 5)}, ValueError, "kernel_size must be one for both"),
        ({"flip": "no"}, TypeError, "flip must be a number, got 'no'"),
        ({"flip": (0.5, 0.5)}, TypeError, r"flip must be a number, got \(0.5, 0.5\)"),
        ({"scale": 0.5}, TypeError, "scale must hold several numbers, got 0.5"),
        ({"scale": "ab"}, TypeError, "scale must hold several numbers, got 'ab'"),
        ({"scale": (0.5,)}, ValueError, r"scale must be a range \(low, high\)"),
        ({"strength": "1"}, TypeError, "strength must be a number, got '1'"),
        ({"colors": 0.4}, TypeError, "colors must hold several numbers, got 0.4"),
        ({"solarize_threshold": "1"}, TypeError, "solarize_threshold must be a number, got '1'"),
        ({"sigma": (1.0, torch.inf)}, ValueError, "sigma must be positive and finite"),
        ({"blur": True, "kernel_size": 3.0}, TypeError, "kernel_size must be an integer, got 3.0"),
        ({"normalize": 0.5}, ValueError, "normalize must be three means .* got 0.5"),
        ({"normalize": ((torch.nan, 0, 0), (1, 1, 1))}, ValueError, "normalize must be .*nan"),
        ({"normalize": ((0, 0, 0), (torch.inf, 1, 1))}, ValueError, "normalize must be .*inf"),
        ({"blur": "yes"}, ValueError, "blur must be a bool, 'auto' or a probability, got 'yes'"),
        ({"blur": 1.5}, ValueError, "blur must be a probability"),
        ({"blur": (0.1, 0.2, 0.3)}, ValueError, "blur must be one probability or one for each"),
        ({"blur": True, "kernel_size": 4}, ValueError, "kernel_size must be odd"),
        ({"blur": True, "kernel_size": 33}, ValueError, "kernel_size must be below 32"),
        ({"blur": True, "blur_padding": "x"}, ValueError, "padding must be 'reflect' or 'zeros'"),
        ({"normalize": ((0, 0, 0), (1, 0, 1))}, ValueError, "normalize must be three means"),
        ({"backend": "gpu"}, ValueError, "backend must be .* got 'gpu'"),
        ({"scale": (0.5, 0.1)}, ValueError, "scale must be a range"),
        ({"scale": (0.0, 1.0)}, ValueError, "scale must be positive"),
        ({"ratio": (0.0, 1.0)}, ValueError, "ratio must be positive"),
        ({"flip": 2}, ValueError, "flip must be a probability"),
        ({"sigma": (0.0, 1.0)}, ValueError, "sigma must be positive"),
        ({"colors": (1, 1, 1)}, ValueError, "colors must be four finite numbers"),
        ({"interpolation": "nearest"}, ValueError, "interpolation must be"),
        ({"contrast_mean": "x"}, ValueError, "contrast_mean must be"),
        ({"saturation_mode": "x"}, ValueError, "saturation_mode must be"),
        ({"solarize_threshold": 2}, ValueError, "solarize_threshold must be"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be floating"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format must be"),
    ],
)
def test_bad_settings(options, error, words):
    with pytest.raises(error, match=words):
        SimCLRAugment(**{"size": 16, **options})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda a: a(IMAGES[0, 0]), ValueError, r"images must be \(B, C, H, W\)"),
        (lambda a: a(IMAGES[None]), ValueError, r"videos .* images.flatten\(0, 1\)"),
        (lambda a: a(IMAGES[:, :1]), ValueError, "must have 3 channels.*images.expand"),
        (lambda a: a(IMAGES.repeat(1, 2, 1, 1)[:, :4]), ValueError, r"images\[:, :3\] leaves"),
        (lambda a: a(IMAGES.permute(0, 2, 3, 1)), ValueError, r"images.permute\(0, 3, 1, 2\)"),
        (lambda a: a(IMAGES.int()), TypeError, r"uint8 or floating.*images.to\(torch.uint8\)"),
        (lambda a: a(IMAGES.numpy()), ValueError, r"\(H, W, 3\) .*from_numpy\(images\).permute"),
        (lambda a: a(IMAGES[0].numpy()), ValueError, r"\(H, W, 3\) .*got \(3, 20, 20\)"),
        (lambda a: a([]), TypeError, "non-empty list"),
        (lambda a: a("photo.jpg"), TypeError, "a PIL image, .* got str"),
        (lambda a: a(["photo.jpg"]), ValueError, "one image each, .* got str"),
        (lambda a: a(Image.new("L", (9, 9))), ValueError, r"mode 'L'; image.convert\('RGB'\)"),
        (lambda a: a([IMAGES]), ValueError, r"images in a list must be one image each"),
        (lambda a: a([IMAGES[0], IMAGES[0].double()]), ValueError, "one dtype and one device"),
        (lambda a: a(IMAGES, params=torch.zeros(2, 2, 5)), ValueError, r"shape \(2, 2, 18\)"),
        (lambda a: a(IMAGES, params=[1]), ValueError, "got list"),
        (
            lambda a: a(IMAGES, params=a.draw(torch.rand(2, 3, 90, 90)) + 10),
            ValueError,
            "box must lie inside the image",
        ),
        (
            lambda a: a(list(IMAGES), params=a.draw(torch.rand(2, 3, 90, 90)) + 10),
            ValueError,
            "box must lie inside the image",
        ),
    ],
)
def test_bad_calls(call, error, words):
    with pytest.raises(error, match=words):
        call(SimCLRAugment(16))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("check_values", [None, True])
def test_range_check(check_values, value):
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    SimCLRAugment(16, check_values=False)(images)
    augment = SimCLRAugment(16, check_values=check_values)
    augment(IMAGES)
    augment((IMAGES * 255).byte())
    for given in (images, list(images)):
        with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
            augment(given)


@pytest.mark.parametrize("size", [16, 224])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "spoil", [lambda x: x * 255, lambda x: (x - 0.45) / 0.22, lambda x: x / 0], ids="umn"
)
def test_the_usual_slips_are_an_error_on_the_cpu(spoil, interpolation, size):
    augment = SimCLRAugment(size, interpolation=interpolation)
    spoiled = spoil(IMAGES.half().float())
    for images in (spoiled, spoiled.double(), list(spoiled), spoiled[0], spoiled.requires_grad_()):
        with pytest.raises(ValueError, match=r"divide 0\.\.\.255 by 255, leave it to normalize="):
            augment(images)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_floats_in_range_pass(interpolation):
    """What a resize in floats has rounded too."""
    augment = SimCLRAugment(40, interpolation=interpolation, antialias=False)
    augment((torch.rand(40, 3, 16, 16) > 0.5).float() * (1 + 1e-6))
    augment((torch.rand(40, 3, 16, 16) > 0.5).half())
    augment((torch.rand(4, 3, 16, 16) * 255).byte())
    augment(torch.empty(0, 3, 16, 16))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("size", "as_list"), [(32, False), (80, True)])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_the_defaults_of_torch_change_no_view(default, as_list, size, backend, make_images):
    """Drawn and made in float32 on the CPU, whatever the user's own tensors are by default."""
    images = make_images(6, 40, 44, torch.uint8)
    images = list(images) if as_list else images

    def views():
        augment = SimCLRAugment(
            size,
            blur=True,
            solarize=0.5,
            normalize=IMAGENET_NORMALIZATION,
            backend=backend,
            generator=torch.Generator().manual_seed(0),
        )
        views, params = augment(images, return_params=True, concat=True)
        return views, params, augment(images, params=params, concat=True)

    expected = views()
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(default)
        actual = views()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("columns", "value", "message"),
    [
        (slice(15, 16), 1, "params must have 0 in column 15, .* blur=0; got .* 6 of 6 views"),
        (slice(17, 18), 1, "params must have 0 in column 17, .* solarize=0; got .* 6 of 6 views"),
        (slice(6, 7), 9, r"params must hold each of 0, 1, 2 and 3 once .* got \[9.0"),
        (slice(6, 10), 1, r"params must hold each of 0, 1, 2 and 3 once"),
        (slice(8, 9), torch.nan, "params must be finite"),
        (slice(0, 1), 0.5, r"box must be whole numbers of pixels, got .*\[0.5, "),
    ],
)
def test_a_table_that_asks_for_the_impossible(columns, value, message, backend, make_images):
    """Neither left out in silence nor an error from within."""
    images = make_images(3, 20, 20)
    augment = SimCLRAugment(16, scale=(0.1, 0.3), jitter=1.0, grayscale=1.0, backend=backend)
    params = augment.draw(images)
    params[..., columns] = value
    with pytest.raises(ValueError, match=message):
        augment(images, params=params)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_table_of_zeros_but_for_the_crop(backend, make_images):
    """Views of one's own: where nothing is jittered no order is followed, nor need be given."""
    images = make_images(3, 20, 20)
    augment = SimCLRAugment(16, backend=backend)
    params = torch.zeros(2, 3, 18)
    params[..., 2:4] = 16
    for view in augment(images, params=params):
        torch.testing.assert_close(view, images[..., :16, :16], atol=1e-6, rtol=0)
    params[0, 0, 7] = 4
    with pytest.raises(ValueError, match="once in the columns of the order"):
        augment(images, params=params)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_table_whose_blur_has_no_width(backend, make_images):
    images = make_images(3, 20, 20)
    augment = SimCLRAugment(16, blur=1.0, backend=backend)
    params = augment.draw(images)
    params[1, 2, 16] = 0
    with pytest.raises(ValueError, match=r"positive sigma in column 16 .* got 0\.0"):
        augment(images, params=params)


def test_numbers_of_any_kind():
    """NumPy's and tensors make the recipe that floats make."""
    expected = repr(
        SimCLRAugment(
            32,
            scale=(0.5, 1.0),
            flip=0.25,
            blur=(0.25, 0.5),
            strength=0.5,
            colors=[1] * 4,
            kernel_size=3,
        )
    )
    for array in (np.array, torch.tensor):
        augment = SimCLRAugment(
            32,
            scale=array([0.5, 1.0]),
            flip=array(0.25),
            blur=array([0.25, 0.5]),
            strength=array(0.5),
            colors=array([1, 1, 1, 1]),
            kernel_size=np.int64(3),
        )
        assert repr(augment) == expected
    numpy = SimCLRAugment(
        np.int64(32), views=np.int32(3), blur=True, kernel_size=[np.int64(3), 3],
        interpolation=InterpolationMode.BICUBIC, strength=np.float32(0.5), flip=np.float16(0.5),
    )  # fmt: skip
    plain = SimCLRAugment(
        (32, 32), views=3, blur=True, kernel_size=3, interpolation="bicubic", strength=0.5
    )
    assert repr(numpy) == repr(plain)
    assert len(numpy(IMAGES)) == 3


def test_a_table_that_is_not_floating(make_images):
    images = make_images(3, 20, 20)
    augment = SimCLRAugment(16)
    with pytest.raises(TypeError, match=r"params must be floating, got torch.int64"):
        augment(images, params=augment.draw(images).long())


@pytest.mark.parametrize("flag", ["return_params", "concat"])
def test_a_flag_of_the_call_that_is_none(flag):
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got 'no'"):
        SimCLRAugment(16)(IMAGES, **{flag: "no"})
