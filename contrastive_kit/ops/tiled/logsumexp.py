"""The logsumexp by tiles, float32 and float64. Equation numbers are of ``docs/nt_xent.md``."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from contrastive_kit.ops.problem import Problem
from contrastive_kit.ops.statistics import merge_statistics, row_statistics
from contrastive_kit.ops.tiled.tiles import (
    Blocks,
    Tile,
    blocks,
    computed_tiles,
    empty_tiles,
    is_one_tile,
    one_tile,
    power_of_two,
    row_and_column_blocks,
)
from contrastive_kit.ops.unit_rows import accumulator_dtype

# While every |logit| is at most this, sums of exp neither overflow nor lose a row to underflow,
# and the running maximum of a stable logsumexp is not needed.
_LARGEST_UNSHIFTED_LOGIT = {torch.float32: 69.0, torch.float64: 600.0}

# exp(x) = exp2(x · log2 e). On x86 torch takes exp from MKL, which needs 3.6 times as long on a
# processor of AMD as torch's own exp2. But a logit in bits is a larger number, and is rounded once
# more: above this largest |logit| that would show in the gradient.
_BITS_PER_NAT = math.log2(math.e)
_LARGEST_LOGIT_IN_BITS = 32.0


def forward(problem: Problem, saved_tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexp of rows (and columns if ``both``), its low part, and its statistics.

    A logsumexp of 100 in float32 is uncertain by 4e-6, and so would be the scale of the whole row
    in the backward. The part that float32 cannot hold therefore comes back as the second result.
    Statistics are empty if not wanted.
    """
    lse, stats = exact_logsumexp(problem, saved_tiles)
    rounded = lse.to(problem.q.dtype)
    lse_lo = torch.where(rounded.isinf(), 0, lse - rounded).to(rounded.dtype)
    return rounded, lse_lo, stats


def exact_logsumexp(problem: Problem, saved_tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The logsumexp in the dtype of accumulators, and its statistics, empty if not wanted.

    The first tiles are left in ``saved_tiles``: their exp where no logit is large, else their
    logits.
    """
    q = problem.q
    bound = torch.inf if problem.statistics else _largest_logit(problem)
    if _needs_logits(problem, bound):
        return _running_logsumexp(problem, saved_tiles)
    scale, exponentiate = _exponentials(problem, bound)
    if is_one_tile(problem):
        exps = one_tile(problem, saved_tiles)
        exps.addmm_(q, problem.keys().T, beta=0, alpha=scale)
        exponentiate(exps, _only_tile(problem))
        of_rows = exps.sum(1)
        sums = torch.cat((of_rows, exps.sum(0))) if problem.both else of_rows
        return sums.to(accumulator_dtype(q)).log_(), q.new_empty(0)
    sums = q.new_zeros(problem.n_results(), dtype=accumulator_dtype(q))
    row_sums, column_sums = row_and_column_blocks(sums, problem)
    for tile, exps in computed_tiles(problem, exponentiate, scale=scale, saved=saved_tiles):
        row_sums[tile.row].add_(exps.sum(1))
        if column_sums is not None and tile.mirrored:
            column_sums[tile.column].add_(exps.sum(0))
    return sums.log_(), q.new_empty(0)


def _running_logsumexp(problem: Problem, saved_tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The logsumexp from logits, equation (8), and its statistics.

    Where exp of a logit may overflow, or the two directions keep different logits.
    """
    q, length, statistics = problem.q, problem.n_results(), problem.statistics
    lse = q.new_full((length,), -torch.inf, dtype=accumulator_dtype(q))
    stats = q.new_zeros(4 if statistics else 0, length)
    stats[:1] = -torch.inf
    row_lse, column_lse = row_and_column_blocks(lse, problem)
    row_stats, column_stats = row_and_column_blocks(stats, problem)
    row_limits, column_limits = _limits(problem)

    def merge(lse: Tensor, stats: Tensor, logits: Tensor, dim: int) -> None:
        maximum = logits.amax(dim)
        shift = maximum.masked_fill(maximum == -torch.inf, 0)
        sums = _exp_(logits - shift.unsqueeze(dim)).sum(dim)
        tile_lse = shift.to(lse.dtype) + sums.to(lse.dtype).log()
        merged = torch.logaddexp(lse, tile_lse)
        if statistics:
            tile_stats = row_statistics(logits, tile_lse.to(q.dtype), dim)
            stats.copy_(merge_statistics(merged, stats, lse, tile_stats, tile_lse))
        lse.copy_(merged)

    for tile, logits in computed_tiles(problem, _leave_out(problem, -torch.inf), saved=saved_tiles):
        kept = _within(logits, row_limits, tile.row, 1)
        merge(row_lse[tile.row], row_stats[tile.row], kept, 1)
        if column_lse is not None and column_stats is not None and tile.mirrored:
            kept = _within(logits, column_limits, tile.column, 0)
            merge(column_lse[tile.column], column_stats[tile.column], kept, 0)
    return lse, stats if statistics else q.new_empty(0)


def backward(
    problem: Problem,
    grad: Tensor,
    lse: Tensor,
    lse_lo: Tensor,
    saved_tiles: Tensor,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of ``q`` and ``k``, equation (5); an empty tensor for the one not needed."""
    q, k = problem.q, problem.k
    dq = q.new_empty(q.shape if needs_grad[0] else 0)
    dk = q.new_empty(k.shape if k is not None and needs_grad[1] else 0)
    # Relative to the largest, or a small incoming gradient would leave the range of float32.
    grad_scale = power_of_two(grad.abs().amax())
    exact = accumulator_dtype(q)
    write_gradients(
        problem, (grad / grad_scale).to(exact), lse.to(exact) + lse_lo, saved_tiles, dq, dk
    )
    return dq.mul_(grad_scale), dk.mul_(grad_scale)


def write_gradients(
    problem: Problem, grad: Tensor, lse: Tensor, saved_tiles: Tensor, dq: Tensor, dk: Tensor
) -> None:
    """Write the gradients of equation (5) to ``dq`` and ``dk``, but for one that is empty.

    ``grad``, of no element above 1, is the gradient of ``lse``, which is as ``exact_logsumexp``
    gives it.
    """
    q, k = problem.q, problem.k
    if 0 in (q.shape[0], problem.keys().shape[0]):
        dq.zero_()
        dk.zero_()
        return
    # An empty row has logsumexp -inf and no gradient; +inf makes its weights exp(-inf) = 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    bound = _largest_logit(problem)
    if _needs_logits(problem, bound):
        # exp(logit - lse) · grad, as much of the exponent as float32 holds taken out of the tile
        rounded = lse.to(q.dtype)
        lse_lo = torch.where(rounded.isinf(), 0, lse - rounded)
        factors = (grad * (-lse_lo).exp()).to(q.dtype)
        weight_tiles = _shifted_weights(problem, rounded, factors, saved_tiles)
    else:
        factors = (grad * (-lse).exp()).to(q.dtype)
        weight_tiles = _weights(problem, factors, bound, saved_tiles)
    rows, drows = blocks(q), blocks(dq)
    columns, dcolumns = (rows, drows) if k is None else (blocks(k), blocks(dk))
    for tile, weights in weight_tiles:
        # The first product of a block is written, and all others added; of beta = 0 what was there
        # is not read. Tiles of the first row and column come first.
        if dq.numel():
            beta = min(tile.column, 1)
            drows[tile.row].addmm_(weights, columns[tile.column], beta=beta)
        if tile.mirrored and (k is None or dk.numel()):
            beta = min(tile.row, 1)
            dcolumns[tile.column].addmm_(weights.T, rows[tile.row], beta=beta)


def _weights(
    problem: Problem, factors: Tensor, bound: float, saved_tiles: Tensor
) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with the weights of equation (5), both directions summed."""
    row_factors, column_factors = row_and_column_blocks(factors, problem)
    if saved_tiles.shape[0] and is_one_tile(problem):
        factor = row_factors[0].unsqueeze(1)
        if column_factors is not None:
            factor = factor + column_factors[0]
        yield _only_tile(problem), one_tile(problem, saved_tiles) * factor
        return
    buffer = empty_tiles(1, problem)[0]
    scale, exponentiate = _exponentials(problem, bound)
    for tile, exps in computed_tiles(
        problem, exponentiate, scale=scale, saved=saved_tiles, known=True
    ):
        weights = buffer[: exps.shape[0], : exps.shape[1]]
        factor = row_factors[tile.row].unsqueeze(1)
        if column_factors is not None:
            factor = torch.add(factor, column_factors[tile.column], out=weights)
        yield tile, torch.mul(exps, factor, out=weights)


def _shifted_weights(
    problem: Problem, lse: Tensor, factors: Tensor, saved_tiles: Tensor
) -> Iterator[tuple[Tile, Tensor]]:
    """The same from logits: where their exp may overflow, or there are limits."""
    row_lse, column_lse = row_and_column_blocks(lse, problem)
    row_factors, column_factors = row_and_column_blocks(factors, problem)
    row_limits, column_limits = _limits(problem)
    buffers = empty_tiles(2, problem)
    for tile, logits in computed_tiles(
        problem, _leave_out(problem, -torch.inf), saved=saved_tiles, known=True
    ):
        weights, shifted = buffers[:, : logits.shape[0], : logits.shape[1]]
        kept = _within(logits, row_limits, tile.row, 1)
        torch.sub(kept, row_lse[tile.row].unsqueeze(1), out=weights)
        _exp_(weights).mul_(row_factors[tile.row].unsqueeze(1))
        if column_lse is not None and column_factors is not None:
            kept = _within(logits, column_limits, tile.column, 0)
            torch.sub(kept, column_lse[tile.column], out=shifted)
            weights.addcmul_(_exp_(shifted), column_factors[tile.column])
        yield tile, weights


def _exponentials(problem: Problem, bound: float) -> tuple[float, Callable[[Tensor, Tile], object]]:
    """By what to scale logits, and what then makes their exp in place, 0 where left out."""
    in_bits = bound <= _LARGEST_LOGIT_IN_BITS
    leave_out = _leave_out(problem, 0.0)

    def exponentiate(logits: Tensor, tile: Tile) -> None:
        _ = logits.exp2_() if in_bits else logits.exp_()
        leave_out(logits, tile)

    return _BITS_PER_NAT if in_bits else 1.0, exponentiate


def _leave_out(problem: Problem, value: float) -> Callable[[Tensor, Tile], object]:
    """What writes ``value`` into a tile where a pair is left out."""
    return lambda x, tile: problem.exclusion.fill_(x, value, tile.top, tile.left)


def _only_tile(problem: Problem) -> Tile:
    return Tile(0, 0, 0, 0, problem.k is not None)


def _exp_(x: Tensor) -> Tensor:
    return x.mul_(_BITS_PER_NAT).exp2_()


def _largest_logit(problem: Problem) -> float:
    """What no |logit| exceeds: ``bound``, or where that is of no use, by the lengths of rows."""
    q, k = problem.q, problem.k
    if problem.bound <= _LARGEST_UNSHIFTED_LOGIT[q.dtype]:
        return problem.bound
    if 0 in (q.shape[0], problem.keys().shape[0]):
        return 0.0
    if q.device.type != "cpu":
        return torch.inf  # reading the norms would wait for the device
    longest = torch.linalg.vector_norm(q, dim=1).amax()
    longest_key = longest if k is None else torch.linalg.vector_norm(k, dim=1).amax()
    return float(longest * longest_key)


def _needs_logits(problem: Problem, bound: float) -> bool:
    # NaN does
    return problem.limits is not None or not bound <= _LARGEST_UNSHIFTED_LOGIT[problem.q.dtype]


def _limits(problem: Problem) -> tuple[Blocks | None, Blocks | None]:
    if problem.limits is None:
        return None, None
    return row_and_column_blocks(problem.limits, problem)


def _within(logits: Tensor, limits: Blocks | None, block: int, dim: int) -> Tensor:
    """The logits of a tile that do not exceed the limits along ``dim``, -inf for the others."""
    if limits is None:
        return logits
    return logits.masked_fill(logits > limits[block].unsqueeze(dim), -torch.inf)
