"""Per-row figures of the kept logits beside their logsumexp, for diagnostics."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LogitStatistics(NamedTuple):
    """Figures of the kept logits of a row, each (R,) and detached; neutral where it keeps none.

    Attributes:
        logsumexp: of the logits, -inf for an empty row.
        maximum: the largest logit, -inf for an empty row.
        expected: the mean logit under the softmax of the row, 0 for an empty row.
        total: the sum of the logits.
        kept: how many logits are kept.
    """

    logsumexp: Tensor
    maximum: Tensor
    expected: Tensor
    total: Tensor
    kept: Tensor


def row_statistics(logits: Tensor, lse: Tensor, dim: int) -> Tensor:
    """The fields of ``LogitStatistics`` after the first, stacked, (4, R).

    Logits that are left out are -inf.
    """
    kept = logits != -torch.inf
    finite = logits.masked_fill(~kept, 0)
    softmax = (logits - _zero_where_empty(lse).unsqueeze(dim)).exp()
    return torch.stack(
        [
            logits.amax(dim),
            (softmax * finite).sum(dim),
            finite.sum(dim),
            kept.sum(dim, dtype=logits.dtype),
        ]
    )


def merge_statistics(lse: Tensor, a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
    """Statistics of the union of two disjoint sets of logits, whose logsumexp is ``lse``."""
    lse = _zero_where_empty(lse)
    return torch.stack(
        [
            torch.maximum(a[0], b[0]),
            (lse_a - lse).exp() * a[1] + (lse_b - lse).exp() * b[1],
            a[2] + b[2],
            a[3] + b[3],
        ]
    )


def merged_statistics(parts: Sequence[LogitStatistics]) -> LogitStatistics:
    """Statistics of the union of disjoint sets of logits of the same rows."""
    lse, *figures = parts[0]
    stats = torch.stack(figures)
    for lse_b, *figures_b in parts[1:]:
        lse_a, lse = lse, torch.logaddexp(lse, lse_b)
        stats = merge_statistics(lse, stats, lse_a, torch.stack(figures_b), lse_b)
    return LogitStatistics(lse, *stats.unbind(0))


def _zero_where_empty(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0)
