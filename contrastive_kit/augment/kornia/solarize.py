"""Random solarization in Kornia's pipelines."""

from typing import Any

import torch
from torch import Tensor

from contrastive_kit.augment import functional
from contrastive_kit.augment.kornia.base import Intensity, Params, beside
from contrastive_kit.augment.parameters import to_number, to_probability


class RandomSolarize(Intensity):
    """Invert the bright pixels of samples, each with probability p.

    torchvision's ``RandomSolarize``: pixels at or above the threshold are inverted.

    Args:
        threshold: In [0, 1].
        p: Probability that a sample is solarized.
        same_on_batch: One decision for all samples.
        keepdim: A single ``(C, H, W)`` image stays one.
        generator: Where the random numbers come from; the default CPU generator if None.

    Shape:
        ``(B, C, H, W)`` or ``(C, H, W)``, floating in [0, 1] or uint8, to ``(B, C, H, W)``. uint8
        becomes float32 in [0, 1]; floats keep their dtype.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If something is no number where one must be, or a flag not True or False.

    Example:
        >>> import torch
        >>> RandomSolarize(p=1.0)(torch.tensor([[[[0.25, 0.75]]]]))
        tensor([[[[0.2500, 0.2500]]]])
    """

    def __init__(
        self,
        threshold: float = 0.5,
        *,
        p: float = 0.5,
        same_on_batch: bool = False,
        keepdim: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        p = to_probability("p", p)
        threshold = to_number("threshold", threshold)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        super().__init__(
            1,
            f"threshold={threshold}, p={p}",
            same_on_batch=same_on_batch,
            keepdim=keepdim,
            generator=generator,
        )
        self.probability = p
        self.flags = {"threshold": threshold}

    def _from_uniforms(self, uniforms: Tensor, shape: tuple[int, ...]) -> Params:
        return {"apply": (uniforms[:, 0] < self.probability).float()}

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Solarize the chosen samples."""
        return functional.solarize(input, flags["threshold"], apply=beside(params["apply"], input))
