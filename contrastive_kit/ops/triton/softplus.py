"""The sum of softplus, the host's part: one kernel and the vendor's products.

A logit's softplus and the weight of its gradient need nothing of other logits. So one kernel makes
both from a tile, a strip of rows at a time, and the strip of weights is multiplied by both matrices
before the next one takes its place: 6 · N² · D operations where the gradient of the sums is known,
8 where it comes later. Equations are those of ``docs/nt_xent.md``.
"""

import math

import torch
from torch import Tensor

from contrastive_kit.ops.problem import Problem
from contrastive_kit.ops.triton import configs, device
from contrastive_kit.ops.triton.host import (
    STRIP_BYTES,
    STRIP_ROWS,
    Packed,
    add_product,
    ceil_div,
    pack,
)


def forward(problem: Problem, bias: Tensor) -> Tensor:
    """Sums of softplus over the kept logits of each row, equation (26)."""
    return _Pass(problem, bias, None, summed=True).run(False, False)[0].to(problem.q.dtype)


def backward(
    problem: Problem, bias: Tensor, grad: Tensor, needs_grad: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (27): gradients of ``bias``, and of ``q`` and ``k``, (0,) for one not needed."""
    power, row_grad = _relative(grad)
    _, slope, dq, dk = _Pass(problem, bias, row_grad, stored=True).run(*needs_grad)
    return (slope * power).to(bias.dtype), dq.mul_(power), dk.mul_(power)


def total(
    problem: Problem, bias: Tensor, weights: Tensor | None, needs_grad: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over all rows, each times its weight, with its gradients, from one pass."""
    needs_bias, needs_q, needs_k = needs_grad
    stored = needs_bias or needs_q or needs_k
    if weights is None:
        all_in_one = _Pass(problem, bias, None, summed=True, stored=stored)
        sums, slope, dq, dk = all_in_one.run(needs_q, needs_k)
        return sums.sum().to(problem.q.dtype), slope.to(bias.dtype), dq, dk
    power, row_grad = _relative(weights.to(problem.q.dtype))
    all_in_one = _Pass(problem, bias, row_grad, summed=True, stored=stored)
    sums, slope, dq, dk = all_in_one.run(needs_q, needs_k)
    value = (sums * weights).sum().to(problem.q.dtype)
    return value, (slope * power).to(bias.dtype), dq.mul_(power), dk.mul_(power)


class _Pass:
    """One pass over the logits, a strip of rows at a time.

    Args:
        problem: rows, columns, and the pairs left out.
        bias: (), what is added to each logit.
        row_grad: (R,), what the weights of a row are multiplied by, or None for 1.
        summed: whether sums of softplus are asked for.
        stored: whether gradients are.
    """

    def __init__(
        self,
        problem: Problem,
        bias: Tensor,
        row_grad: Tensor | None,
        *,
        summed: bool = False,
        stored: bool = False,
    ) -> None:
        self.problem, self.bias, self.row_grad = problem, bias, row_grad
        self.summed, self.stored = summed, stored

    def run(self, needs_q: bool, needs_k: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums (R,) and the sum of all weights, float64; gradients of the matrices, or (0,)."""
        q, keys = self.problem.q, self.problem.keys()
        sums = q.new_zeros(len(q), dtype=torch.float64)
        slope = q.new_zeros((), dtype=torch.float64)
        dq = q.new_zeros(q.shape if needs_q else 0)
        dk = keys.new_zeros(keys.shape if needs_k else 0)
        if len(q) and len(keys):
            with device.on_device(q.device):
                packed = pack(self.problem)
                self._strips(packed, sums, slope, dq, dk)
        return sums, slope, dq, dk

    def _strips(self, packed: Packed, sums: Tensor, slope: Tensor, dq: Tensor, dk: Tensor) -> None:
        from contrastive_kit.ops.triton import softplus_kernels as kernels

        rows, n_rows = packed.rows[:2]
        columns, n_columns = packed.columns[:2]
        config = configs.softplus(packed.mma.dtype)
        across = ceil_div(n_columns, config.columns)
        stride = across * config.columns
        height = min(STRIP_ROWS, STRIP_BYTES // (stride * rows.element_size()), n_rows)
        height = ceil_div(max(height, 1), config.rows) * config.rows
        part = sums.new_empty((2, across, height), dtype=torch.float32)
        strip = rows.new_empty(height * stride if self.stored else 0)
        row_grad = part if self.row_grad is None else self.row_grad
        for top in range(0, n_rows, height):
            bottom = min(top + height, n_rows)
            down = ceil_div(bottom - top, config.rows)
            n_parts = across * down * config.rows
            parts = part.view(2, -1)[:, :n_parts].view(2, across, -1)
            kernels.softplus_kernel[(down, across)](
                *packed.matrices(), *packed.ids(), self.bias, row_grad, strip, part[0], part[1],
                stride, top, *packed.sizes(), packed.mma.weight_scale,
                WEIGHTED=self.row_grad is not None, SUMMED=self.summed, STORED=self.stored,
                BK=config.slice_of(packed.depth), **packed.constants(), **config.options(),
            )  # fmt: skip
            if self.summed:
                sums[top:bottom] = parts[0].sum(0, dtype=torch.float64)[: bottom - top]
            if not self.stored:
                continue
            slope += parts[1][:, : bottom - top].sum(dtype=torch.float64)
            weights = strip[: (bottom - top) * stride].view(-1, stride)[:, :n_columns]
            if dq.ndim == 2:
                width = dq.shape[1]
                add_product(dq[top:bottom], weights, columns[:n_columns, :width], packed)
            if dk.ndim == 2:
                add_product(dk, weights.T, rows[top:bottom, : dk.shape[1]], packed)
        undo = 1 / (packed.mma.weight_scale * packed.mma.scale)
        for gradient in (dq, dk):
            gradient.mul_(undo)


def _relative(grad: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two near the largest gradient, and all relative to it, or small ones vanish."""
    largest = torch.linalg.vector_norm(grad, math.inf)
    power = torch.where((largest > 0) & largest.isfinite(), largest, 1).frexp().exponent
    scale = torch.ldexp(torch.ones_like(largest), power)
    return scale, (grad / scale).contiguous()
