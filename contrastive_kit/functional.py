"""The losses as functions."""

from contrastive_kit.losses import info_nce, nt_xent, siglip, similarity_distillation, sup_con

__all__ = ["info_nce", "nt_xent", "siglip", "similarity_distillation", "sup_con"]
