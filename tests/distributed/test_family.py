"""SupCon and SigLIP over processes: after DDP's mean, what one process finds on the whole batch.

The oracle is the formula of ``contrastive_kit.reference`` on the concatenated batch, in one
process and in float64.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from budgets import VALUE, assert_within, gradient_budget
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contrastive_kit import SigLIP, SupCon, reference
from contrastive_kit.functional import siglip, sup_con

TEMPERATURE = 0.2
SUP_CON = {
    "out": (2, {}),
    "in": (2, {"variant": "in"}),
    "out, three views, weights": (3, {"sample_weight": True}),
    "in, three views, weights": (3, {"variant": "in", "sample_weight": True}),
    "pairwise, three views, weights": (3, {"variant": "pairwise", "sample_weight": True}),
    "pairwise, one view": (1, {"variant": "pairwise"}),
    "out, one view": (1, {}),
    "in, one view, weights": (1, {"variant": "in", "sample_weight": True}),
}
SIGLIP = {"plain": {}, "ids": {"ids": True}, "ids, weights": {"ids": True, "sample_weight": True}}


def share_of(rank, size, unequal):
    """Sizes of the batches of all ranks, and the part of the whole that is this rank's."""
    counts = [4 + (3 * r % 5 if unequal else 0) for r in range(size)]
    return counts, slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def weights_of(n):
    weights = torch.rand(n, dtype=torch.float64)
    weights[1] = 0
    return weights


def labels_of(n):
    """Some labels on several ranks, and the last image of the last rank alone with its own."""
    labels = torch.arange(n) * 3 % max(2, n - 3) // 2
    labels[-1] = -5
    return labels


def mean_over_ranks(x, size):
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / size


def sup_con_oracle(views, labels, temperature, variant, weights):
    losses = reference.sup_con(torch.stack(tuple(views)), labels, temperature, variant)
    has_positive = ~losses.isnan()
    shares = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights
    shares = shares.expand_as(losses)
    weighted = torch.where(has_positive, losses.nan_to_num() * shares, 0)
    return weighted, weighted.sum() / shares[has_positive].sum()


def check_sup_con(rank, size, name, unequal, backend):
    n_views, options = SUP_CON[name]
    counts, mine = share_of(rank, size, unequal)
    n, variant = sum(counts), options.get("variant", "out")
    labels = labels_of(n)
    weights = weights_of(n) if "sample_weight" in options else None
    whole = torch.randn(n_views, n, 5, dtype=torch.float64)
    views = whole.clone().requires_grad_()
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    losses, mean = sup_con_oracle(views, labels, temperature, variant, weights)
    expected = torch.autograd.grad(mean, (views, temperature), retain_graph=True)

    def call(*z, **more):
        return sup_con(
            *z,
            labels=labels[mine],
            variant=variant,
            sample_weight=None if weights is None else weights[mine],
            gather_distributed=True,
            backend=backend,
            **more,
        )

    z = [v.clone().requires_grad_() for v in whole[:, mine]]
    tau = temperature.detach().clone().requires_grad_()
    loss = call(*z, temperature=tau)
    *dz, d_tau = torch.autograd.grad(loss, (*z, tau))
    budget = 10 * gradient_budget(torch.float64, TEMPERATURE)
    assert_within(mean_over_ranks(loss, size), mean, 10 * VALUE[torch.float64])
    # What the other ranks add to the gradient of an embedding arrived through the gather.
    assert_within(torch.stack(dz) / size, expected[0][:, mine], budget)
    assert_within(mean_over_ranks(d_tau, size), expected[1], 10 * budget)
    each = call(*z, temperature=TEMPERATURE, reduction="none")
    torch.testing.assert_close(each, losses[:, mine].detach(), rtol=1e-12, atol=1e-12)
    total = call(*z, temperature=TEMPERATURE, reduction="sum")
    torch.testing.assert_close(total, losses[:, mine].sum().detach())


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", list(SUP_CON))
def test_sup_con(world, name, unequal):
    world.run(check_sup_con, name, unequal, "tiled")


@pytest.mark.parametrize("name", ["out", "in"])
def test_sup_con_on_the_reference_backend(pair, name):
    pair.run(check_sup_con, name, True, "reference")


def check_siglip(rank, size, name, unequal, backend):
    counts, mine = share_of(rank, size, unequal)
    n = sum(counts)
    ids = torch.arange(n) * 3 % max(2, n - 3) - 2 if "ids" in SIGLIP[name] else None
    weights = weights_of(n) if "sample_weight" in SIGLIP[name] else None
    whole = torch.randn(2, n, 5, dtype=torch.float64)
    exact = [whole.clone(), torch.tensor(TEMPERATURE).double(), torch.tensor(-2.0).double()]
    exact = [x.requires_grad_() for x in exact]
    losses = reference.siglip(*exact[0], exact[1], exact[2], ids)
    mean = losses.mean() if weights is None else reference.weighted_mean(losses, weights)
    expected = torch.autograd.grad(mean, exact)

    own = {
        "ids": None if ids is None else ids[mine],
        "sample_weight": None if weights is None else weights[mine],
        "gather_distributed": True,
        "backend": backend,
    }
    inputs = [x.detach().clone().requires_grad_() for x in (*whole[:, mine], *exact[1:])]
    loss = siglip(*inputs[:2], temperature=inputs[2], logit_bias=inputs[3], **own)
    *dz, d_tau, d_bias = torch.autograd.grad(loss, inputs)
    budget = 10 * gradient_budget(torch.float64, TEMPERATURE)
    assert_within(mean_over_ranks(loss, size), mean, VALUE[torch.float64])
    assert_within(torch.stack(dz) / size, expected[0][:, mine], budget)
    assert_within(mean_over_ranks(d_tau, size), expected[1], budget)
    assert_within(mean_over_ranks(d_bias, size), expected[2], budget)
    each = siglip(*inputs[:2], temperature=TEMPERATURE, logit_bias=-2.0, reduction="none", **own)
    each_expected = losses if weights is None else losses * weights
    torch.testing.assert_close(each, each_expected[mine].detach())


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", list(SIGLIP))
def test_siglip(world, name, unequal):
    world.run(check_siglip, name, unequal, "tiled")


def test_siglip_on_the_reference_backend(pair):
    pair.run(check_siglip, "ids, weights", True, "reference")


class Step(nn.Module):
    """An encoder and its loss in one module, as DDP wants learnable scalars."""

    def __init__(self, loss):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.loss = loss

    def forward(self, views, **options):
        return self.loss(*(self.encoder(v) for v in views), **options)


def check_training(rank, size, family, ddp_around):
    counts, mine = share_of(rank, size, True)
    n = sum(counts)
    if family == "SigLIP":
        step, options = Step(SigLIP(0.3, -2.0, gather_distributed=True)), {}
    else:
        loss = SupCon(TEMPERATURE, learnable_temperature=True, gather_distributed=True)
        step, options = Step(loss), {"labels": labels_of(n)[mine]}
    step.double()
    images = torch.randn(2, n, 6, dtype=torch.float64)
    single = copy.deepcopy(step)
    embeddings = [single.encoder(v) for v in images]
    if family == "SigLIP":
        mean = reference.siglip(*embeddings, single.loss.temperature, single.loss.logit_bias).mean()
    else:
        mean = sup_con_oracle(embeddings, labels_of(n), single.loss.temperature, "out", None)[1]
    expected = torch.autograd.grad(mean, list(single.parameters()))
    if ddp_around == "the step":
        ddp = DistributedDataParallel(step)  # which must outlive the backward
        ddp(images[:, mine], **options).backward()
    else:
        ddp = DistributedDataParallel(step.encoder)
        z = ddp(images[:, mine].flatten(0, 1)).unflatten(0, (2, -1))
        step.loss(*z, **options).backward()
    for parameter, grad in zip(step.parameters(), expected, strict=True):
        assert_within(parameter.grad, grad, 1e-12)


@pytest.mark.parametrize("ddp_around", ["the step", "the encoder alone"])
@pytest.mark.parametrize("family", ["SupCon", "SigLIP"])
def test_parameters_under_ddp(world, family, ddp_around):
    """Scale and bias get their mean gradient, also where DDP does not know of them."""
    world.run(check_training, family, ddp_around)


def check_disagreement(rank, size):
    z = torch.randn(4, 3 + rank)
    with pytest.raises(ValueError, match="processes must bring rows alike"):
        siglip(z, z, gather_distributed=True)
    with pytest.raises(ValueError, match="processes must bring rows alike"):
        sup_con(z, labels=torch.arange(4), gather_distributed=True)
    z, labels = torch.randn(4, 3), torch.arange(4, dtype=(torch.int32, torch.int64)[rank % 2])
    with pytest.raises(ValueError, match="labels torch"):
        sup_con(z, labels=labels, gather_distributed=True)


def test_processes_that_disagree_all_raise(several):
    several.run(check_disagreement)


def test_several_processes_without_a_group_are_told_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    z = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="init_process_group"):
        siglip(z, z, gather_distributed=True)
    with pytest.raises(RuntimeError, match="init_process_group"):
        SupCon(gather_distributed=True)(z, labels=torch.arange(4))
    with pytest.raises(ValueError, match="process_group is used only with"):
        SigLIP(process_group=object())
