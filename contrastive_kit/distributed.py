"""Rows of all processes in one tensor, so that every anchor meets the negatives of every process.

A loss that compares its own rows with the gathered ones, and takes its mean over its own rows, has
after the averaging of ``DistributedDataParallel`` or ``fully_shard`` exactly the gradient that one
process has on the concatenated batch.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

_Result = TypeVar("_Result")


def rank_and_size(group: "dist.ProcessGroup | None" = None) -> tuple[int, int]:
    """Rank of this process in a group, and the number of processes there.

    Where torch.distributed has not been initialized and the environment variable ``WORLD_SIZE``,
    which launchers set, is missing or 1, there is this one process: rank 0 of 1. So a program that
    gathers runs without a launcher too. A program that starts processes by itself, without that
    variable, has to initialize them first: what it computes before is of one process.

    Args:
        group: the processes; None for all of them.

    Raises:
        RuntimeError: where torch.distributed is missing or has not been initialized, though there
            is a ``group``, or ``WORLD_SIZE`` tells of several processes.
        TypeError: if ``group`` is no process group.
        ValueError: if this process is not a member of ``group``.
    """
    initialized = dist.is_available() and dist.is_initialized()
    if not initialized:
        launched = os.environ.get("WORLD_SIZE", "1")
        if group is None and launched == "1":
            return 0, 1
        if not dist.is_available():
            raise RuntimeError(
                "gathering over processes needs torch.distributed, which this build of torch "
                "lacks; leave gather_distributed=False"
            )
        raise RuntimeError(
            f"gathering over processes (WORLD_SIZE is {launched}) needs a process group: call "
            "torch.distributed.init_process_group() first, or leave gather_distributed=False"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group must contain this process, which is no member of it")
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup (of a DeviceMesh: "
            f"mesh.get_group()) or None, got {type(group).__name__}"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("process_group must contain this process, which is no member of it")
    return rank, dist.get_world_size(group)


def row_counts(
    x: Tensor, group: "dist.ProcessGroup | None" = None, *, settings: str = ""
) -> tuple[int, ...]:
    """Number of rows that each process brings, after a check that they otherwise agree.

    Processes that disagree would wait for each other forever, or mix up their numbers. All of them
    raise the same error instead. The exchange is one collective of two integers a process. It takes
    place on the CPU if the group has a backend for it (``init_process_group`` without a backend
    gives both gloo and NCCL), while a GPU still works on the batch; with NCCL alone it waits for
    the GPU. Under ``torch.compile`` it breaks the graph.

    Args:
        x: tensor (n, ...); n may differ between processes, the rest of the shape, the dtype, the
            kind of device and whether a gradient is needed may not.
        group: the processes; None for all of them.
        settings: whatever else must be the same text on every process.

    Returns:
        The n of every process, in order of rank.

    Raises:
        ValueError: on every process, if they disagree; the message tells who has what.
    """
    rank, size = rank_and_size(group)
    if size == 1:
        return (len(x),)
    exchange = _outside_graphs(_exchange)
    return exchange(x, group, settings, rank, size)


def checked(check: Callable[[], _Result], group: "dist.ProcessGroup | None" = None) -> _Result:
    """What ``check`` returns; if it raises on one process, all others get an error too.

    For what a process looks at before it calls ``row_counts`` or ``gather_rows``: an error there,
    on an empty batch, say, would leave the others waiting for it until the time-out. Here it takes
    the place of the exchange that they wait in, and their call raises a ``ValueError`` that tells
    it. A process without error communicates nothing.

    Args:
        check: called without arguments.
        group: the processes; None for all of them.

    Raises:
        Exception: what ``check`` raises.
        RuntimeError, TypeError, ValueError: as ``rank_and_size``.

    Example:
        >>> from contrastive_kit.distributed import checked, gather_rows
        >>> def gathered(x):
        ...     checked(lambda: check_my_rows(x))
        ...     return gather_rows(x)
    """
    try:
        return check()
    except Exception as error:
        if rank_and_size(group)[1] > 1:
            refuse = _outside_graphs(_refuse)
            refuse(f"{type(error).__name__}: {error}", group)
        raise


def _outside_graphs(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """``function``, at which a graph of ``torch.compile`` breaks, or Dynamo would compile parts."""
    # Only where it runs, which spares others the import of Dynamo.
    if not torch.compiler.is_compiling():
        return function
    disabled: Callable[..., _Result] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


# What a process that brings no rows sends for their number.
_REFUSED = -1


def _refuse(reason: str, group: "dist.ProcessGroup | None") -> None:
    _exchanged(_REFUSED, reason, torch.device("cpu"), group)


def _exchange(
    x: Tensor, group: "dist.ProcessGroup | None", settings: str, rank: int, size: int
) -> tuple[int, ...]:
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    description = (
        f"(n{''.join(f', {length}' for length in x.shape[1:])}) {x.dtype} on {x.device.type} "
        f"{'with' if needs_gradient else 'without'} gradient{settings and f', {settings}'}"
    )
    counts, descriptions = _exchanged(x.shape[0], description, x.device, group)
    if not descriptions:
        return counts
    if _REFUSED in counts:
        listed = "; ".join(
            f"rank {i}: {text}"
            for i, (n, text) in enumerate(zip(counts, descriptions, strict=True))
            if n == _REFUSED
        )
        raise ValueError(
            f"no process can gather, because not all have rows to bring, got {listed} (this is "
            f"rank {rank}); a batch that is empty or short on some processes is left out by "
            "drop_last=True in the DataLoader"
        )
    listed = "; ".join(f"rank {i}: {text}" for i, text in enumerate(descriptions))
    raise ValueError(
        f"processes must bring rows alike in all but their number, got {listed} "
        f"(this is rank {rank})"
    )


def _exchanged(
    count: int, description: str, device: torch.device, group: "dist.ProcessGroup | None"
) -> tuple[tuple[int, ...], list[str]]:
    """The counts of all processes, and their descriptions if one of them refuses or differs."""
    size = dist.get_world_size(group)
    device = torch.device("cpu") if _talks_on("cpu", group) else _device_of(group, device)
    mine = torch.tensor([count, zlib.crc32(description.encode())], device=device)
    table = torch.empty(2 * size, dtype=mine.dtype, device=device)
    _all_gather(table, mine, group)
    counts, checks = table.view(size, 2).T.tolist()
    if len(set(checks)) == 1 and _REFUSED not in counts:
        return tuple(counts), []
    descriptions: list[Any] = [None] * size
    dist.all_gather_object(descriptions, description, group)
    return tuple(counts), descriptions


def _talks_on(device_type: str, group: "dist.ProcessGroup | None") -> bool:
    return f"{device_type}:" in dist.get_backend_config(group)


def _device_of(group: "dist.ProcessGroup | None", device: torch.device) -> torch.device:
    """``device``, or the accelerator where the group, through NCCL alone, reaches only that."""
    if _talks_on(device.type, group) or not torch.accelerator.is_available():
        return device
    return torch.accelerator.current_accelerator() or device


def gather_rows(
    x: Tensor,
    group: "dist.ProcessGroup | None" = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """The rows of all processes, in order of rank; differentiable.

    One collective in each direction: an all-gather, and in the backward a reduce-scatter, which
    brings each process the sum over processes of the gradients of its own rows. Works with gloo and
    NCCL, and with batches of different sizes, which are padded on the way. To send several views,
    put them beside each other: (n, V, D). A process whose peer dies gets the error of the backend,
    at the latest after the time-out of the process group.

    Args:
        x: tensor (n, ...) of any dtype that the backend sends, which for gloo and NCCL excludes
            int16. Gradients are summed in this dtype.
        group: the processes; None for all of them.
        counts: what ``row_counts`` returned for ``x``, or for a tensor with as many rows; None to
            call it here. With ``counts`` ``torch.compile`` sees no graph break.

    Returns:
        (N, ...), where N is the sum of the counts; ``x`` itself where there is one process.

    Raises:
        RuntimeError, TypeError, ValueError: as ``rank_and_size`` and ``row_counts``.

    Memory:
        N rows, and as much again while batches of different sizes are packed.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from contrastive_kit.distributed import gather_rows
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> gather_rows(torch.eye(2))  # of the one process there is
        tensor([[1., 0.],
                [0., 1.]])
        >>> dist.destroy_process_group()
    """
    rank, size = rank_and_size(group)
    if counts is None:
        counts = row_counts(x, group)
    if len(counts) != size or counts[rank] != len(x):
        raise ValueError(
            f"counts must hold {size} numbers, that of rank {rank} being {len(x)}, got {counts}"
        )
    if size == 1:
        return x
    gathered: Tensor = _GatherRows.apply(x, group, tuple(counts), rank)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, group: "dist.ProcessGroup | None", counts: tuple[int, ...], rank: int
    ) -> Tensor:
        longest = max(counts)
        mine = _pad(x, longest)
        everyone = mine.new_empty(len(counts) * longest, *x.shape[1:])
        _all_gather(everyone, mine, group)
        if min(counts) == longest:
            return everyone
        blocks = zip(torch.split(everyone, longest), counts, strict=True)
        return torch.cat([block[:count] for block, count in blocks])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.ranks = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _SumToOwners.apply(grad, *ctx.ranks), None, None, None


def _all_gather(everyone: Tensor, mine: Tensor, group: "dist.ProcessGroup | None") -> None:
    if hasattr(dist, "all_gather_single"):  # torch 2.14 warns that the other is deprecated
        dist.all_gather_single(everyone, mine, group)
    else:
        dist.all_gather_into_tensor(everyone, mine, group)


def _reduce_scatter(mine: Tensor, everyone: Tensor, group: "dist.ProcessGroup | None") -> None:
    if hasattr(dist, "reduce_scatter_single"):
        dist.reduce_scatter_single(mine, everyone, group=group)
    else:
        dist.reduce_scatter_tensor(mine, everyone, group=group)


class _SumToOwners(torch.autograd.Function):
    """The adjoint of ``_GatherRows``, which is the adjoint of this one."""

    @staticmethod
    def forward(
        grad: Tensor, group: "dist.ProcessGroup | None", counts: tuple[int, ...], rank: int
    ) -> Tensor:
        longest = max(counts)
        if min(counts) != longest:
            grad = torch.cat([_pad(block, longest) for block in torch.split(grad, list(counts))])
        mine = grad.new_empty(longest, *grad.shape[1:])
        _reduce_scatter(mine, grad.contiguous(), group)
        return mine[: counts[rank]]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.ranks = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _GatherRows.apply(grad, *ctx.ranks), None, None, None


def _pad(x: Tensor, length: int) -> Tensor:
    if len(x) == length:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])


def average_gradient(x: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """``x`` itself, whose gradient is averaged over processes: for parameters outside of DDP.

    Averaging once more, as ``DistributedDataParallel`` does, changes nothing. One all-reduce in the
    backward; every process must run it.

    Args:
        x: tensor of any shape, the same on every process.
        group: the processes; None for all of them.

    Raises:
        RuntimeError, TypeError, ValueError: as ``rank_and_size``.
    """
    _, size = rank_and_size(group)
    if size == 1:
        return x
    averaged: Tensor = _AverageGradient.apply(x, group, size)
    return averaged


class _AverageGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: "dist.ProcessGroup | None", size: int) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.size = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Average.apply(grad, ctx.group, ctx.size), None, None


class _Average(torch.autograd.Function):
    """The mean over processes, which is its own adjoint."""

    @staticmethod
    def forward(x: Tensor, group: "dist.ProcessGroup | None", size: int) -> Tensor:
        # A temperature may be on the CPU while the processes talk through NCCL alone.
        total = (x / size).to(_device_of(group, x.device))
        dist.all_reduce(total, group=group)
        return total.to(x.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.size = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Average.apply(grad, ctx.group, ctx.size), None, None


def is_overwritten(buffer: Tensor) -> bool:
    """Whether the DistributedDataParallel that runs now sends rank 0's ``buffer`` to the others."""
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or not ddp.will_sync_module_buffers():
        return False
    return dist.get_world_size(ddp.process_group) > 1 and any(
        each is buffer for each in ddp.modules_buffers
    )
