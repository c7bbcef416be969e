"""Triton kernels of the whole NT-Xent of two views; conventions are those of ``kernels.py``.

Between the first and the second the logits go through ``forward_kernel``, between the second and
the third through ``backward_kernel``.
"""

# ruff: noqa: TID253
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from contrastive_kit.ops.triton.kernels import (
    LN2,
    as_multiplied,
    exponent_power,
    gradient_power,
    merge_parts,
)


@triton.jit
def _load_view(p_z, o_row, row_stride, column_stride, n_rows, n_columns, BD: tl.constexpr):
    """Rows of a view in float32, 0 beyond its ends, [BM, BD]."""
    o_column = tl.arange(0, BD)
    m_z = (o_row < n_rows)[:, None] & (o_column < n_columns)[None, :]
    o_z = o_row.to(tl.int64)[:, None] * row_stride
    o_z += o_column.to(tl.int64)[None, :] * column_stride
    return tl.load(p_z + o_z, mask=m_z, other=0.0).to(tl.float32)


@triton.jit
def _unit_rows(b_z, root_scale):
    """Rows of length 1 / sqrt(temperature), equation (3), and the two numbers that made them.

    Nothing of each number is in float64, which most cards compute at 1/64 of the rate.
    """
    # The power of two below the largest entry: dividing by it is exact, and keeps squares in range.
    b_power = exponent_power(tl.max(tl.abs(b_z), 1))  # [BM]
    b_power = tl.where(b_power == 0, float("inf"), b_power)  # a row of zeros or subnormal numbers
    b_z = b_z / b_power[:, None]
    b_square = tl.sum(b_z * b_z, 1)
    b_factor = root_scale / tl.sqrt(tl.where(b_square > 0, b_square, 1.0))
    return b_z * b_factor[:, None], b_power, b_factor


@triton.jit(do_not_specialize=["n", "n_columns"])
def pair_prepare_kernel(
    p_z1, z1_row_stride, z1_column_stride, p_z2, z2_row_stride, z2_column_stride, p_packed,
    p_positive, p_arrived, n, n_columns, root_scale, scale, n_padded,
    BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Unit rows of two views, packed one after the other, and the logit of each pair."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    m_row = o_row < n
    b_z = _load_view(p_z1, o_row, z1_row_stride, z1_column_stride, n, n_columns, BD)
    b_u1, _, _ = _unit_rows(b_z, root_scale)  # [BM, BD]
    b_z = _load_view(p_z2, o_row, z2_row_stride, z2_column_stride, n, n_columns, BD)
    b_u2, _, _ = _unit_rows(b_z, root_scale)  # [BM, BD]
    b_positive = tl.sum(b_u1.to(tl.float64) * b_u2, 1)
    tl.store(p_positive + o_row, b_positive, mask=m_row)
    o_column = tl.arange(0, BD)[None, :]
    dtype = p_packed.dtype.element_ty
    p_target = p_packed + o_row.to(tl.int64)[:, None] * BD + o_column
    tl.store(p_target, as_multiplied(b_u1 * scale, PRECISION).to(dtype), mask=m_row[:, None])
    p_target += tl.cast(n, tl.int64) * BD
    tl.store(p_target, as_multiplied(b_u2 * scale, PRECISION).to(dtype), mask=m_row[:, None])
    o_padding = o_row.to(tl.int64) + 2 * n
    p_target = p_packed + o_padding[:, None] * BD + o_column
    tl.store(p_target, tl.zeros([BM, BD], dtype), mask=(o_padding < n_padded)[:, None])
    if tl.program_id(0) == 0:
        tl.store(p_arrived, 0)


@triton.jit(do_not_specialize=["n", "n_blocks", "n_tiles", "n_row_parts", "n_programs"])
def pair_loss_kernel(
    p_row_part, p_column_part, p_positive, p_slope, p_factor, p_lse2, p_sums, p_maxima, p_arrived,
    p_loss, p_grad_scale, n, n_blocks, n_tiles, n_row_parts, n_programs, weight_scale,
    SHIFTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The mean loss of equation (4) from partial sums, and what its gradient needs of each anchor.

    ``p_slope`` gets the derivative by the logsumexp. The program that arrives last adds up the
    losses of all, in the order of their rows whichever it is, and finds the scale of the gradients.
    """
    o_index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    m_index = o_index < n
    b_sum = tl.zeros([WIDTH], tl.float64)
    if SHIFTED:
        b_max = tl.full([WIDTH], float("-inf"), tl.float32)
    else:
        b_max = tl.zeros([WIDTH], tl.float32)
    b_block = o_index // BM
    b_sum, b_max = merge_parts(
        b_sum, b_max, p_row_part, n_row_parts, n, o_index, b_block * BM // BN // n_tiles,
        tl.where(m_index, n_row_parts, 0), SHIFTED, PARTS,
    )  # fmt: skip
    b_sum, b_max = merge_parts(
        b_sum, b_max, p_column_part, n_blocks, n, o_index, tl.zeros([WIDTH], tl.int32),
        tl.where(m_index, b_block, 0), SHIFTED, PARTS,
    )  # fmt: skip
    b_exact = b_max + tl.log2(b_sum)  # [WIDTH], float64
    m_empty = b_exact == float("-inf")
    b_positive = tl.load(p_positive + o_index % (n // 2), mask=m_index, other=0.0)
    b_gap = b_exact * LN2 - b_positive
    b_small = tl.exp(-tl.abs(b_gap))
    # log(1 + small) by way of what 1 + small is rounded to: exact however small.
    b_above = 1.0 + b_small
    b_log = tl.where(b_above == 1.0, b_small, tl.log(b_above) * b_small / (b_above - 1.0))
    b_softplus = tl.where(m_empty, 0.0, tl.maximum(b_gap, 0.0) + b_log)
    b_sigmoid = tl.where(b_gap < 0, b_small, 1.0) / b_above
    b_sigmoid = tl.where(m_empty, 0.0, b_sigmoid)
    b_lse2 = b_exact.to(tl.float32)
    # Of these there are WIDTH for each program.
    tl.store(p_slope + o_index, b_sigmoid.to(tl.float32))
    b_lo = tl.where(m_empty, 0.0, b_lse2 - b_exact).to(tl.float32)
    tl.store(p_factor + o_index, (b_sigmoid * tl.exp2(b_lo)).to(tl.float32))
    tl.store(p_lse2 + o_index, tl.where(m_empty, float("inf"), b_lse2))
    b_largest = tl.max(tl.where(m_index, b_sigmoid, 0.0), 0).to(tl.float32)
    tl.store(p_sums + tl.program_id(0), tl.sum(tl.where(m_index, b_softplus, 0.0), 0))
    tl.store(p_maxima + tl.program_id(0), b_largest)
    tl.debug_barrier()
    if tl.atomic_add(p_arrived, 1, sem="acq_rel") == n_programs - 1:
        o_program = tl.arange(0, PROGRAMS)
        m_program = o_program < n_programs
        b_sums = tl.load(p_sums + o_program, mask=m_program, other=0.0)
        tl.store(p_loss, (tl.sum(b_sums, 0) / n).to(tl.float32))
        b_largest = tl.max(tl.load(p_maxima + o_program, mask=m_program, other=0.0), 0)
        tl.store(p_grad_scale, gradient_power(b_largest) / weight_scale)


@triton.jit
def _gradient_of_rows(b_u, b_power, b_factor, b_du):
    """The part orthogonal to unit rows, for the rows they were made of: equation (7)."""
    # Of the length that rounded factors gave the rows, not of the ideal one: the gradient of
    # nearly identical views is the small difference of two nearly parallel vectors.
    b_along = tl.sum(b_du * b_u, 1)  # [BM]
    b_square = tl.sum(b_u * b_u, 1)
    b_projection = b_along / tl.where(b_square > 0, b_square, 1.0)
    return (b_du - b_u * b_projection[:, None]) * b_factor[:, None] / b_power[:, None]


@triton.jit(do_not_specialize=["n", "n_columns", "n_parts"])
def pair_finish_kernel(
    p_z1, z1_row_stride, z1_column_stride, p_z2, z2_row_stride, z2_column_stride, p_part, p_slope,
    p_grad, p_grad_scale, p_dz1, p_dz2, n, n_columns, n_parts, root_scale, undo_scale,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of both views from partial gradients of their unit rows, and from their pairs."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    m_row = o_row < n
    o_column = tl.arange(0, BD)
    b_z = _load_view(p_z1, o_row, z1_row_stride, z1_column_stride, n, n_columns, BD)
    b_u1, b_power1, b_factor1 = _unit_rows(b_z, root_scale)
    b_z = _load_view(p_z2, o_row, z2_row_stride, z2_column_stride, n, n_columns, BD)
    b_u2, b_power2, b_factor2 = _unit_rows(b_z, root_scale)
    b_du1 = tl.zeros([BM, BD], tl.float32)
    b_du2 = tl.zeros([BM, BD], tl.float32)
    n_wide = tl.cast(n, tl.int64)
    for i_part in range(0, n_parts):
        o_part = (2 * i_part * n_wide + o_row)[:, None] * BD + o_column[None, :]
        b_du1 += tl.load(p_part + o_part, mask=m_row[:, None], other=0.0)
        o_part += n_wide * BD
        b_du2 += tl.load(p_part + o_part, mask=m_row[:, None], other=0.0)
    grad_scale = tl.load(p_grad_scale) * undo_scale
    b_pull = tl.load(p_slope + o_row, mask=m_row, other=0.0)
    b_pull += tl.load(p_slope + n + o_row, mask=m_row, other=0.0)
    b_du1 = b_du1 * grad_scale - b_u2 * b_pull[:, None]
    b_du2 = b_du2 * grad_scale - b_u1 * b_pull[:, None]
    b_dz1 = _gradient_of_rows(b_u1, b_power1, b_factor1, b_du1)  # [BM, BD]
    b_dz2 = _gradient_of_rows(b_u2, b_power2, b_factor2, b_du2)  # [BM, BD]
    grad = tl.load(p_grad).to(tl.float32) / (2 * n)
    m_z = m_row[:, None] & (o_column < n_columns)[None, :]
    o_z = o_row.to(tl.int64)[:, None] * n_columns + o_column[None, :]
    dtype = p_dz1.dtype.element_ty
    tl.store(p_dz1 + o_z, (b_dz1 * grad).to(dtype), mask=m_z)
    tl.store(p_dz2 + o_z, (b_dz2 * grad).to(dtype), mask=m_z)
