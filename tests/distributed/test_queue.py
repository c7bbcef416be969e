"""The queue of a training job: one and the same on every process."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contrastive_kit import NegativeQueue
from contrastive_kit.functional import info_nce


def everyones(x, size):
    """``x`` of every rank, which must have the same shape on all."""
    gathered = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(gathered, x.contiguous())
    return gathered


def check_in_sync(rank, size, queue_size):
    queue = NegativeQueue(3, queue_size, gather_distributed=True)
    expected = torch.empty(0, 3, dtype=torch.float64)
    for step in range(5):
        counts = [1 + (step + 2 * r) % 4 for r in range(size)]
        keys = torch.randn(sum(counts), 3, dtype=torch.float64)
        begin = sum(counts[:rank])
        before = queue(keys[begin : begin + counts[rank]].float())
        torch.testing.assert_close(before.double(), expected, rtol=0, atol=1e-6)
        expected = torch.cat([expected, F.normalize(keys, dim=1)])[-queue_size:]
        assert all(torch.equal(x, queue.rows) for x in everyones(queue.rows, size))
        assert len(queue) == len(expected)
    torch.testing.assert_close(queue.negatives().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("queue_size", [2, 11, 100])
def test_it_holds_the_keys_of_all_processes_in_order_of_rank(world, queue_size):
    world.run(check_in_sync, queue_size)


def check_labels(rank, size):
    queue = NegativeQueue(2, 7, gather_distributed=True, labels=True)
    expected = []
    for step in range(4):
        counts = [1 + (step + 2 * r) % 4 for r in range(size)]
        begin = sum(counts[:rank])
        labels = torch.arange(sum(counts), dtype=torch.int16) + 100 * step
        mine = labels[begin : begin + counts[rank]]
        rows, held = queue(torch.stack([mine.float() + 1, torch.ones(len(mine))], 1), mine)
        assert held.tolist() == expected
        torch.testing.assert_close(rows[:, 0] / rows[:, 1] - 1, held.float(), rtol=1e-4, atol=1e-4)
        expected = [*expected, *labels.tolist()][-7:]
    assert queue.labels().tolist() == expected


def test_labels_of_all_processes_stay_with_their_keys(world):
    world.run(check_labels)


def check_evaluation(rank, size):
    queue = NegativeQueue(3, 8, gather_distributed=True)
    queue(torch.randn(2, 3))
    before = queue.negatives()
    queue.eval()
    if rank == 0:
        assert torch.equal(queue(torch.randn(2, 3)), before)
    queue.train()
    queue(torch.randn(2, 3))
    assert len(queue) == min(8, 4 * size)


def test_evaluation_on_one_process_waits_for_nobody(several):
    several.run(check_evaluation)


def check_subgroup(rank, size):
    groups = [dist.new_group([r for r in range(size) if r % 2 == odd]) for odd in (0, 1)]
    queue = NegativeQueue(3, 8, gather_distributed=True, process_group=groups[rank % 2])
    queue(torch.full((rank + 1, 3), float(rank + 1)))
    assert len(queue) == sum(r + 1 for r in range(size) if r % 2 == rank % 2)
    with pytest.raises(ValueError, match="process_group must contain this process"):
        NegativeQueue(3, 8, gather_distributed=True, process_group=groups[1 - rank % 2])


def test_subgroups(several):
    several.run(check_subgroup)


class MoCo(nn.Module):
    def __init__(self, dim, queue):
        super().__init__()
        self.query, self.key = nn.Linear(5, dim), nn.Linear(5, dim)
        self.key.requires_grad_(False)
        self.queue = queue

    def forward(self, x):
        key = self.key(x)
        return info_nce(self.query(x), key, self.queue(key), temperature=0.2)


def check_training(rank, size):
    """Under DDP, which broadcasts buffers, as in one process with the whole batch."""
    single = MoCo(4, NegativeQueue(4, 13)).double()
    several = MoCo(4, NegativeQueue(4, 13, gather_distributed=True)).double()
    several.load_state_dict(single.state_dict())
    ddp = DistributedDataParallel(several)
    optimizers = [torch.optim.SGD(m.query.parameters(), lr=0.5) for m in (single, several)]
    for _ in range(4):
        x = torch.randn(3 * size, 5, dtype=torch.float64)
        for module, batch, optimizer in zip(
            (single, ddp), (x, x[3 * rank : 3 * rank + 3]), optimizers, strict=True
        ):
            optimizer.zero_grad()
            module(batch).backward()
            optimizer.step()
    assert (single.query.weight.grad != 0).any()
    torch.testing.assert_close(several.query.weight, single.query.weight, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(several.queue.negatives(), single.queue.negatives())


def test_training_is_that_of_one_process(world):
    world.run(check_training)


def check_disagreement(rank, size):
    queue = NegativeQueue(3, 4, gather_distributed=True).to(
        torch.float64 if rank == 0 else torch.float32
    )
    with pytest.raises(ValueError, match="rows alike in all but their number"):
        queue(torch.randn(2, 3))
    assert len(queue) == 0


def test_queues_that_differ_are_refused_on_every_process(several):
    several.run(check_disagreement)


def check_no_keys(rank, size):
    queue = NegativeQueue(3, 8, gather_distributed=True)
    keys = torch.randn(2, 3)
    queue(keys if rank == 0 else keys[:0])
    expected = F.normalize(everyones(keys, size)[0], dim=1)
    torch.testing.assert_close(queue.negatives(), expected)
    queue(keys[:0])
    assert len(queue) == 2


def test_a_process_may_have_no_keys(world):
    world.run(check_no_keys)


def check_refusals(rank, size):
    queue = NegativeQueue(3, 4, gather_distributed=True)
    odd = rank == size - 1
    dtype = torch.bfloat16 if odd else torch.float32
    with pytest.raises(ValueError, match=f"alike .*rank {size - 1}: .*keys of torch.bfloat16"):
        queue(torch.randn(2, 3, dtype=dtype))
    message = rf"keys must have shape \(n, 3\), got \(2, 5\){'' if odd else '.*this is rank'}"
    with pytest.raises(ValueError, match=message):
        queue(torch.randn(2, 5 if odd else 3))
    assert len(queue) == 0
    queue(torch.randn(2, 3))
    assert len(queue) == min(4, 2 * size)


def test_keys_that_one_process_refuses_are_refused_on_all(several):
    several.run(check_refusals)


def check_warning(rank, size, gather, broadcast):
    """Inside DDP only a queue that gathers, or that nobody overwrites, is right."""
    model = DistributedDataParallel(
        MoCo(4, NegativeQueue(4, 8, gather_distributed=gather)), broadcast_buffers=broadcast
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.randn(2, 5)).sum().backward()
    said = [str(w.message) for w in caught if "NegativeQueue" in str(w.message)]
    assert len(said) == (broadcast and not gather)
    assert all("gather_distributed=True, or broadcast_buffers=False" in text for text in said)


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("gather", [True, False])
def test_a_queue_that_ddp_overwrites_says_so(pair, gather, broadcast):
    pair.run(check_warning, gather, broadcast)
