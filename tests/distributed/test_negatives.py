"""Negatives of the batch and of the caller over processes: what one process finds on everything.

The oracle is the formula of ``contrastive_kit.reference`` on the concatenated batch, in one
process and in float64.
"""

import pytest
import torch
import torch.distributed as dist
from budgets import VALUE, assert_within, gradient_budget

from contrastive_kit import reference
from contrastive_kit.functional import info_nce

TEMPERATURE = 0.2
SAME_SIDE = {"query_negatives": True, "key_negatives": True}
CASES = {
    "shared": {},
    "shared, symmetric": {"symmetric": True},
    "shared, everything": {"symmetric": True, **SAME_SIDE, "hardness": 0.5},
    "per query": {"query_negatives": True},
    "per query, symmetric": {"symmetric": True, **SAME_SIDE, "label_smoothing": 0.1},
    "none, same side": SAME_SIDE,
    "shared, without false": {"symmetric": True, **SAME_SIDE, "false_negative_margin": 0.1},
    "per query, without false": {"false_negative_margin": 0.2, "hardness": 0.5},
}


def share_of(counts, rank):
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def oracle(inputs, temperature, ids, negative_ids, options):
    options = dict(options)
    q, k, *more = inputs
    both = options.pop("symmetric", False)
    if not both:
        given = {"negatives": more[0], "negative_ids": negative_ids} if more else {}
        return reference.info_nce(q, k, temperature, ids, **given, **options)
    of_queries = options.pop("query_negatives", False)
    of_keys = options.pop("key_negatives", False)
    rows = reference.info_nce(
        q, k, temperature, ids, negatives=more[0], negative_ids=negative_ids,
        query_negatives=of_queries, **options,
    )  # fmt: skip
    columns = reference.info_nce(k, q, temperature, ids, query_negatives=of_keys, **options)
    return torch.stack([rows, columns])


def check(rank, size, name):
    counts = [4 + (3 * r % 5) for r in range(size)]
    n, mine = sum(counts), share_of(counts, rank)
    # Of the first process none, where there are others.
    more_counts = [3 * r if size > 1 else 5 for r in range(size)]
    shared = share_of(more_counts, rank)
    ids = torch.arange(n) * 3 % max(2, n - 3) - 2
    tensors = [*torch.randn(2, n, 5, dtype=torch.float64)]
    negative_ids, own = None, mine
    if name.startswith("shared"):
        tensors.append(torch.randn(sum(more_counts), 5, dtype=torch.float64))
        own = shared
    elif name.startswith("per query"):
        tensors.append(torch.randn(n, 3, 5, dtype=torch.float64))
    if len(tensors) == 3:
        negative_ids = torch.randint(-2, 5, tensors[2].shape[:-1], dtype=torch.int16)
    inputs = [x.clone().requires_grad_() for x in tensors]
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    losses = oracle(inputs, temperature, ids, negative_ids, CASES[name])
    expected = torch.autograd.grad(losses.mean(), (*inputs, temperature))

    z = [tensors[0][mine], tensors[1][mine], *(x[own] for x in tensors[2:])]
    z = [x.clone().requires_grad_() for x in z]
    tau = temperature.detach().clone().requires_grad_()
    call = {
        "ids": ids[mine],
        "negative_ids": None if negative_ids is None else negative_ids[own],
        "in_batch_negatives": True,
        "gather_distributed": True,
        **CASES[name],
    }
    loss = info_nce(*z, temperature=tau, **call)
    *dz, d_tau = torch.autograd.grad(loss, (*z, tau))
    mean, d_temperature = loss.detach().clone(), d_tau.clone()
    for x in (mean, d_temperature):
        dist.all_reduce(x)
    budget = 10 * gradient_budget(torch.float64, TEMPERATURE)
    assert_within(mean / size, losses.mean(), 10 * VALUE[torch.float64])
    assert_within(d_temperature / size, expected[-1], 10 * budget)
    for grad, whole, part in zip(dz, expected, (mine, mine, own), strict=False):
        if part.start < part.stop:
            assert_within(grad / size, whole[part], budget)
    each = info_nce(*z, temperature=TEMPERATURE, reduction="none", **call)
    torch.testing.assert_close(each, losses[..., mine], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(CASES))
def test_equals_one_process(few, name):
    few.run(check, name)


def test_a_world_of_one(alone):
    alone.run(check, "shared, everything")


def check_disagreement(rank, size):
    z, more = torch.randn(4, 3), torch.randn(5, 3)
    call = {"gather_distributed": True, "in_batch_negatives": True}
    with pytest.raises(ValueError, match="processes must bring rows alike"):
        info_nce(z, z, None if rank else more, **call)
    with pytest.raises(ValueError, match=r"processes must bring rows alike.*per_query True"):
        info_nce(z, z, more.expand(4, 5, 3) if rank else more, **call)


def test_processes_that_disagree_all_raise(pair):
    pair.run(check_disagreement)
