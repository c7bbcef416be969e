"""SogCLR over processes: losses, gradients and normalizers of one process on the whole batch."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contrastive_kit import SogCLR


def share_of(rank, size, unequal):
    counts = [4 + (3 * r % 5 if unequal else 0) for r in range(size)]
    return sum(counts), slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def check_steps(rank, size, unequal):
    n, mine = share_of(rank, size, unequal)
    gathered = SogCLR(n + 3, 0.2, gamma=0.4, gather_distributed=True).double()
    whole = SogCLR(n + 3, 0.2, gamma=0.4).double()
    for step in range(3):
        views = torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True)
        index = (torch.randperm(n + 3)[:n] // (1 + step % 2)).int()
        expected = whole(*views, index=index)
        z = views.detach()[:, mine].clone().requires_grad_()
        loss = gathered(*z, index=index[mine])
        grad = torch.autograd.grad(loss, z)[0]
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / size, expected.detach(), rtol=1e-12, atol=1e-12)
        expected_grad = torch.autograd.grad(expected, views)[0][:, mine]
        torch.testing.assert_close(grad / size, expected_grad, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(gathered.log_normalizer, whole.log_normalizer)


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
def test_steps_are_those_of_one_process(few, unequal):
    few.run(check_steps, unequal)


class Model(nn.Module):
    def __init__(self, loss_fn):
        super().__init__()
        self.layer, self.loss_fn = nn.Linear(5, 4), loss_fn

    def forward(self, x, index):
        return self.loss_fn(*self.layer(x).unbind(0), index=index)


def check_warning(rank, size, gather, broadcast):
    loss_fn = SogCLR(20, gather_distributed=gather)
    model = DistributedDataParallel(Model(loss_fn), broadcast_buffers=broadcast)
    x = torch.randn(size, 2, 4, 5)[rank]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(x, 4 * rank + torch.arange(4)).backward()
    said = [str(w.message) for w in caught if "SogCLR" in str(w.message)]
    assert len(said) == (broadcast and not gather)
    assert all("gather_distributed=True, or broadcast_buffers=False" in text for text in said)
    known = int((loss_fn.log_normalizer > -torch.inf).sum())
    if gather:
        assert known == 4 * size
    elif not broadcast:
        assert known == 4


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("gather", [True, False])
def test_normalizers_that_ddp_overwrites_are_spoken_of(pair, gather, broadcast):
    pair.run(check_warning, gather, broadcast)


def check_refusal(rank, size):
    loss_fn = SogCLR(5, gather_distributed=True)
    index = torch.tensor([0, 9 if rank == 1 else 1])
    with pytest.raises(ValueError, match=r"index must be from 0 to num_images - 1 \(4\)"):
        loss_fn(*torch.randn(2, 2, 3), index=index)
    assert (loss_fn.log_normalizer == -torch.inf).all()


def test_an_index_that_one_process_refuses_is_refused_on_all(several):
    several.run(check_refusal)


def check_settings(rank, size):
    loss_fn = SogCLR(5, gamma=0.5 + 0.1 * rank, gather_distributed=True)
    with pytest.raises(ValueError, match="gamma 0"):
        loss_fn(*torch.randn(2, 2, 3), index=torch.arange(2))


def test_processes_that_differ_in_options_are_told(pair):
    pair.run(check_settings)
