"""The logsumexp in fused kernels, the host's part.

The forward keeps partial sums, the backward computes each tile again. Kernels and their comments
are in ``kernels.py`` and ``backward_kernels.py``, imported at the first launch.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_kit.ops.problem import Problem, rounds_float32
from contrastive_kit.ops.triton import configs, device

# While every |logit| is at most this, sums of exp neither overflow nor lose a row to underflow,
# and the running maximum of a stable logsumexp is not needed.
_LARGEST_UNSHIFTED_LOGIT = 69.0

_LOG2E = math.log2(math.e)

# Packed rows come in whole tiles of any size in the table.
PADDING = 256

# Bytes of partial sums of a forward, partial gradients of a backward, and weights of a strip.
SUM_BYTES = 2**26
GRADIENT_BYTES = 2**27
STRIP_BYTES = 2**28
# A strip's product is added to the whole gradient; less high, that traffic would dominate.
STRIP_ROWS = 2048

# Sizes of the small kernels and how they run.
_PACK_ELEMENTS, FINISH_ELEMENTS = 2048, 2048
PARTS, WIDTH, BLOCK = 32, 64, 1024
SMALL: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}

# Programs for each multiprocessor that even out unequal work, by timing on an H100: those of the
# backward each leave a whole gradient to be added up. And tiles of one forward program.
_FORWARD_WAVES, _BACKWARD_WAVES = 8, 2
_MOST_TILES = 64


def forward(problem: Problem, saved_tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexp of rows (and columns if ``both``), its low part, and its statistics.

    Nothing is put into ``saved_tiles``: tensor cores multiply faster than memory is read.
    """
    results = [_forward(part) for part in _one_way(problem)]
    if len(results) == 1:
        return results[0]
    lse, lse_lo, stats = zip(*results, strict=True)
    joined = torch.cat(stats, 1) if problem.statistics else stats[0]
    return torch.cat(lse), torch.cat(lse_lo), joined


def _forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    q, length = problem.q, problem.n_results()
    lse, lse_lo = q.new_empty(length), q.new_empty(length)
    stats = q.new_empty((4, length) if problem.statistics else 0)
    if length > 0:
        with device.on_device(q.device):
            packed = pack(problem)
            _sum_exponentials(packed, problem, lse, lse_lo)
            if problem.statistics:
                _statistics(packed, lse, stats)
                if problem.both:
                    n_rows = packed.rows.n
                    _statistics(packed.transposed(), lse[n_rows:], stats[:, n_rows:])
    return lse, lse_lo, stats


def backward(
    problem: Problem,
    grad: Tensor,
    lse: Tensor,
    lse_lo: Tensor,
    saved_tiles: Tensor,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of ``q`` and ``k``, equation (5); an empty tensor for the one not needed."""
    if problem.limits is None:
        return _backward(problem, grad, lse, lse_lo, needs_grad)
    needs_q, itself = needs_grad[0], problem.k is None
    needs = (needs_q, needs_q if itself else needs_grad[1])
    rows, *columns = _one_way(problem)
    n = len(problem.q)
    dq, dk = _backward(rows, grad[:n], lse[:n], lse_lo[:n], needs)
    for part in columns:
        more_k, more_q = _backward(part, grad[n:], lse[n:], lse_lo[n:], (needs[1], needs[0]))
        dq, dk = dq + more_q, dk + more_k
    return (dq + dk, dk.new_empty(0)) if itself else (dq, dk)


def _one_way(problem: Problem) -> list[Problem]:
    """The problem itself; with limits, which hold in one direction, one for each direction."""
    if problem.limits is None:
        return [problem]
    q, keys, n = problem.q, problem.keys(), len(problem.q)
    rows = problem._replace(k=keys, both=False, limits=problem.limits[:n])
    if not problem.both:
        return [rows]
    exclusion, limits = problem.exclusion.transposed(), problem.limits[n:]
    return [rows, rows._replace(q=keys, k=q, exclusion=exclusion, limits=limits)]


def _backward(
    problem: Problem, grad: Tensor, lse: Tensor, lse_lo: Tensor, needs_grad: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    q, k = problem.q, problem.k
    needs_q, needs_k = needs_grad[0], needs_grad[1] and k is not None
    dq = q.new_empty(q.shape if needs_q else 0)
    dk = q.new_empty(k.shape if k is not None and needs_k else 0)
    if len(lse) > 0 and (needs_q or needs_k):
        with device.on_device(q.device):
            packed = pack(problem)
            weights = _weights_of(packed, problem, grad, lse, lse_lo)
            config = configs.backward(*packed.key(), weights.shifted)
            if config is None:
                _strips(weights, dq, dk, k is None)
            else:
                if needs_q:
                    _fused(weights, config, dq)
                if needs_k:
                    _fused(weights.transposed(), config, dk)
    return dq, dk


class Mma(NamedTuple):
    """What tensor cores multiply: dtype, the precision of their float32, and the scale of rows."""

    dtype: torch.dtype
    precision: str
    scale: float

    @property
    def weight_scale(self) -> float:
        """Keeps weights of about 1 / N² out of the subnormal numbers of float16."""
        return 2.0**13 if self.dtype == torch.float16 else 1.0


def mma_of(name: str) -> Mma:
    """How to multiply rows rounded to ``name``: "float32", "tf32", "bfloat16" or "float16"."""
    if name in ("bfloat16", "float16"):
        return Mma(getattr(torch, name), "ieee", math.sqrt(_LOG2E))
    # float32 is multiplied as three products of its parts, as exact as float32 arithmetic.
    precision = "ieee" if torch.version.hip else "tf32" if name == "tf32" else "tf32x3"
    return Mma(torch.float32, precision, 1.0)


def multiplied_as(mma_dtype: str) -> str:
    """``mma_dtype``, or "tf32" where torch is set to round float32 to it."""
    return "tf32" if mma_dtype == "float32" and rounds_float32() else mma_dtype


class Side(NamedTuple):
    """Rows or columns of the logits: packed, how many, and what leaves pairs out."""

    packed: Tensor
    n: int
    ids: Tensor | None
    limits: Tensor | None = None


class Packed(NamedTuple):
    """Both sides of the logits and the rule of left-out pairs, as kernels take them."""

    rows: Side
    columns: Side
    mma: Mma
    architecture: str
    period: int

    @property
    def depth(self) -> int:
        """Width of the packed rows."""
        return self.rows.packed.shape[1]

    def transposed(self) -> "Packed":
        """Rows and columns exchanged."""
        return self._replace(rows=self.columns, columns=self.rows)

    def key(self) -> tuple[str, torch.dtype, str, int]:
        """Where to look in the table of configurations."""
        return self.architecture, self.mma.dtype, self.mma.precision, self.depth

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Pointers to the packed rows and columns."""
        return self.rows.packed, self.columns.packed

    def ids(self) -> tuple[Tensor, Tensor]:
        """Pointers to the ids, which are not looked at where there are none."""
        if self.rows.ids is None or self.columns.ids is None:
            return self.matrices()
        return self.rows.ids, self.columns.ids

    def row_limits(self) -> Tensor:
        """Pointer to the limits of the rows, which are not looked at where there are none."""
        return self.rows.packed if self.rows.limits is None else self.rows.limits

    def sizes(self) -> tuple[int, int, int, int]:
        """Numbers of rows and columns, the period, and a multiple of it beyond all rows."""
        period = max(self.period, 1)
        beyond_rows = ceil_div(self.rows.n + PADDING, period) * period
        return self.rows.n, self.columns.n, period, beyond_rows

    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        by_ids = self.rows.ids is not None
        return {
            "RULE": 2 if by_ids else 1 if self.period > 0 else 0,
            "LIMITED": self.rows.limits is not None or self.columns.limits is not None,
            "SCALE_LOGITS": self.mma.scale == 1,
            "BD": self.depth,
            "PRECISION": self.mma.precision,
        }


def pack(problem: Problem) -> Packed:
    """Pack both sides of a problem."""
    q, k, exclusion = problem.q, problem.k, problem.exclusion
    mma = mma_of(problem.mma_dtype)
    if _shifts(problem):
        # Rows of any length: the largest of float16 may not grow.
        mma = mma._replace(scale=1.0)
    row_ids, column_ids = (
        None if ids is None else ids.contiguous()
        for ids in (exclusion.row_ids, exclusion.column_ids)
    )
    limits = None if problem.limits is None else problem.limits.contiguous()
    rows = columns = Side(_pack(q, mma), len(q), row_ids, limits)
    if k is not None:
        columns = Side(_pack(k, mma), len(k), row_ids if column_ids is None else column_ids)
    return Packed(rows, columns, mma, device.architecture_of(q.device), exclusion.period)


def _pack(x: Tensor, mma: Mma) -> Tensor:
    """Contiguous, padded, scaled and rounded, as the kernels read it."""
    from contrastive_kit.ops.triton import kernels

    n, width = x.shape
    depth = configs.packed_depth(width)
    padded = ceil_div(n, PADDING) * PADDING
    as_it_is = x.dtype == mma.dtype and mma.precision != "tf32" and x.is_contiguous()
    if (padded, depth) == (n, width) and as_it_is:
        return x
    packed = x.new_empty(padded, depth, dtype=mma.dtype)
    block = math.gcd(depth, 256)
    height = _PACK_ELEMENTS // block
    kernels.pack_kernel[(padded // height, depth // block)](
        x, *x.stride(), packed, n, width, mma.scale, BM=height, BN=block, BD=depth,
        PRECISION=mma.precision, **SMALL,
    )  # fmt: skip
    return packed


def _sum_exponentials(packed: Packed, problem: Problem, lse: Tensor, lse_lo: Tensor) -> None:
    """Partial sums, some blocks of rows at a time, each merged into the result."""
    from contrastive_kit.ops.triton import kernels

    n_rows, n_columns = packed.rows.n, packed.columns.n
    itself, length, shifted = problem.k is None, len(lse), _shifts(problem)
    config = configs.forward(*packed.key(), shifted)
    blocks = ceil_div(n_rows, config.rows)
    n_tiles, row_parts = tiles_of_program(config, n_rows, n_columns, itself, lse.device)
    fields = 2 if shifted else 1
    at_once = blocks
    keeps_columns = itself or problem.both
    if keeps_columns:
        n_bytes = blocks * fields * n_columns * 4
        at_once = ceil_div(blocks, min(ceil_div(n_bytes, SUM_BYTES), blocks))
    row_part = lse.new_empty(fields, row_parts, n_rows)
    column_part = lse.new_empty(fields, at_once if keeps_columns else 0, n_columns)
    running = lse.new_empty((2, length) if at_once < blocks else 0, dtype=torch.float64)
    # Where results begin, how many they are, and which partial sums count for them.
    results = [(0, n_rows, True, itself)]
    if problem.both:
        results.append((n_rows, n_columns, False, True))
    for first in range(0, blocks, at_once):
        height = min(at_once, blocks - first)
        kernels.forward_kernel[(height, row_parts)](
            *packed.matrices(), *packed.ids(), packed.row_limits(), row_part, column_part,
            *packed.sizes(), first, n_tiles, row_parts, at_once, SELF=itself,
            BY_COLUMN=keeps_columns, SHIFTED=shifted, BK=config.slice_of(packed.depth),
            **packed.constants(), **config.options(),
        )  # fmt: skip
        for offset, n, by_row, by_column in results:
            kernels.reduce_kernel[(ceil_div(n, WIDTH),)](
                row_part, column_part, running, lse, lse_lo, n, length, offset, first, height,
                n_tiles, row_parts, at_once, SELF=itself, BY_ROW=by_row, BY_COLUMN=by_column,
                SHIFTED=shifted, FIRST=first == 0, LAST=first + height == blocks, BM=config.rows,
                BN=config.columns, PARTS=PARTS, WIDTH=WIDTH, **SMALL,
            )  # fmt: skip


def tiles_of_program(
    config: configs.Config, n_rows: int, n_columns: int, itself: bool, where: torch.device
) -> tuple[int, int]:
    """How many tiles of a block of rows a program of the forward takes, and how many programs."""
    blocks, across = ceil_div(n_rows, config.rows), ceil_div(n_columns, config.columns)
    n_tiles = ceil_div(blocks * across, 2 if itself else 1)
    chunk = min(ceil_div(n_tiles, _FORWARD_WAVES * device.processors(where)), _MOST_TILES, across)
    return chunk, ceil_div(across, chunk)


def _statistics(packed: Packed, lse: Tensor, stats: Tensor) -> None:
    """The statistics of the rows, into the first of ``stats`` (4, any number)."""
    from contrastive_kit.ops.triton import kernels

    config = configs.statistics(*packed.key())
    kernels.statistics_kernel[(ceil_div(packed.rows.n, config.rows),)](
        *packed.matrices(), *packed.ids(), packed.row_limits(), lse, stats, *packed.sizes(),
        stats.stride(0),
        BK=config.slice_of(packed.depth), **packed.constants(), **config.options(),
    )  # fmt: skip


class Weights(NamedTuple):
    """The weights of equation (5): the logits, and what scales them on both sides.

    Attributes:
        packed: both sides of the logits.
        shifted: whether the logsumexp is subtracted before exp, or is part of the factors.
        row_factor: of each row.
        row_lse2: the logsumexp of each row in base 2.
        column_factor: of each column.
        column_lse2: the logsumexp of each column in base 2.
        from_rows: whether the logsumexp of rows has a gradient.
        from_columns: whether that of columns has one.
        grad_scale: what gradients are multiplied by at the end, (1,).
    """

    packed: Packed
    shifted: bool
    row_factor: Tensor
    row_lse2: Tensor
    column_factor: Tensor
    column_lse2: Tensor
    from_rows: bool
    from_columns: bool
    grad_scale: Tensor

    def transposed(self) -> "Weights":
        """Rows and columns exchanged."""
        factors = (self.column_factor, self.column_lse2, self.row_factor, self.row_lse2)
        directions = (self.from_columns, self.from_rows)
        return Weights(
            self.packed.transposed(), self.shifted, *factors, *directions, self.grad_scale
        )

    def pointers(self) -> tuple[Tensor, ...]:
        """What the kernels read."""
        limits = (self.packed.row_limits(), self.packed.transposed().row_limits())
        return *self.packed.matrices(), *self[2:6], *self.packed.ids(), *limits

    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        return {
            "FROM_ROWS": self.from_rows,
            "FROM_COLUMNS": self.from_columns,
            "SHIFTED": self.shifted,
            **self.packed.constants(),
        }


def _weights_of(
    packed: Packed, problem: Problem, grad: Tensor, lse: Tensor, lse_lo: Tensor
) -> Weights:
    """The factors of the weights for a gradient of the logsumexp."""
    from contrastive_kit.ops.triton import backward_kernels as kernels

    n, length, mma, shifted = packed.rows.n, len(lse), packed.mma, _shifts(problem)
    # Columns begin at an address for which nothing is compiled anew, whatever the number of rows.
    begin = ceil_div(n, PADDING) * PADDING
    room = begin + length - n
    factor, grad_scale = lse.new_empty(room), lse.new_empty(1)
    lse2 = lse.new_empty(room if shifted else 0)
    kernels.factor_kernel[(ceil_div(length, BLOCK),)](
        grad, grad.stride(0), lse, lse_lo, torch.linalg.vector_norm(grad, math.inf), factor, lse2,
        grad_scale, length, n, begin, mma.weight_scale, 1 / (mma.weight_scale * mma.scale),
        SHIFTED=shifted, BLOCK=BLOCK, **SMALL,
    )  # fmt: skip
    if problem.k is None:
        return Weights(packed, shifted, factor, lse2, factor, lse2, True, True, grad_scale)
    factors = (factor, lse2, factor[begin:], lse2[begin:])
    return Weights(packed, shifted, *factors, True, problem.both, grad_scale)


def _fused(weights: Weights, config: configs.Config, gradient: Tensor) -> None:
    """The gradient of the rows, the weights never leaving the chip."""
    from contrastive_kit.ops.triton import backward_kernels as kernels

    n_rows, depth = weights.packed.rows.n, weights.packed.depth
    part = partial_gradients(weights, config, deferred=False)
    height = FINISH_ELEMENTS // depth
    kernels.finish_kernel[(ceil_div(n_rows, height),)](
        part, weights.grad_scale, gradient, n_rows, gradient.shape[1], len(part),
        BM=height, BD=depth, **SMALL,
    )  # fmt: skip


def partial_gradients(weights: Weights, config: configs.Config, *, deferred: bool) -> Tensor:
    """Gradients of the rows by chunk of columns, (chunks, R, depth)."""
    from contrastive_kit.ops.triton import backward_kernels as kernels

    packed, grad_scale = weights.packed, weights.grad_scale
    n_rows, depth = packed.rows.n, packed.depth
    blocks, across = ceil_div(n_rows, config.rows), ceil_div(packed.columns.n, config.columns)
    parts = min(
        ceil_div(_BACKWARD_WAVES * device.processors(grad_scale.device), blocks),
        max(1, GRADIENT_BYTES // (n_rows * depth * 4)),
        across,
    )
    n_tiles = ceil_div(across, parts)
    parts = ceil_div(across, n_tiles)
    part = grad_scale.new_empty(parts, n_rows, depth)
    kernels.backward_kernel[(blocks, parts)](
        *weights.pointers(), grad_scale, part, *packed.sizes(), n_tiles,
        DEFERRED=deferred, **weights.constants(), **config.options(),
    )  # fmt: skip
    return part


def _strips(weights: Weights, dq: Tensor, dk: Tensor, itself: bool) -> None:
    """Gradients from strips of stored weights, which the vendor's library multiplies.

    With ``itself`` a strip begins at its own diagonal block, and what is right of that block
    counts for both of its sides.
    """
    from contrastive_kit.ops.triton import backward_kernels as kernels

    packed = weights.packed
    rows, n_rows = packed.rows[:2]
    columns, n_columns = packed.columns[:2]
    config = configs.weights(*packed.key(), weights.shifted)
    whole = math.lcm(config.rows, config.columns)
    padded = ceil_div(n_columns, whole) * whole
    height = min(STRIP_ROWS, STRIP_BYTES // (padded * rows.element_size()), n_rows)
    height = ceil_div(max(height, 1), whole) * whole
    buffer = rows.new_empty(height * padded)
    mirrored = dq if itself else dk
    width = max(dq.shape[-1], dk.shape[-1])
    for gradient in (dq, dk):
        gradient.zero_()
    for top in range(0, n_rows, height):
        bottom = min(top + height, n_rows)
        left = top if itself else 0
        stride = padded - left
        kernels.weights_kernel[(ceil_div(bottom - top, config.rows), stride // config.columns)](
            *weights.pointers(), buffer, stride, top, left, *packed.sizes(),
            BK=config.slice_of(packed.depth), **weights.constants(), **config.options(),
        )  # fmt: skip
        strip = buffer[: height * stride].view(height, stride)
        strip = strip[: bottom - top, : n_columns - left]
        if dq.ndim == 2:
            add_product(dq[top:bottom], strip, columns[left:n_columns, :width], packed)
        right = bottom if itself else 0
        if mirrored.ndim == 2 and right < n_columns:
            mirrored_strip = strip[:, right - left :].T
            add_product(mirrored[right:], mirrored_strip, rows[top:bottom, :width], packed)
    for gradient in (dq, dk):
        gradient.mul_(weights.grad_scale)


def add_product(total: Tensor, a: Tensor, b: Tensor, packed: Packed) -> None:
    """``total += a @ b`` in float32, whatever the dtype of the factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif packed.architecture == "hip":
        from contrastive_kit.ops.triton import backward_kernels as kernels

        config = configs.PRODUCT
        (n_rows, n_columns), n_inner = total.shape, len(b)
        grid = (ceil_div(n_rows, config.rows), ceil_div(n_columns, config.columns))
        kernels.add_product_kernel[grid](
            total, a, *a.stride(), b, n_rows, n_columns, n_inner, BD=packed.depth,
            BK=config.step, **config.options(),
        )  # fmt: skip
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _shifts(problem: Problem) -> bool:
    return problem.limits is not None or needs_shift(problem.bound)


def needs_shift(bound: float) -> bool:
    """Whether exp of a logit may leave its range."""
    return not bound <= _LARGEST_UNSHIFTED_LOGIT


def ceil_div(a: int, b: int) -> int:
    """How many times ``b`` it takes for ``a``."""
    return -(-a // b)
