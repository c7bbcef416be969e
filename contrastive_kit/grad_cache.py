"""Batches whose activations do not fit into memory: encoded in chunks, with exact gradients."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

# Rounding may differ between a pass with a graph and one without, where the encoder is compiled.
# A dropout of 0.1 that is not repeated makes a difference of about 0.3.
_TOLERANCE = 1e-2
_TOLERANCE_IN_HALF = 5e-2


class GradCache:
    """An encoder that runs chunk by chunk, so that only one chunk's activations are in memory.

    A contrastive loss needs the embeddings of the whole batch at once, so plain gradient
    accumulation computes another loss. Embeddings are small, though; what fills memory are the
    activations behind them. ``GradCache`` encodes the chunks without keeping any; when the
    gradient of the embeddings comes back from the loss, it encodes each chunk once more, with the
    same random numbers, and sends the chunk's part of the gradient through.

    It takes the place of the encoder in the training loop, and nothing else changes: any loss and
    whatever it takes and returns, several losses, ``GradScaler``, autocast, gradient accumulation
    over calls::

        encode = GradCache(encoder, chunk_size=64)
        z1, z2 = encode.views(view1, view2)  # encoder(torch.cat([view1, view2])).chunk(2)
        loss = loss_fn(z1, z2)
        loss.backward()

    For image and text towers make one ``GradCache`` of each. An augmentation that is part of the
    encoder runs chunk by chunk as well, and then the views of the batch need no memory either.

    What is computed:

    - **Gradients** are those of ``torch.cat([encoder(x) for x in batch.split(chunk_size)])``, to
      rounding. Without batch norm those are the gradients of the whole batch at once.
    - **Batch norm** in training mode normalises each chunk by its own statistics, as on several
      devices. Its running statistics, and any other buffer, change in the first pass only: once
      for each chunk. ``eval()`` on the batch norm modules freezes them, and makes the gradients
      those of the whole batch.
    - **Random numbers** of the second pass are those of the first: the default generators of the
      CPU and of the devices involved, and each ``torch.Generator`` that is an attribute of a module
      in the encoder (``SimCLRAugment.generator``). The first call verifies that both passes give
      the same embeddings, and raises if not.
    - **DistributedDataParallel** around the encoder, or inside it, reduces gradients in the last
      chunk only; so do FSDP and ``fully_shard``, which keep the whole gradient until then. With
      ``fully_shard`` that overrides an own ``set_requires_gradient_sync(False)``.

    Costs one more forward pass: up to a third more time. A batch of at most ``chunk_size`` goes
    through the encoder directly. Without gradients to compute, only the first pass runs.

    Args:
        encoder: a module from tensors of N rows to tensors of N rows, in any structure of tuples,
            lists and dicts. Row i of the result must depend on row i of the arguments alone (batch
            norm excepted). An argument or result of no dimension is not split; such a
            result, CLIP's logit scale for one, must be the same for each chunk.
        chunk_size: samples in one forward pass, at least 1. The last chunk may be shorter.

    Raises:
        TypeError: ``encoder`` is not a module or ``chunk_size`` not an integer; an argument of the
            call is not a tensor where it must be.
        ValueError: ``chunk_size`` below 1; DistributedDataParallel with a static graph; arguments
            without rows or with different numbers of them; results without a row for each sample.
        RuntimeError: in the backward pass, if the second pass gives other embeddings or no
            gradient, or if it is asked for more than ``.grad`` of all parameters
            (``torch.autograd.grad``, ``create_graph=True``).

    Memory:
        The arguments, the embeddings, and the activations of one chunk; one copy of the buffers.

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
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(f"chunk_size must be an integer, got {chunk_size!r}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if any(getattr(ddp, "static_graph", False) for ddp in _outermost_with("no_sync", encoder)):
            raise ValueError(
                "encoder must not be a DistributedDataParallel with static_graph=True, which "
                "cannot leave gradients unreduced in its first backward"
            )
        self.encoder = encoder
        self.chunk_size = chunk_size
        self._verified = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as ``encoder(*args, **kwargs)``; each tensor is split along its first dimension.

        Returns:
            What the encoder returns for the whole batch. Its gradient is computed by
            ``loss.backward()``, which adds it to ``.grad`` of the encoder's parameters.
        """
        return self._encode(self.encoder, args, kwargs)

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
        result: tuple[Any, ...] = self._encode(partial(_encode_jointly, self.encoder), views, {})
        return result

    def __repr__(self) -> str:
        """The options, without the encoder's layers."""
        return f"GradCache({type(self.encoder).__name__}, chunk_size={self.chunk_size})"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _encode(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        n = _number_of_rows(leaves)
        # Ranks of unequal batches have to take the same steps, one chunk or many.
        if n <= self.chunk_size and not _synchronised(self.encoder):
            return call(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def encode_rows(rows: list[Tensor]) -> Any:
            parts = iter(rows)
            chunk = [next(parts) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            chunk_args, chunk_kwargs = tree_unflatten(chunk, structure)
            return call(*chunk_args, **chunk_kwargs)

        passes = _Passes(self, encode_rows, n, {x.device for x in tensors})
        wants_gradient = any(x.requires_grad for x in (*self.encoder.parameters(), *tensors))
        if torch.is_grad_enabled() and wants_gradient:
            anchor = torch.zeros(0, requires_grad=True)
            outputs = _EncodeTwice.apply(passes, anchor, *tensors)
        else:
            with torch.no_grad():
                outputs = passes.first(tensors)
        return tree_unflatten(list(outputs), passes.structure)


class _EncodeTwice(torch.autograd.Function):
    """The first pass as the forward, the second as the backward.

    The gradient of the parameters goes to ``.grad`` by a backward of its own for each chunk. The
    anchor, a tensor that requires a gradient, makes autograd call the backward at all.
    """

    @staticmethod
    def forward(ctx: Any, passes: "_Passes", anchor: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        outputs = passes.first(tensors)
        ctx.passes = passes
        ctx.save_for_backward(*tensors)
        results = (x for x in outputs if isinstance(x, Tensor))
        ctx.mark_non_differentiable(*(x for x in results if not _can_have_gradient(x)))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the backward of GradCache has no graph: omit create_graph=True")
        if not torch.autograd._is_checkpoint_valid():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                "GradCache adds to .grad of all parameters of the encoder: call backward() "
                "without inputs=, and not torch.autograd.grad"
            )
        wanted = ctx.needs_input_grad[2:]
        return None, None, *ctx.passes.second(ctx.saved_tensors, wanted, grads)


class _Passes:
    """Both passes over one batch, and what the second needs to repeat the first.

    Attributes:
        structure: how the encoder's results are nested, known after the first pass.
    """

    structure: Any

    def __init__(
        self,
        cache: GradCache,
        encode_rows: Callable[[list[Tensor]], Any],
        n: int,
        devices: set[torch.device],
    ) -> None:
        self._cache = cache
        self._encode_rows = encode_rows
        self._chunks = [
            slice(start, min(start + cache.chunk_size, n))
            for start in range(0, n, cache.chunk_size)
        ]
        encoder = cache.encoder
        devices |= {x.device for x in (*encoder.parameters(), *encoder.buffers())}
        self._generators = _generators(encoder, devices)
        self._random_states: list[list[Tensor]] = []
        self._first_results: list[list[Any]] = []
        self._buffers = _buffers(encoder)
        self._autocast: list[dict[str, Any]] = [
            {
                "device_type": device_type,
                "dtype": torch.get_autocast_dtype(device_type),
                "enabled": torch.is_autocast_enabled(device_type),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            }
            for device_type in sorted({"cpu", *(device.type for device in devices)})
            if torch.amp.is_autocast_available(device_type)
        ]

    def first(self, tensors: tuple[Tensor, ...] | list[Tensor]) -> tuple[Any, ...]:
        """Encode without a graph; returns the leaves of the encoder's results."""
        results: list[list[Any]] = []
        for rows in self._chunks:
            self._random_states.append([generator.get() for generator in self._generators])
            chunk = [_part(x, rows) for x in tensors]
            leaves, self.structure = tree_flatten(self._encode_rows(chunk))
            _check_results(leaves, rows.stop - rows.start)
            results.append(leaves)
        if not self._cache._verified:
            self._first_results = results
        # Weights that autocast has cast without a graph would serve later passes without gradient.
        torch.clear_autocast_cache()
        return tuple(_merge(parts) for parts in zip(*results, strict=True))

    def second(
        self,
        tensors: tuple[Tensor, ...],
        wanted: tuple[bool, ...],
        grads: tuple[Tensor | None, ...],
    ) -> list[Tensor | None]:
        """Encode with a graph and send the gradients through; returns those of the arguments."""
        tensor_grads = [
            torch.zeros_like(x) if want else None for x, want in zip(tensors, wanted, strict=True)
        ]
        with _restored(self._generators, self._buffers), torch.enable_grad():
            for i, rows in enumerate(self._chunks):
                is_last = i == len(self._chunks) - 1
                for generator, state in zip(self._generators, self._random_states[i], strict=True):
                    generator.set(state)
                chunk = [
                    _part(x, rows).detach().requires_grad_(want)
                    for x, want in zip(tensors, wanted, strict=True)
                ]
                with _gradient_reduction(self._cache.encoder, is_last):
                    with ExitStack() as stack:
                        for options in self._autocast:
                            stack.enter_context(torch.autocast(**options))
                        leaves, _ = tree_flatten(self._encode_rows(chunk))
                    if self._first_results:
                        self._verify(i, leaves)
                    _backward(leaves, grads, rows, is_last)
                for x, grad in zip(chunk, tensor_grads, strict=True):
                    if grad is not None and x.grad is not None:
                        _part(grad, rows).add_(x.grad)
        self._cache._verified = True
        return tensor_grads

    def _verify(self, i: int, second: list[Any]) -> None:
        """Raise unless chunk ``i`` of the second pass is that of the first."""
        autocast = any(options["enabled"] for options in self._autocast)
        first, last = self._first_results[i], self._first_results[-1]
        for mine, of_last, now in zip(first, last, second, strict=True):
            if not isinstance(mine, Tensor) or not _can_have_gradient(mine):
                continue
            before = mine if mine.ndim else of_last
            half = autocast or before.dtype in (torch.float16, torch.bfloat16)
            tolerance = _TOLERANCE_IN_HALF if half else _TOLERANCE
            difference = torch.linalg.vector_norm((now.detach() - before).float())
            # A NaN, of whatever origin, is none of this check's business: no comparison holds.
            if difference > tolerance * torch.linalg.vector_norm(before.float()):
                raise RuntimeError(
                    "the second pass of GradCache gives other embeddings than the first, so that "
                    "its gradient would be wrong. Random numbers are repeated where they come from "
                    "torch's default generators or from a torch.Generator that is an attribute of "
                    "a module in the encoder; does it draw others, or keep a state that is no "
                    "buffer, or return a scalar that differs from chunk to chunk?"
                )


class _RandomSource(NamedTuple):
    """A generator of random numbers, by its state."""

    get: Callable[[], Tensor]
    set: Callable[[Tensor], object]


class _Buffer(NamedTuple):
    """A buffer of a module in training mode, and its value before the first pass."""

    module: nn.Module
    name: str
    tensor: Tensor
    value: Tensor


def _generators(encoder: nn.Module, devices: set[torch.device]) -> list[_RandomSource]:
    """All that the encoder may draw from, as far as it can be seen."""
    sources = [_RandomSource(torch.get_rng_state, torch.set_rng_state)]
    for device in sorted(devices, key=str):
        if device.type in ("cpu", "meta"):
            continue
        random = torch.get_device_module(device)
        if device.type == "mps":
            sources.append(_RandomSource(random.get_rng_state, random.set_rng_state))
            continue
        sources.append(
            _RandomSource(
                partial(random.get_rng_state, device), partial(random.set_rng_state, device=device)
            )
        )
    attributes = (value for module in encoder.modules() for value in vars(module).values())
    own = {id(value): value for value in attributes if isinstance(value, torch.Generator)}
    return sources + [_RandomSource(g.get_state, g.set_state) for g in own.values()]


def _buffers(encoder: nn.Module) -> list[_Buffer]:
    return [
        _Buffer(module, name, tensor, tensor.clone())
        for module in encoder.modules()
        if module.training
        for name, tensor in module.named_buffers(recurse=False)
    ]


@contextmanager
def _restored(sources: list[_RandomSource], buffers: list[_Buffer]) -> Iterator[None]:
    """Inside, the buffers as before the first pass; afterwards all as it was on entry."""
    states = [source.get() for source in sources]
    current = []
    for module, name, tensor, value in buffers:
        now = getattr(module, name)
        current.append(_Buffer(module, name, now, now.clone()))
        _set_buffer(_Buffer(module, name, tensor, value))
    try:
        yield
    finally:
        for buffer in current:
            _set_buffer(buffer)
        for source, state in zip(sources, states, strict=True):
            source.set(state)


def _set_buffer(buffer: _Buffer) -> None:
    with torch.no_grad():
        buffer.tensor.copy_(buffer.value)
    setattr(buffer.module, buffer.name, buffer.tensor)


@contextmanager
def _gradient_reduction(encoder: nn.Module, reduce: bool) -> Iterator[None]:
    """Inside, distributed wrappers reduce gradients over ranks, or keep them to themselves."""
    with ExitStack() as stack:
        for module in _outermost_with("no_sync", encoder):
            if not reduce:
                stack.enter_context(module.no_sync())
        for module in _outermost_with("set_requires_gradient_sync", encoder):
            module.set_requires_gradient_sync(reduce)
            stack.callback(module.set_requires_gradient_sync, True)
        yield


def _synchronised(encoder: nn.Module) -> bool:
    wrappers = (
        wrapper
        for method in ("no_sync", "set_requires_gradient_sync")
        for wrapper in _outermost_with(method, encoder)
    )
    return any(True for _ in wrappers)


def _outermost_with(method: str, module: nn.Module) -> Iterator[Any]:
    """Modules with a method of that name, but for those inside another such module."""
    if hasattr(module, method):
        yield module
        return
    for child in module.children():
        yield from _outermost_with(method, child)


def _encode_jointly(encoder: nn.Module, *views: Tensor) -> tuple[Any, ...]:
    results = encoder(torch.cat(views))
    _check_results(tree_flatten(results)[0], sum(map(len, views)))
    n_views = len(views)

    def of_view(i: int, x: Tensor) -> Tensor:
        return x.chunk(n_views)[i] if x.ndim else x

    return tuple(tree_map_only(Tensor, partial(of_view, i), results) for i in range(n_views))


def _number_of_rows(leaves: list[Any]) -> int:
    shapes = [tuple(x.shape) for x in leaves if isinstance(x, Tensor) and x.ndim]
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


def _part(x: Tensor, rows: slice) -> Tensor:
    """The rows of one chunk; what has no rows belongs to each chunk."""
    return x[rows] if x.ndim else x


def _can_have_gradient(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _merge(parts: tuple[Any, ...]) -> Any:
    """One result for the batch; what has no rows is that of the last chunk."""
    if isinstance(parts[-1], Tensor):
        return torch.cat(parts) if parts[-1].ndim else parts[-1].clone()
    return parts[-1]


def _backward(
    leaves: list[Any], grads: tuple[Tensor | None, ...], rows: slice, is_last: bool
) -> None:
    """Backward of one chunk; a result that has no rows gets its gradient in the last one."""
    present = [
        (leaf, _part(grad, rows))
        for leaf, grad in zip(leaves, grads, strict=True)
        if grad is not None and (leaf.ndim or is_last)
    ]
    roots = [(leaf, grad) for leaf, grad in present if leaf.requires_grad]
    if present and not roots:
        raise RuntimeError(
            "encoder must return results with a gradient, since some of its parameters require "
            "one; is there a detach() or no_grad() in it?"
        )
    if roots:
        torch.autograd.backward([leaf for leaf, _ in roots], [grad for _, grad in roots])
