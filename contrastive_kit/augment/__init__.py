"""Batched, per-sample augmentations.

`SimCLRAugment` makes whole views; the other modules are its parts, for Kornia's pipelines;
`functional` holds the operations themselves. Names load on first use: `functional` and
`SimCLRAugment` need torch and einops only, the modules import Kornia.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contrastive_kit.augment import functional as functional
    from contrastive_kit.augment.kornia.geometric import RandomHorizontalFlip, RandomResizedCrop
    from contrastive_kit.augment.kornia.intensity import (
        ColorJitter,
        GaussianBlur,
        RandomGrayscale,
        RandomSolarize,
    )
    from contrastive_kit.augment.kornia.view import SimCLRView
    from contrastive_kit.augment.recipe import BYOL, CIFAR, GOOGLE_RESEARCH, IMAGENET, Recipe
    from contrastive_kit.augment.simclr import SimCLRAugment

__all__ = [
    "BYOL",
    "CIFAR",
    "GOOGLE_RESEARCH",
    "IMAGENET",
    "ColorJitter",
    "GaussianBlur",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomSolarize",
    "Recipe",
    "SimCLRAugment",
    "SimCLRView",
]

_HOME = {
    "BYOL": "recipe",
    "CIFAR": "recipe",
    "GOOGLE_RESEARCH": "recipe",
    "IMAGENET": "recipe",
    "Recipe": "recipe",
    "ColorJitter": "kornia.intensity",
    "GaussianBlur": "kornia.intensity",
    "RandomGrayscale": "kornia.intensity",
    "RandomHorizontalFlip": "kornia.geometric",
    "RandomResizedCrop": "kornia.geometric",
    "RandomSolarize": "kornia.intensity",
    "SimCLRAugment": "simclr",
    "SimCLRView": "kornia.view",
}

# Hidden from type checkers, which would take any misspelled name for one of these.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
        if name == "functional":
            return _import_module(f"{__name__}.functional")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "functional"})
