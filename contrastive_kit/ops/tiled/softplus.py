"""The sum of softplus by tiles. Equation numbers are of ``docs/nt_xent.md``.

Memory is linear in the number of rows in training too: where the sum of each row is asked for, the
backward computes the logits again; where it is that of all rows, one pass makes the gradients too.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from contrastive_kit.ops.problem import Problem
from contrastive_kit.ops.tiled.tiles import Tile, blocks, computed_tiles, power_of_two
from contrastive_kit.ops.unit_rows import accumulator_dtype

# By default softplus is linear above 20, which float64 would notice.
_LINEAR_ABOVE = 50


def forward(problem: Problem, bias: Tensor) -> Tensor:
    """Sums of softplus over the kept logits of each row, equation (26)."""
    q = problem.q
    sums = q.new_zeros(len(q), dtype=accumulator_dtype(q))
    row_sums = blocks(sums)
    for tile, logits in computed_tiles(problem, _adding(bias)):
        values = F.softplus(logits, threshold=_LINEAR_ABOVE)
        problem.exclusion.fill_(values, 0.0, tile.top, tile.left)
        row_sums[tile.row].add_(values.sum(1))
    return sums.to(q.dtype)


def backward(
    problem: Problem, bias: Tensor, grad: Tensor, needs_grad: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (27): gradients of ``bias``, and of ``q`` and ``k``, (0,) for one not needed."""
    q, keys = problem.q, problem.keys()
    dq = q.new_zeros(q.shape if needs_grad[0] else 0)
    dk = keys.new_zeros(keys.shape if needs_grad[1] else 0)
    dbias = bias.new_zeros(bias.shape, dtype=accumulator_dtype(q))
    # Relative to the largest, or a small incoming gradient would leave the range of float32.
    grad_scale = power_of_two(grad.abs().amax())
    row_grad = blocks(grad / grad_scale)
    rows, columns, drows, dcolumns = blocks(q), blocks(keys), blocks(dq), blocks(dk)
    add_bias = _adding(bias)

    def weigh(logits: Tensor, tile: Tile) -> None:
        weights = add_bias(logits, tile).sigmoid_()
        problem.exclusion.fill_(weights, 0.0, tile.top, tile.left)
        weights.mul_(row_grad[tile.row].unsqueeze(1))

    for tile, weights in computed_tiles(problem, weigh):
        if bias.ndim:
            blocks(dbias)[tile.row].add_(weights.sum(1))
        else:
            dbias += weights.sum()
        if needs_grad[0]:
            drows[tile.row].addmm_(weights, columns[tile.column])
        if needs_grad[1]:
            dcolumns[tile.column].addmm_(weights.T, rows[tile.row])
    return (dbias * grad_scale).to(bias.dtype), dq.mul_(grad_scale), dk.mul_(grad_scale)


def total(
    problem: Problem, bias: Tensor, weights: Tensor | None, needs_grad: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over all rows, each times its weight, with its gradients, (26) and (27).

    The gradients are those of ``bias``, ``q`` and ``k``; (0,) for a matrix that needs none.
    """
    q, keys = problem.q, problem.keys()
    _, needs_q, needs_k = needs_grad
    dq = q.new_zeros(q.shape if needs_q else 0)
    dk = keys.new_zeros(keys.shape if needs_k else 0)
    accumulator = accumulator_dtype(q)
    sums, dbias = q.new_zeros(len(q), dtype=accumulator), bias.new_zeros((), dtype=accumulator)
    row_sums, row_weights = blocks(sums), None if weights is None else blocks(weights.to(q.dtype))
    rows, columns, drows, dcolumns = blocks(q), blocks(keys), blocks(dq), blocks(dk)
    for tile, logits in computed_tiles(problem, _adding(bias)):
        values = F.softplus(logits, threshold=_LINEAR_ABOVE)
        problem.exclusion.fill_(values, 0.0, tile.top, tile.left)
        row_sums[tile.row].add_(values.sum(1))
        if not any(needs_grad):
            continue
        slopes = logits.sigmoid_()
        problem.exclusion.fill_(slopes, 0.0, tile.top, tile.left)
        if row_weights is not None:
            slopes.mul_(row_weights[tile.row].unsqueeze(1))
        dbias += slopes.sum()
        if needs_q:
            drows[tile.row].addmm_(slopes, columns[tile.column])
        if needs_k:
            dcolumns[tile.column].addmm_(slopes.T, rows[tile.row])
    if weights is not None:
        sums *= weights
    return sums.sum().to(q.dtype), dbias.to(bias.dtype), dq, dk


def _adding(bias: Tensor) -> Callable[[Tensor, Tile], Tensor]:
    """What adds the bias to a tile in place, one to all rows or each row its own."""
    if bias.ndim == 0:
        return lambda logits, tile: logits.add_(bias)
    of_rows = blocks(bias)
    return lambda logits, tile: logits.add_(of_rows[tile.row].unsqueeze(1))
