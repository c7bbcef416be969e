"""The negatives of anchors, in one group or several: their logsumexp, their number, their sum.

A group answers for M anchors. Nothing here is of size M × M.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from contrastive_kit.losses._kept import kept_counts, kept_sums
from contrastive_kit.ops import (
    Exclusion,
    LogitStatistics,
    Problem,
    logsumexp_for,
    merged_statistics,
    row_statistics,
)

Found = tuple[Tensor, LogitStatistics | None]


class Negatives(Protocol):
    """What a loss asks of the negatives of its M anchors."""

    def found(self) -> Found:
        """The logsumexp of their logits, (M,), -inf where there is none; and its statistics."""
        ...

    def at_scale(self, scale: float) -> Tensor:
        """The logsumexp of their logits times ``scale``, (M,)."""
        ...

    def counts(self) -> Tensor:
        """How many they are, int64 (M,)."""
        ...

    def totals(self) -> Tensor:
        """The sum of their logits, (M,)."""
        ...


@dataclass(frozen=True)
class InTiles:
    """The kept columns of a problem, and for its columns the rows if it asks for ``both``."""

    problem: Problem
    backend: str

    def among(self, q: Tensor, k: Tensor | None, **changes: Any) -> "InTiles":
        """The same question, but for ``changes``, of rows ``q`` and columns ``k``."""
        return InTiles(self.problem._replace(q=q, k=k, **changes), self.backend)

    def found(self) -> Found:
        return logsumexp_for(self.problem, self.backend)(self.problem)

    def at_scale(self, scale: float) -> Tensor:
        problem, root = self.problem, math.sqrt(scale)
        scaled = problem._replace(
            q=problem.q * root,
            k=None if problem.k is None else problem.k * root,
            # A symbol for the scale cannot multiply infinity.
            bound=torch.inf if problem.bound == torch.inf else problem.bound * scale,
            limits=None if problem.limits is None else problem.limits * scale,
            statistics=False,
        )
        return logsumexp_for(problem, self.backend)(scaled)[0]

    def counts(self) -> Tensor:
        if self.problem.limits is not None:
            # Only the tiles know which logits are within their limits.
            return self._statistics().kept.long()
        return _beside(
            [kept_counts(q.shape[0], k.shape[0], e, q.device) for q, k, e in self._sides()]
        )

    def totals(self) -> Tensor:
        return _beside([(q * kept_sums(q.shape[0], k, e)).sum(1) for q, k, e in self._sides()])

    @torch.no_grad()
    def _statistics(self) -> LogitStatistics:
        problem = self.problem._replace(statistics=True)
        statistics = logsumexp_for(problem, self.backend)(problem)[1]
        assert statistics is not None  # they were asked for
        return statistics

    def _sides(self) -> list[tuple[Tensor, Tensor, Exclusion]]:
        q, keys, exclusion = self.problem.q, self.problem.keys(), self.problem.exclusion
        rows = [(q, keys, exclusion)]
        return [*rows, (keys, q, exclusion.transposed())] if self.problem.both else rows


@dataclass(frozen=True)
class PerQuery:
    """Negatives that each anchor has for itself, as the logits (M, K), K ≥ 1, -inf if left out."""

    logits: Tensor
    some_left_out: bool
    statistics: bool

    @classmethod
    def of(
        cls,
        queries: Tensor,
        negatives: Tensor,
        left_out: Tensor | None,
        statistics: bool,
        limits: Tensor | None = None,
    ) -> "PerQuery":
        """Of queries (M, D) and negatives (M, K, D), without those where ``left_out`` (M, K).

        Nor those whose logits are above the ``limits`` (M,).
        """
        dtype = torch.promote_types(queries.dtype, negatives.dtype)
        with torch.autocast(queries.device.type, enabled=False):
            logits = torch.einsum("nd,nkd->nk", queries.to(dtype), negatives.to(dtype))
        if limits is not None:
            above = logits.detach() > limits[:, None]
            left_out = above if left_out is None else left_out | above
        if left_out is not None:
            logits = logits.masked_fill(left_out, -torch.inf)
        return cls(logits, left_out is not None, statistics)

    def found(self) -> Found:
        lse = self.at_scale(1.0)
        if not self.statistics:
            return lse, None
        logits, plain = self.logits.detach(), lse.detach()
        return lse, LogitStatistics(plain, *row_statistics(logits, plain, 1).unbind(0))

    def at_scale(self, scale: float) -> Tensor:
        logits = self.logits if scale == 1.0 else scale * self.logits
        return _logsumexp(logits, 1) if self.some_left_out else logits.logsumexp(1)

    def counts(self) -> Tensor:
        return (self.logits != -torch.inf).sum(1)

    def totals(self) -> Tensor:
        return self.logits.masked_fill(self.logits == -torch.inf, 0).sum(1)


@dataclass(frozen=True)
class Nothing:
    """No negative, for as many anchors as ``like`` (M, D) has rows."""

    like: Tensor
    statistics: bool

    def found(self) -> Found:
        lse, zero = self.at_scale(1.0), self.totals()
        return lse, LogitStatistics(lse, lse, zero, zero, zero) if self.statistics else None

    def at_scale(self, scale: float) -> Tensor:
        return self.like.new_full(self.like.shape[:1], -torch.inf)

    def counts(self) -> Tensor:
        return self.like.new_zeros(self.like.shape[:1], dtype=torch.int64)

    def totals(self) -> Tensor:
        return self.like.new_zeros(self.like.shape[:1])


@dataclass(frozen=True)
class Together:
    """The union of groups that share no negative, each for the same M anchors."""

    groups: tuple[Negatives, ...]

    def found(self) -> Found:
        found = [group.found() for group in self.groups]
        lse = _united([x for x, _ in found])
        statistics = [x for _, x in found if x is not None]
        return lse, merged_statistics(statistics) if statistics else None

    def at_scale(self, scale: float) -> Tensor:
        return _united([group.at_scale(scale) for group in self.groups])

    def counts(self) -> Tensor:
        return torch.stack([group.counts() for group in self.groups]).sum(0)

    def totals(self) -> Tensor:
        return torch.stack([group.totals() for group in self.groups]).sum(0)


@dataclass(frozen=True)
class Beside:
    """Groups for different anchors, one after the other."""

    groups: tuple[Negatives, ...]

    def found(self) -> Found:
        lse, statistics = zip(*(group.found() for group in self.groups), strict=True)
        if statistics[0] is None:
            return torch.cat(lse), None
        fields = [torch.cat(field) for field in zip(*statistics, strict=True)]
        return torch.cat(lse), LogitStatistics(*fields)

    def at_scale(self, scale: float) -> Tensor:
        return torch.cat([group.at_scale(scale) for group in self.groups])

    def counts(self) -> Tensor:
        return torch.cat([group.counts() for group in self.groups])

    def totals(self) -> Tensor:
        return torch.cat([group.totals() for group in self.groups])


def together(groups: list[Negatives], anchors: Tensor, statistics: bool) -> Negatives:
    """The groups of ``anchors`` (M, D) as one, whether there are none, one or several."""
    if not groups:
        return Nothing(anchors, statistics)
    return groups[0] if len(groups) == 1 else Together(tuple(groups))


def check_own_keys(key: Tensor, negatives: Tensor) -> None:
    """Raise where shared negatives begin or end with the keys, if that can be seen for nothing.

    On a GPU, and in a graph, it would have to be waited for. Keys that are all alike, as of a
    collapsed encoder, may well have been seen before.
    """
    plain = type(key) is Tensor and type(negatives) is Tensor and key.device.type == "cpu"
    if not plain or negatives.ndim != 2 or torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        return
    n, same = len(key), key.to(negatives.dtype)
    again = torch.equal(negatives[:n], same) or torch.equal(negatives[-n:], same)
    if again and not torch.equal(key, key[:1].expand_as(key)):
        raise ValueError(
            "negatives must not hold the keys of the same call, which would count each positive "
            "twice; give those of the queue alone, or the mined ones, and with "
            "in_batch_negatives=True the other keys are negatives too"
        )


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _united(parts: list[Tensor]) -> Tensor:
    """The logsumexp of the union of sets, from theirs, (M,) each; of their common dtype."""
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return _logsumexp(torch.stack([part.to(dtype) for part in parts]), 0)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """The logsumexp, whose gradient is 0 where all is -inf; that of torch is NaN there."""
    empty = (x == -torch.inf).all(dim, keepdim=True)
    lse = x.masked_fill(empty, 0).logsumexp(dim)
    return lse.masked_fill(empty.squeeze(dim), -torch.inf)
