"""Losses with several positives across two sides, over processes: what one process finds.

The oracle is the formula of ``contrastive_kit.reference`` on the concatenated batch, in one
process and in float64.
"""

import pytest
import torch
import torch.distributed as dist
from budgets import VALUE, assert_within, gradient_budget

from contrastive_kit import reference
from contrastive_kit.functional import siglip, similarity_distillation, sup_con

TEMPERATURE = 0.2
BUDGET = 10 * gradient_budget(torch.float64, TEMPERATURE)


def share_of(rank, counts):
    """The part of the whole that is this rank's."""
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def mean_over_ranks(x, size):
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / size


def weighted(losses, weights):
    """The sum of the weighted losses of anchors with a positive, over that of their weights."""
    matched = ~losses.isnan()
    return (losses.nan_to_num() * weights).sum() / (weights * matched).sum()


def check_keys(rank, size, variant, symmetric, weighs):
    images, captions = [3 + 2 * r % 3 for r in range(size)], [5 - r % 2 for r in range(size)]
    n, m = sum(images), sum(captions)
    mine, mine_of_keys = share_of(rank, images), share_of(rank, captions)
    labels, key_labels = torch.arange(n) * 3 % (n - 1), torch.arange(m) * 5 % (n + 1)
    weights = torch.rand(n, dtype=torch.float64) if weighs else torch.ones(n, dtype=torch.float64)
    views = torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(m, 5, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    rows, row_labels = views.flatten(0, 1), labels.repeat(2)
    forth = reference.sup_con_between(rows, row_labels, keys, key_labels, tau, variant)
    back = reference.sup_con_between(keys, key_labels, rows, row_labels, tau, variant)
    mean = weighted(forth, weights.repeat(2))
    if symmetric:
        mean = (mean + weighted(back, torch.ones_like(back))) / 2
    expected = torch.autograd.grad(mean, (views, keys, tau))

    inputs = [x.detach().clone().requires_grad_() for x in (*views[:, mine], keys[mine_of_keys])]
    own_tau = tau.detach().clone().requires_grad_()

    def call(temperature, reduction):
        return sup_con(
            *inputs[:2],
            labels=labels[mine],
            keys=inputs[2],
            key_labels=key_labels[mine_of_keys],
            temperature=temperature,
            variant=variant,
            symmetric=symmetric,
            sample_weight=weights[mine] if weighs else None,
            reduction=reduction,
            gather_distributed=True,
        )

    loss = call(own_tau, "mean")
    *grads, d_tau = torch.autograd.grad(loss, (*inputs, own_tau))
    assert_within(mean_over_ranks(loss, size), mean, 10 * VALUE[torch.float64])
    assert_within(torch.stack(grads[:2]) / size, expected[0][:, mine], BUDGET)
    assert_within(grads[2] / size, expected[1][mine_of_keys], BUDGET)
    assert_within(mean_over_ranks(d_tau, size), expected[2], 10 * BUDGET)
    each = call(TEMPERATURE, "none")
    of_rows = (forth.nan_to_num() * weights.repeat(2)).view(2, n)[:, mine].detach()
    if symmetric:
        of_keys = back.nan_to_num()[mine_of_keys].detach()
        torch.testing.assert_close(each, torch.cat([of_rows.flatten(), of_keys]))
    else:
        torch.testing.assert_close(each, of_rows)


@pytest.mark.parametrize("variant", ["out", "in", "pairwise"])
@pytest.mark.parametrize(("symmetric", "weighs"), [(False, False), (False, True), (True, False)])
def test_sup_con_between_two_sides(world, variant, symmetric, weighs):
    world.run(check_keys, variant, symmetric, weighs)


def check_bad_keys(rank, size):
    z, labels = torch.randn(3, 4), torch.arange(3)
    keys = torch.empty(0, 4) if rank == size - 1 else torch.randn(2, 4)
    with pytest.raises(ValueError, match="keys must have no empty dimension"):
        sup_con(
            z, labels=labels, keys=keys, key_labels=labels[: len(keys)], gather_distributed=True
        )


def test_empty_keys_of_one_process_raise_on_all(several):
    several.run(check_bad_keys)


def check_siglip(rank, size, balance, weighs):
    images, captions = [3 + 2 * r % 3 for r in range(size)], [5 - r % 2 for r in range(size)]
    n, m = sum(images), sum(captions)
    mine, mine_of_z2 = share_of(rank, images), share_of(rank, captions)
    labels, z2_labels = torch.arange(n) * 3 % (n - 1), torch.arange(m) * 5 % (n + 1)
    weights = torch.rand(n, dtype=torch.float64) if weighs else torch.ones(n, dtype=torch.float64)
    exact = [torch.randn(count, 5, dtype=torch.float64) for count in (n, m)]
    exact += [torch.tensor(x, dtype=torch.float64) for x in (TEMPERATURE, -2.0)]
    exact = [x.requires_grad_() for x in exact]
    losses = reference.siglip_with_labels(
        exact[0], labels, exact[1], z2_labels, *exact[2:], balance_positives=balance
    )
    mean = reference.weighted_mean(losses, weights)
    expected = torch.autograd.grad(mean, exact)
    own = {
        "labels": labels[mine],
        "z2_labels": z2_labels[mine_of_z2],
        "balance_positives": balance,
        "sample_weight": weights[mine] if weighs else None,
        "gather_distributed": True,
    }
    inputs = [exact[0][mine], exact[1][mine_of_z2], *exact[2:]]
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = siglip(*inputs[:2], temperature=inputs[2], logit_bias=inputs[3], **own)
    dz1, dz2, d_tau, d_bias = torch.autograd.grad(loss, inputs)
    assert_within(mean_over_ranks(loss, size), mean, 10 * VALUE[torch.float64])
    assert_within(dz1 / size, expected[0][mine], BUDGET)
    assert_within(dz2 / size, expected[1][mine_of_z2], BUDGET)
    assert_within(mean_over_ranks(d_tau, size), expected[2], 10 * BUDGET)
    assert_within(mean_over_ranks(d_bias, size), expected[3], 10 * BUDGET)
    each = siglip(*inputs[:2], temperature=TEMPERATURE, logit_bias=-2.0, reduction="none", **own)
    torch.testing.assert_close(each, (losses * weights)[mine].detach())


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("balance", [False, True])
def test_siglip_with_labels(world, balance, weighs):
    world.run(check_siglip, balance, weighs)


def check_distillation(rank, size, symmetric, weighs):
    queries, keys = [3 + 2 * r % 3 for r in range(size)], [5 - r % 2 for r in range(size)]
    n, m = sum(queries), sum(keys)
    mine, mine_of_keys = share_of(rank, queries), share_of(rank, keys)
    weights = torch.rand(n, dtype=torch.float64) if weighs else torch.ones(n, dtype=torch.float64)
    query, key, taught, taught_key = (
        torch.randn(count, d, dtype=torch.float64) for count, d in ((n, 5), (m, 5), (n, 3), (m, 3))
    )
    tau = torch.tensor(TEMPERATURE, dtype=torch.float64)
    exact = [x.clone().requires_grad_() for x in (query, key, tau)]
    forth = reference.similarity_distillation(*exact[:2], taught, taught_key, exact[2], 0.1)
    back = reference.similarity_distillation(*exact[1::-1], taught_key, taught, exact[2], 0.1)
    mean = reference.weighted_mean(forth, weights)
    if symmetric:
        mean = (mean + back.mean()) / 2
    expected = torch.autograd.grad(mean, exact)

    inputs = [x.clone().requires_grad_() for x in (query[mine], key[mine_of_keys], tau)]

    def call(temperature, reduction):
        return similarity_distillation(
            *inputs[:2],
            taught[mine],
            taught_key[mine_of_keys],
            temperature=temperature,
            teacher_temperature=0.1,
            symmetric=symmetric,
            sample_weight=weights[mine] if weighs else None,
            reduction=reduction,
            gather_distributed=True,
        )

    loss = call(inputs[2], "mean")
    d_query, d_key, d_tau = torch.autograd.grad(loss, inputs)
    assert_within(mean_over_ranks(loss, size), mean, 10 * VALUE[torch.float64])
    assert_within(d_query / size, expected[0][mine], BUDGET)
    assert_within(d_key / size, expected[1][mine_of_keys], BUDGET)
    assert_within(mean_over_ranks(d_tau, size), expected[2], 10 * BUDGET)
    of_rows = (forth * weights)[mine].detach()
    if symmetric:
        of_rows = torch.cat([of_rows, back[mine_of_keys].detach()])
    torch.testing.assert_close(call(TEMPERATURE, "none"), of_rows)


@pytest.mark.parametrize(("symmetric", "weighs"), [(False, False), (False, True), (True, False)])
def test_similarity_distillation(world, symmetric, weighs):
    world.run(check_distillation, symmetric, weighs)


def check_multi_hot(rank, size, n_views, weighs):
    counts = [3 + 2 * r % 3 for r in range(size)]
    n, mine = sum(counts), share_of(rank, counts)
    labels = (torch.rand(n, 4, dtype=torch.float64) < 0.3) * torch.arange(1, 5) / 3
    labels[0] = 0
    labels[1:3, 1] = 1
    weights = torch.rand(n, dtype=torch.float64) if weighs else torch.ones(n, dtype=torch.float64)
    views = torch.randn(n_views, n, 5, dtype=torch.float64, requires_grad=True)
    losses = reference.sup_con_of_multi_hot(views, labels, TEMPERATURE)
    mean = weighted(losses, weights.expand_as(losses))
    (expected,) = torch.autograd.grad(mean, views)
    inputs = [x.detach().clone().requires_grad_() for x in views[:, mine]]
    loss = sup_con(
        *inputs,
        labels=labels[mine],
        temperature=TEMPERATURE,
        sample_weight=weights[mine] if weighs else None,
        gather_distributed=True,
    )
    grads = torch.stack(torch.autograd.grad(loss, inputs))
    assert_within(mean_over_ranks(loss, size), mean, 10 * VALUE[torch.float64])
    torch.testing.assert_close(grads / size, expected[:, mine], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("n_views", [1, 2])
def test_sup_con_with_several_labels_of_an_image(world, n_views, weighs):
    world.run(check_multi_hot, n_views, weighs)
