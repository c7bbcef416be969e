"""The losses, one file each: a function and its module side by side."""

from contrastive_kit.losses._stats import ContrastiveStats
from contrastive_kit.losses.infonce import InfoNCE, info_nce
from contrastive_kit.losses.ntxent import NTXent, nt_xent

__all__ = ["ContrastiveStats", "InfoNCE", "NTXent", "info_nce", "nt_xent"]
