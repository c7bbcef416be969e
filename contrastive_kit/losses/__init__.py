"""The losses, one file each: a function and its module side by side."""

from contrastive_kit.losses._stats import ContrastiveStats
from contrastive_kit.losses.distillation import (
    SimilarityDistillation,
    similarity_distillation,
)
from contrastive_kit.losses.infonce import InfoNCE, info_nce
from contrastive_kit.losses.matryoshka import Matryoshka
from contrastive_kit.losses.ntxent import NTXent, nt_xent
from contrastive_kit.losses.siglip import SigLIP, siglip
from contrastive_kit.losses.sogclr import SogCLR
from contrastive_kit.losses.supcon import SupCon, sup_con

__all__ = [
    "ContrastiveStats",
    "InfoNCE",
    "Matryoshka",
    "NTXent",
    "SigLIP",
    "SimilarityDistillation",
    "SogCLR",
    "SupCon",
    "info_nce",
    "nt_xent",
    "siglip",
    "similarity_distillation",
    "sup_con",
]
