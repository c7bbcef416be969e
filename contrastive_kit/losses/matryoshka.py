"""Matryoshka representation learning: a loss on prefixes of the embeddings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from contrastive_kit._checks import check_int, check_number
from contrastive_kit.losses.distillation import SimilarityDistillation

# What losses take as keywords and is as wide as the embeddings.
_AS_WIDE = ("negatives", "keys")


class Matryoshka(nn.Module):
    """Any loss on the first d numbers of the embeddings, summed over several d: equation (31).

    Embeddings learned so can be cut to any of these widths, and a search can begin with short ones.
    The loss normalizes each prefix by itself. It is called once for each width: time and memory are
    the sum of those calls.

    Args:
        loss_fn: a loss of this library, or a module that is called in the same way. A learnable
            temperature is shared by all widths.
        dims: the widths, each at least 1 and at most that of the embeddings.
        weights: what the loss of each width is multiplied by, at least 0; 1 each if None.

    Raises:
        TypeError: for a loss that is no module, a width that is no integer, a weight that is no
            number.
        ValueError: for no width, one that is given twice or out of range, as many weights as there
            are not widths, a negative weight.

    References:
        Kusupati et al., Matryoshka Representation Learning, arXiv 2205.13147, equation 1.

    Example:
        >>> import torch
        >>> from contrastive_kit import Matryoshka, NTXent
        >>> loss_fn = Matryoshka(NTXent(0.1), dims=(128, 64, 32))
        >>> z1, z2 = torch.randn(2, 8, 128).unbind(0)
        >>> expected = sum(NTXent(0.1)(z1[:, :d], z2[:, :d]) for d in (128, 64, 32))
        >>> torch.equal(loss_fn(z1, z2), expected)
        True
    """

    def __init__(
        self, loss_fn: nn.Module, dims: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(loss_fn, nn.Module):
            raise TypeError(f"loss_fn must be a module, NTXent() for one, got {loss_fn!r}")
        self.loss_fn = loss_fn
        self.dims: tuple[int, ...] = tuple(check_int("dims", d, at_least=1) for d in dims)
        if not self.dims or len(set(self.dims)) < len(self.dims):
            raise ValueError(f"dims must be different widths, at least one, got {self.dims}")
        given = [1.0] * len(self.dims) if weights is None else weights
        self.weights: tuple[float, ...] = tuple(check_number("weights", w) for w in given)
        if len(self.weights) != len(self.dims) or not all(w >= 0 for w in self.weights):
            raise ValueError(
                f"weights must be {len(self.dims)} numbers of at least 0, one for each width, got "
                f"{self.weights}"
            )

    def forward(self, *embeddings: Tensor | None, **inputs: Any) -> Tensor:
        """The sum over the widths.

        Args:
            *embeddings: what ``loss_fn`` takes by position, (…, D); each is cut.
            **inputs: what it takes by keyword. ``negatives`` and ``keys`` are cut too, the rest is
                handed on: so are the embeddings of a teacher, which keep their width.

        Returns:
            What the loss returns, of its ``reduction``.

        Raises:
            ValueError: for a width beyond that of the embeddings, ``return_stats``, or a teacher
                that is given by position.
        """
        if inputs.get("return_stats"):
            raise ValueError(
                "return_stats must be False, as statistics are those of one width: call "
                "loss_fn.loss_fn(z1[:, :d], z2[:, :d], return_stats=True)"
            )
        if isinstance(self.loss_fn, SimilarityDistillation) and len(embeddings) > 2:
            raise ValueError(
                "teacher_query and teacher_key must be given by keyword, as what is given by "
                f"position is cut; got {len(embeddings)} by position"
            )
        cut = {name: inputs.pop(name) for name in _AS_WIDE if inputs.get(name) is not None}
        widths = [x.shape[-1] for x in (*embeddings, *cut.values()) if x is not None]
        if widths and max(self.dims) > min(widths):
            raise ValueError(
                f"dims must be at most the width of the embeddings, {min(widths)}, got {self.dims}"
            )
        total: Tensor | None = None
        for d, weight in zip(self.dims, self.weights, strict=True):
            prefixes = [None if x is None else x[..., :d] for x in embeddings]
            wide = {name: x[..., :d] for name, x in cut.items()}
            loss: Tensor = weight * self.loss_fn(*prefixes, **wide, **inputs)
            total = loss if total is None else total + loss
        assert total is not None
        return total

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        """The widths, and the weights where they are not 1."""
        weights = "" if set(self.weights) == {1.0} else f", weights={self.weights}"
        return f"dims={self.dims}{weights}"
