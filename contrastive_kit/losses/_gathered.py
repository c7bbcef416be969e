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
        first: the number of the first image of this process.
        ids: integers (N,), the id of each image; its number where no ids were given.
        own_ids: (n,), those of the images of this process.
        sample_weight: the weight of each image, (N,), or None.
        n_processes: how many processes there are.
    """

    rows: Tensor
    first: int
    ids: Tensor
    own_ids: Tensor
    sample_weight: Tensor | None
    n_processes: int

    def exclusion(self, views: int) -> Exclusion:
        """Pairs of equal id, for own rows view by view against the rows of all image by image."""
        rows = self.own_ids.repeat(views)
        return Exclusion(0, rows, self.ids.repeat_interleave(views))

    def weight_per_process(self) -> float | Tensor:
        """What the mean divides by for each loss of an image, as an average process has it."""
        weight = self.sample_weight
        total = float(self.ids.shape[0]) if weight is None else weight.sum()
        return total / self.n_processes


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
    first = sum(counts[:rank])
    if ids is None:
        ids = torch.arange(sum(counts), device=rows.device)
    else:
        ids = gather_rows(ids.long(), group, counts)  # gloo and NCCL send no int16
    if sample_weight is not None:
        sample_weight = gather_rows(sample_weight.to(rows.dtype), group, counts)
    own_ids = ids[first : first + counts[rank]]
    everything = gather_rows(images, group, counts)
    return GatheredBatch(everything, first, ids, own_ids, sample_weight, size)


def gather_labels(
    labels: Tensor,
    sample_weight: Tensor | None,
    group: "ProcessGroup | None",
    settings: str,
) -> tuple[Tensor, Tensor | None]:
    """The labels (n,) of the anchors of all processes, and their weights if there are any."""
    counts = row_counts(labels, group, settings=settings)
    if sample_weight is not None:
        sample_weight = gather_rows(sample_weight, group, counts)
    return gather_rows(labels.long(), group, counts), sample_weight


def gather_more(
    rows: Tensor, ids: Tensor | None, group: "ProcessGroup | None"
) -> tuple[Tensor, Tensor | None]:
    """Rows (k, D) beside those of the batch, and their ids, of all processes; k may differ."""
    counts = row_counts(rows, group)
    if ids is not None:
        ids = gather_rows(ids.long(), group, counts)  # gloo and NCCL send no int16
    return gather_rows(rows, group, counts), ids


def _described(x: object) -> str:
    if not isinstance(x, Tensor):
        return str(x)
    return f"{x.dtype}{' with gradient' if x.requires_grad and torch.is_grad_enabled() else ''}"
