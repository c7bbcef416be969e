"""The loss of a batch of pairs as one op: small batches wait for calls, not for arithmetic.

What ``losses`` composes of many: unit rows, the logsumexp over negatives, the loss of each anchor,
their mean. Equation numbers are of ``docs/nt_xent.md``.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit._dtypes import compute_dtype
from contrastive_kit.ops.differentiable_once import (
    applier,
    differentiable_once,
    first_is_differentiable,
    is_watched,
)
from contrastive_kit.ops.pairs import PairLoss, Pairs, PairStatistics
from contrastive_kit.ops.problem import Exclusion, Problem
from contrastive_kit.ops.registered import register
from contrastive_kit.ops.statistics import LogitStatistics
from contrastive_kit.ops.tiled.logsumexp import exact_logsumexp, write_gradients
from contrastive_kit.ops.tiled.tiles import new_tiles, power_of_two
from contrastive_kit.ops.unit_rows import to_gradients_, to_unit_rows_

# By default softplus is linear above 20, which float64 would notice.
_LINEAR_ABOVE = 50


def pair_loss(pairs: Pairs) -> PairLoss | None:
    """The loss of the pairs and its statistics, or None for what the op does not take."""
    z1, z2, temperature, _, weight = pairs[:5]
    if z1.device.type != "cpu" or (weight is not None and weight.requires_grad):
        return None
    if z1 is z2:
        z2 = z2.view_as(z2)  # torch.compile takes no tensor twice
    wanted = [z1, z2] + ([temperature] if isinstance(temperature, Tensor) else [])
    # As for the logsumexp alone, see ``registered.py``.
    save_tiles = torch.is_grad_enabled() and any(x.requires_grad for x in wanted)
    save_tiles = save_tiles and not pairs.statistics and not torch.compiler.is_exporting()
    number = math.nan if isinstance(temperature, Tensor) else temperature
    tensor = temperature if isinstance(temperature, Tensor) else None
    loss, stats = _apply(z1, z2, tensor, *pairs[3:], number, save_tiles)
    if not pairs.statistics:
        return loss, None
    positive_logits, *negatives = stats.unbind(0)
    return loss, PairStatistics(positive_logits[None], LogitStatistics(*negatives))


class _Settings:
    """The arguments of the ops that are no embeddings, and what follows from them."""

    def __init__(
        self, temperature: Tensor | None, ids: Tensor | None, sample_weight: Tensor | None,
        between: bool, both: bool, decoupled: bool, reduction: str, statistics: bool, number: float,
    ) -> None:  # fmt: skip
        self.ids, self.sample_weight = ids, sample_weight
        self.between, self.both, self.decoupled = between, both, decoupled
        self.reduction, self.statistics = reduction, statistics
        # Without its derivative: reading a value on the CPU waits for nothing.
        self.temperature = number if temperature is None else float(temperature.detach())
        self.root_scale = self.temperature**-0.5 if self.temperature > 0 else math.nan
        self.n_directions = 2 if both or not between else 1

    def problem(self, rows: Tensor) -> Problem:
        """The logsumexp to be taken of unit rows (2, N, D)."""
        n = rows.shape[1]
        bound = 1.001 / self.temperature if self.temperature else math.nan
        if self.between:
            q, k = rows.unbind(0)
            return Problem(q, k, Exclusion(n, self.ids), self.both, bound, self.statistics)
        ids = None if self.ids is None else self.ids.repeat(2)
        return Problem(rows.view(2 * n, -1), None, Exclusion(n, ids), False, bound, self.statistics)

    def weights(self, like: Tensor) -> Tensor | None:
        """What each pair counts in the loss where that is not the same for all."""
        if self.sample_weight is None:
            return None
        weights = self.sample_weight.to(like.dtype)
        if self.reduction != "mean":
            return weights
        total = weights.sum() * self.n_directions
        return weights / torch.where(total == 0, 1, total)


def _forward(z1: Tensor, z2: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The loss, its statistics (6, R) or (0,), and what the backward needs.

    That is the unit rows (2, N, D); the lengths of embeddings, and of the rows, (2, N, 1);
    logsumexp and slope of the loss of each anchor, (directions, N); and tiles.
    """
    settings, save_tiles = _Settings(*arguments[:-1]), arguments[-1]
    with torch.autocast("cpu", enabled=False):
        rows = torch.stack((z1, z2)).to(compute_dtype(z1, z2))
        norm, length = to_unit_rows_(rows, settings.root_scale)
        y1, y2 = rows.unbind(0)
        positive = (y1 * y2).sum(1)
        problem = settings.problem(rows)
        tiles = new_tiles(problem, save_tiles)
        lse, stats = exact_logsumexp(problem, tiles)
        lse = lse.view(-1, rows.shape[1])
        gap = lse - positive
        if settings.decoupled:
            # An anchor without negatives has loss 0; NaN is no number either way.
            losses = gap.masked_fill(gap == -torch.inf, 0)
            slope = torch.where(gap == -torch.inf, 0.0, torch.ones_like(gap))
        else:
            # Unlike a difference of logsumexps it keeps its relative precision for tiny losses.
            losses, slope = F.softplus(gap, threshold=_LINEAR_ABOVE), gap.sigmoid()
        loss = _reduced(losses, settings)
        if settings.statistics:
            of_rows = lse.view(1, -1).to(rows.dtype)
            stats = torch.cat([positive.repeat(len(lse))[None], of_rows, stats])
    return loss.to(rows.dtype), stats, rows, norm, length, lse, slope, tiles


def _reduced(losses: Tensor, settings: _Settings) -> Tensor:
    """Losses (directions, N), in double precision, as equation (18) has them."""
    weights = settings.weights(losses)
    if weights is None and settings.reduction == "mean":
        return losses.mean()
    losses = losses if weights is None else losses * weights
    if settings.reduction == "none":
        return losses if settings.n_directions > 1 else losses[0]
    return losses.sum()


def _fake_forward(z1: Tensor, z2: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    between, both, _, reduction, statistics, _, save_tiles = arguments[3:]
    (n, d), dtype = z1.shape, compute_dtype(z1, z2)
    rows = z1.new_empty((2, n, d), dtype=dtype)
    directions = 2 if both or not between else 1
    shape = () if reduction != "none" else (n,) if directions == 1 else (2, n)
    q, k = (rows[0], rows[1]) if between else (rows.flatten(0, 1), None)
    exact = z1.new_empty((directions, n), dtype=torch.float64)
    return (
        rows.new_empty(shape),
        rows.new_empty((6, directions * n) if statistics else 0),
        rows,
        z1.new_empty((2, n, 1), dtype=torch.float64),
        z1.new_empty((2, n, 1), dtype=torch.float64),
        exact,
        torch.empty_like(exact),
        new_tiles(Problem(q, k), save_tiles),
    )


def _backward(
    grad: Tensor,
    rows: Tensor,
    norm: Tensor,
    length: Tensor,
    lse: Tensor,
    slope: Tensor,
    tiles: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of both matrices, (2, N, D), and of the temperature; that of one may be missing."""
    settings, (needs_z1, needs_z2, needs_temperature) = _Settings(*arguments[:-3]), arguments[-3:]
    problem = settings.problem(rows)
    with torch.autocast("cpu", enabled=False):
        weights = settings.weights(slope)
        scale = grad.to(slope.dtype)  # of all gradients
        if settings.reduction == "none":
            weights = scale if weights is None else scale * weights
            scale = slope.new_ones(())
        if weights is not None:
            # Relative to the largest, or small weights would leave the range of float32.
            largest = power_of_two(weights.abs().amax())
            slope = slope * (weights / largest)
            scale = scale * largest
        elif settings.reduction == "mean":
            scale = scale / slope.numel()
        # What of both is needed: all for NT-Xent, where each row is in the gradient of others, and
        # for the temperature.
        needed = (True, True)
        if settings.between and not needs_temperature:
            needed = needs_z1, needs_z2
        grads = rows.new_empty(rows.shape)
        if settings.between:
            dq, dk = (x if need else x[:0] for x, need in zip(grads, needed, strict=True))
        else:
            dq, dk = grads.view(problem.q.shape), grads[0, :0]
        write_gradients(problem, slope.view(-1), lse.view(-1), tiles, dq, dk)
        of_positive = slope.sum(0).to(rows.dtype).unsqueeze(1)
        for own, other, need in zip(grads, rows.unbind(0)[::-1], needed, strict=True):
            _ = own.addcmul_(other, of_positive, value=-1) if need else own.zero_()
        # The reciprocal of a tiny length times a large gradient may leave the range of float32.
        factor = (scale * settings.root_scale / norm).clamp_(max=torch.finfo(rows.dtype).max)
        along = to_gradients_(grads, rows, length, factor.to(rows.dtype))
        d_temperature = norm.new_zeros(())
        if needs_temperature:
            # What lies along a row is the gradient of its length, and so of the temperature.
            d_temperature = along.sum() * scale / (-2 * settings.temperature)
    return grads, d_temperature


_SETTINGS = (
    "Tensor? temperature, Tensor? ids, Tensor? sample_weight, bool between, bool both, "
    "bool decoupled, str reduction, bool statistics, float number"
)
_forward_op = register(
    "tiled_pair_loss",
    f"(Tensor z1, Tensor z2, {_SETTINGS}, bool save_tiles) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_op = register(
    "tiled_pair_loss_backward",
    "(Tensor grad, Tensor rows, Tensor norm, Tensor length, Tensor lse, Tensor slope, "
    f"Tensor tiles, {_SETTINGS}, bool needs_z1, bool needs_z2, bool needs_temperature) -> "
    " (Tensor, Tensor)",
    _backward,
    lambda grad, rows, norm, length, lse, *_: (torch.empty_like(rows), lse.new_empty(())),
)


class _PairLoss(torch.autograd.Function):
    """Differentiable form of the two ops; takes what the first op takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z1: Any, z2: Any, temperature: Any, ids: Any, sample_weight: Any, between: Any, both: Any,
        decoupled: Any, reduction: Any, statistics: Any, number: Any, save_tiles: Any,
    ) -> Any:  # fmt: skip
        forward = _forward_op if is_watched(z1) else _forward
        return forward(
            z1, z2, temperature, ids, sample_weight, between, both, decoupled, reduction,
            statistics, number, save_tiles,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z1, z2, *tensors = inputs[:5]
        ctx.settings = inputs[5:-1]
        first_is_differentiable(ctx, *output)
        # The embeddings for their dtypes, and as what a second derivative would be of.
        ctx.save_for_backward(*output[2:], *tensors, z1, z2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        *saved, temperature, ids, sample_weight, z1, z2 = ctx.saved_tensors
        backward = _backward_op if is_watched(grad) else _backward
        grads, d_temperature = backward(
            grad, *saved, temperature, ids, sample_weight, *ctx.settings, *needs
        )
        dz1, dz2 = grads.unbind(0)
        return (
            dz1.to(z1.dtype) if needs[0] else None,
            dz2.to(z2.dtype) if needs[1] else None,
            d_temperature.to(temperature.dtype).view_as(temperature) if needs[2] else None,
            *[None] * 9,
        )


_apply = applier(_PairLoss, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _PairLoss.setup_context(ctx, inputs, output)


# torch.export leaves the function out, and keeps the op.
torch.library.register_autograd(
    "contrastive_kit::tiled_pair_loss", _PairLoss.backward, setup_context=_setup_context
)
