"""Losses and augmentations for contrastive learning of visual representations.

Names load on first use, so that ``from contrastive_kit import NTXent`` imports torch and nothing
else: kornia, torchvision and Triton are loaded by the parts that need them.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from contrastive_kit._version import __version__

if TYPE_CHECKING:
    from contrastive_kit import augment as augment
    from contrastive_kit import distributed as distributed
    from contrastive_kit import evaluation as evaluation
    from contrastive_kit import functional as functional
    from contrastive_kit import losses as losses
    from contrastive_kit import metrics as metrics
    from contrastive_kit import ops as ops
    from contrastive_kit import reference as reference
    from contrastive_kit.augment.simclr import SimCLRAugment
    from contrastive_kit.encoders import resnet_encoder
    from contrastive_kit.grad_cache import GradCache
    from contrastive_kit.heads import ProjectionHead
    from contrastive_kit.losses.distillation import SimilarityDistillation
    from contrastive_kit.losses.infonce import InfoNCE
    from contrastive_kit.losses.matryoshka import Matryoshka
    from contrastive_kit.losses.ntxent import NTXent
    from contrastive_kit.losses.siglip import SigLIP
    from contrastive_kit.losses.sogclr import SogCLR
    from contrastive_kit.losses.supcon import SupCon
    from contrastive_kit.ops import which_backend
    from contrastive_kit.queue import NegativeQueue

__all__ = [
    "GradCache",
    "InfoNCE",
    "Matryoshka",
    "NTXent",
    "NegativeQueue",
    "ProjectionHead",
    "SigLIP",
    "SimCLRAugment",
    "SimilarityDistillation",
    "SogCLR",
    "SupCon",
    "__version__",
    "resnet_encoder",
    "which_backend",
]

_HOME = {
    "GradCache": "grad_cache",
    "InfoNCE": "losses.infonce",
    "Matryoshka": "losses.matryoshka",
    "NTXent": "losses.ntxent",
    "NegativeQueue": "queue",
    "ProjectionHead": "heads",
    "SigLIP": "losses.siglip",
    "SimCLRAugment": "augment.simclr",
    "SimilarityDistillation": "losses.distillation",
    "SogCLR": "losses.sogclr",
    "SupCon": "losses.supcon",
    "resnet_encoder": "encoders",
    "which_backend": "ops",
}
_MODULES = (
    "augment",
    "distributed",
    "evaluation",
    "functional",
    "losses",
    "metrics",
    "ops",
    "reference",
)

# Hidden from type checkers, which would take any misspelled name for one of these.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
        if name in _MODULES:
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
