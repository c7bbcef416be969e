"""Random horizontal flips in Kornia's pipelines."""

from typing import Any

import torch
from torch import Tensor

from contrastive_kit.augment.kornia.base import Geometric, Params, beside
from contrastive_kit.augment.parameters import to_probability


class RandomHorizontalFlip(Geometric):
    """Flip samples horizontally, each with probability p.

    Args:
        p: Probability of the flip.
        same_on_batch: One decision for all samples.
        keepdim: A single ``(C, H, W)`` image stays one.
        generator: Where the random numbers come from; the default CPU generator if None.

    Shape:
        ``(B, C, H, W)`` or ``(C, H, W)``, floating or uint8, to ``(B, C, H, W)``. uint8 becomes
        float32 in [0, 1]; floats keep their dtype.

    Raises:
        ValueError: If p is not between 0 and 1.
        TypeError: If p is no number, or a flag not True or False.

    Example:
        >>> import torch
        >>> RandomHorizontalFlip(p=1.0)(torch.tensor([[[[0.0, 1.0]]]]))
        tensor([[[[1., 0.]]]])
    """

    def __init__(
        self,
        p: float = 0.5,
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

    def compute_transformation(
        self, input: Tensor, params: Params, flags: dict[str, Any]
    ) -> Tensor:
        """The matrices from source to result pixels."""
        flip = beside(params["apply"], input).to(input.dtype)
        matrix = torch.eye(3, dtype=input.dtype, device=input.device).repeat(len(flip), 1, 1)
        matrix[:, 0, 0] = 1 - 2 * flip
        matrix[:, 0, 2] = (input.shape[-1] - 1) * flip
        return matrix

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Flip the chosen samples."""
        return _flip(input, beside(params["apply"], input))

    def inverse_transform(
        self,
        input: Tensor,
        flags: dict[str, Any],
        transform: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Flip the same samples again."""
        if transform is None:
            raise ValueError("inverse needs the transform, got None")
        return _flip(input, transform[:, 0, 0] < 0)


def _flip(images: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, 1, 1, 1) != 0, images.flip(-1), images)
