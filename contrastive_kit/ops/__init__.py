"""The primitive behind the losses, and the choice of its backend."""

from contrastive_kit.ops._exclusion import Exclusion
from contrastive_kit.ops._lse import BACKENDS, BackendChoice, kept_logsumexp, which_backend
from contrastive_kit.ops._statistics import LogitStatistics, row_statistics
from contrastive_kit.ops._unit_rows import scaled_unit_rows

__all__ = [
    "BACKENDS",
    "BackendChoice",
    "Exclusion",
    "LogitStatistics",
    "kept_logsumexp",
    "row_statistics",
    "scaled_unit_rows",
    "which_backend",
]
