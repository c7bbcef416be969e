r"""Batched image operations with explicit parameters, one value per sample.

Each function equals torchvision's floating point operation applied image by image, to float32
rounding. None draws random numbers, waits for the GPU or modifies its input, and all can be
differentiated with respect to the images. Images are ``(B, C, H, W)``, floating in [0, 1] or uint8
in 0...255, in any memory format. `crop_resize` keeps uint8; every other function turns it into
float32 in [0, 1]. Half precision is computed in float32 and rounded once, at the end.

A parameter is one number for all samples, or a ``(B,)`` tensor on the device of the images.
"""

import math
from collections.abc import Sequence
from enum import Enum
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit.augment.parameters import several, to_number

Interpolation = Literal["bilinear", "bicubic", "nearest"]

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)


def check_images(images: object, channels: int | None = None) -> Tensor:
    """Return `images` if it is a batch of images, else raise an error that says what is wrong."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images must be (B, C, H, W) and not empty, got {tuple(images.shape)}")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be uint8 or floating, got {images.dtype}")
    if channels is not None and images.shape[1] != channels:
        raise ValueError(f"images must have {channels} channels, got {tuple(images.shape)}")
    return images


def _to_working(images: Tensor) -> Tensor:
    """Floats in [0, 1], at least float32."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.float() if images.dtype in (torch.float16, torch.bfloat16) else images


def _to_result(result: Tensor, images: Tensor) -> Tensor:
    return result.to(images.dtype) if images.is_floating_point() else result


def _per_sample(
    name: str, value: float | Tensor, images: Tensor, low: float, high: float = math.inf
) -> Tensor:
    """``(B, 1, 1, 1)``, or ``(1, 1, 1, 1)`` for a plain number, in the working precision."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        # Dynamo traces no more than this for the numbers that are usual.
        value = value if type(value) in (float, int) else to_number(name, value)
        if not low <= value <= high:
            raise ValueError(f"{name} must be between {low} and {high}, got {value}")
        return torch.full((1, 1, 1, 1), value, dtype=dtype, device=images.device)
    if value.ndim == 0 or value.shape == images.shape[:1]:
        return value.to(dtype).reshape(-1, 1, 1, 1)
    raise ValueError(
        f"{name} must be a number or a tensor of shape ({images.shape[0]},), "
        f"got {tuple(value.shape)}"
    )


def _gated(result: Tensor, images: Tensor, apply: Tensor | None) -> Tensor:
    if apply is None:
        return result
    if apply.shape != images.shape[:1]:
        raise ValueError(f"apply must have shape ({images.shape[0]},), got {tuple(apply.shape)}")
    return torch.where(apply.reshape(-1, 1, 1, 1) != 0, result, images)


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    gray = GRAY_WEIGHTS[0] * red + GRAY_WEIGHTS[1] * green + GRAY_WEIGHTS[2] * blue
    return gray.unsqueeze(1)


def adjust_brightness(images: Tensor, factor: float | Tensor) -> Tensor:
    """Multiply the images by a factor and clamp to [0, 1].

    Args:
        images: ``(B, C, H, W)``, floating in [0, 1] or uint8.
        factor: Not negative; 1 leaves the image alone, 0 is black.

    Returns:
        ``(B, C, H, W)``; float32 if `images` is uint8, else its dtype.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If a shape does not fit or a number is out of range.

    Example:
        >>> images = torch.tensor([0.25, 0.75]).expand(1, 3, 1, 2)
        >>> adjust_brightness(images, 2.0)[0, 0]
        tensor([[0.5000, 1.0000]])
    """
    check_images(images)
    factor = _per_sample("factor", factor, images, 0.0)
    return _to_result((_to_working(images) * factor).clamp(0, 1), images)


def adjust_contrast(
    images: Tensor, factor: float | Tensor, *, mean: Literal["gray", "channel"] = "gray"
) -> Tensor:
    """Move the images away from, or towards, their mean, and clamp to [0, 1].

    Args:
        images: ``(B, 3, H, W)``, floating in [0, 1] or uint8.
        factor: Not negative; 1 leaves the image alone, 0 makes it its mean.
        mean: The mean of the gray image (torchvision, PIL), or of each channel (TensorFlow).

    Returns:
        ``(B, 3, H, W)``; float32 if `images` is uint8, else its dtype.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If a shape does not fit or a number is out of range.

    Example:
        >>> images = torch.tensor([0.25, 0.75]).expand(1, 3, 1, 2)
        >>> adjust_contrast(images, 0.5)[0, 0]
        tensor([[0.3750, 0.6250]])
    """
    check_images(images, channels=3)
    factor = _per_sample("factor", factor, images, 0.0)
    return _to_result(_contrast(_to_working(images), factor, mean), images)


def _contrast(images: Tensor, factor: Tensor, mean: Literal["gray", "channel"]) -> Tensor:
    if mean not in ("gray", "channel"):
        raise ValueError(f"mean must be 'gray' or 'channel', got {mean!r}")
    centre = (_gray(images) if mean == "gray" else images).mean(dim=(2, 3), keepdim=True)
    return (factor * images + (1 - factor) * centre).clamp(0, 1)


def adjust_saturation(
    images: Tensor, factor: float | Tensor, *, mode: Literal["gray", "hsv"] = "gray"
) -> Tensor:
    """Move the images away from, or towards, their gray version, and clamp to [0, 1].

    Args:
        images: ``(B, 3, H, W)``, floating in [0, 1] or uint8.
        factor: Not negative; 1 leaves the image alone, 0 takes its colour away.
        mode: Blend with the gray image (torchvision, PIL), or scale S in HSV (TensorFlow).

    Returns:
        ``(B, 3, H, W)``; float32 if `images` is uint8, else its dtype.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If a shape does not fit or a number is out of range.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
        >>> adjust_saturation(red, 0.5).flatten()
        tensor([0.6495, 0.1495, 0.1495])
        >>> adjust_saturation(red, 0.5, mode="hsv").flatten()
        tensor([1.0000, 0.5000, 0.5000])
    """
    check_images(images, channels=3)
    factor = _per_sample("factor", factor, images, 0.0)
    return _to_result(_saturation(_to_working(images), factor, mode), images)


def _saturation(images: Tensor, factor: Tensor, mode: Literal["gray", "hsv"]) -> Tensor:
    if mode == "gray":
        return (factor * images + (1 - factor) * _gray(images)).clamp(0, 1)
    if mode != "hsv":
        raise ValueError(f"mode must be 'gray' or 'hsv', got {mode!r}")
    # V = max and S = (max - min) / max: x moves away from the maximum by the ratio of new S to old.
    brightest = images.amax(dim=1, keepdim=True)
    spread = brightest - images.amin(dim=1, keepdim=True)
    spread = spread.clamp(min=torch.finfo(images.dtype).tiny)
    return brightest - (brightest - images) * torch.minimum(factor, brightest / spread)


def adjust_hue(images: Tensor, shift: float | Tensor) -> Tensor:
    r"""Turn the hue, keeping value and saturation.

    The HSV rotation without a branch. With mx, mn the largest and smallest of a pixel's channels,
    d = mx − mn and the hue in sextants t = copysign(1 + (g + b − r − mn) / d, g − b) + 6·shift,

    .. math:: R = mn + d\,w(t),\quad G = mn + d\,w(t - 2),\quad B = mn + d\,w(t + 2),
              \qquad w(u) = \mathrm{clamp}(||u| - 3| - 1, 0, 1).

    Args:
        images: ``(B, 3, H, W)``, floating in [0, 1] or uint8.
        shift: In turns, between -0.5 and 0.5; 1/3 takes red to green.

    Returns:
        ``(B, 3, H, W)``; float32 if `images` is uint8, else its dtype.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If a shape does not fit or a number is out of range.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
        >>> adjust_hue(red, 1 / 3).flatten().round(decimals=4)
        tensor([0., 1., 0.])
    """
    check_images(images, channels=3)
    shift = _per_sample("shift", shift, images, -0.5, 0.5)
    return _to_result(_hue(_to_working(images), shift), images)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    red, green, blue = (channel.unsqueeze(1) for channel in images.unbind(1))
    lowest = images.amin(dim=1, keepdim=True)
    spread = images.amax(dim=1, keepdim=True) - lowest
    sextant = 1 + (green + blue - red - lowest) / spread.clamp(min=torch.finfo(images.dtype).tiny)
    hue = torch.copysign(sextant, green - blue) + 6 * shift
    hue = hue - 6 * (hue / 6).detach().round()
    shifted = torch.cat((hue, hue - 2, hue + 2), dim=1)
    return lowest + spread * (((shifted.abs() - 3).abs() - 1).clamp(0, 1))


def grayscale(images: Tensor, *, apply: Tensor | None = None) -> Tensor:
    """Take the colour away, keeping three equal channels.

    Args:
        images: ``(B, 3, H, W)``, floating in [0, 1] or uint8.
        apply: ``(B,)``; samples where it is zero are left alone. All are changed if None.

    Returns:
        ``(B, 3, H, W)``; float32 if `images` is uint8, else its dtype.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If a shape does not fit.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
        >>> grayscale(red).flatten()
        tensor([0.2989, 0.2989, 0.2989])
    """
    check_images(images, channels=3)
    working = _to_working(images)
    return _to_result(_gated(_gray(working).expand_as(working).clone(), working, apply), images)


def solarize(
    images: Tensor, threshold: float | Tensor = 0.5, *, apply: Tensor | None = None
) -> Tensor:
    """Invert what is at least as bright as the threshold.

    Args:
        images: ``(B, C, H, W)``, floating in [0, 1] or uint8.
        threshold: In [0, 1].
        apply: ``(B,)``; samples where it is zero are left alone. All are changed if None.

    Returns:
        ``(B, C, H, W)``; float32 if `images` is uint8, else its dtype.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If a shape does not fit or a number is out of range.

    Example:
        >>> images = torch.tensor([0.25, 0.75]).expand(1, 3, 1, 2)
        >>> solarize(images)[0, 0]
        tensor([[0.2500, 0.2500]])
    """
    check_images(images)
    threshold = _per_sample("threshold", threshold, images, 0.0, 1.0)
    working = _to_working(images)
    inverted = torch.where(working >= threshold, 1 - working, working)
    return _to_result(_gated(inverted, working, apply), images)


def color_jitter(
    images: Tensor,
    order: Tensor,
    brightness: float | Tensor,
    contrast: float | Tensor,
    saturation: float | Tensor,
    hue: float | Tensor,
    *,
    apply: Tensor | None = None,
    contrast_mean: Literal["gray", "channel"] = "gray",
    saturation_mode: Literal["gray", "hsv"] = "gray",
) -> Tensor:
    """Brightness, contrast, saturation and hue, in an order of its own for each sample.

    The images are clamped to [0, 1] after each operation. Every sample passes the same sequence of
    tensor operations, three steps before its hue and three after it, of which those that are not
    its own have the factor 1.

    Args:
        images: ``(B, 3, H, W)``, floating in [0, 1] or uint8.
        order: ``(B, 4)``, each row a permutation of 0 (brightness), 1 (contrast), 2 (saturation)
            and 3 (hue): the operation that comes first, second, third, last.
        brightness: Factor, not negative.
        contrast: Factor, not negative.
        saturation: Factor, not negative.
        hue: Shift in turns, between -0.5 and 0.5.
        apply: ``(B,)``; samples where it is zero are left alone. All are changed if None.
        contrast_mean: As in `adjust_contrast`.
        saturation_mode: As in `adjust_saturation`.

    Returns:
        ``(B, 3, H, W)``; float32 if `images` is uint8, else its dtype.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If a shape does not fit or a number is out of range.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> order = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]])
        >>> color_jitter(images, order, 1.2, 0.8, torch.tensor([0.5, 1.5]), 0.1).shape
        torch.Size([2, 3, 8, 8])
    """
    check_images(images, channels=3)
    if contrast_mean not in ("gray", "channel"):
        raise ValueError(f"contrast_mean must be 'gray' or 'channel', got {contrast_mean!r}")
    if saturation_mode not in ("gray", "hsv"):
        raise ValueError(f"saturation_mode must be 'gray' or 'hsv', got {saturation_mode!r}")
    if order.shape != (images.shape[0], 4):
        raise ValueError(f"order must be ({images.shape[0]}, 4), got {tuple(order.shape)}")
    working = _to_working(images)
    brightness = _per_sample("brightness", brightness, images, 0.0)
    contrast = _per_sample("contrast", contrast, images, 0.0)
    saturation = _per_sample("saturation", saturation, images, 0.0)
    hue = _per_sample("hue", hue, images, -0.5, 0.5)

    order = order.long()
    hue_place = (order == 3).to(torch.int8).argmax(dim=1, keepdim=True)
    neutral = torch.ones_like(hue)
    factors = [
        f.reshape(-1, 1).expand(len(images), 1) for f in (brightness, contrast, saturation, neutral)
    ]
    factor = torch.cat(factors, dim=1).gather(1, order)
    slot = torch.arange(4, device=images.device)
    x = working
    for slots, own in ((slice(0, 3), hue_place > slot), (slice(1, 4), hue_place < slot)):
        chosen = torch.where(own, factor, 1.0)[:, slots, None, None, None].unbind(1)
        kinds = order[:, slots, None, None, None].unbind(1)
        for f, kind in zip(chosen, kinds, strict=True):
            x = _step(x, f, kind, contrast_mean, saturation_mode)
        if slots.start == 0:
            x = _hue(x, hue)
    return _to_result(_gated(x, working, apply), images)


def _step(
    x: Tensor,
    factor: Tensor,
    kind: Tensor,
    contrast_mean: Literal["gray", "channel"],
    saturation_mode: Literal["gray", "hsv"],
) -> Tensor:
    """Brightness, contrast or saturation, whichever a sample's kind says, in the same operations.

    All three are f · x + (1 − f) · target: black, the mean, or the gray image.
    """
    gray = _gray(x)
    centre = (gray if contrast_mean == "gray" else x).mean(dim=(2, 3), keepdim=True)
    target = (kind == 1) * centre
    if saturation_mode == "gray":
        return (factor * x + (1 - factor) * (target + (kind == 2) * gray)).clamp(0, 1)
    linear = torch.where(kind == 2, 1.0, factor)
    x = (linear * x + (1 - linear) * target).clamp(0, 1)
    return _saturation(x, torch.where(kind == 2, factor, 1.0), "hsv")


def _blur_matrix(size: int, sigma: Tensor, radius: int, padding: str) -> Tensor:
    """The ``(B, size, size)`` matrices that blur along one axis."""
    sigma = sigma.reshape(-1, 1, 1)
    index = torch.arange(size, device=sigma.device)
    source, target = index, index[:, None]

    def weight(offset: Tensor) -> Tensor:
        return torch.exp(-0.5 * (offset / sigma) ** 2) * (offset.abs() <= radius)

    total = weight(torch.arange(-radius, radius + 1, device=sigma.device)).sum(-1, keepdim=True)
    result = weight(source - target)
    if padding == "reflect":
        last = size - 1
        result = result + weight(source + target) * (source > 0)
        result = result + weight(2 * last - source - target) * (source < last)
    return result / total


def gaussian_blur(
    images: Tensor,
    sigma: float | Tensor,
    *,
    kernel_size: int | Sequence[int],
    padding: Literal["reflect", "zeros"] = "reflect",
    apply: Tensor | None = None,
) -> Tensor:
    """Blur with a normalised, truncated Gaussian, one width per sample.

    Args:
        images: ``(B, C, H, W)``, floating in [0, 1] or uint8.
        sigma: Standard deviation in pixels, positive.
        kernel_size: Odd number of taps along each axis, or one for the height and one for the
            width.
        padding: What lies beyond the border: the mirror image, or black (TensorFlow's "SAME").
        apply: ``(B,)``; samples where it is zero are left alone. All are changed if None.

    Returns:
        ``(B, C, H, W)``; float32 if `images` is uint8, else its dtype.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If `kernel_size` is even, not positive, or reaches beyond the mirrored image,
            or if a shape does not fit or a number is out of range.

    Example:
        >>> images = torch.zeros(1, 3, 5, 5)
        >>> images[:, :, 2, 2] = 1
        >>> gaussian_blur(images, 1.0, kernel_size=3)[0, 0, 2]
        tensor([0.0000, 0.1238, 0.2042, 0.1238, 0.0000])
    """
    check_images(images)
    radius_y, radius_x = check_kernel(kernel_size, images.shape[-2:], padding)
    sigma = _per_sample("sigma", sigma, images, torch.finfo(torch.float32).tiny)
    working = _to_working(images)
    height, width = images.shape[-2:]
    rows = _blur_matrix(height, sigma, radius_y, padding)
    square = height == width and radius_y == radius_x
    columns = rows if square else _blur_matrix(width, sigma, radius_x, padding)
    with torch.autocast(images.device.type, enabled=False):
        result = rows[:, None] @ working @ columns[:, None].mT
    return _to_result(_gated(result, working, apply), images)


def check_kernel(
    kernel_size: int | Sequence[int], shape: Sequence[int], padding: str
) -> tuple[int, int]:
    """The radii, along height and width, of a blur kernel that fits the images, else an error."""
    pair: tuple[Any, ...] = (kernel_size, kernel_size)
    if several(kernel_size):
        pair = tuple(kernel_size)  # type: ignore[arg-type]
    if any(isinstance(taps, bool) or not isinstance(taps, Integral) for taps in pair):
        raise TypeError(f"kernel_size must be an integer, got {kernel_size!r}")
    if len(pair) != 2 or min(pair) < 1 or any(taps % 2 == 0 for taps in pair):
        raise ValueError(
            f"kernel_size must be odd and positive, for both axes or each, got {kernel_size}"
        )
    if padding not in ("reflect", "zeros"):
        raise ValueError(f"padding must be 'reflect' or 'zeros', got {padding!r}")
    radii = int(pair[0]) // 2, int(pair[1]) // 2
    for side, radius in zip(shape, radii, strict=False):
        if padding == "reflect" and radius >= side:
            raise ValueError(
                f"kernel_size must be below {2 * side} to mirror images of {tuple(shape)}, "
                f"got {kernel_size}"
            )
    return radii


def check_interpolation(interpolation: object) -> Literal["bilinear", "bicubic"]:
    """The name of an interpolation that images take, of torchvision's and Kornia's enums too."""
    name = interpolation.name if isinstance(interpolation, Enum) else interpolation
    name = name.lower() if isinstance(name, str) else name
    if name == "bilinear":
        return "bilinear"
    if name == "bicubic":
        return "bicubic"
    raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {interpolation!r}")


def crop_resize(
    images: Tensor,
    box: Tensor,
    size: int | tuple[int, int],
    *,
    flip: Tensor | None = None,
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
) -> Tensor:
    """Cut a box out of each image, resize it, and flip it horizontally where asked.

    Equal to torchvision's ``resized_crop`` and ``hflip``, image by image. Bicubic floats may leave
    [0, 1], as there. uint8 is resized across, rounded and clamped to whole grey levels, and then
    down, as in torchvision: equal to it on the CPU, and elsewhere to one grey level, in rare pixels
    two.

    On the CPU each image is resized by itself, reading no more than its box. On other devices,
    under ``torch.compile`` and for results one pixel wide, which torch (2.14) resizes wrongly, the
    resize is two batched matrix products whose banded matrices hold the interpolation weights,
    B · H_out · H + B · W_out · W floats.

    Args:
        images: ``(B, C, H, W)``, floating or uint8. In uint8 ``channels_last`` is 2-3 times faster
            on the CPU.
        box: ``(B, 4)``: top, left, height and width in pixels, whole numbers of any dtype.
        size: Height and width of the result, or both as one number.
        flip: ``(B,)``; samples where it is not zero are flipped horizontally.
        interpolation: "bilinear" or "bicubic", or "nearest" for masks: the pixel whose area holds
            the centre, torchvision's NEAREST_EXACT.
        antialias: Low-pass when shrinking. False aliases, as TensorFlow's SimCLR does. Without
            meaning for "nearest".

    Returns:
        ``(B, C, *size)`` in the dtype of `images`.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If a shape does not fit, a size is not positive or, on the CPU, a box is not
            inside its image or not of whole numbers.

    Example:
        >>> images = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> crop_resize(images, torch.tensor([[0, 0, 2, 2]]), 2, flip=torch.tensor([True]))
        tensor([[[[1., 0.],
                  [5., 4.]]]])
    """
    check_images(images)
    size = check_size(size)
    if interpolation not in ("bilinear", "bicubic", "nearest"):
        raise ValueError(
            f"interpolation must be 'bilinear', 'bicubic' or 'nearest', got {interpolation!r}"
        )
    if box.shape != (images.shape[0], 4):
        raise ValueError(f"box must be ({images.shape[0]}, 4), got {tuple(box.shape)}")
    if flip is not None and flip.shape != images.shape[:1]:
        raise ValueError(f"flip must be ({images.shape[0]},), got {tuple(flip.shape)}")
    in_eager_cpu = images.device.type == "cpu" and not torch.compiler.is_compiling()
    if in_eager_cpu:
        check_boxes(box, images.shape[-2], images.shape[-1])
    if interpolation == "nearest":
        return _crop_nearest(images, box, size, flip)
    if in_eager_cpu and can_interpolate(size):
        return _crop_each(images, box, size, flip, interpolation, antialias)
    return crop_matmul(images, box, size, flip, interpolation, antialias)


def check_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, both positive, else an error."""
    pair: tuple[Any, ...] = tuple(size) if several(size) else (size, size)  # type: ignore[arg-type]
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in pair)
    if len(pair) != 2 or not whole or min(pair) < 1:
        raise ValueError(f"size must be a positive int or two of them, got {size!r}")
    return int(pair[0]), int(pair[1])


def check_boxes(box: Tensor, height: int | Tensor, width: int | Tensor) -> None:
    """Raise unless boxes on the CPU are inside their images, and whole pixels."""
    top, left, tall, wide = box.unbind(-1)
    inside = (top >= 0) & (left >= 0) & (tall >= 1) & (wide >= 1)
    inside &= (top + tall <= height) & (left + wide <= width)
    if not bool(inside.all()):
        wrong = int((~inside).flatten().int().argmax())
        raise ValueError(
            f"box must lie inside the image, got (top, left, height, width) = "
            f"{box.reshape(-1, 4)[wrong].tolist()} for sample {wrong}"
        )
    # One way to crop would round them, the other would not.
    broken = (box != box.floor()).any(dim=-1)
    if bool(broken.any()):
        raise ValueError(
            "box must be whole numbers of pixels, got (top, left, height, width) = "
            f"{box[broken][0].tolist()}"
        )


def can_interpolate(size: tuple[int, int]) -> bool:
    """Whether torch's resize is right: to a width of 1 it repeats rows or stops (2.9 to 2.14)."""
    return size[1] > 1


def _crop_each(
    images: Tensor,
    box: Tensor,
    size: tuple[int, int],
    flip: Tensor | None,
    interpolation: Interpolation,
    antialias: bool,
) -> Tensor:
    narrow = images.dtype in (torch.float16, torch.bfloat16)
    source = images.float() if narrow else images
    mirrored = [False] * len(images) if flip is None else (flip != 0).tolist()
    rows = box.long().tolist()
    crops = []
    for image, (top, left, height, width), mirror in zip(source, rows, mirrored, strict=True):
        crop = image[None, :, top : top + height, left : left + width]
        crop = F.interpolate(crop, size, mode=interpolation, antialias=antialias)
        crops.append(crop.flip(-1) if mirror else crop)
    if not crops:
        return images.new_empty((0, images.shape[1], *size))
    return torch.cat(crops).to(images.dtype)


def _crop_nearest(
    images: Tensor, box: Tensor, size: tuple[int, int], flip: Tensor | None
) -> Tensor:
    top, left, height, width = box.float().unbind(-1)
    rows = _nearest_index(top, height, size[0], None)
    columns = _nearest_index(left, width, size[1], flip)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    picked = images[sample, :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1).contiguous()


def _nearest_index(start: Tensor, extent: Tensor, target: int, flip: Tensor | None) -> Tensor:
    """``(B, target)``: the source pixel that each pixel of the result copies."""
    index = _target_index(start, target, flip)
    offset = ((index + 0.5) * (extent / target)[:, None]).floor()
    return (start[:, None] + offset.minimum(extent[:, None] - 1)).long()


def _target_index(start: Tensor, target: int, flip: Tensor | None) -> Tensor:
    index = torch.arange(target, device=start.device, dtype=start.dtype)
    return index if flip is None else torch.where(flip[:, None] != 0, target - 1 - index, index)


def crop_matmul(
    images: Tensor,
    box: Tensor,
    size: tuple[int, int],
    flip: Tensor | None,
    interpolation: Interpolation,
    antialias: bool,
) -> Tensor:
    """`crop_resize` as two products with matrices of weights, without its checks."""
    source = images if images.dtype == torch.float64 else images.float()
    top, left, height, width = box.to(source.dtype).unbind(-1)
    rows = resize_matrix(top, height, images.shape[-2], size[0], None, interpolation, antialias)
    columns = resize_matrix(left, width, images.shape[-1], size[1], flip, interpolation, antialias)
    with torch.autocast(images.device.type, enabled=False):
        across = source @ columns[:, None].mT
        if images.dtype == torch.uint8:
            to_levels(across)
        result = rows[:, None] @ across
    if images.dtype == torch.uint8:
        to_levels(result)
    return result.to(images.dtype)


def to_levels(x: Tensor) -> None:
    """Round to whole grey levels, halves up as torch's resize of uint8 does; in place."""
    x.add_(0.5).floor_().clamp_(0, 255)


def resize_matrix(
    start: Tensor,
    extent: Tensor,
    source: int,
    target: int,
    flip: Tensor | None,
    interpolation: Interpolation,
    antialias: bool,
) -> Tensor:
    """``(B, target, source)``: the weight of each source pixel in each pixel of the result.

    The conventions are ATen's: half-pixel centres; with antialias the kernel is stretched by the
    shrink factor and renormalised at the border, without it the border pixel is repeated.
    """
    index = _target_index(start, target, flip)
    start, extent = start[:, None], extent[:, None]
    scale = extent / target
    centre = scale * (index + 0.5)
    pixel = torch.arange(source, device=start.device, dtype=start.dtype) - start
    if antialias:
        stretch = scale.clamp(min=1)[..., None]
        distance = ((pixel + 0.5)[:, None, :] - centre[:, :, None]) / stretch
        inside = ((pixel >= 0) & (pixel < extent)).to(pixel.dtype)
        weight = _kernel(distance.abs(), interpolation, -0.5) * inside[:, None, :]
        return weight / weight.sum(dim=-1, keepdim=True)
    position = centre - 0.5
    if interpolation == "bilinear":
        position = position.maximum(position.new_zeros(())).minimum(extent - 1)
    first = position.floor() - (0 if interpolation == "bilinear" else 1)
    weight = torch.zeros((), dtype=start.dtype, device=start.device)
    for tap in range(2 if interpolation == "bilinear" else 4):
        at = first + tap
        share = _kernel((at - position).abs(), interpolation, -0.75)
        at = at.maximum(at.new_zeros(())).minimum(extent - 1)
        weight = weight + share[..., None] * (at[..., None] == pixel[:, None, :])
    return weight


def _kernel(distance: Tensor, interpolation: Interpolation, a: float) -> Tensor:
    if interpolation == "bilinear":
        return (1 - distance).clamp(min=0)
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
