"""The color operations: brightness, contrast, saturation, hue, grayscale, solarization."""

from typing import Literal

import torch
from torch import Tensor

from contrastive_kit.augment.functional.images import checked, gated, per_sample, to_result
from contrastive_kit.augment.parameters import CONTRAST, HUE, SATURATION

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)


def gray(images: Tensor) -> Tensor:
    """``(B, 1, H, W)``: the weighted sum of the channels."""
    red, green, blue = images.unbind(1)
    luma = GRAY_WEIGHTS[0] * red + GRAY_WEIGHTS[1] * green + GRAY_WEIGHTS[2] * blue
    return luma[:, None]


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
    working = checked(images)
    factor = per_sample("factor", factor, images, 0.0)
    return to_result((working * factor).clamp(0, 1), images)


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
    working = checked(images, channels=3)
    factor = per_sample("factor", factor, images, 0.0)
    if mean not in ("gray", "channel"):
        raise ValueError(f"mean must be 'gray' or 'channel', got {mean!r}")
    center = (gray(working) if mean == "gray" else working).mean(dim=(2, 3), keepdim=True)
    return to_result((factor * working + (1 - factor) * center).clamp(0, 1), images)


def adjust_saturation(
    images: Tensor, factor: float | Tensor, *, mode: Literal["gray", "hsv"] = "gray"
) -> Tensor:
    """Move the images away from, or towards, their gray version, and clamp to [0, 1].

    Args:
        images: ``(B, 3, H, W)``, floating in [0, 1] or uint8.
        factor: Not negative; 1 leaves the image alone, 0 takes its color away.
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
    working = checked(images, channels=3)
    factor = per_sample("factor", factor, images, 0.0)
    if mode not in ("gray", "hsv"):
        raise ValueError(f"mode must be 'gray' or 'hsv', got {mode!r}")
    if mode == "hsv":
        return to_result(_scale_saturation(working, factor), images)
    return to_result((factor * working + (1 - factor) * gray(working)).clamp(0, 1), images)


def _scale_saturation(images: Tensor, factor: Tensor) -> Tensor:
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
    working = checked(images, channels=3)
    shift = per_sample("shift", shift, images, -0.5, 0.5)
    return to_result(_hue(working, shift), images)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    red, green, blue = torch.split(images, 1, dim=1)
    lowest = images.amin(dim=1, keepdim=True)
    spread = images.amax(dim=1, keepdim=True) - lowest
    sextant = 1 + (green + blue - red - lowest) / spread.clamp(min=torch.finfo(images.dtype).tiny)
    hue = torch.copysign(sextant, green - blue) + 6 * shift
    hue = hue - 6 * (hue / 6).detach().round()
    shifted = torch.cat((hue, hue - 2, hue + 2), dim=1)
    return lowest + spread * (((shifted.abs() - 3).abs() - 1).clamp(0, 1))


def grayscale(images: Tensor, *, apply: Tensor | None = None) -> Tensor:
    """Take the color away, keeping three equal channels.

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
    working = checked(images, channels=3)
    result = gray(working).expand_as(working).clone()
    return to_result(gated(result, working, apply), images)


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
    working = checked(images)
    threshold = per_sample("threshold", threshold, images, 0.0, 1.0)
    return to_result(gated(invert(working, threshold), working, apply), images)


def invert(images: Tensor, threshold: float | Tensor) -> Tensor:
    """`solarize` all samples, without its checks."""
    return torch.where(images >= threshold, 1 - images, images)


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
    working = checked(images, channels=3)
    if contrast_mean not in ("gray", "channel"):
        raise ValueError(f"contrast_mean must be 'gray' or 'channel', got {contrast_mean!r}")
    if saturation_mode not in ("gray", "hsv"):
        raise ValueError(f"saturation_mode must be 'gray' or 'hsv', got {saturation_mode!r}")
    if order.shape != (images.shape[0], 4):
        raise ValueError(f"order must be ({images.shape[0]}, 4), got {tuple(order.shape)}")
    columns = (
        per_sample("brightness", brightness, images, 0.0),
        per_sample("contrast", contrast, images, 0.0),
        per_sample("saturation", saturation, images, 0.0),
        per_sample("hue", hue, images, -0.5, 0.5),
    )
    factors = torch.cat([c.reshape(-1, 1).expand(len(images), 1) for c in columns], dim=1)
    result = jitter(working, order, factors, contrast_mean, saturation_mode)
    return to_result(gated(result, working, apply), images)


def jitter(
    x: Tensor,
    order: Tensor,
    factors: Tensor,
    contrast_mean: Literal["gray", "channel"],
    saturation_mode: Literal["gray", "hsv"],
) -> Tensor:
    """`color_jitter` of all samples, without its checks; ``(B, 4)`` `factors`, the hue's last."""
    order = order.long()
    hue_place = (order == HUE).to(torch.int8).argmax(dim=1, keepdim=True)
    factor, slot = factors.gather(1, order), torch.arange(4, device=x.device)
    before, after = (torch.where(own, factor, 1.0) for own in (hue_place > slot, hue_place < slot))
    steps = [(before, 0), (before, 1), (before, 2), (after, 1), (after, 2), (after, 3)]
    for number, (own, place) in enumerate(steps):
        if number == 3:
            x = _hue(x, factors[:, HUE, None, None, None])
        f, operation = (column[:, place, None, None, None] for column in (own, order))
        x = _adjust(x, f, operation, contrast_mean, saturation_mode)
    return x


def _adjust(
    x: Tensor,
    factor: Tensor,
    operation: Tensor,
    contrast_mean: Literal["gray", "channel"],
    saturation_mode: Literal["gray", "hsv"],
) -> Tensor:
    """Brightness, contrast or saturation, whichever is a sample's own, in the same operations.

    All three are f · x + (1 − f) · target: black, the mean, or the gray image.
    """
    luma = gray(x)
    center = (luma if contrast_mean == "gray" else x).mean(dim=(2, 3), keepdim=True)
    target, saturates = (operation == CONTRAST) * center, operation == SATURATION
    if saturation_mode == "gray":
        return (factor * x + (1 - factor) * (target + saturates * luma)).clamp(0, 1)
    linear = torch.where(saturates, 1.0, factor)
    x = (linear * x + (1 - linear) * target).clamp(0, 1)
    return _scale_saturation(x, torch.where(saturates, factor, 1.0))
