"""Uniform random numbers of a module with a generator of its own.

A `torch.Generator` is awkward in three places. In a DataLoader's workers it is a copy in the same
state, in every worker and every epoch. As part of a pickle it holds a tensor, which a spawned
process cannot read. And torch.compile (2.9 to 2.14) traces none. `Draws` is right in all three.
"""

import hashlib
import os
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn


class _Source:
    """A generator, pickled by its bytes, and known to the operator below by a number."""

    __slots__ = ("__weakref__", "generator", "number")

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.number = id(generator)

    def __reduce__(self) -> tuple[Any, ...]:
        state = bytes(self.generator.get_state().tolist())
        return _unpickle, (str(self.generator.device), state)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Source":
        from copy import deepcopy

        return _source(deepcopy(self.generator, memo))


# One for each generator, so that modules that share one still do so after a pickle. An entry lives
# as long as a module holds its source.
_SOURCES: WeakValueDictionary[int, _Source] = WeakValueDictionary()


def _source(generator: torch.Generator) -> _Source:
    return _SOURCES.setdefault(id(generator), _Source(generator))


def _unpickle(device: str, state: bytes) -> _Source:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return _source(generator)


class Draws(nn.Module):
    """A module that draws random numbers, from `generator` if that is not None."""

    _source: _Source | None
    _generator: torch.Generator | None

    @property
    def generator(self) -> torch.Generator | None:
        """Where the random numbers come from; the default CPU generator if None."""
        return self._generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or None, got {type(generator).__name__}"
            )
        self._generator = generator
        self._source = None if generator is None else _source(generator)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_generator", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        source = state["_source"]
        self._generator = None if source is None else source.generator

    def uniforms(self, *shape: int, by_rank: bool) -> Tensor:
        """Uniform numbers in [0, 1), float32, on the generator's device.

        In a DataLoader worker the numbers of a generator depend on the worker, on the epoch and,
        where it can be known, on the rank; with `by_rank` also elsewhere on the rank.
        """
        if self._source is None:
            return torch.rand(shape, dtype=torch.float32, device="cpu")
        if torch.compiler.is_compiling():
            drawn: Tensor = _op(self._source.number, shape, by_rank)
            return drawn
        return _draw(self._source.generator, shape, by_rank)


def _draw(generator: torch.Generator, shape: tuple[int, ...], by_rank: bool) -> Tensor:
    place = _place(by_rank)
    if place and generator.device.type == "cpu":
        # One number of the generator and the place make a generator for this call: the caller may
        # seed it, save it and restore it as ever.
        drawn = torch.randint(2**62, (), generator=generator, device="cpu").item()
        digest = hashlib.blake2b(repr((drawn, *place)).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)


def _place(by_rank: bool) -> tuple[int, ...]:
    """What sets this process apart from others that hold the same generator."""
    worker = torch.utils.data.get_worker_info()
    rank = 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
    elif worker is not None:
        # A spawned worker knows what the launcher told its parent.
        rank = int(os.environ.get("RANK", "0"))
    if worker is not None:
        return worker.seed, rank
    return (rank,) if by_rank and rank else ()


def _draw_from(number: int, shape: list[int], by_rank: bool) -> Tensor:
    return _draw(_SOURCES[number].generator, tuple(shape), by_rank)


def _fake(number: int, shape: list[int], by_rank: bool) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=_SOURCES[number].generator.device)


torch.library.define(
    "contrastive_kit::uniforms",
    "(int source, SymInt[] shape, bool by_rank) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
torch.library.impl("contrastive_kit::uniforms", "BackendSelect", _draw_from)
torch.library.register_fake("contrastive_kit::uniforms", _fake)
_op = torch.ops.contrastive_kit.uniforms.default
