"""The diagnostics that all losses share: what counts as the nearest candidate."""

import pytest
import torch

from contrastive_kit.functional import info_nce, nt_xent, siglip, sup_con
from contrastive_kit.ops import BACKENDS

LOSSES = {
    "nt_xent": nt_xent,
    "three views": lambda a, b, **options: nt_xent(a, b, b, **options),
    "info_nce": info_nce,
    "clip": lambda a, b, **options: info_nce(a, b, symmetric=True, **options),
    "siglip": siglip,
    "queue": lambda a, b, **options: info_nce(a, b, b, **options),
    "per query": lambda a, b, **options: info_nce(a, b, b.expand(len(a), -1, -1), **options),
    "sup_con": lambda a, b, **options: sup_con(a, b, labels=torch.arange(len(a)) // 2, **options),
    "one view": lambda a, b, **options: sup_con(a, labels=torch.arange(len(a)) // 2, **options),
}
losses = pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)


@losses
@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_collapsed_encoder_is_never_right(dtype, backend, loss_fn):
    """All candidates are equally near, but for how the sums of their products are rounded."""
    for d in (1, 7, 64, 128, 513, 2048):
        z = torch.randn(d, dtype=dtype).expand(12, d)
        for temperature in (0.07, 0.1, torch.tensor(0.5)):
            call = {"temperature": temperature, "return_stats": True, "backend": backend}
            assert loss_fn(z, z, **call)[1].accuracy == 0, (d, temperature)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("queue", "per query")])
def test_a_small_difference_is_no_tie(name):
    """Cosines of 1 with positives, and 1e-5 less with negatives."""
    axis = torch.arange(12) // 2 if name in ("sup_con", "one view") else torch.arange(12)
    z = torch.cat([torch.ones(12, 1), torch.eye(12)[axis] * 1e-5**0.5], dim=1)
    assert LOSSES[name](z, z, return_stats=True)[1].accuracy == 1
