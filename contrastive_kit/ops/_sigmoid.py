"""The primitive of the sigmoid loss: the sum of softplus over the kept entries of ``q @ k.T + b``.

Registered like the logsumexp. Forward and backward go over the same tiles, and the backward
computes the logits again: memory is linear in the number of rows in training too. Equation numbers
are those of ``docs/nt_xent.md``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit import reference
from contrastive_kit._checks import check_choice
from contrastive_kit._dtypes import compute_dtype
from contrastive_kit.ops._differentiable_once import differentiable_once
from contrastive_kit.ops._exclusion import Exclusion
from contrastive_kit.ops._registered import _register
from contrastive_kit.ops._tiled import blocks, logit_tiles, power_of_two
from contrastive_kit.ops._unit_rows import accumulator_dtype

SOFTPLUS_BACKENDS = ("tiled", "reference")

# By default softplus is linear above 20, which float64 would notice.
_LINEAR_ABOVE = 50


def kept_softplus_sum(
    q: Tensor,
    k: Tensor,
    bias: float | Tensor = 0.0,
    *,
    exclusion: Exclusion = Exclusion(),  # noqa: B008  an immutable tuple
    backend: str = "auto",
) -> Tensor:
    """Sum of softplus over the kept entries of each row of ``q @ k.T + bias``, equation (18).

    A row that keeps no entry has sum 0. NaN and inf propagate. Gradients flow to ``q``, ``k`` and
    ``bias`` once; a second differentiation raises (except with the ``reference`` backend).
    Deterministic. Memory beyond the result: a few tiles, and R·C for the ``reference`` backend.

    Args:
        q: rows (R, D), floating; computed in float64 if float64, else in float32.
        k: columns (C, D).
        bias: number, or tensor of one value, which receives its gradient.
        exclusion: the pairs left out.
        backend: "auto" or "tiled" (any device), or "reference" (the formula, memory R·C).

    Returns:
        The sums (R,).

    Raises:
        ValueError: for an unknown backend.

    Example:
        >>> import torch
        >>> from contrastive_kit.ops import Exclusion, kept_softplus_sum
        >>> kept_softplus_sum(torch.eye(3), torch.eye(3), exclusion=Exclusion(3))  # 2 log 2
        tensor([1.3863, 1.3863, 1.3863])
    """
    check_choice("backend", backend, ["auto", *SOFTPLUS_BACKENDS])
    dtype = compute_dtype(q, k)
    q, k = q.to(dtype), k.to(dtype)
    if isinstance(bias, Tensor):
        bias = bias.reshape(()).to(q.device, dtype)
    else:
        bias = q.new_full((), bias)
    if backend == "reference":
        with torch.autocast(q.device.type, enabled=False):
            excluded = exclusion.mask(q.shape[0], k.shape[0], q.device)
            return reference.kept_softplus_sum(q, k, bias, excluded)
    period, row_ids, column_ids = exclusion
    sums: Tensor = _KeptSoftplusSum.apply(q, k, bias, row_ids, column_ids, period)
    return sums


def _forward(
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    period: int,
) -> Tensor:
    exclusion = Exclusion(period, row_ids, column_ids)
    sums = q.new_zeros(len(q), dtype=accumulator_dtype(q))
    row_sums = blocks(sums)
    with torch.autocast(q.device.type, enabled=False):
        for tile, logits in logit_tiles(q, k):
            values = F.softplus(logits.add_(bias), threshold=_LINEAR_ABOVE)
            exclusion.fill_(values, 0.0, tile.top, tile.left)
            row_sums[tile.row].add_(values.sum(1))
    return sums.to(q.dtype)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    period: int,
) -> Tensor:
    return q.new_empty(q.shape[0])


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    period: int,
    needs_q: bool,
    needs_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (19): gradients of ``q`` and ``k``, (0,) for one not needed, and of ``bias``."""
    exclusion = Exclusion(period, row_ids, column_ids)
    dq = q.new_zeros(q.shape if needs_q else 0)
    dk = k.new_zeros(k.shape if needs_k else 0)
    dbias = q.new_zeros((), dtype=accumulator_dtype(q))
    # Relative to the largest, or a small incoming gradient would leave the range of float32.
    unit = power_of_two(grad.abs().amax())
    scales = blocks(grad / unit)
    rows, columns, drows, dcolumns = blocks(q), blocks(k), blocks(dq), blocks(dk)
    with torch.autocast(q.device.type, enabled=False):
        for tile, logits in logit_tiles(q, k):
            weights = logits.add_(bias).sigmoid_()
            exclusion.fill_(weights, 0.0, tile.top, tile.left)
            weights.mul_(scales[tile.row].unsqueeze(1))
            dbias += weights.sum()
            if needs_q:
                drows[tile.row].addmm_(weights, columns[tile.column])
            if needs_k:
                dcolumns[tile.column].addmm_(weights.T, rows[tile.row])
    return dq.mul_(unit), dk.mul_(unit), (dbias * unit).to(bias.dtype)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    period: int,
    needs_q: bool,
    needs_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq = q.new_empty(q.shape if needs_q else 0)
    return dq, k.new_empty(k.shape if needs_k else 0), torch.empty_like(bias)


_SHARED_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor bias, Tensor? row_ids, Tensor? column_ids, SymInt period"
)
softplus_sum_forward = _register(
    "contrastive_kit::kept_softplus_sum",
    f"({_SHARED_ARGUMENTS}) -> Tensor",
    _forward,
    _fake_forward,
)
softplus_sum_backward = _register(
    "contrastive_kit::kept_softplus_sum_backward",
    f"(Tensor grad, {_SHARED_ARGUMENTS}, bool needs_q, bool needs_k) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _KeptSoftplusSum(torch.autograd.Function):
    """Differentiable form of the two ops. Only the inputs are kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        bias: Tensor,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        period: int,
    ) -> Tensor:
        result: Tensor = softplus_sum_forward(q, k, bias, row_ids, column_ids, period)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.period = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_q, needs_k, needs_bias = ctx.needs_input_grad[:3]
        dq, dk, dbias = softplus_sum_backward(
            grad, *ctx.saved_tensors, ctx.period, needs_q, needs_k
        )
        return (
            dq if needs_q else None,
            dk if needs_k else None,
            dbias if needs_bias else None,
            *[None] * 3,
        )


# As that of the logsumexp.
torch.library.register_autograd(
    "contrastive_kit::kept_softplus_sum",
    _KeptSoftplusSum.backward,
    setup_context=_KeptSoftplusSum.setup_context,
)
