"""The primitives behind the losses, and the choice of their backend."""

from contrastive_kit.ops.backends import (
    BACKENDS,
    Backend,
    BackendChoice,
    BackendName,
    check_backend,
    logsumexp_for,
    pair_loss_for,
    softplus_sum_for,
    softplus_total_for,
    which_backend,
)
from contrastive_kit.ops.pairs import Pairs, PairStatistics
from contrastive_kit.ops.primitives import kept_logsumexp, kept_softplus_sum
from contrastive_kit.ops.problem import Exclusion, Problem, mma_dtype, rounds_float32
from contrastive_kit.ops.registered import LogSumExp
from contrastive_kit.ops.statistics import LogitStatistics, merged_statistics, row_statistics
from contrastive_kit.ops.unit_rows import scaled_unit_rows

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendChoice",
    "BackendName",
    "Exclusion",
    "LogSumExp",
    "LogitStatistics",
    "PairStatistics",
    "Pairs",
    "Problem",
    "check_backend",
    "kept_logsumexp",
    "kept_softplus_sum",
    "logsumexp_for",
    "merged_statistics",
    "mma_dtype",
    "pair_loss_for",
    "rounds_float32",
    "row_statistics",
    "scaled_unit_rows",
    "softplus_sum_for",
    "softplus_total_for",
    "which_backend",
]
