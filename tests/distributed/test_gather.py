"""Gathering of rows: values, gradients, agreement, and what happens when a process dies."""

import datetime
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from worlds import TIME_OUT, Failed

from contrastive_kit import InfoNCE, NTXent, SigLIP, SupCon
from contrastive_kit.distributed import (
    average_gradient,
    checked,
    gather_rows,
    rank_and_size,
    row_counts,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def counts_for(size, unequal):
    return [3 + (2 * rank if unequal else 0) for rank in range(size)]


def batch(counts, *shape, dtype=torch.float64):
    """The whole batch, the same on every rank, and where each rank's share begins."""
    whole = torch.randn(sum(counts), *shape, dtype=torch.float64).to(dtype)
    return whole, [sum(counts[:rank]) for rank in range(len(counts))]


def check_values_and_gradients(rank, size, unequal, dtype):
    counts = counts_for(size, unequal)
    whole, start = batch(counts, 2, 5, dtype=dtype)
    mine = slice(start[rank], start[rank] + counts[rank])
    x = whole[mine].clone().requires_grad_()
    gathered = gather_rows(x)
    assert torch.equal(gathered, whole)
    assert gathered.dtype == dtype
    # Each rank has weights of its own; the gradient is their sum over ranks. Small integers are
    # exact in half precision too.
    weights = [torch.randint(-4, 5, whole.shape).to(dtype) for _ in range(size)]
    (gradient,) = torch.autograd.grad((gathered * weights[rank]).sum(), x)
    assert torch.equal(gradient, sum(weights)[mine])
    assert gradient.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unequal", [False, True])
def test_values_and_gradients(world, unequal, dtype):
    world.run(check_values_and_gradients, unequal, dtype)


def check_integers(rank, size):
    n = rank + 1
    gathered = gather_rows(torch.arange(n) + 2**40 * rank)
    expected = torch.cat([torch.arange(r + 1) + 2**40 * r for r in range(size)])
    assert torch.equal(gathered, expected)
    assert not gathered.requires_grad
    empty = gather_rows(torch.ones(rank, 2))
    assert empty.shape == (size * (size - 1) // 2, 2)


def test_integers_and_no_rows(world):
    world.run(check_integers)


def check_second_derivative(rank, size):
    x = (torch.randn(2, 3, dtype=torch.float64) + rank).requires_grad_()
    (first,) = torch.autograd.grad((gather_rows(x) ** 3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, size * 3 * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, size * 6 * x)


def test_second_derivatives(several):
    several.run(check_second_derivative)


def check_collectives(rank, size):
    """Only the exchange of sizes, one gather, and in the backward one reduce-scatter."""
    calls = []

    def counted(name):
        original = getattr(dist, name)

        def call(*args, **options):
            calls.append(name)
            return original(*args, **options)

        return original, call

    gather, scatter = "all_gather_single", "reduce_scatter_single"
    if not hasattr(dist, gather):  # up to torch 2.13
        gather, scatter = "all_gather_into_tensor", "reduce_scatter_tensor"
    names = [gather, scatter, "all_reduce", "all_gather"]
    originals = {name: counted(name) for name in names}
    for name, (_, call) in originals.items():
        setattr(dist, name, call)
    try:
        x = torch.ones(2, 3, requires_grad=True)
        counts = row_counts(x)
        assert calls == [gather]
        gathered = gather_rows(x, counts=counts)
        assert calls == [gather] * 2
        gathered.sum().backward()
        assert calls == [gather] * 2 + [scatter]
    finally:
        for name, (original, _) in originals.items():
            setattr(dist, name, original)


def test_one_collective_in_each_direction(pair):
    pair.run(check_collectives)


def check_average(rank, size, dtype):
    x = torch.randn(3).to(dtype).requires_grad_()
    y = average_gradient(x)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(x, 2.0 * rank), retain_graph=True)
    assert torch.equal(grad, torch.full_like(x, size - 1.0))
    x = x.detach().double().requires_grad_()
    cube = (average_gradient(x) ** 3).sum() * (rank + 1)
    (first,) = torch.autograd.grad(cube, x, create_graph=True)
    torch.testing.assert_close(first, 3 * x**2 * (size + 1) / 2)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x * (size + 1) / 2)


def check_average_twice(rank, size):
    x = torch.randn(3, requires_grad=True)
    y = average_gradient(x)
    # Of what is already the mean, it is the mean.
    (grad,) = torch.autograd.grad(average_gradient(y), x, torch.full_like(x, 2.0 * rank))
    assert torch.equal(grad, torch.full_like(x, size - 1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_average_of_gradients(world, dtype):
    world.run(check_average, dtype)
    world.run(check_average_twice)


def check_without_a_backend_for_the_cpu(rank, size):
    """As with NCCL alone: the exchange is made where the rows are. Here that is the CPU again."""
    original = dist.get_backend_config
    dist.get_backend_config = lambda group: "cuda:nccl"
    try:
        assert row_counts(torch.ones(rank + 1, 2)) == tuple(range(1, size + 1))
        x = torch.ones((), requires_grad=True)
        (average_gradient(x) * rank).backward()
        assert x.grad == (size - 1) / 2
    finally:
        dist.get_backend_config = original


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is asked for what NCCL would do")
def test_without_a_backend_for_the_cpu(pair):
    pair.run(check_without_a_backend_for_the_cpu)


def check_subgroup(rank, size):
    groups = [dist.new_group([r for r in range(size) if r % 2 == odd]) for odd in (0, 1)]
    mine, other = groups[rank % 2], groups[1 - rank % 2]
    members = [r for r in range(size) if r % 2 == rank % 2]
    assert rank_and_size(mine) == (members.index(rank), len(members))
    x = torch.full((rank + 1, 2), float(rank), requires_grad=True)
    gathered = gather_rows(x, mine)
    expected = torch.cat([torch.full((r + 1, 2), float(r)) for r in members])
    assert torch.equal(gathered, expected)
    gathered.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, len(members)))
    with pytest.raises(ValueError, match="process_group must contain this process"):
        gather_rows(x, other)


def test_subgroups(several):
    several.run(check_subgroup)


def rows_that_differ(rank, what):
    x = torch.ones(2, 3, requires_grad=True)
    if rank == 0:
        return x
    return {
        "length": torch.ones(2, 4, requires_grad=True),
        "views": torch.ones(2, 2, 3, requires_grad=True),
        "dtype": torch.ones(2, 3, dtype=torch.float64, requires_grad=True),
        "gradient": torch.ones(2, 3),
    }[what]


def check_disagreement(rank, size, what, message):
    with pytest.raises(ValueError, match=r"rank 0: \(n, 3\) torch.float32 on cpu with gr") as error:
        gather_rows(rows_that_differ(rank, what))
    assert message in str(error.value)
    assert f"this is rank {rank}" in str(error.value)
    # Everybody raised, so that everybody can go on.
    assert len(gather_rows(torch.ones(rank, 1))) == size * (size - 1) // 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("length", "rank 1: (n, 4) torch.float32 on cpu with gradient"),
        ("views", "rank 1: (n, 2, 3) torch.float32"),
        ("dtype", "rank 1: (n, 3) torch.float64"),
        ("gradient", "rank 1: (n, 3) torch.float32 on cpu without gradient"),
    ],
)
def test_rows_that_cannot_be_gathered_are_refused_on_every_rank(several, what, message):
    several.run(check_disagreement, what, message)


def check_settings(rank, size):
    assert row_counts(torch.ones(rank, 2), settings="ids") == tuple(range(size))
    with pytest.raises(ValueError, match=r"rank 1: .* gradient, without ids"):
        row_counts(torch.ones(2, 2), settings="with ids" if rank == 0 else "without ids")


def test_other_settings_must_agree_too(several):
    several.run(check_settings)


def check_wrong_counts(rank, size):
    for counts in ((2,) * (size + 1), (3,) * size):
        with pytest.raises(ValueError, match=rf"counts must hold {size} numbers.* being 2, got"):
            gather_rows(torch.ones(2, 1), counts=counts)


def test_wrong_counts(world):
    world.run(check_wrong_counts)


def fail():
    raise KeyError("no such image")


def checked_counts(check):
    checked(check)
    return row_counts(torch.ones(2, 3))


def check_refusal(rank, size, odd):
    start = time.monotonic()
    with pytest.raises(KeyError if rank in odd else ValueError, match="no such image") as error:
        checked_counts(fail if rank in odd else lambda: None)
    if rank not in odd:
        assert f"got rank {odd[0]}: KeyError" in str(error.value)
        assert f"this is rank {rank}" in str(error.value)
        assert all((f"rank {r}: KeyError" in str(error.value)) == (r in odd) for r in range(size))
    assert time.monotonic() - start < TIME_OUT / 3
    assert len(gather_rows(checked(lambda: torch.ones(rank, 1)))) == size * (size - 1) // 2


def test_an_error_before_the_exchange_is_one_on_every_rank(several):
    for odd in ([0], [several.size - 1], list(range(several.size))):
        several.run(check_refusal, odd)


def check_no_warning(rank, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.ones(rank, 3, requires_grad=True)
        gather_rows(x).sum().backward()
        average_gradient(torch.ones(3, requires_grad=True)).sum().backward()


def test_nothing_that_torch_has_deprecated_is_used(several):
    several.run(check_no_warning)


def check_compiled(rank, size):
    def loss(x, counts=None):
        return (gather_rows(x, counts=counts) ** 2).sum()

    compiled = torch.compile(loss, backend="aot_eager")
    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for n in (2, 3, 5):
        for step, counts in ((compiled, None), (whole, (n,) * size)):
            x = (torch.randn(n, 3) + rank).requires_grad_()
            y = x.detach().clone().requires_grad_()
            value = step(x) if counts is None else step(x, counts)
            value.backward()
            loss(y).backward()
            torch.testing.assert_close(value, loss(y))
            torch.testing.assert_close(x.grad, y.grad)
    uneven = torch.ones(2 + rank, 3, requires_grad=True)
    torch.testing.assert_close(compiled(uneven), loss(uneven))
    with pytest.raises(Exception, match=r"(?i)disable"):
        torch.compile(gather_rows, backend="eager", fullgraph=True)(uneven)


@pytest.mark.slow
def test_under_compile_only_the_exchange_of_sizes_breaks_the_graph(pair):
    pair.run(check_compiled)


def group_with_time_out():
    group = dist.new_group(timeout=datetime.timedelta(seconds=5))
    dist.barrier()  # nobody dies before all are connected: torch 2.9 does not wait for that
    return group


def check_death(rank, size):
    group = group_with_time_out()
    if rank == size - 1:
        os._exit(1)
    start = time.monotonic()
    try:
        gather_rows(torch.ones(2, 3), group)
    except RuntimeError as error:
        return time.monotonic() - start, str(error)


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_for_the_others(several):
    *living, dead = several.answers(check_death)
    assert dead == ("died", "the process ended")
    for kind, answer in living:
        assert kind == "returned"
        seconds, message = answer
        assert seconds < 60  # and not the 120 after which the other group gives up
        assert message


def check_death_before_backward(rank, size):
    x = torch.ones(2, 3, requires_grad=True)
    loss = gather_rows(x, group_with_time_out()).sum()
    if rank == size - 1:
        os._exit(1)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)


def test_a_process_that_dies_before_its_backward_is_an_error_for_the_others(pair):
    living, dead = pair.answers(check_death_before_backward)
    assert dead == ("died", "the process ended")
    assert living[0] == "returned"
    assert living[1]


def check_that_fails(rank, size):
    assert rank != size - 1, "on purpose"


def test_a_check_can_fail(several):
    with pytest.raises(Failed, match="on purpose"):
        several.run(check_that_fails)


class TestWithoutProcessGroup:
    def test_several_processes_are_told_what_to_do(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        for call in (rank_and_size, lambda: gather_rows(torch.ones(2, 2))):
            with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2.*init_process_group\(\)"):
                call()

    @pytest.mark.parametrize("world_size", [None, "1"])
    @pytest.mark.parametrize("available", [True, False])
    def test_one_process_has_nothing_to_gather(self, monkeypatch, world_size, available):
        if world_size is None:
            monkeypatch.delenv("WORLD_SIZE", raising=False)
        else:
            monkeypatch.setenv("WORLD_SIZE", world_size)
        if not available:
            monkeypatch.setattr(dist, "is_available", lambda: False)
        x = torch.randn(3, 2)
        assert rank_and_size() == (0, 1)
        assert gather_rows(x) is x

    @pytest.mark.parametrize("loss", [NTXent, InfoNCE, SupCon, SigLIP])
    def test_the_loss_of_one_process_is_the_plain_loss(self, monkeypatch, loss):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        z1, z2 = torch.randn(2, 5, 3)
        more = {"labels": torch.arange(5) // 2} if loss is SupCon else {}
        gathered = loss(gather_distributed=True)(z1, z2, **more)
        assert torch.equal(gathered, loss()(z1, z2, **more))

    def test_it_says_so_where_torch_has_no_distributed(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(dist, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="which this build of torch lacks"):
            rank_and_size()


def check_group_types(rank, size):
    assert rank_and_size() == (rank, size)
    with pytest.raises(TypeError, match=r"must be a torch.distributed.ProcessGroup .* got list"):
        rank_and_size([0, 1])


def test_types_of_groups(world):
    world.run(check_group_types)
