"""Every operation against torchvision's, image by image, with the same parameters."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2

from contrastive_kit.augment import functional as ck

FACTORS = torch.tensor([0.0, 0.3, 1.0, 1.7, 5.0])
SHIFTS = torch.tensor([-0.5, -0.37, -0.1, 0.0, 0.2, 1 / 3, 0.5])
ONE_OP = {
    "brightness": (ck.adjust_brightness, v1.adjust_brightness, FACTORS),
    "contrast": (ck.adjust_contrast, v1.adjust_contrast, FACTORS),
    "saturation": (ck.adjust_saturation, v1.adjust_saturation, FACTORS),
    "hue": (ck.adjust_hue, v1.adjust_hue, SHIFTS),
    "solarize": (ck.solarize, v1.solarize, torch.tensor([0.0, 0.4, 0.5, 1.0])),
}


def close(result, expected, atol=1e-5):
    torch.testing.assert_close(result, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 64)])
@pytest.mark.parametrize("name", ONE_OP)
def test_equals_torchvision(name, shape, make_images):
    ours, theirs, values = ONE_OP[name]
    images = make_images(len(values), *shape)
    expected = [theirs(x, float(v)) for x, v in zip(images, values, strict=True)]
    close(ours(images, values), torch.stack(expected))
    close(
        ours(images, float(values[1])), torch.stack([theirs(x, float(values[1])) for x in images])
    )


def test_the_comparison_notices_a_small_error(make_images):
    images = make_images(1, 8, 8)
    with pytest.raises(AssertionError):
        close(ck.adjust_hue(images, 0.1), v1.adjust_hue(images, 0.1001))


def test_hue_of_every_8_bit_color_on_a_grid():
    levels = torch.tensor([0, 1, 2, 63, 64, 127, 128, 200, 254, 255]) / 255
    colors = torch.tensor(list(itertools.product(levels.tolist(), repeat=3)))
    images = colors.T.reshape(1, 3, 10, 100)
    for shift in SHIFTS.tolist():
        close(ck.adjust_hue(images, shift), v1.adjust_hue(images, shift))


def test_grayscale_equals_torchvision_and_obeys_its_gate(make_images):
    images = make_images(3, 9, 6)
    close(ck.grayscale(images), v1.rgb_to_grayscale(images, 3))
    gated = ck.grayscale(images, apply=torch.tensor([0, 1, 0]))
    assert torch.equal(gated[0], images[0])
    assert not torch.equal(gated[1], images[1])


@pytest.mark.parametrize("size", [(9, 12), (33, 32)])
@pytest.mark.parametrize("kernel", [1, 3, 9, 17])
def test_blur_equals_torchvision(kernel, size, make_images):
    sigma = torch.tensor([0.1, 0.5, 1.3, 2.0, 6.0])
    images = make_images(len(sigma), *size)
    expected = [
        v1.gaussian_blur(x, [kernel] * 2, [float(s)] * 2)
        for x, s in zip(images, sigma, strict=True)
    ]
    close(ck.gaussian_blur(images, sigma, kernel_size=kernel), torch.stack(expected))


def test_blur_with_black_beyond_the_border(make_images):
    images = make_images(2, 10, 8)
    wide = torch.nn.functional.pad(images, (4, 4, 4, 4))
    expected = v1.gaussian_blur(wide, [7, 7], [1.5, 1.5])[:, :, 4:-4, 4:-4]
    close(ck.gaussian_blur(images, 1.5, kernel_size=7, padding="zeros"), expected)


def test_contrast_about_the_channel_mean(make_images):
    images = make_images(2, 6, 5, torch.float64)
    expected = torch.empty_like(images)
    for b, c in itertools.product(range(2), range(3)):
        mean = images[b, c].sum() / 30
        expected[b, c] = (mean + (images[b, c] - mean) * 1.5).clamp(0, 1)
    close(ck.adjust_contrast(images, 1.5, mean="channel"), expected, 1e-12)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.8])
def test_saturation_in_hsv(factor, make_images):
    from torchvision.transforms import _functional_tensor as internal

    images = make_images(2, 11, 7)
    hsv = internal._rgb2hsv(images)
    hsv[:, 1] = (hsv[:, 1] * factor).clamp(0, 1)
    close(ck.adjust_saturation(images, factor, mode="hsv"), internal._hsv2rgb(hsv))


def test_jitter_in_all_24_orders(make_images, torchvision_jitter):
    orders = torch.tensor(list(itertools.permutations(range(4))))
    images = make_images(24, 7, 9)
    factors = torch.rand(24, 4) * 1.6 + 0.2
    factors[:, 3] = torch.rand(24) - 0.5
    result = ck.color_jitter(images, orders, *factors.unbind(1))
    expected = [
        torchvision_jitter(x, o, f) for x, o, f in zip(images, orders, factors, strict=True)
    ]
    close(result, torch.stack(expected))


def test_jitter_gate_leaves_samples_alone(make_images):
    images = make_images(2, 5, 5)
    order = torch.tensor([[0, 1, 2, 3]]).expand(2, 4)
    result = ck.color_jitter(images, order, 0.5, 0.5, 0.5, 0.1, apply=torch.tensor([True, False]))
    assert not torch.equal(result[0], images[0])
    assert torch.equal(result[1], images[1])


BOXES = torch.tensor(
    [[0, 0, 37, 45], [5, 7, 1, 1], [36, 44, 1, 1], [3, 4, 20, 11], [0, 40, 37, 5], [10, 0, 2, 45]]
)


@pytest.mark.parametrize("route", [ck.crop_resize, "matmul"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 8), (37, 45), (64, 51), (1, 3)])
def test_crop_equals_torchvision(size, interpolation, antialias, route, make_images):
    mode = InterpolationMode(interpolation)
    flip = torch.tensor([0, 1, 0, 1, 1, 0])
    # Each axis of a uint8 crop is rounded: of weights in 15 bits there, of floats in a product.
    levels = 2 if route == "matmul" and interpolation == "bicubic" else 1
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-5), (torch.uint8, levels)):
        images = make_images(len(BOXES), 37, 45, dtype)
        if route == "matmul":
            result = ck.crop_matmul(images, BOXES, size, flip, interpolation, antialias)
        else:
            result = ck.crop_resize(
                images, BOXES, size, flip=flip, interpolation=interpolation, antialias=antialias
            )
        expected = []
        for image, box, mirrored in zip(images, BOXES.tolist(), flip, strict=True):
            crop = v2.resized_crop(image, *box, list(size), mode, antialias=antialias)
            expected.append(v1.hflip(crop) if mirrored else crop)
        assert result.dtype == dtype
        close(result.double(), torch.stack(expected).double(), atol)


@pytest.mark.parametrize("size", [(8, 8), (37, 45), (64, 51), (1, 3)])
def test_nearest_crop_copies_pixels(size, make_images):
    flip = torch.tensor([0, 1, 0, 1, 1, 0])
    for dtype in (torch.float32, torch.uint8):
        images = make_images(len(BOXES), 37, 45, dtype)
        result = ck.crop_resize(images, BOXES, size, flip=flip, interpolation="nearest")
        for i, (image, box) in enumerate(zip(images, BOXES.tolist(), strict=True)):
            crop = v2.resized_crop(image, *box, list(size), InterpolationMode.NEAREST_EXACT)
            assert torch.equal(result[i], v1.hflip(crop) if flip[i] else crop)


@pytest.mark.parametrize("target", [32, 96, 224])
def test_crop_at_the_usual_sizes(target, make_images):
    images = make_images(3, 256, 256)
    boxes = torch.tensor([[0, 0, 256, 256], [11, 100, 133, 90], [200, 3, 40, 53]])
    expected = [
        v2.resized_crop(x, *box, [target, target], InterpolationMode.BILINEAR, antialias=True)
        for x, box in zip(images, boxes.tolist(), strict=True)
    ]
    close(ck.crop_resize(images, boxes, target), torch.stack(expected))
    matmul = ck.crop_matmul(images, boxes, (target, target), None, "bilinear", True)
    close(matmul, torch.stack(expected))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_crops_one_pixel_wide(channels, dtype, interpolation, antialias):
    """The transpose of those one pixel high, which torch itself resizes rightly."""
    images = (torch.rand(2, channels, 19, 23, dtype=torch.float64) * 255).to(dtype)
    boxes = torch.tensor([[3, 2, 14, 20], [0, 5, 1, 18]])
    options = {"interpolation": interpolation, "antialias": antialias}
    for height in (1, 2, 7, 25):
        expected = [
            v2.resized_crop(
                image.mT.double(), left, top, wide, tall, [1, height],
                InterpolationMode(interpolation),
                antialias=antialias,
            ).mT
            for image, (top, left, tall, wide) in zip(images, boxes.tolist(), strict=True)
        ]  # fmt: skip
        result = ck.crop_resize(images, boxes, (height, 1), **options)
        # Levels are rounded and, where a bicubic overshoots, clamped after each axis.
        within = 1e-3 if dtype != torch.uint8 else 1.01 if interpolation == "bilinear" else 32
        close(result.double(), torch.stack(expected).double(), within)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_both_routes_of_the_crop_agree(data):
    height, width = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    tall, wide = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - tall)), data.draw(st.integers(0, width - wide))
    size = (data.draw(st.integers(1, 24)), data.draw(st.integers(2, 24)))
    interpolation, antialias = (
        data.draw(st.sampled_from(["bilinear", "bicubic"])),
        data.draw(st.booleans()),
    )
    images = torch.rand(1, 2, height, width, dtype=torch.float64)
    box = torch.tensor([[top, left, tall, wide]])
    flip = torch.tensor([data.draw(st.booleans())])
    each = ck.crop_resize(
        images, box, size, flip=flip, interpolation=interpolation, antialias=antialias
    )
    close(ck.crop_matmul(images, box, size, flip, interpolation, antialias), each)


SAMPLE = {
    "brightness": lambda x: ck.adjust_brightness(x, torch.tensor([0.6, 1.3])),
    "contrast": lambda x: ck.adjust_contrast(x, torch.tensor([0.6, 1.2])),
    "contrast, channel": lambda x: ck.adjust_contrast(x, 0.7, mean="channel"),
    "saturation": lambda x: ck.adjust_saturation(x, 0.7),
    "saturation, hsv": lambda x: ck.adjust_saturation(x, 0.7, mode="hsv"),
    "hue": lambda x: ck.adjust_hue(x, torch.tensor([0.11, -0.45])),
    "grayscale": lambda x: ck.grayscale(x, apply=torch.tensor([1, 0])),
    "solarize": ck.solarize,
    "blur": lambda x: ck.gaussian_blur(x, torch.tensor([0.5, 1.0]), kernel_size=3),
    "crop": lambda x: ck.crop_resize(x, torch.tensor([[0, 1, 3, 3], [1, 0, 3, 4]]), 5),
    "jitter": lambda x: ck.color_jitter(
        x, torch.tensor([[2, 3, 0, 1], [0, 3, 1, 2]]), 0.9, 0.8, 0.7, 0.1
    ),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_gradient(name):
    images = (0.3 + 0.4 * torch.rand(2, 3, 4, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(SAMPLE[name], images)


@pytest.mark.parametrize("name", SAMPLE)
def test_gradient_of_gray_pixels_is_finite(name):
    images = torch.full((2, 3, 4, 4), 0.4, requires_grad=True)
    SAMPLE[name](images).sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_narrow_types_are_computed_in_float32(name, dtype, make_images):
    images = make_images(2, 4, 4, dtype)
    before = images.clone()
    result = SAMPLE[name](images)
    assert torch.equal(images, before)
    if name == "crop" or dtype != torch.uint8:
        assert result.dtype == dtype
        wide = images.float()
    else:
        assert result.dtype == torch.float32
        wide = images.float() / 255
    if dtype == torch.uint8:
        close(result.float(), SAMPLE[name](wide), 1.0 if name == "crop" else 1e-6)
    else:
        assert torch.equal(result, SAMPLE[name](wide).to(dtype))


@pytest.mark.parametrize("name", SAMPLE)
def test_memory_formats_give_the_same(name, make_images):
    images = make_images(2, 4, 4)
    last = images.contiguous(memory_format=torch.channels_last)
    close(SAMPLE[name](last), SAMPLE[name](images), 1e-6)


@pytest.mark.parametrize("name", SAMPLE)
def test_compiles_without_a_graph_break(name, make_images):
    images = make_images(2, 4, 4)
    compiled = torch.compile(SAMPLE[name], fullgraph=True, backend="aot_eager")
    close(compiled(images), SAMPLE[name](images))


def test_values_stay_in_range(make_images):
    images = make_images(4, 16, 16)
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]])
    result = ck.color_jitter(images, order, 1.9, 3.0, 2.5, 0.5)
    # The hue alone is not clamped, neither here nor in torchvision: it may round one ulp beyond.
    assert result.min() >= -1e-6
    assert result.max() <= 1 + 1e-6


def test_empty_batch():
    images = torch.rand(0, 3, 4, 4)
    assert ck.crop_resize(images, torch.zeros(0, 4), 8).shape == (0, 3, 8, 8)
    assert ck.adjust_hue(images, torch.zeros(0)).shape == (0, 3, 4, 4)


RGB = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ck.adjust_hue([1], 0.1), TypeError, "images must be a tensor, got list"),
        (lambda: ck.adjust_hue(RGB[0], 0.1), ValueError, r"images must be \(B, C, H, W\)"),
        (lambda: ck.adjust_hue(RGB[:, :1], 0.1), ValueError, "images must have 3 channels"),
        (lambda: ck.adjust_hue(RGB.int(), 0.1), TypeError, "uint8 or floating, got torch.int32"),
        (lambda: ck.adjust_hue(RGB, 0.6), ValueError, "shift must be between -0.5 and 0.5"),
        (lambda: ck.adjust_hue(RGB, torch.zeros(3)), ValueError, r"shift must be .* got \(3,\)"),
        (lambda: ck.adjust_brightness(RGB, -1), ValueError, "factor must be between 0"),
        (lambda: ck.adjust_brightness(RGB, float("nan")), ValueError, "got nan"),
        (lambda: ck.adjust_contrast(RGB, 1.0, mean="x"), ValueError, "mean must be 'gray'"),
        (lambda: ck.adjust_saturation(RGB, 1.0, mode="x"), ValueError, "mode must be 'gray'"),
        (lambda: ck.solarize(RGB, 1.5), ValueError, "threshold must be between"),
        (lambda: ck.grayscale(RGB, apply=torch.ones(3)), ValueError, "apply must have shape"),
        (lambda: ck.gaussian_blur(RGB, 1.0, kernel_size=4), ValueError, "odd and positive"),
        (lambda: ck.gaussian_blur(RGB, 1.0, kernel_size=17), ValueError, "below 16"),
        (lambda: ck.gaussian_blur(RGB, 0.0, kernel_size=3), ValueError, "sigma must be between"),
        (
            lambda: ck.gaussian_blur(RGB, 1.0, kernel_size=3, padding="x"),
            ValueError,
            "padding must be 'reflect' or 'zeros'",
        ),
        (lambda: ck.crop_resize(RGB, torch.ones(1, 4), 4), ValueError, r"box must be \(2, 4\)"),
        (lambda: ck.crop_resize(RGB, torch.ones(2, 4), 0), ValueError, "size must be a positive"),
        (
            lambda: ck.crop_resize(RGB, torch.tensor([[0, 0, 8, 8], [1, 0, 8, 8]]), 4),
            ValueError,
            "inside the image, .* for sample 1",
        ),
        (
            lambda: ck.crop_resize(RGB, torch.ones(2, 4), 4, interpolation="lanczos"),
            ValueError,
            "'bilinear', 'bicubic' or 'nearest', got 'lanczos'",
        ),
        (
            lambda: ck.crop_resize(RGB, torch.ones(2, 4), 4, flip=torch.ones(1)),
            ValueError,
            r"flip must be \(2,\)",
        ),
        (
            lambda: ck.color_jitter(RGB, torch.ones(2, 3), 1, 1, 1, 0),
            ValueError,
            r"order must be \(2, 4\)",
        ),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()
