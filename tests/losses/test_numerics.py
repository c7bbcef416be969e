"""Small temperatures and small losses, in float32, against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from budgets import gradient_budget, relative_error

from contrastive_kit.functional import nt_xent

TEMPERATURES = [
    1.0,
    0.5,
    0.2,
    0.1,
    0.07,
    0.05,
    0.03,
    0.02,
    0.0145,
    0.014,
    0.01,
    0.007,
    0.005,
    0.002,
]


def eager(z1, z2, temperature):
    """NT-Xent as it is usually written."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def oracle(z1, z2, temperature):
    """log(1 + Σ exp(s_in - s_ip)): unlike a cross entropy it stays exact for tiny losses."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    m = len(z)
    logits = z @ z.T / temperature
    positive = logits[torch.arange(m), torch.arange(m).roll(m // 2)]
    same = (torch.arange(m)[:, None] - torch.arange(m)[None, :]) % (m // 2) == 0
    gaps = (logits - positive[:, None]).masked_fill(same, -torch.inf)
    return gaps.exp().sum(1).log1p().mean()


def gradient(formula, views, temperature, dtype):
    views = [v.to(dtype).requires_grad_() for v in views]
    loss = formula(*views, temperature=temperature)
    return loss.item(), torch.stack(torch.autograd.grad(loss, views))


def pairs(kind, seed, n=126, d=60):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, n, d, generator=generator)
    noise = {"unrelated": None, "related": 1.0, "close": 0.1}[kind]
    return (first, second) if noise is None else (first, first + noise * second)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["unrelated", "related", "close"])
def test_float32_gradients_stay_within_their_budget(kind, temperature):
    for seed in range(3):
        views = pairs(kind, seed)
        exact_loss, exact = gradient(oracle, views, temperature, torch.float64)
        if exact.norm() < 1e-30:  # below what float32 can hold
            continue
        loss, grad = gradient(nt_xent, views, temperature, torch.float32)
        assert relative_error(grad, exact) <= gradient_budget(torch.float32, temperature)
        assert abs(loss - exact_loss) <= 1e-6 / temperature * abs(exact_loss)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["unrelated", "related", "close"])
def test_float32_gradients_are_no_worse_than_eager(kind, temperature):
    """In the mean square over draws, to the few percent by which their roundings differ by luck."""
    ours, theirs = [], []
    for seed in range(12):
        views = pairs(kind, seed)
        exact = gradient(oracle, views, temperature, torch.float64)[1]
        if exact.norm() >= 1e-30:  # what float32 can hold
            ours.append(
                relative_error(gradient(nt_xent, views, temperature, torch.float32)[1], exact)
            )
            theirs.append(
                relative_error(gradient(eager, views, temperature, torch.float32)[1], exact)
            )
    assert math.hypot(*ours) <= 1.05 * math.hypot(*theirs)


@pytest.mark.parametrize("temperature", [0.05, 0.03, 0.02])
def test_a_tiny_loss_is_right_where_a_cross_entropy_is_zero(temperature):
    views = pairs("close", 0, n=32)
    exact, exact_grad = gradient(oracle, views, temperature, torch.float64)
    loss, grad = gradient(nt_xent, views, temperature, torch.float32)
    assert exact < 1e-5
    assert abs(loss - exact) <= 1e-3 * exact
    assert relative_error(grad, exact_grad) <= gradient_budget(torch.float32, temperature)


def test_a_loss_of_1e_minus_12():
    views = pairs("close", 0, n=32)
    exact, _ = gradient(oracle, views, 0.02, torch.float64)
    assert 1e-16 < exact < 1e-10
    assert gradient(eager, views, 0.02, torch.float32)[0] == 0.0
    assert abs(gradient(nt_xent, views, 0.02, torch.float32)[0] - exact) <= 1e-3 * exact


@pytest.mark.parametrize("temperature", [0.01, 0.005])
def test_the_worst_pair_keeps_its_gradient(temperature):
    """Opposed positives: the loss is about 2 / temperature and must not saturate."""
    z1 = torch.eye(4)
    z2 = -torch.eye(4)
    exact_loss, exact = gradient(oracle, (z1 + 1e-3, z2), temperature, torch.float64)
    loss, grad = gradient(nt_xent, (z1 + 1e-3, z2), temperature, torch.float32)
    assert loss == pytest.approx(exact_loss, rel=1e-6)
    assert loss > 0.9 / temperature
    assert relative_error(grad, exact) <= 1e-4


def test_float64_is_exact_where_the_loss_is_large():
    views = pairs("unrelated", 0, n=8)
    exact, exact_grad = gradient(oracle, views, 0.01, torch.float64)
    loss, grad = gradient(nt_xent, views, 0.01, torch.float64)
    assert exact > 25
    assert loss == pytest.approx(exact, rel=1e-13)
    assert relative_error(grad, exact_grad) <= gradient_budget(torch.float64, 0.01)
