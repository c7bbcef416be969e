"""Modules for Kornia's pipelines; `contrastive_kit.augment` has their names."""
