"""Random loss of colour in Kornia's pipelines."""

from typing import Any

import torch
from torch import Tensor

from contrastive_kit.augment import functional
from contrastive_kit.augment.kornia.base import Intensity, Params, beside
from contrastive_kit.augment.parameters import to_probability


class RandomGrayscale(Intensity):
    """Take the colour of samples away, each with probability p, keeping three channels.

    torchvision's ``RandomGrayscale``, with its weights 0.2989, 0.587 and 0.114.

    Args:
        p: Probability that a sample loses its colour.
        same_on_batch: One decision for all samples.
        keepdim: A single ``(3, H, W)`` image stays one.
        generator: Where the random numbers come from; the default CPU generator if None.

    Shape:
        ``(B, 3, H, W)`` or ``(3, H, W)``, floating in [0, 1] or uint8, to ``(B, 3, H, W)``. uint8
        becomes float32 in [0, 1]; floats keep their dtype.

    Raises:
        ValueError: If p is not between 0 and 1.
        TypeError: If p is no number, or a flag not True or False.

    Example:
        >>> import torch
        >>> RandomGrayscale(p=1.0)(torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)).flatten()
        tensor([0.2989, 0.2989, 0.2989])
    """

    def __init__(
        self,
        p: float = 0.1,
        *,
        same_on_batch: bool = False,
        keepdim: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        p = to_probability("p", p)
        super().__init__(
            1, f"p={p}", same_on_batch=same_on_batch, keepdim=keepdim, generator=generator
        )
        self.probability = p

    def _from_uniforms(self, uniforms: Tensor, shape: tuple[int, ...]) -> Params:
        return {"apply": (uniforms[:, 0] < self.probability).float()}

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Take the colour of the chosen samples away."""
        return functional.grayscale(input, apply=beside(params["apply"], input))
