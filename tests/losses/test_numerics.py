"""Small temperatures and small losses, in float32, against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from budgets import gradient_budget, relative_error

from contrastive_kit.functional import nt_xent, siglip, sup_con

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
    """In the mean square over draws: a single one may be unlucky on one processor or the other."""
    errors = []
    for seed in range(4):
        views = pairs(kind, seed)
        exact_loss, exact = gradient(oracle, views, temperature, torch.float64)
        if exact.norm() < 1e-30:  # below what float32 can hold
            continue
        loss, grad = gradient(nt_xent, views, temperature, torch.float32)
        errors.append(relative_error(grad, exact))
        assert abs(loss - exact_loss) <= 1e-6 / temperature * abs(exact_loss)
    budget = gradient_budget(torch.float32, temperature)
    assert math.hypot(*errors) <= budget * len(errors) ** 0.5


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["unrelated", "related", "close"])
def test_float32_gradients_are_no_worse_than_eager(kind, temperature):
    """In the mean square over draws, to the part by which their roundings differ by luck.

    Over three draws that is up to a sixth, one way on one processor and the other way on another.
    """
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
    assert math.hypot(*ours) <= 1.2 * math.hypot(*theirs)


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


def softmax_family(z1, z2, temperature, positive, hardness=0.0):
    """Log of one plus odds, for each anchor and set of positives: exact for tiny losses."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool)
    negative = ~positive & ~itself
    n_negatives = negative.sum(1).to(z.dtype)
    kept = logits.masked_fill(~negative, -torch.inf)
    nu = (kept * (1 + hardness)).logsumexp(1)
    if hardness:
        nu = nu + n_negatives.log() - (kept * hardness).logsumexp(1)
    pi = logits.masked_fill(~(positive & ~itself), -torch.inf).logsumexp(1)
    return (nu - pi).exp().log1p(), pi, logits


def same(labels):
    return labels[:, None] == labels[None, :]


LABELS = torch.arange(126) // 3


def sup_con_out(z1, z2, temperature):
    odds, pi, logits = softmax_family(z1, z2, temperature, same(LABELS.repeat(2)))
    positive = same(LABELS.repeat(2)) & ~torch.eye(252, dtype=torch.bool)
    return (odds + pi - (logits * positive).sum(1) / 5).mean()


def binary(z1, z2, temperature, bias):
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature + bias
    sign = 1 - 2 * torch.eye(len(z1), dtype=z1.dtype)
    return torch.logaddexp(sign * logits, torch.zeros_like(logits)).sum(1).mean()


FAMILY = {
    "hardness": (
        lambda a, b, temperature: nt_xent(a, b, temperature=temperature, hardness=0.5),
        lambda a, b, temperature: softmax_family(
            a, b, temperature, same(torch.arange(126).repeat(2)), 0.5
        )[0].mean(),
        1.5,  # logits are multiplied by 1 + hardness
    ),
    "sup_con in": (
        lambda a, b, temperature: sup_con(
            a, b, labels=LABELS, temperature=temperature, variant="in"
        ),
        lambda a, b, temperature: (
            softmax_family(a, b, temperature, same(LABELS.repeat(2)))[0].mean() + math.log(5)
        ),
        1.0,
    ),
    "sup_con out": (
        lambda a, b, temperature: sup_con(a, b, labels=LABELS, temperature=temperature),
        sup_con_out,
        1.0,
    ),
    "siglip": (
        lambda a, b, temperature: siglip(a, b, temperature=temperature, logit_bias=-5.0),
        lambda a, b, temperature: binary(a, b, temperature, -5.0),
        1.0,
    ),
}


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.02, 0.01, 0.005])
@pytest.mark.parametrize("name", list(FAMILY))
def test_float32_gradients_of_the_family_stay_within_their_budget(name, temperature):
    loss_fn, exact_fn, factor = FAMILY[name]
    for seed in range(3):
        views = pairs("related", seed)
        exact_loss, exact = gradient(exact_fn, views, temperature, torch.float64)
        assert exact.norm() >= 1e-30
        loss, grad = gradient(loss_fn, views, temperature, torch.float32)
        assert relative_error(grad, exact) <= factor * gradient_budget(torch.float32, temperature)
        assert abs(loss - exact_loss) <= factor * 1e-6 / temperature * abs(exact_loss)
