"""Against the distributed losses of other libraries, each with its documented factor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contrastive_kit.functional import info_nce, nt_xent


def gradient(loss, x, y, module, rank, n):
    """Gradient of the parameters after DDP's mean, and the loss of this rank."""
    ddp = DistributedDataParallel(module)
    mine = slice(rank * n, rank * n + n)
    a, b = ddp(torch.stack([x[mine], y[mine]]))
    value = loss(F.normalize(a, dim=1), F.normalize(b, dim=1))
    value.backward()
    return module.weight.grad, value.detach()


def problem(size):
    module = nn.Linear(5, 4, bias=False).double()
    x = torch.randn(6 * size, 5, dtype=torch.float64)
    return module, x, x + torch.randn_like(x)


def copy_of(module):
    twin = nn.Linear(5, 4, bias=False).double()
    twin.load_state_dict(module.state_dict())
    return twin


def check_open_clip(rank, size, local_loss, gather_with_grad):
    open_clip = pytest.importorskip("open_clip.loss")
    module, x, y = problem(size)
    theirs = open_clip.ClipLoss(
        local_loss=local_loss, gather_with_grad=gather_with_grad, rank=rank, world_size=size
    )
    expected, value = gradient(
        lambda a, b: info_nce(a, b, temperature=0.1, symmetric=True, gather_distributed=True),
        x, y, copy_of(module), rank, 6,
    )  # fmt: skip
    grad, their_value = gradient(lambda a, b: theirs(a, b, 10.0), x, y, copy_of(module), rank, 6)
    if local_loss:
        torch.testing.assert_close(their_value, value)
    if gather_with_grad:
        torch.testing.assert_close(grad, expected)
    elif not local_loss:
        # The defaults: every rank computes the whole loss, and its rows get one share of it.
        torch.testing.assert_close(grad, expected / size)
    else:
        cosine = F.cosine_similarity(grad.flatten(), expected.flatten(), dim=0)
        assert cosine < 0.9999


@pytest.mark.parametrize("gather_with_grad", [False, True])
@pytest.mark.parametrize("local_loss", [False, True])
def test_clip_is_that_of_open_clip_with_gather_with_grad(pair, local_loss, gather_with_grad):
    pytest.importorskip("open_clip.loss")
    pair.run(check_open_clip, local_loss, gather_with_grad)


def check_lightly(rank, size):
    lightly_loss = pytest.importorskip("lightly.loss")
    module, x, y = problem(size)
    theirs = lightly_loss.NTXentLoss(0.1, gather_distributed=True)
    expected, value = gradient(
        lambda a, b: nt_xent(a, b, temperature=0.1, gather_distributed=True),
        x, y, copy_of(module), rank, 6,
    )  # fmt: skip
    grad, their_value = gradient(theirs, x, y, copy_of(module), rank, 6)
    torch.testing.assert_close(their_value, value)
    torch.testing.assert_close(grad, expected)


def test_nt_xent_is_that_of_lightly(pair):
    pytest.importorskip("lightly.loss")
    pair.run(check_lightly)


def check_metric_learning(rank, size):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distributed = pytest.importorskip("pytorch_metric_learning.utils.distributed")
    module, x, y = problem(size)
    theirs = distributed.DistributedLossWrapper(losses.NTXentLoss(0.1), efficient=False)
    labels = torch.arange(6 * rank, 6 * rank + 6).repeat(2)
    expected, _ = gradient(
        lambda a, b: nt_xent(a, b, temperature=0.1, gather_distributed=True),
        x, y, copy_of(module), rank, 6,
    )  # fmt: skip
    grad, _ = gradient(
        lambda a, b: theirs(torch.cat([a, b]), labels), x, y, copy_of(module), rank, 6
    )
    torch.testing.assert_close(grad, expected)


def test_nt_xent_is_that_of_pytorch_metric_learning(pair):
    pytest.importorskip("pytorch_metric_learning.losses")
    pair.run(check_metric_learning)
