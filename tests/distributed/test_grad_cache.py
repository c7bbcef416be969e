"""GradCache under DDP and fully_shard: one reduction, and the gradient of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from contrastive_kit import GradCache, NTXent

N, D = 13, 5
DDP_OPTIONS = [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}]


def encoder(*inner):
    torch.manual_seed(1)
    layers = [nn.Linear(12, 9), *inner, nn.GELU(), nn.Linear(9, D)]
    return nn.Sequential(*layers).double()


def all_views(n=N):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, 12, generator=generator).double() for _ in range(2)]


def rows(rank, size, first):
    """The rows of this rank: ``first`` for rank 0, the rest in equal parts for the others."""
    if size == 1:
        return slice(None)
    rest = (N - first) // (size - 1)
    begin = 0 if rank == 0 else first + (rank - 1) * rest
    end = first if rank == 0 else N if rank == size - 1 else begin + rest
    return slice(begin, end)


def loss_fn(**options):
    return NTXent(0.2, **options).double()


def expected_state(times=1.0):
    """Gradients of one process on the whole batch: encoder and learnable temperature."""
    whole, whole_loss = encoder(), loss_fn(learnable_temperature=True)
    whole_loss(*whole(torch.cat(all_views())).chunk(2)).backward()
    return [times * p.grad for p in (*whole.parameters(), *whole_loss.parameters())]


def check(parameters, expected):
    for parameter, want in zip(parameters, expected, strict=True):
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-13)


def counted(ddp):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    reductions = []

    def hook(state, bucket):
        reductions.append(bucket.index())
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, hook)
    return reductions


class Everything(nn.Module):
    """Encoder, GradCache and loss in one module, as training frameworks have it."""

    def __init__(self, *inner, chunk_size=3, with_unused=False):
        super().__init__()
        self.encode = GradCache(encoder(*inner), chunk_size=chunk_size)
        self.loss_fn = loss_fn(learnable_temperature=True, gather_distributed=True)
        if with_unused:
            self.unused = nn.Linear(2, 2).double()

    def forward(self, *views):
        return self.loss_fn(*self.encode.views(*views))


def check_ddp_around_everything(rank, size, options, first):
    from torch.nn.parallel import DistributedDataParallel

    with_unused = "find_unused_parameters" in options
    ddp = DistributedDataParallel(Everything(with_unused=with_unused), **options)
    reductions = counted(ddp)
    mine = [view[rows(rank, size, first)] for view in all_views()]
    used = [*ddp.module.encode.parameters(), *ddp.module.loss_fn.parameters()]
    for step in range(3):
        ddp.zero_grad()
        ddp(*mine).backward()
        check(used, expected_state())
        assert len(set(reductions)) * (step + 1) == len(reductions), "one reduction a step"
    if with_unused:
        assert all(p.grad is None or not p.grad.any() for p in ddp.module.unused.parameters())

    ddp.zero_grad()
    reductions.clear()
    with ddp.no_sync():
        ddp(*mine).backward()
    assert not reductions
    ddp(*mine).backward()
    assert len(set(reductions)) == len(reductions) > 0
    check(used, expected_state(times=2))


def check_ddp_around_the_encoder(rank, size, options, first):
    from torch.nn.parallel import DistributedDataParallel

    ddp = DistributedDataParallel(encoder(), **options)
    loss = DistributedDataParallel(loss_fn(learnable_temperature=True, gather_distributed=True))
    reductions = counted(ddp)
    encode = GradCache(ddp, chunk_size=3)
    mine = [view[rows(rank, size, first)] for view in all_views()]
    for step in range(3):
        ddp.zero_grad()
        loss.zero_grad()
        loss(*encode.views(*mine)).backward()
        check((*ddp.parameters(), *loss.parameters()), expected_state())
        assert len(reductions) == step + 1, "one reduction a step"

    ddp.zero_grad()
    loss.zero_grad()
    with ddp.no_sync(), loss.no_sync():
        loss(*encode.views(*mine)).backward()
    assert len(reductions) == step + 1
    loss(*encode.views(*mine)).backward()
    assert len(reductions) == step + 2
    check((*ddp.parameters(), *loss.parameters()), expected_state(times=2))


def check_buffers_are_sent_once_a_step(rank, size, around_everything, first):
    """As by a plain DDP: those of rank 0, before the first chunk; the second pass sends none."""
    from torch.nn.parallel import DistributedDataParallel

    model = Everything(nn.BatchNorm1d(9))
    norm = model.encode.encoder[1]
    if around_everything:
        step = DistributedDataParallel(model)
    else:
        ddp = DistributedDataParallel(model.encode.encoder)
        encode = GradCache(ddp, chunk_size=3)

        def step(*views):
            return model.loss_fn(*encode.views(*views))

    mine = [view[rows(rank, size, first)] for view in all_views()]
    norm.running_mean.fill_(rank)
    before = torch.zeros(9).double()
    for _ in range(2):
        step(*mine).backward()
        mean = before
        for chunk in zip(*(view.split(3) for view in mine), strict=True):
            with torch.no_grad():
                hidden = model.encode.encoder[0](torch.cat(chunk))
            mean = 0.9 * mean + 0.1 * hidden.mean(0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-14)
        means = [torch.empty_like(mean) for _ in range(size)]
        dist.all_gather(means, mean)
        before = means[0]
    grads = [p.grad for p in model.encode.parameters()]
    for grad in grads:
        of_all = [torch.empty_like(grad) for _ in range(size)]
        dist.all_gather(of_all, grad)
        assert all(torch.equal(grad, other) for other in of_all)


def check_two_ddp_inside_the_encoder(rank, size):
    from torch.nn.parallel import DistributedDataParallel

    model = encoder()
    inside = nn.Sequential(DistributedDataParallel(model[:2]), DistributedDataParallel(model[2:]))
    reductions = [counted(part) for part in inside]
    mine = [view[rows(rank, size, 6)] for view in all_views()]
    loss = loss_fn(learnable_temperature=True, gather_distributed=True)
    loss(*GradCache(inside, chunk_size=4).views(*mine)).backward()
    check(inside.parameters(), expected_state()[:-1])
    assert [len(part) for part in reductions] == [1, 1]
    with pytest.raises(ValueError, match="static_graph"):
        GradCache(DistributedDataParallel(encoder(), static_graph=True), chunk_size=3)


def check_fully_shard(rank, size, root_is_everything):
    """Blocks and root sharded; GradCache around the root, or called by its forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    first, chunk_size = {2: (7, 4), 3: (5, 3)}[size]  # as many chunks on each rank
    model = Everything(chunk_size=chunk_size)
    inner = model.encode.encoder
    root = model if root_is_everything else inner
    temperature = set(model.loss_fn.parameters())  # 0-dim, which fully_shard does not shard
    for part in (inner[0], inner[2], root):
        fully_shard(part, mesh=mesh, ignored_params=temperature)
    mine = [view[rows(rank, size, first)] for view in all_views()]
    optimizer = torch.optim.SGD(root.parameters(), lr=0.05)
    reduced_before = []
    shards = list(inner.parameters())
    hook = inner[0].register_forward_pre_hook(
        lambda *_: reduced_before.append(any(shard.grad is not None for shard in shards))
    )
    whole, whole_loss = encoder(), loss_fn(learnable_temperature=True)
    whole_parameters = [*whole.parameters(), *(whole_loss.parameters() if root is model else ())]
    whole_optimizer = torch.optim.SGD(whole_parameters, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        whole_optimizer.zero_grad()
        loss = model(*mine)
        loss.backward()
        whole_loss(*whole(torch.cat(all_views())).chunk(2)).backward()
        check(root.parameters(), [p.grad for p in whole_parameters])
        optimizer.step()
        whole_optimizer.step()
        for shard, want in zip(inner.parameters(), whole.parameters(), strict=True):
            assert hasattr(shard, "full_tensor"), "parameters are sharded after a step"
            torch.testing.assert_close(shard.full_tensor(), want.data, rtol=1e-10, atol=1e-13)
    assert not any(reduced_before), "no gradient before that of the last chunk"
    hook.remove()


@pytest.mark.parametrize("options", DDP_OPTIONS, ids=str)
@pytest.mark.parametrize("first", [5, 7, 11])
def test_ddp_around_a_module_with_everything(few, options, first):
    few.run(check_ddp_around_everything, options, first)


@pytest.mark.parametrize("options", DDP_OPTIONS, ids=str)
@pytest.mark.parametrize("first", [5, 7, 11])
def test_ddp_around_the_encoder(few, options, first):
    few.run(check_ddp_around_the_encoder, options, first)


@pytest.mark.parametrize("around_everything", [True, False])
@pytest.mark.parametrize("first", [6, 9])
def test_buffers_are_sent_once_a_step(few, around_everything, first):
    few.run(check_buffers_are_sent_once_a_step, around_everything, first)


def test_two_ddp_inside_the_encoder(few):
    few.run(check_two_ddp_inside_the_encoder)


@pytest.mark.parametrize("root_is_everything", [True, False])
def test_fully_shard(few, root_is_everything):
    few.run(check_fully_shard, root_is_everything)
