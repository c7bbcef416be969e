"""Modules for Kornia's pipelines that change colors or sharpness and move no pixel."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from contrastive_kit.augment import functional
from contrastive_kit.augment.kornia.base import Intensity, Params, Range, uniform
from contrastive_kit.augment.parameters import several, to_number, to_numbers


class ColorJitter(Intensity):
    """Brightness, contrast, saturation and hue, in an order drawn for each sample.

    torchvision's ``ColorJitter``. A number x stands for the range (max(0, 1 − x), 1 + x), and for
    (−x, x) of the hue, in turns.

    Args:
        brightness: A number, or the range of the factor; not negative.
        contrast: A number, or the range of the factor; not negative.
        saturation: A number, or the range of the factor; not negative.
        hue: A number, or the range of the shift in turns, within -0.5 and 0.5.
        p: Probability that a sample is changed.
        same_on_batch: One set of factors, one order and one decision for all samples.
        keepdim: A single ``(3, H, W)`` image stays one.
        generator: Where the random numbers come from; the default CPU generator if None.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If something is no number where one must be, or a flag not True or False.

    Shape:
        ``(B, 3, H, W)`` or ``(3, H, W)``, floating in [0, 1] or uint8, to ``(B, 3, H, W)``. uint8
        becomes float32 in [0, 1]; floats keep their dtype.

    Example:
        >>> import torch
        >>> jitter = ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8)
        >>> jitter(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
        >>> jitter
        ColorJitter(brightness=(0.2, 1.8), contrast=(0.2, 1.8), saturation=(0.2, 1.8), hue=(-0.2, 0.2), p=0.8)
    """  # noqa: E501

    operation: ClassVar[Callable[..., Tensor]] = staticmethod(functional.color_jitter)
    drawn: ClassVar[tuple[str, ...]] = (
        "order",
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "apply",
    )

    def __init__(
        self,
        brightness: float | Range = 0.0,
        contrast: float | Range = 0.0,
        saturation: float | Range = 0.0,
        hue: float | Range = 0.0,
        *,
        p: float = 1.0,
        same_on_batch: bool = False,
        keepdim: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        ranges = {
            "brightness": _range("brightness", brightness, 1.0, 0.0, math.inf),
            "contrast": _range("contrast", contrast, 1.0, 0.0, math.inf),
            "saturation": _range("saturation", saturation, 1.0, 0.0, math.inf),
            "hue": _range("hue", hue, 0.0, -0.5, 0.5),
        }
        super().__init__(
            8,
            ", ".join(f"{name}=({low:.4g}, {high:.4g})" for name, (low, high) in ranges.items()),
            p=p,
            same_on_batch=same_on_batch,
            keepdim=keepdim,
            generator=generator,
        )
        self.ranges = ranges

    def draw(self, uniforms: Tensor, shape: tuple[int, ...]) -> Params:
        """The order and the factors."""
        columns = zip(self.ranges.items(), uniforms[:, 4:].unbind(1), strict=True)
        factors = {name: uniform(numbers, bounds) for (name, bounds), numbers in columns}
        return {"order": uniforms[:, :4].argsort(dim=1), **factors}


def _range(name: str, value: float | Range, center: float, low: float, high: float) -> Range:
    if several(value):
        ends = to_numbers(name, value)
    else:
        number = to_number(name, value)
        if not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}")
        ends = (max(low, center - number) if name != "hue" else -number, center + number)
    if len(ends) != 2 or not low <= ends[0] <= ends[1] <= high or math.isinf(ends[1]):
        raise ValueError(
            f"{name} must be a number or a finite range within {low} and {high}, got {value}"
        )
    return ends[0], ends[1]


class RandomGrayscale(Intensity):
    """Take the color of samples away, each with probability p, keeping three channels.

    torchvision's ``RandomGrayscale``, with its weights 0.2989, 0.587 and 0.114.

    Args:
        p: Probability that a sample loses its color.
        same_on_batch: One decision for all samples.
        keepdim: A single ``(3, H, W)`` image stays one.
        generator: Where the random numbers come from; the default CPU generator if None.

    Raises:
        ValueError: If p is not between 0 and 1.
        TypeError: If p is no number, or a flag not True or False.

    Shape:
        ``(B, 3, H, W)`` or ``(3, H, W)``, floating in [0, 1] or uint8, to ``(B, 3, H, W)``. uint8
        becomes float32 in [0, 1]; floats keep their dtype.

    Example:
        >>> import torch
        >>> RandomGrayscale(p=1.0)(torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)).flatten()
        tensor([0.2989, 0.2989, 0.2989])
    """

    operation: ClassVar[Callable[..., Tensor]] = staticmethod(functional.grayscale)

    def __init__(
        self,
        p: float = 0.1,
        *,
        same_on_batch: bool = False,
        keepdim: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            0,
            "",
            p=p,
            same_on_batch=same_on_batch,
            keepdim=keepdim,
            generator=generator,
        )


class GaussianBlur(Intensity):
    """Blur samples, each with probability p and a width of its own.

    torchvision's ``GaussianBlur``: a normalized Gaussian, truncated to `kernel_size` taps, that
    sees the reflected image beyond the border.

    Args:
        kernel_size: Odd number of taps along each axis, or one for the height and one for the
            width, in Kornia's order (torchvision's is the other).
        sigma: Range of the standard deviation in pixels, or one number.
        p: Probability that a sample is blurred.
        same_on_batch: One width and one decision for all samples.
        keepdim: A single ``(C, H, W)`` image stays one.
        generator: Where the random numbers come from; the default CPU generator if None.

    Raises:
        ValueError: If an argument is out of its range, or the images are too small to be reflected.
        TypeError: If something is no number where one must be, or a flag not True or False.

    Shape:
        ``(B, C, H, W)`` or ``(C, H, W)``, floating in [0, 1] or uint8, to ``(B, C, H, W)``. uint8
        becomes float32 in [0, 1]; floats keep their dtype.

    Example:
        >>> import torch
        >>> GaussianBlur(3, p=1.0)(torch.ones(1, 1, 4, 4)).allclose(torch.ones(1, 1, 4, 4))
        True
    """

    operation: ClassVar[Callable[..., Tensor]] = staticmethod(functional.gaussian_blur)
    drawn: ClassVar[tuple[str, ...]] = ("sigma", "apply")

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        sigma: float | Range = (0.1, 2.0),
        *,
        p: float = 0.5,
        same_on_batch: bool = False,
        keepdim: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        functional.check_kernel(kernel_size, (), "zeros")
        ends = to_numbers("sigma", sigma) if several(sigma) else (to_number("sigma", sigma),) * 2
        if len(ends) != 2 or not 0 < ends[0] <= ends[1] < math.inf:
            raise ValueError(
                f"sigma must be a positive number or a finite range of them, got {sigma}"
            )
        super().__init__(
            1,
            f"kernel_size={kernel_size}, sigma={ends}",
            p=p,
            same_on_batch=same_on_batch,
            keepdim=keepdim,
            generator=generator,
        )
        self.sigma = ends
        self.flags: dict[str, Any] = {"kernel_size": kernel_size}

    def draw(self, uniforms: Tensor, shape: tuple[int, ...]) -> Params:
        """The widths."""
        return {"sigma": uniform(uniforms[:, 0], self.sigma)}


class RandomSolarize(Intensity):
    """Invert the bright pixels of samples, each with probability p.

    torchvision's ``RandomSolarize``: pixels at or above the threshold are inverted.

    Args:
        threshold: In [0, 1].
        p: Probability that a sample is solarized.
        same_on_batch: One decision for all samples.
        keepdim: A single ``(C, H, W)`` image stays one.
        generator: Where the random numbers come from; the default CPU generator if None.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If something is no number where one must be, or a flag not True or False.

    Shape:
        ``(B, C, H, W)`` or ``(C, H, W)``, floating in [0, 1] or uint8, to ``(B, C, H, W)``. uint8
        becomes float32 in [0, 1]; floats keep their dtype.

    Example:
        >>> import torch
        >>> RandomSolarize(p=1.0)(torch.tensor([[[[0.25, 0.75]]]]))
        tensor([[[[0.2500, 0.2500]]]])
    """

    operation: ClassVar[Callable[..., Tensor]] = staticmethod(functional.solarize)

    def __init__(
        self,
        threshold: float = 0.5,
        *,
        p: float = 0.5,
        same_on_batch: bool = False,
        keepdim: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        threshold = to_number("threshold", threshold)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        super().__init__(
            0,
            f"threshold={threshold}",
            p=p,
            same_on_batch=same_on_batch,
            keepdim=keepdim,
            generator=generator,
        )
        self.flags: dict[str, Any] = {"threshold": threshold}
