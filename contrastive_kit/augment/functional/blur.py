"""The Gaussian blur."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from contrastive_kit.augment.functional.images import checked, gated, per_sample, to_result
from contrastive_kit.augment.parameters import several


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
    """Blur with a normalized, truncated Gaussian, one width per sample.

    Args:
        images: ``(B, C, H, W)``, floating in [0, 1] or uint8.
        sigma: Standard deviation in pixels, positive.
        kernel_size: Odd number of taps along each axis, or one for the height and one for the
            width.
        padding: What lies beyond the border: the image reflected, or black (TensorFlow's "SAME").
        apply: ``(B,)``; samples where it is zero are left alone. All are changed if None.

    Returns:
        ``(B, C, H, W)``; float32 if `images` is uint8, else its dtype.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If `kernel_size` is even, not positive, or reaches beyond the reflected image,
            or if a shape does not fit or a number is out of range.

    Example:
        >>> images = torch.zeros(1, 3, 5, 5)
        >>> images[:, :, 2, 2] = 1
        >>> gaussian_blur(images, 1.0, kernel_size=3)[0, 0, 2]
        tensor([0.0000, 0.1238, 0.2042, 0.1238, 0.0000])
    """
    working = checked(images)
    radii = check_kernel(kernel_size, images.shape[-2:], padding)
    sigma = per_sample("sigma", sigma, images, torch.finfo(torch.float32).tiny)
    return to_result(gated(blur(working, sigma, radii, padding), working, apply), images)


def blur(images: Tensor, sigma: Tensor, radii: tuple[int, int], padding: str) -> Tensor:
    """`gaussian_blur` of all samples, without its checks; `sigma` has ``(B,)`` or one value."""
    (height, width), (radius_y, radius_x) = images.shape[-2:], radii
    rows = _blur_matrix(height, sigma, radius_y, padding)
    square = height == width and radius_y == radius_x
    columns = rows if square else _blur_matrix(width, sigma, radius_x, padding)
    with torch.autocast(images.device.type, enabled=False):
        return rows[:, None] @ images @ columns[:, None].mT


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
