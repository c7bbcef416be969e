"""Losses and augmentations for contrastive learning of visual representations.

Names load on first use, so that ``from contrastive_kit import NTXent`` imports torch and nothing
else: kornia, torchvision and Triton are loaded by the parts that need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from contrastive_kit._version import __version__

if TYPE_CHECKING:
    from contrastive_kit.augment.simclr import SimCLRAugment as SimCLRAugment
    from contrastive_kit.encoders import resnet_encoder as resnet_encoder
    from contrastive_kit.grad_cache import GradCache as GradCache
    from contrastive_kit.heads import ProjectionHead as ProjectionHead
    from contrastive_kit.losses.distillation import (
        SimilarityDistillation as SimilarityDistillation,
    )
    from contrastive_kit.losses.infonce import InfoNCE as InfoNCE
    from contrastive_kit.losses.ntxent import NTXent as NTXent
    from contrastive_kit.losses.siglip import SigLIP as SigLIP
    from contrastive_kit.losses.supcon import SupCon as SupCon
    from contrastive_kit.ops import which_backend as which_backend
    from contrastive_kit.queue import NegativeQueue as NegativeQueue

_HOME = {
    "GradCache": "contrastive_kit.grad_cache",
    "InfoNCE": "contrastive_kit.losses.infonce",
    "NegativeQueue": "contrastive_kit.queue",
    "NTXent": "contrastive_kit.losses.ntxent",
    "ProjectionHead": "contrastive_kit.heads",
    "SigLIP": "contrastive_kit.losses.siglip",
    "SimilarityDistillation": "contrastive_kit.losses.distillation",
    "SimCLRAugment": "contrastive_kit.augment.simclr",
    "SupCon": "contrastive_kit.losses.supcon",
    "resnet_encoder": "contrastive_kit.encoders",
    "which_backend": "contrastive_kit.ops",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
