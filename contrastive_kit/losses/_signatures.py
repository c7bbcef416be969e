"""What each loss takes by keyword, for the overloads that tell a type checker what it returns.

Only type checkers read this file.
"""

from typing import TypedDict

from torch import Tensor
from torch.distributed import ProcessGroup


class LossKeywords(TypedDict, total=False):
    """What all losses take."""

    temperature: float | Tensor
    sample_weight: Tensor | None
    reduction: str
    gather_distributed: bool
    process_group: ProcessGroup | None
    backend: str


class _CrossEntropyKeywords(LossKeywords, total=False):
    ids: Tensor | None
    label_smoothing: float
    hardness: float
    positive_prior: float
    margin: float


class NTXentKeywords(_CrossEntropyKeywords, total=False):
    """Those of ``nt_xent``."""

    decoupled: bool


class InfoNCEKeywords(_CrossEntropyKeywords, total=False):
    """Those of ``info_nce``."""

    symmetric: bool
    in_batch_negatives: bool | None
    query_negatives: bool
    key_negatives: bool
    negative_ids: Tensor | None


class SupConKeywords(LossKeywords, total=False):
    """Those of ``sup_con``."""

    variant: str


class SigLIPKeywords(LossKeywords, total=False):
    """Those of ``siglip``."""

    logit_bias: float | Tensor
    ids: Tensor | None
