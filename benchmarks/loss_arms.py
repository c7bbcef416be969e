"""The implementations that are compared, each behind ``loss(z1, z2)`` with the mean over anchors.

Embeddings come in unnormalised, as a projection head leaves them; every arm normalises.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit.functional import info_nce, nt_xent

Loss = Callable[[Tensor, Tensor], Tensor]

OURS = "contrastive-kit"


class Arm(NamedTuple):
    """One implementation of a loss.

    Attributes:
        build: from the temperature to the loss; raises ImportError where it is not installed.
        largest_n: pairs beyond which its memory is out of proportion, or None.
        compiled: whether its first call at a size compiles for that size.
    """

    build: Callable[[float], Loss]
    largest_n: int | None = None
    compiled: bool = False


def eager_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent as one writes it in plain torch, with the diagonal masked in place."""
    u = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = u @ u.T / temperature
    logits.fill_diagonal_(-torch.inf)
    positive = torch.arange(len(u), device=u.device).roll(len(z1))
    return F.cross_entropy(logits, positive)


def eager_clip(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The loss of CLIP as one writes it in plain torch, with one matrix of logits."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    positive = torch.arange(len(z1), device=z1.device)
    return (F.cross_entropy(logits, positive) + F.cross_entropy(logits.T, positive)) / 2


def _compiled(eager: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[float], Loss]:
    def build(temperature: float) -> Loss:
        compiled = torch.compile(eager, dynamic=False)
        return lambda z1, z2: compiled(z1, z2, temperature)

    return build


def _lightly_nt_xent(temperature: float) -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature)


def _pml_nt_xent(temperature: float) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature)

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        return loss(torch.cat([z1, z2]), torch.arange(len(z1)).repeat(2))

    return call


def _open_clip(temperature: float) -> Loss:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda z1, z2: loss(F.normalize(z1, dim=1), F.normalize(z2, dim=1), 1 / temperature)


NT_XENT = {
    OURS: Arm(lambda temperature: lambda z1, z2: nt_xent(z1, z2, temperature=temperature)),
    "eager": Arm(lambda temperature: lambda z1, z2: eager_nt_xent(z1, z2, temperature)),
    "compiled eager": Arm(_compiled(eager_nt_xent), compiled=True),
    "lightly": Arm(_lightly_nt_xent),
    # Several tensors of 2N × 2N(2N - 2) numbers: 64 MiB each at N = 128, 0.5 GiB at N = 256.
    "pytorch-metric-learning": Arm(_pml_nt_xent, largest_n=128),
}

CLIP = {
    OURS: Arm(
        lambda temperature: lambda z1, z2: info_nce(z1, z2, temperature=temperature, symmetric=True)
    ),
    "eager": Arm(lambda temperature: lambda z1, z2: eager_clip(z1, z2, temperature)),
    "compiled eager": Arm(_compiled(eager_clip), compiled=True),
    "open_clip": Arm(_open_clip),
}

SUBJECTS = {"nt_xent": NT_XENT, "clip": CLIP}


def embeddings(n: int, d: int, seed: int = 0, noise: float = 0.65) -> tuple[Tensor, Tensor]:
    """Two views (n, d) that want gradients: an image plus noise each.

    The cosine between the views of an image is about 1 / (1 + noise²), 0.7 by default.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, d, generator=generator)
    z1, z2 = (image + noise * torch.randn(n, d, generator=generator) for _ in range(2))
    return z1.requires_grad_(), z2.requires_grad_()


def forward(loss: Loss, z1: Tensor, z2: Tensor) -> Tensor:
    """The value alone."""
    with torch.no_grad():
        return loss(z1, z2)


def forward_backward(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    """The gradients with respect to both views."""
    return torch.autograd.grad(loss(z1, z2), (z1, z2))
