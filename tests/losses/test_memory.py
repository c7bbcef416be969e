"""Peak memory of forward and backward: linear in N, never N × N."""

import pytest
import torch
from memory import peak_mebibytes

from contrastive_kit import SogCLR
from contrastive_kit.functional import (
    info_nce,
    nt_xent,
    siglip,
    similarity_distillation,
    sup_con,
)

LOSSES = {
    "nt_xent": nt_xent,
    "info_nce": info_nce,
    "smoothed": lambda a, b, **k: nt_xent(a, b, label_smoothing=0.1, sample_weight=a[:, 0], **k),
    "hardness": lambda a, b, **k: nt_xent(a, b, hardness=0.5, **k),
    "sup_con": lambda a, b, **k: sup_con(a, b, labels=torch.arange(len(a)) // 4, **k),
    "sup_con in": lambda a, b, **k: sup_con(
        a, b, labels=torch.arange(len(a)) // 4, variant="in", **k
    ),
    "sup_con pairwise": lambda a, b, **k: sup_con(
        a, b, labels=torch.arange(len(a)) // 4, variant="pairwise", **k
    ),
    "sup_con keys": lambda a, b, **k: sup_con(
        a,
        labels=torch.arange(len(a)) // 4,
        keys=b,
        key_labels=torch.arange(len(a)) // 3,
        symmetric=True,
        **k,
    ),
    "sup_con multi-hot": lambda a, b, **k: sup_con(a, b, labels=a.detach() > 0.5, **k),
    "distillation": lambda a, b, **k: similarity_distillation(
        a, b, a.flip(1), b.flip(1), symmetric=True, **k
    ),
    "without false": lambda a, b, **k: info_nce(
        a, b, symmetric=True, false_negative_margin=0.1, **k
    ),
    "sog_clr": lambda a, b, temperature: SogCLR(len(a), temperature)(
        a, b, index=torch.arange(len(a))
    ),
    "siglip": siglip,
    "siglip labels": lambda a, b, **k: siglip(a, b, labels=torch.arange(len(a)) // 4, **k),
}


def peak(loss_fn, n):
    a, b = (torch.randn(n, 16, requires_grad=True) for _ in range(2))
    return peak_mebibytes(lambda: loss_fn(a, b, temperature=0.1).backward())


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("nt_xent", 48),
        ("info_nce", 48),
        ("smoothed", 48),
        ("hardness", 80),
        ("without false", 48),
        ("sog_clr", 48),
        ("sup_con", 48),
        ("sup_con in", 80),
        ("sup_con pairwise", 48),
        ("sup_con keys", 48),
        ("sup_con multi-hot", 48),
        ("distillation", 48),
        ("siglip", 16),
        ("siglip labels", 16),
    ],
)
def test_memory_is_linear_in_n(name, limit):
    small, large = peak(LOSSES[name], 3072), peak(LOSSES[name], 4096)
    # One similarity matrix has 64 MiB for info_nce and siglip, 256 for the others.
    assert large <= limit
    # A matrix would add 28 MiB or more, the rows add one half for each copy.
    assert large - small <= 4


def test_the_reference_has_a_matrix():
    """Or the numbers above would mean nothing."""

    def loss_fn(a, b, temperature):
        return info_nce(a, b, temperature=temperature, backend="reference")

    small, large = peak(loss_fn, 512), peak(loss_fn, 1024)
    assert large >= 4
    assert large / small == pytest.approx(4, rel=0.2)
