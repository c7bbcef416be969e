"""A part of a batch, encoded a second time exactly as it was the first."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten


class BatchContext:
    """What all chunks of one batch have in common when they are encoded a second time."""

    def __init__(self, encoder: nn.Module, tensors: list[Tensor]) -> None:
        self.encoder = encoder
        self.modes = [(module, module.training) for module in encoder.modules()]
        self.versions = [(parameter, version(parameter)) for parameter in encoder.parameters()]
        devices = {x.device for x in (*tensors, *encoder.parameters(), *encoder.buffers())}
        self.generators = _generators(encoder, devices)
        self.parametrizations = parametrize._cache_enabled, parametrize._cache
        self._copies: dict[int, tuple[Tensor, int | None, Tensor]] = {}

    def copied(self, buffer: Tensor) -> Tensor:
        """A copy of the buffer as it is now; one for all chunks that find it unchanged."""
        writes = version(buffer)
        known = self._copies.get(id(buffer))
        if known is None or known[1] != writes or writes is None:
            known = self._copies[id(buffer)] = buffer, writes, buffer.detach().clone()
        return known[2]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, modes and parametrized weights of the first pass; the encoder reduces nothing."""
        if any(version(parameter) != writes for parameter, writes in self.versions):
            raise RuntimeError(
                "a parameter of GradCache's encoder has changed between the call and its backward, "
                "so that the gradient would be that of another encoder: call backward() before "
                "optimizer.step(), load_state_dict() or any other change of the weights"
            )
        modes = [(module, module.training) for module, _ in self.modes]
        cache = parametrize._cache_enabled, parametrize._cache
        with _no_communication(self.encoder):
            try:
                parametrize._cache_enabled, parametrize._cache = self.parametrizations
                _set_modes(self.modes)
                yield
            finally:
                _set_modes(modes)
                parametrize._cache_enabled, parametrize._cache = cache


class Replayed:
    """Encodes one chunk: first as the encoder does, from then on as it did the first time.

    Args:
        encode: the encoder, called with the tensors of the chunk.
        context: of the batch.
        verified: called when the second pass has given what the first did; None to not compare.
    """

    def __init__(
        self,
        encode: Callable[..., Any],
        context: BatchContext,
        verified: Callable[[], None] | None,
    ) -> None:
        self._encode = encode
        self._context = context
        self._verified = verified
        self._first_results: list[Any] | None = None
        self._started = False

    def __call__(self, *tensors: Tensor) -> Any:
        if self._started:
            return self._repeat(tensors)
        self._started = True
        self._random_states = [generator.get() for generator in self._context.generators]
        self._buffers = [
            _Buffer(module, name, self._context.copied(tensor))
            for module, name, tensor in _buffers(self._context.encoder)
        ]
        result = self._encode(*tensors)
        if self._verified is not None:
            self._first_results = [
                leaf.detach() if isinstance(leaf, Tensor) else None
                for leaf in tree_flatten(result)[0]
            ]
        return result

    def _repeat(self, tensors: tuple[Tensor, ...]) -> Any:
        context = self._context
        random_states = [generator.get() for generator in context.generators]
        current = list(_buffers(context.encoder))
        with context.restored():
            try:
                # Other tensors in their place, not other values in place: the encoder may have kept
                # a buffer for its backward, and what it writes in this pass must leave no trace.
                for module, name, value in self._buffers:
                    module._buffers[name] = value.clone()
                for generator, state in zip(context.generators, self._random_states, strict=True):
                    generator.set(state)
                result = self._encode(*tensors)
            finally:
                for module, name, tensor in current:
                    module._buffers[name] = tensor
                for generator, state in zip(context.generators, random_states, strict=True):
                    generator.set(state)
        if self._verified is not None and self._first_results is not None:
            self._compare(tree_flatten(result)[0], self._first_results)
            self._first_results = None
            self._verified()
        return result

    def _compare(self, second: list[Any], first: list[Any]) -> None:
        for before, after in zip(first, second, strict=True):
            if isinstance(before, Tensor) and not close(after, before):
                raise RuntimeError(
                    "the second pass of GradCache gives other embeddings than the first, so that "
                    "its gradient would be wrong. Random numbers are repeated where they come from "
                    "torch's default generators or from a torch.Generator that is an attribute of "
                    "a module in the encoder; does it draw others, or keep a state that is no "
                    "buffer?"
                )


class _Buffer(NamedTuple):
    """Where a buffer is, and a value of it."""

    module: nn.Module
    name: str
    value: Tensor


class _RandomSource(NamedTuple):
    """A generator of random numbers, by its state."""

    get: Callable[[], Tensor]
    set: Callable[[Tensor], object]


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


def _buffers(encoder: nn.Module) -> Iterator[_Buffer]:
    for module in encoder.modules():
        for name, tensor in module._buffers.items():
            if tensor is not None:
                yield _Buffer(module, name, tensor)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def fill_parametrization_cache(encoder: nn.Module) -> None:
    """Inside ``parametrize.cached()``: compute weights outside of chunks, of which each drops its.

    A weight that the first chunk has computed would reach the others from there, as it does
    without chunks, but the second pass of that chunk has its own.
    """
    if not parametrize._cache_enabled:
        return
    for module in encoder.modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:  # type: ignore[union-attr]
                getattr(module, name)


def data_parallel(encoder: nn.Module) -> list[Any]:
    """Each ``DistributedDataParallel`` in the encoder, itself included."""
    if not torch.distributed.is_available():
        return []
    from torch.nn.parallel import DistributedDataParallel

    return [m for m in encoder.modules() if isinstance(m, DistributedDataParallel)]


@contextmanager
def reduction(encoder: nn.Module, prepare: bool) -> Iterator[None]:
    """Inside, a forward of DistributedDataParallel prepares the reduction of gradients, or not.

    Only the last chunk's may. Buffers are sent to all ranks by the first chunk alone, after which
    a forward that prepares nothing has left word that they are.
    """
    with ExitStack() as stack:
        for ddp in [] if prepare else data_parallel(encoder):
            stack.enter_context(ddp.no_sync())
        yield


@contextmanager
def _no_communication(encoder: nn.Module) -> Iterator[None]:
    """Inside, a forward of DistributedDataParallel sends no buffers and prepares no reduction."""
    wrappers = data_parallel(encoder)
    before = [ddp.require_forward_param_sync for ddp in wrappers]
    try:
        for ddp in wrappers:
            ddp.require_forward_param_sync = False
        with reduction(encoder, prepare=False):
            yield
    finally:
        for ddp, value in zip(wrappers, before, strict=True):
            ddp.require_forward_param_sync = value


@torch.no_grad()
def close(a: Tensor, b: Tensor) -> bool:
    """Whether ``a`` is ``b``, but for the rounding of kernels whose sums have no fixed order."""
    if not (a.is_floating_point() or a.is_complex()):
        return True
    autocast = torch.is_autocast_enabled(a.device.type)
    dtype = torch.get_autocast_dtype(a.device.type) if autocast else a.dtype
    if dtype == torch.float32 and a.device.type != "cpu":
        dtype = torch.float16  # TensorFloat-32 rounds to as many bits
    tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
    wide = torch.promote_types(a.abs().dtype, torch.float32)
    difference, norm = (torch.linalg.vector_norm(x.abs(), dtype=wide) for x in (a - b, b))
    # Of NaN, whatever its origin, this is not the judge: no comparison with it holds.
    return not bool(difference > tolerance * norm)


def version(x: Tensor) -> int | None:
    """How often the values of ``x`` have been written to, as autograd counts."""
    return None if x.is_inference() else x._version
