"""Random colour jitter in Kornia's pipelines."""

import math
from typing import Any

import torch
from torch import Tensor

from contrastive_kit.augment import functional
from contrastive_kit.augment.kornia.base import (
    Intensity,
    Params,
    Range,
    beside,
    uniform,
)
from contrastive_kit.augment.parameters import several, to_number, to_numbers, to_probability


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

    Shape:
        ``(B, 3, H, W)`` or ``(3, H, W)``, floating in [0, 1] or uint8, to ``(B, 3, H, W)``. uint8
        becomes float32 in [0, 1]; floats keep their dtype.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If something is no number where one must be, or a flag not True or False.

    Example:
        >>> import torch
        >>> jitter = ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8)
        >>> jitter(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
        >>> jitter
        ColorJitter(brightness=(0.2, 1.8), contrast=(0.2, 1.8), saturation=(0.2, 1.8), hue=(-0.2, 0.2), p=0.8)
    """  # noqa: E501

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
        p = to_probability("p", p)
        ranges = {
            "brightness": _range("brightness", brightness, 1.0, 0.0, math.inf),
            "contrast": _range("contrast", contrast, 1.0, 0.0, math.inf),
            "saturation": _range("saturation", saturation, 1.0, 0.0, math.inf),
            "hue": _range("hue", hue, 0.0, -0.5, 0.5),
        }

        options = ", ".join(
            f"{name}=({low:.4g}, {high:.4g})" for name, (low, high) in ranges.items()
        )
        super().__init__(
            9,
            f"{options}, p={p}",
            same_on_batch=same_on_batch,
            keepdim=keepdim,
            generator=generator,
        )
        self.probability = p
        self.ranges = ranges

    def _from_uniforms(self, uniforms: Tensor, shape: tuple[int, ...]) -> Params:
        return {
            "apply": (uniforms[:, 0] < self.probability).float(),
            "order": uniforms[:, 1:5].argsort(dim=1),
            **{
                name: uniform(numbers, bounds)
                for (name, bounds), numbers in zip(
                    self.ranges.items(), uniforms[:, 5:].unbind(1), strict=True
                )
            },
        }

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Change the colours of the chosen samples."""
        names = ("order", "brightness", "contrast", "saturation", "hue", "apply")
        order, brightness, contrast, saturation, hue, apply = (
            beside(params[name], input) for name in names
        )
        return functional.color_jitter(
            input, order, brightness, contrast, saturation, hue, apply=apply
        )


def _range(name: str, value: float | Range, centre: float, low: float, high: float) -> Range:
    if several(value):
        ends = to_numbers(name, value)
    else:
        number = to_number(name, value)
        if not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}")
        ends = (max(low, centre - number) if name != "hue" else -number, centre + number)
    if len(ends) != 2 or not low <= ends[0] <= ends[1] <= high or math.isinf(ends[1]):
        raise ValueError(
            f"{name} must be a number or a finite range within {low} and {high}, got {value}"
        )
    return ends[0], ends[1]
