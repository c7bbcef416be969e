"""A temperature of each anchor over processes: what one process finds on the whole batch."""

import pytest
import torch
import torch.distributed as dist

from contrastive_kit.functional import info_nce, siglip

LOSSES = {
    "one way": (info_nce, {}),
    "clip": (info_nce, {"symmetric": True}),
    "clip, sides": (
        info_nce,
        {"symmetric": True, "query_negatives": True, "key_negatives": True},
    ),
    "siglip": (siglip, {}),
}


def check(rank, size, name):
    loss_fn, options = LOSSES[name]
    counts = [3 + 2 * r % 3 for r in range(size)]
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    whole = [torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    whole.append((0.1 + torch.rand(sum(counts), dtype=torch.float64)).requires_grad_())
    expected = loss_fn(*whole[:2], temperature=whole[2], **options)
    own = [x.detach()[mine].clone().requires_grad_() for x in whole]
    loss = loss_fn(*own[:2], temperature=own[2], gather_distributed=True, **options)
    grads = torch.autograd.grad(loss, own)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / size, expected.detach())
    for ours, theirs in zip(grads, torch.autograd.grad(expected, whole), strict=True):
        torch.testing.assert_close(ours / size, theirs[mine], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_that_of_one_process(few, name):
    few.run(check, name)
