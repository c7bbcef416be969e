"""The logsumexp over the columns of the same class: what other rules leave out, and nothing else.

The kernels of ``tiled`` with the opposite rule, registered beside the backends so that the ops and
their gradient are shared.
"""

import torch
from torch import Tensor

from contrastive_kit.ops import _tiled
from contrastive_kit.ops._exclusion import Exclusion
from contrastive_kit.ops._registered import _KERNELS, registered_logsumexp

_NAME = "tiled, same class only"


def same_class_logsumexp(
    q: Tensor,
    k: Tensor | None,
    row_ids: Tensor,
    column_ids: Tensor | None,
    n_ids: int,
    bound: float = torch.inf,
) -> Tensor:
    """Logsumexp over those columns of each row that share its class, but not its id, (R,).

    A row without any has logsumexp -inf and a zero gradient. Memory: a few tiles.

    Args:
        q: rows (R, D), float32 or float64.
        k: columns (C, D) of the same dtype, or None for ``k = q``.
        row_ids: int64 (R,), ``class · n_ids + id`` of the row.
        column_ids: the same of the columns, (C,), or None for ``k = q``.
        n_ids: more than the largest id.
        bound: a number that no logit exceeds in magnitude, if one is known.
    """
    rule = Exclusion(n_ids, row_ids, column_ids)
    return registered_logsumexp(q, k, rule, False, bound, False, _NAME)[0]


class _SameClass(Exclusion):
    """Leaves out what is of another class or of the same id; ``period`` is the number of ids."""

    def fill_(self, tile: Tensor, value: float, top: int, left: int) -> None:
        height, width = tile.shape
        assert self.row_ids is not None
        column_ids = self.row_ids if self.column_ids is None else self.column_ids
        row, column = self.row_ids[top : top + height, None], column_ids[left : left + width]
        left_out = row // self.period != column // self.period
        tile.masked_fill_(left_out.logical_or_(row == column), value)


class _SameClassKernels:
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor | None,
        exclusion: Exclusion,
        both: bool,
        bound: float,
        statistics: bool,
        saved_tiles: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _tiled.forward(q, k, _SameClass(*exclusion), both, bound, statistics, saved_tiles)

    @staticmethod
    def backward(
        grad: Tensor,
        lse: Tensor,
        lost: Tensor,
        saved_tiles: Tensor,
        q: Tensor,
        k: Tensor | None,
        exclusion: Exclusion,
        both: bool,
        bound: float,
        needs_grad: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        return _tiled.backward(
            grad, lse, lost, saved_tiles, q, k, _SameClass(*exclusion), both, bound, needs_grad
        )


_KERNELS[_NAME] = _SameClassKernels
