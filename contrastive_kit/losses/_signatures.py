"""What each loss takes by keyword, for the overloads that tell a type checker what it returns.

Only type checkers read this file.
"""

from typing import TypedDict

from torch import Tensor
from torch.distributed import ProcessGroup

from contrastive_kit.losses._options import Reduction, Variant
from contrastive_kit.ops import BackendName


class LossKeywords(TypedDict, total=False):
    """What all losses take."""

    temperature: float | Tensor
    sample_weight: Tensor | None
    reduction: Reduction
    gather_distributed: bool
    process_group: ProcessGroup | None
    backend: BackendName


class _CrossEntropyKeywords(LossKeywords, total=False):
    """What losses with a softmax take."""

    ids: Tensor | None
    label_smoothing: float
    hardness: float
    positive_prior: float
    margin: float
    false_negative_margin: float | None


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

    keys: Tensor | None
    key_labels: Tensor | None
    symmetric: bool
    variant: Variant


class SigLIPKeywords(LossKeywords, total=False):
    """Those of ``siglip``."""

    logit_bias: float | Tensor
    ids: Tensor | None
    labels: Tensor | None
    z2_labels: Tensor | None
    balance_positives: bool
