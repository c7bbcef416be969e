"""Batched, per-sample augmentations.

`SimCLRAugment` makes whole views; the other modules are its parts, for Kornia's pipelines;
`functional` holds the operations themselves. Names load on first use: `functional` and
`SimCLRAugment` need torch and einops only, the modules import Kornia.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contrastive_kit.augment.kornia.geometric import (
        RandomHorizontalFlip as RandomHorizontalFlip,
    )
    from contrastive_kit.augment.kornia.geometric import RandomResizedCrop as RandomResizedCrop
    from contrastive_kit.augment.kornia.intensity import ColorJitter as ColorJitter
    from contrastive_kit.augment.kornia.intensity import GaussianBlur as GaussianBlur
    from contrastive_kit.augment.kornia.intensity import RandomGrayscale as RandomGrayscale
    from contrastive_kit.augment.kornia.intensity import RandomSolarize as RandomSolarize
    from contrastive_kit.augment.kornia.view import SimCLRView as SimCLRView
    from contrastive_kit.augment.recipe import BYOL as BYOL
    from contrastive_kit.augment.recipe import CIFAR as CIFAR
    from contrastive_kit.augment.recipe import GOOGLE_RESEARCH as GOOGLE_RESEARCH
    from contrastive_kit.augment.recipe import IMAGENET as IMAGENET
    from contrastive_kit.augment.recipe import Recipe as Recipe
    from contrastive_kit.augment.simclr import SimCLRAugment as SimCLRAugment

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

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
