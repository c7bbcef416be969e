"""Batches whose activations do not fit into memory: encoded in chunks, with exact gradients."""

import copy
from collections import UserDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from contrastive_kit._checks import check_int
from contrastive_kit._replay import (
    BatchContext,
    Replayed,
    close,
    data_parallel,
    fill_parametrization_cache,
    reduction,
    version,
)


class GradCache(nn.Module):
    """An encoder that runs chunk by chunk, so that only one chunk's activations are in memory.

    A contrastive loss needs the embeddings of the whole batch at once, so plain gradient
    accumulation computes another loss. Embeddings are small, though; what fills memory are the
    activations behind them. ``GradCache`` encodes the chunks without keeping any; when the
    gradient of the embeddings comes back from the loss, it encodes each chunk once more, with the
    same random numbers, and sends the chunk's part of the gradient through.

    It takes the place of the encoder in the training loop, and nothing else changes: any loss and
    whatever it takes and returns, several losses, ``torch.autograd.grad``, ``GradScaler``,
    autocast, gradient accumulation over calls::

        encode = GradCache(encoder, chunk_size=64)
        z1, z2 = encode.views(view1, view2)  # encoder(torch.cat([view1, view2])).chunk(2)
        loss = loss_fn(z1, z2)
        loss.backward()

    For image and text towers make one ``GradCache`` of each. An augmentation that is part of the
    encoder runs chunk by chunk as well, and then the views of the batch need no memory either.

    What is computed:

    - **Gradients** are those of ``torch.cat([encoder(x) for x in batch.split(chunk_size)])``, to
      rounding. Without batch norm those are the gradients of the whole batch at once.
    - **Batch norm** in training mode normalizes each chunk by its own statistics, as on several
      devices. Its running statistics, and any other buffer, change in the first pass only: once
      for each chunk. ``eval()`` on the batch norm modules freezes them, and makes the gradients
      those of the whole batch.
    - **The second pass** repeats the first: the random numbers of torch's default generators and
      of each ``torch.Generator`` that is an attribute of a module in the encoder
      (``SimCLRAugment.generator``), the buffers, training and evaluation modes, and autocast.
      Parameters must not change in between. The first call verifies that both passes give the same
      embeddings.
    - **DistributedDataParallel** may wrap the encoder, be inside it, or wrap a module that has the
      ``GradCache`` inside: gradients are reduced once a backward. So may ``fully_shard``, where all
      ranks need the same number of chunks, since each chunk gathers the parameters.

    Costs one more forward pass: up to a third more time. A batch of at most ``chunk_size`` goes
    through the encoder directly. Without gradients to compute, only the first pass runs.

    Args:
        encoder: a module from tensors of N rows to tensors of N rows, in any structure of tuples,
            lists and dicts. Row i of the result must depend on row i of the arguments alone (batch
            norm excepted). Arguments that are 0-dim tensors or no tensors are passed to each chunk
            as they are; such results, CLIP's logit scale for one, must be the same for each chunk.
        chunk_size: samples in one forward pass, at least 1. The last chunk may be shorter.

    Raises:
        TypeError: ``encoder`` is not a module or ``chunk_size`` not an integer; an argument of the
            call is not a tensor where it must be.
        ValueError: ``chunk_size`` below 1; DistributedDataParallel with a static graph; arguments
            without rows or with different numbers of them; results without a row for each sample,
            or others that differ from chunk to chunk.
        RuntimeError: if the encoder writes into its arguments; in the backward pass, if a parameter
            has changed since the first pass, or if the second gives other embeddings.

    Memory:
        The arguments, the embeddings, and the activations of one chunk; one copy of the buffers,
        and for each chunk one of those that it changed.

    References:
        Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
        arXiv 2101.06983.

    Example:
        >>> import torch
        >>> from contrastive_kit import GradCache, NTXent
        >>> encoder = torch.nn.Linear(8, 4)
        >>> encode = GradCache(encoder, chunk_size=16)
        >>> z1, z2 = encode.views(torch.randn(100, 8), torch.randn(100, 8))
        >>> z1.shape
        torch.Size([100, 4])
        >>> NTXent()(z1, z2).backward()
        >>> encoder.weight.grad.shape
        torch.Size([4, 8])
    """

    def __init__(self, encoder: nn.Module, *, chunk_size: int) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
        if any(ddp.static_graph for ddp in data_parallel(encoder)):
            raise ValueError(
                "encoder must not be a DistributedDataParallel with static_graph=True, which "
                "allows one forward a backward"
            )
        self.encoder = encoder
        self.chunk_size: int = check_int("chunk_size", chunk_size, at_least=1)
        self._verified = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as ``encoder(*args, **kwargs)``; each tensor is split along its first dimension.

        Returns:
            What the encoder returns for the whole batch.
        """
        return self._encode(self.encoder, args, kwargs)  # pyright: ignore[reportCallIssue]

    def views(self, *views: Tensor) -> tuple[Any, ...]:
        """The same as ``encoder(torch.cat(views)).chunk(len(views))``.

        Each chunk holds the same samples of all views: ``len(views) * chunk_size`` rows. Batch norm
        then sees all views together, and cannot tell them apart.

        Args:
            *views: tensors of one shape (N, ...) and dtype. Call once for each shape.

        Returns:
            What the encoder returns, for each view.
        """
        for i, view in enumerate(views):
            if not isinstance(view, Tensor):
                raise TypeError(f"views[{i}] must be a tensor, got {type(view).__name__}")
            if (view.shape, view.dtype, view.device) != (
                views[0].shape,
                views[0].dtype,
                views[0].device,
            ):
                raise ValueError(
                    f"views[{i}] must have the shape, dtype and device of views[0], "
                    f"{tuple(views[0].shape)}, {views[0].dtype}, {views[0].device}; got "
                    f"{tuple(view.shape)}, {view.dtype}, {view.device}"
                )
        jointly = partial(_encode_jointly, self.encoder)
        result: tuple[Any, ...] = self._encode(jointly, views, {})  # pyright: ignore[reportCallIssue]
        return result

    def extra_repr(self) -> str:
        """The options, as the constructor takes them."""
        return f"chunk_size={self.chunk_size}"

    def _verify(self) -> None:
        self._verified = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _encode(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tensors: list[Tensor] = []
        _map_tensors(tensors.append, (args, kwargs))
        n = _number_of_rows(tensors)
        if n <= self.chunk_size:
            return call(*args, **kwargs)

        def encode_rows(*rows: Tensor) -> Any:
            parts = iter(rows)
            chunk_args, chunk_kwargs = _map_tensors(lambda _: next(parts), (args, kwargs))
            return call(*chunk_args, **chunk_kwargs)

        wants_gradient = any(x.requires_grad for x in (*self.encoder.parameters(), *tensors))
        context = None
        if torch.is_grad_enabled() and wants_gradient:
            fill_parametrization_cache(self.encoder)
            context = BatchContext(self.encoder, tensors)
        results = []
        for start in range(0, n, self.chunk_size):
            rows = slice(start, min(start + self.chunk_size, n))
            chunk = [x[rows] if x.ndim else x for x in tensors]
            versions = [version(x) for x in chunk]
            if context is None:
                result = encode_rows(*chunk)
            else:
                # A weight cast once for all chunks would sum their gradients in half precision.
                torch.clear_autocast_cache()
                run = Replayed(encode_rows, context, None if self._verified else self._verify)
                with reduction(self.encoder, rows.stop == n), set_checkpoint_early_stop(False):
                    result = checkpoint(run, *chunk, use_reentrant=False, preserve_rng_state=False)
            if versions != [version(x) for x in chunk]:
                raise RuntimeError(
                    "encoder must not write into its arguments, since it gets them once more in "
                    "the backward pass: replace what works in place before its first layer "
                    "(inplace=True, add_, x[...] = ...), or let it work on x.clone()"
                )
            results.append(tree_flatten(result))
            _check_results(results[-1][0], rows.stop - rows.start)
        return _merge(results, compare=not self._verified)


def _encode_jointly(encoder: nn.Module, *views: Tensor) -> tuple[Any, ...]:
    results = encoder(torch.cat(views))
    _check_results(tree_flatten(results)[0], sum(map(len, views)))
    n_views = len(views)

    def of_view(i: int, x: Tensor) -> Tensor:
        return x.chunk(n_views)[i] if x.ndim else x

    return tuple(tree_map_only(Tensor, partial(of_view, i), results) for i in range(n_views))


def _map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` with each tensor replaced, also inside a UserDict, which tokenizers return."""

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, UserDict):
            result = copy.copy(leaf)
            result.data = _map_tensors(function, leaf.data)
            return result
        return leaf

    return tree_map(replaced, tree)


def _number_of_rows(tensors: list[Tensor]) -> int:
    shapes = [tuple(x.shape) for x in tensors if x.ndim]
    if not shapes:
        raise TypeError("GradCache must be called with at least one tensor of N rows, got none")
    if len({shape[0] for shape in shapes}) > 1 or shapes[0][0] == 0:
        raise ValueError(
            "tensors must have one number of rows, at least 1, along their first dimension; got "
            f"shapes {', '.join(map(str, shapes))}"
        )
    return shapes[0][0]


def _check_results(leaves: list[Any], n: int) -> None:
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if not any(x.ndim for x in tensors):
        raise TypeError("encoder must return a tensor, or a tuple, list or dict of tensors")
    for x in tensors:
        if x.ndim and len(x) != n:
            raise ValueError(
                f"encoder must return one row for each of {n} rows, got shape {tuple(x.shape)}"
            )


def _merge(results: list[tuple[list[Any], Any]], compare: bool) -> Any:
    """One result for the batch from the leaves and the structure of each chunk's.

    Comparing tensors waits for the device: ``compare`` asks for it.
    """
    structure = results[-1][1]
    for _, other in results:
        if other != structure:
            raise ValueError(
                "encoder must return one structure of tensors for all chunks, got "
                f"{other} and {structure}"
            )
    return tree_unflatten(
        [
            _merge_leaf(parts, compare)
            for parts in zip(*(leaves for leaves, _ in results), strict=True)
        ],
        structure,
    )


def _merge_leaf(parts: tuple[Any, ...], compare: bool) -> Any:
    last = parts[-1]
    if not isinstance(last, Tensor):
        same = all(part is last or part == last for part in parts)
    elif last.ndim:
        return torch.cat(parts)
    else:
        same = not compare or all(close(part, last) for part in parts)
    if not same:
        raise ValueError(
            "encoder must return tensors of N rows, and besides them only what is the same for "
            f"each chunk; got {parts[0]!r} and {last!r}, which GradCache cannot join into one"
        )
    return last
