"""Batched, per-sample augmentations."""
