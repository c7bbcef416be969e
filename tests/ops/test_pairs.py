"""The losses of pairs as one op: how many calls it makes, what it refuses, what autograd sees."""

import pytest
import torch
from budgets import assert_within, gradient_budget
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_kit.functional import info_nce, nt_xent
from contrastive_kit.ops import Pairs, pair_loss_for
from contrastive_kit.ops.registered import registered
from contrastive_kit.ops.tiled import tiles


class Calls(TorchDispatchMode):
    """Counts the calls of ATen, those inside the ops of the package too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "contrastive_kit":
            with self:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return func.redispatch(keys, *args, **(kwargs or {}))
        self.count += 1
        return func(*args, **(kwargs or {}))


IDS, WEIGHT = torch.arange(48) // 2, torch.linspace(0, 1, 48)
LOSSES = {
    "nt_xent": (nt_xent, 110),
    "nt_xent, ids and weights": (
        lambda a, b: nt_xent(a, b, ids=IDS, sample_weight=WEIGHT),
        110,
    ),
    "info_nce": (info_nce, 140),
    "clip": (lambda a, b: info_nce(a, b, symmetric=True), 140),
    "clip, ids and weights": (
        lambda a, b: info_nce(a, b, symmetric=True, ids=IDS, sample_weight=WEIGHT),
        140,
    ),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_small_step_makes_few_calls(name):
    """A small batch waits for calls, not for arithmetic."""
    loss_fn, most = LOSSES[name]
    views = [torch.randn(48, 33, requires_grad=True) for _ in range(2)]
    with Calls() as calls:
        loss_fn(*views).backward()
    assert 20 < calls.count <= most


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_a_temperature_learns_from_frozen_embeddings(backend, frozen, symmetric):
    """What else needs a gradient does not change that of the temperature."""
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    views = list(torch.randn(2, 23, 7, dtype=torch.float64))

    def gradients(views, loss_fn):
        wanted = [tau, *(v for v in views if v.requires_grad)]
        return torch.autograd.grad(loss_fn(*views), wanted)

    def loss_fn(a, b):
        return info_nce(a, b, temperature=tau, symmetric=symmetric, backend=backend)

    def eager(a, b):
        a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
        logits, own = a @ b.T / tau, torch.arange(23)
        loss = torch.nn.functional.cross_entropy(logits, own)
        back = torch.nn.functional.cross_entropy(logits.T, own)
        return (loss + back) / 2 if symmetric else loss

    views = [v if i in frozen else v.requires_grad_() for i, v in enumerate(views)]
    expected = gradients(views, eager)
    for actual, exact in zip(gradients(views, loss_fn), expected, strict=True):
        assert_within(actual, exact, gradient_budget(torch.float64, 0.2))


def pairs(n=21, **options):
    z1, z2 = torch.randn(2, n, 6).unbind(0)
    return Pairs(z1, z2, 0.2, **options)


@pytest.mark.parametrize("tile", [8, tiles.CPU_TILE])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoupled": True, "reduction": "none", "ids": torch.arange(21) // 2},
        {"between": True, "both": True, "sample_weight": torch.linspace(0, 1, 21)},
        {"between": True, "statistics": True, "reduction": "sum"},
        {"temperature": torch.tensor(0.01)},
    ],
)
def test_opcheck(options, tile, monkeypatch):
    # The edges of saved tiles are never written, nor read: to compare them they need a value.
    empty_tiles = tiles.empty_tiles
    monkeypatch.setattr(tiles, "empty_tiles", lambda *args: empty_tiles(*args).zero_())
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    asked = pairs()._replace(**options)
    number, tensor = asked.temperature, None
    if isinstance(number, torch.Tensor):
        number, tensor = torch.nan, number
    arguments = (asked.z1, asked.z2, tensor, *asked[3:], number, not asked.statistics)
    torch.library.opcheck(registered("tiled_pair_loss"), arguments)
    wanting = [x.clone().requires_grad_() for x in arguments[:2]]
    torch.library.opcheck(registered("tiled_pair_loss"), (*wanting, *arguments[2:]))
    loss, _, *saved = registered("tiled_pair_loss")(*arguments)
    for needs in ((True, False, False), (True, True, True)):
        torch.library.opcheck(
            registered("tiled_pair_loss_backward"),
            (torch.rand_like(loss), *saved, *arguments[2:-1], *needs),
        )


def test_what_the_op_does_not_take():
    """A gradient for the weights, and another device; the losses then compose what they need."""
    assert pair_loss_for(pairs(), "tiled") is not None
    assert pair_loss_for(pairs(), "reference") is None
    weight = torch.rand(21, requires_grad=True)
    assert pair_loss_for(pairs(sample_weight=weight), "tiled") is None
    a, b, *_ = pairs()
    (grad,) = torch.autograd.grad(nt_xent(a.requires_grad_(), b, sample_weight=weight), weight)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tiny", [1e-30, 1e-20])
def test_tiny_weights_and_gradients_do_not_underflow(tiny, reduction):
    """Of every weight alike the gradient is a multiple."""
    z = torch.randn(2, 15, 4).unbind(0)
    results = []
    for weight in (1.0, tiny):
        views = [x.clone().requires_grad_() for x in z]
        loss = nt_xent(*views, sample_weight=torch.full((15,), weight), reduction=reduction)
        results.append(torch.stack(torch.autograd.grad(loss.sum() / loss.numel() / 8, views)))
    factor = 1.0 if reduction == "mean" else tiny
    assert_within(results[1].double() / factor, results[0].double(), 1e-6)
