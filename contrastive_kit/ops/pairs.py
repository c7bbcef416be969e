"""The loss of a batch of pairs as one value, for the backends that have it as one op."""

from typing import NamedTuple

from torch import Tensor

from contrastive_kit.ops.statistics import LogitStatistics


class Pairs(NamedTuple):
    """What is asked of N pairs of embeddings: the losses of equations (4), (9) and (10).

    Attributes:
        z1: embeddings (N, D), floating, of any length.
        z2: those that are paired with them, row by row.
        temperature: a number, or a tensor of one value, which receives its gradient.
        ids: integers (N,) or None; pairs of equal id are not negatives of each other.
        sample_weight: weights (N,) of the pairs, which receive no gradient, or None.
        between: rows of ``z1`` are compared with those of ``z2`` alone (InfoNCE), and not with all
            rows of both (NT-Xent).
        both: and rows of ``z2`` with those of ``z1``; only with ``between``.
        decoupled: leave the positives out of the denominator, equation (12).
        reduction: "mean", "sum", or "none" for losses (2, N), (N,) in one direction.
        statistics: also ask for ``PairStatistics``.
    """

    z1: Tensor
    z2: Tensor
    temperature: float | Tensor
    ids: Tensor | None = None
    sample_weight: Tensor | None = None
    between: bool = False
    both: bool = False
    decoupled: bool = False
    reduction: str = "mean"
    statistics: bool = False


class PairStatistics(NamedTuple):
    """Logits of the positives of each anchor, (1, R), and figures of its negatives; detached."""

    positive_logits: Tensor
    negatives: LogitStatistics


PairLoss = tuple[Tensor, PairStatistics | None]
