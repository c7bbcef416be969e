"""The primitive behind the losses, and the choice of its backend."""

from contrastive_kit.ops._exclusion import Exclusion
from contrastive_kit.ops._lse import (
    BACKENDS,
    BackendChoice,
    kept_logsumexp,
    operand_dtype,
    which_backend,
)
from contrastive_kit.ops._pair_loss import pair_loss
from contrastive_kit.ops._same_class import same_class_logsumexp
from contrastive_kit.ops._sigmoid import SOFTPLUS_BACKENDS, kept_softplus_sum
from contrastive_kit.ops._statistics import LogitStatistics, row_statistics
from contrastive_kit.ops._unit_rows import scaled_unit_rows

__all__ = [
    "BACKENDS",
    "SOFTPLUS_BACKENDS",
    "BackendChoice",
    "Exclusion",
    "LogitStatistics",
    "kept_logsumexp",
    "kept_softplus_sum",
    "operand_dtype",
    "pair_loss",
    "row_statistics",
    "same_class_logsumexp",
    "scaled_unit_rows",
    "which_backend",
]
