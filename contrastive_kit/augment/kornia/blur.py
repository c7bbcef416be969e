"""Random Gaussian blur in Kornia's pipelines."""

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


class GaussianBlur(Intensity):
    """Blur samples, each with probability p and a width of its own.

    torchvision's ``GaussianBlur``: a normalised Gaussian, truncated to `kernel_size` taps, that
    sees the mirror image beyond the border.

    Args:
        kernel_size: Odd number of taps along each axis, or one for the height and one for the
            width, in Kornia's order (torchvision's is the other).
        sigma: Range of the standard deviation in pixels, or one number.
        p: Probability that a sample is blurred.
        same_on_batch: One width and one decision for all samples.
        keepdim: A single ``(C, H, W)`` image stays one.
        generator: Where the random numbers come from; the default CPU generator if None.

    Shape:
        ``(B, C, H, W)`` or ``(C, H, W)``, floating in [0, 1] or uint8, to ``(B, C, H, W)``. uint8
        becomes float32 in [0, 1]; floats keep their dtype.

    Raises:
        ValueError: If an argument is out of its range, or the images are too small to be mirrored.
        TypeError: If something is no number where one must be, or a flag not True or False.

    Example:
        >>> import torch
        >>> GaussianBlur(3, p=1.0)(torch.ones(1, 1, 4, 4)).allclose(torch.ones(1, 1, 4, 4))
        True
    """

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
        p = to_probability("p", p)
        functional.check_kernel(kernel_size, (), "zeros")
        ends = to_numbers("sigma", sigma) if several(sigma) else (to_number("sigma", sigma),) * 2
        if len(ends) != 2 or not 0 < ends[0] <= ends[1] < float("inf"):
            raise ValueError(
                f"sigma must be a positive number or a finite range of them, got {sigma}"
            )

        options = f"kernel_size={kernel_size}, sigma={ends}, p={p}"
        super().__init__(
            2, options, same_on_batch=same_on_batch, keepdim=keepdim, generator=generator
        )
        self.probability = p
        self.sigma = ends
        self.flags = {"kernel_size": kernel_size}

    def _from_uniforms(self, uniforms: Tensor, shape: tuple[int, ...]) -> Params:
        return {
            "apply": (uniforms[:, 0] < self.probability).float(),
            "sigma": uniform(uniforms[:, 1], self.sigma),
        }

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Blur the chosen samples."""
        return functional.gaussian_blur(
            input,
            beside(params["sigma"], input),
            kernel_size=flags["kernel_size"],
            apply=beside(params["apply"], input),
        )
