"""The batch of all processes, which the anchors of one process are compared with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive_kit._checks import check_gathering
from contrastive_kit.distributed import (
    average_gradient,
    gather_rows,
    rank_and_size,
    row_counts,
)
from contrastive_kit.ops import Exclusion

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GatheredBatch(NamedTuple):
    """What a process needs of the images of all processes, in order of rank.

    Attributes:
        rows: (N, V, D), the V rows of each image.
        ids: integers (N,), the id of each image; its number where no ids were given.
        own_ids: (n,), those of the images of this process.
        weight_per_process: what the mean divides by for each loss of an image: the mean over
            processes of their number of images, or of the sum of their weights, which is a tensor.
    """

    rows: Tensor
    ids: Tensor
    own_ids: Tensor
    weight_per_process: float | Tensor

    def exclusion(self, own_views: int, views: int) -> Exclusion:
        """Pairs of equal id, for ``own_views`` blocks of rows against interleaved ``views``."""
        return Exclusion(0, self.own_ids.repeat(own_views), self.ids.repeat_interleave(views))


def several_processes(gather_distributed: bool, group: "ProcessGroup | None") -> bool:
    """Whether there are processes to gather from; raises where there cannot be any."""
    check_gathering(gather_distributed, group)
    return gather_distributed and rank_and_size(group)[1] > 1


def settings_of(loss: str, embeddings: Sequence[Tensor], **options: object) -> str:
    """What must be the same on every process, as text: the loss, its options, dtypes as given.

    Of a tensor only the dtype and whether it needs a gradient: its value would have to be waited
    for.
    """
    dtypes = "/".join(str(z.dtype) for z in embeddings)
    listed = ", ".join(f"{name} {_described(value)}" for name, value in options.items())
    return f"{loss} of {dtypes}, {listed}"


def own_parameters(x: Tensor, gather_distributed: bool, group: "ProcessGroup | None") -> Tensor:
    """Parameters of a loss as they are, with the mean over processes for a gradient.

    Outside of DDP the copies of the processes would drift apart without a word.
    """
    if gather_distributed and dist.is_available() and dist.is_initialized():
        return average_gradient(x, group)
    return x


def gather_batch(
    rows: Tensor,
    ids: Tensor | None,
    sample_weight: Tensor | None,
    group: "ProcessGroup | None",
    settings: str,
) -> GatheredBatch:
    """Gather ``rows`` (V, n, D) in one collective, and ids and weights (n,) if there are any.

    ``settings`` must be the same text on every process, see ``settings_of``.
    """
    images = rows.transpose(0, 1)
    counts = row_counts(images, group, settings=settings)
    rank, size = rank_and_size(group)
    if ids is None:
        everyones_ids = torch.arange(sum(counts), device=rows.device)
        own_ids = everyones_ids[sum(counts[:rank]) :][: counts[rank]]
    else:
        own_ids = ids.long()  # gloo and NCCL send no int16
        everyones_ids = gather_rows(own_ids, group, counts)
    weight: float | Tensor = float(sum(counts))
    if sample_weight is not None:
        weight = gather_rows(sample_weight.to(rows.dtype), group, counts).sum()
    return GatheredBatch(gather_rows(images, group, counts), everyones_ids, own_ids, weight / size)


def _described(x: object) -> str:
    if not isinstance(x, Tensor):
        return str(x)
    return f"{x.dtype}{' with gradient' if x.requires_grad and torch.is_grad_enabled() else ''}"
