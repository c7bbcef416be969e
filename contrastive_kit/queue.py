"""A queue of keys from earlier batches: many negatives at the price of a small batch."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contrastive_kit._checks import (
    check_dense,
    check_device,
    check_embeddings,
    check_flag,
    check_gathering,
    check_ids,
    check_int,
)
from contrastive_kit.distributed import (
    checked,
    gather_rows,
    is_overwritten,
    rank_and_size,
    row_counts,
)
from contrastive_kit.ops import scaled_unit_rows

# The label of a place that has never had a key.
_NO_LABEL = torch.iinfo(torch.int64).min


class NegativeQueue(nn.Module):
    """The last ``size`` keys seen in training, as negatives for ``InfoNCE``: the queue of MoCo.

    A call returns what the queue holds and then, in training mode only, takes in the keys it was
    given; so no key is a negative of its own query. The queue begins empty and grows to ``size``;
    an empty one makes the loss 0, see ``fill_at_random``. Keys are stored detached and normalized,
    in the order of their coming; a batch may have any number of keys, also more than ``size``, of
    which the last ones stay. A key with NaN or inf is not taken in: its place keeps the key that it
    had, or a zero row, which has cosine 0 to all.

    What it holds is part of the ``state_dict``. Rows are stored in the dtype and on the device of
    the module, float32 at first, and normalized in at least float32 also under autocast. Nothing
    waits for a GPU (but the exchange of sizes, with NCCL alone: see ``row_counts``).
    ``torch.compile`` breaks the graph here and compiles the rest.

    One call a step, also where both views have queries and keys: with a second call, after the keys
    of the first went in, images would be negatives of themselves.
    ``negatives = queue(torch.cat([key1, key2]))`` serves both losses. Nor do keys belong beside the
    queue, ``torch.cat([key, negatives])``: each would be the negative of its own query.

    With ``labels`` it is the memory of XBM: it also holds the label of each key, and what it held
    are the ``keys`` and ``key_labels`` of ``SupCon``, among which an anchor finds positives too. To
    those the keys of the same call may be added, if they are none of the anchors.

    Args:
        dim: length D of a key.
        size: number of keys to hold; MoCo has 65,536.
        gather_distributed: take in the keys of all processes, in order of rank, so that every
            process has the same queue. If False each process has a queue of its own, which must
            then not be inside a ``DistributedDataParallel`` that broadcasts its buffers.
        process_group: the processes to gather from; None for all of them.
        labels: also hold an integer label of each key; each call then needs the labels of its keys.

    Raises:
        TypeError: if ``dim`` or ``size`` is no integer, for keys that are not floating tensors,
            labels that are not integers.
        ValueError: if ``dim`` or ``size`` is below 1, for keys or labels of another shape or
            device, labels where none are held or the reverse, for a ``process_group`` without
            ``gather_distributed``. With it, in training, on every process if one of them raises.
        RuntimeError: in training with ``gather_distributed`` where there is no process group, but
            ``WORLD_SIZE`` tells of several processes.

    Memory:
        ``size``·D, and as much again for what a call returns.

    References:
        He et al., Momentum Contrast for Unsupervised Visual Representation Learning,
        arXiv 1911.05722, algorithm 1; Wang et al., Cross-Batch Memory for Embedding Learning, arXiv
        1912.06798, algorithm 1 (labels).

    Example:
        >>> import torch
        >>> from contrastive_kit import InfoNCE, NegativeQueue
        >>> loss_fn, queue = InfoNCE(), NegativeQueue(dim=16, size=100)
        >>> for _ in range(3):
        ...     query, key = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        ...     loss = loss_fn(query, key, negatives=queue(key))
        >>> len(queue)
        24
        >>> from contrastive_kit import SupCon
        >>> loss_fn, memory = SupCon(), NegativeQueue(dim=16, size=100, labels=True)
        >>> for _ in range(3):
        ...     z, labels = torch.randn(8, 16, requires_grad=True), torch.arange(8) % 3
        ...     keys, key_labels = memory(z, labels)
        ...     loss = loss_fn(z, labels=labels)
        ...     loss = loss + loss_fn(z, labels=labels, keys=keys, key_labels=key_labels)
    """

    rows: Tensor
    row_labels: Tensor

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        gather_distributed: bool = False,
        process_group: "dist.ProcessGroup | None" = None,
        labels: bool = False,
    ) -> None:
        super().__init__()
        dim, size = check_int("dim", dim, 1), check_int("size", size, 1)
        check_gathering(gather_distributed, process_group)
        check_flag("labels", labels)
        if process_group is not None:
            rank_and_size(process_group)
        self.has_labels = labels
        self.gather_distributed = gather_distributed
        self.process_group = process_group
        self.register_buffer("rows", torch.zeros(size, dim))
        if labels:
            self.register_buffer("row_labels", torch.full((size,), _NO_LABEL))
        # A Python number: one in a tensor would have to be read back from the device.
        self._taken = 0
        self._warned = False

    @overload
    def forward(self, keys: Tensor) -> Tensor: ...
    @overload
    def forward(self, keys: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, keys: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Negatives from earlier calls, and the keys go into the queue if it is in training mode.

        Args:
            keys: embeddings (n, D), any floating dtype, not necessarily normalized. With n = 0 the
                queue stays as it is, or takes in the keys of the other processes.
            labels: integers (n,), the label of each key, where the queue holds labels.

        Returns:
            A detached copy of the rows held before the call, oldest first: (K, D), 0 ≤ K ≤ size;
            where it holds labels, the pair of the rows and their labels, int64 (K,).
        """
        if torch.compiler.is_compiling():
            step: Callable[[Tensor, Tensor | None], Tensor | tuple[Tensor, Tensor]]
            step = torch.compiler.disable(self._step)  # type: ignore[no-untyped-call]
            return step(keys, labels)
        return self._step(keys, labels)

    if TYPE_CHECKING:
        __call__ = forward

    def _step(self, keys: Tensor, labels: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        if self.training and self.gather_distributed:
            rank_and_size(self.process_group)  # raises first where there are no processes
            checked(lambda: self._check(keys, labels), self.process_group)
        else:
            self._check(keys, labels)
            self._warn_where_overwritten()
        held = (self.negatives(), self.labels()) if self.has_labels else self.negatives()
        if self.training:
            self._take(keys, labels)
        return held

    def _warn_where_overwritten(self) -> None:
        """Warn, once, inside a DistributedDataParallel that sends the rows of rank 0 to all."""
        if not self._warned and self.training and is_overwritten(self.rows):
            self._warned = True
            warnings.warn(
                "a NegativeQueue with gather_distributed=False is inside a DistributedDataParallel "
                "that broadcasts its buffers: the keys of rank 0 overwrite those of the other "
                "processes. Use gather_distributed=True, or broadcast_buffers=False for a queue "
                "of its own on each process",
                stacklevel=2,
            )

    def _check(self, keys: Tensor, labels: Tensor | None) -> None:
        dim = self.rows.shape[1]
        if isinstance(keys, Tensor):
            check_dense("keys", keys)
        if not (isinstance(keys, Tensor) and keys.shape == (0, dim) and keys.is_floating_point()):
            check_embeddings("keys", keys)
        if keys.shape[1] != dim:
            raise ValueError(f"keys must have shape (n, {dim}), got {tuple(keys.shape)}")
        check_device("keys", keys, "the queue", self.rows)
        if labels is None:
            if self.has_labels:
                raise ValueError("labels must be given to a queue that holds labels=True, got None")
        elif self.has_labels:
            check_ids("labels", labels, len(keys), "keys", keys)
        else:
            raise ValueError("labels are held only by NegativeQueue(..., labels=True); omit them")

    @torch.no_grad()
    def fill_at_random(self, generator: torch.Generator) -> None:
        """Replace what the queue holds by ``size`` random directions, as MoCo's code begins.

        Then the first losses are those of a full queue. While it is empty, they are 0. In a queue
        that holds labels, theirs is the smallest of int64, so that they are positives of nothing.

        Args:
            generator: where the numbers come from. With ``gather_distributed`` it has to have the
                same seed on every process.

        Raises:
            TypeError: if ``generator`` is no ``torch.Generator``.

        Example:
            >>> import torch
            >>> from contrastive_kit import NegativeQueue
            >>> queue = NegativeQueue(dim=16, size=100)
            >>> queue.fill_at_random(torch.Generator().manual_seed(0))
            >>> len(queue)
            100
        """
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, got {type(generator).__name__}; "
                "torch.Generator().manual_seed(0) is one"
            )
        directions = torch.randn(
            self.rows.shape, generator=generator, device=generator.device, dtype=torch.float32
        )
        self.rows.copy_(scaled_unit_rows((directions,), 1.0)[0])
        if self.has_labels:
            self.row_labels.fill_(_NO_LABEL)
        self._taken = len(self.rows)

    def negatives(self) -> Tensor:
        """A detached copy of the rows held, oldest first: (K, D), 0 ≤ K ≤ size."""
        return self._in_order(self.rows)

    def labels(self) -> Tensor:
        """A copy of the labels of the rows held, oldest first: int64 (K,), 0 ≤ K ≤ size.

        Raises:
            ValueError: for a queue without labels.
        """
        if not self.has_labels:
            raise ValueError("labels are held only by NegativeQueue(..., labels=True)")
        return self._in_order(self.row_labels)

    def _in_order(self, held: Tensor) -> Tensor:
        if self._taken < len(held):
            return held[: self._taken].clone()
        return held.roll(-self._taken % len(held), 0)

    @torch.no_grad()
    def _take(self, keys: Tensor, labels: Tensor | None) -> None:
        settings = f"keys of {keys.dtype}{', with labels' if self.has_labels else ''}"
        dtype = torch.promote_types(keys.dtype, self.rows.dtype)
        keys = scaled_unit_rows((keys.to(dtype),), 1.0)[0]
        if self.gather_distributed:
            counts = row_counts(keys, self.process_group, settings=settings)
            keys = gather_rows(keys, self.process_group, counts)
            if labels is not None:
                labels = gather_rows(labels.long(), self.process_group, counts)
        size = len(self.rows)
        start = (self._taken + max(0, len(keys) - size)) % size
        kept = keys[-size:].to(self.rows.dtype)
        until_end = min(len(kept), size - start)
        for begin, block in ((start, slice(until_end)), (0, slice(until_end, None))):
            rows = kept[block]
            place = slice(begin, begin + len(rows))
            finite = rows.isfinite().all(1)
            self.rows[place] = torch.where(finite[:, None], rows, self.rows[place])
            if labels is not None:
                of_rows = labels[-size:][block].long()
                self.row_labels[place] = torch.where(finite, of_rows, self.row_labels[place])
        self._taken += len(keys)

    def __len__(self) -> int:
        return min(self._taken, len(self.rows))

    def __bool__(self) -> bool:
        """True, also while it is empty: ``if queue`` asks whether there is one."""
        return True

    def get_extra_state(self) -> Tensor:
        """How many keys have been taken in so far; tells where the oldest one is."""
        return torch.tensor(self._taken, device="cpu")  # whatever the default device is

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what ``get_extra_state`` returned."""
        self._taken = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        taken, held = self._taken, dict(self.named_buffers())
        given = {name: state_dict.get(f"{prefix}{name}") for name in held}
        if any(x is None or x.shape != held[name].shape for name, x in given.items()):
            # Torch refuses such buffers, but would take what else belongs to them.
            before = {name: x.clone() for name, x in held.items()}
            super()._load_from_state_dict(state_dict, prefix, *args)
            for name, x in before.items():
                held[name].copy_(x)
            self._taken = taken
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The options, as the constructor takes them."""
        size, dim = self.rows.shape
        shown = f"dim={dim}, size={size}, gather_distributed={self.gather_distributed}"
        return f"{shown}, labels=True" if self.has_labels else shown
