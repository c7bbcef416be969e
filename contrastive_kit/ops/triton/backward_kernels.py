"""Triton kernels of the gradient of the logsumexp; conventions are those of ``kernels.py``."""

# ruff: noqa: TID253
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from contrastive_kit.ops.triton.kernels import (
    LOG2E,
    as_multiplied,
    gradient_power,
    has_left_out,
    ids_of,
    is_left_out,
    limits_of,
    load_block,
    logits_of,
)


@triton.jit(do_not_specialize=["n", "n_rows", "i_columns", "grad_stride"])
def factor_kernel(p_grad, grad_stride, p_lse, p_lse_lo, p_largest, p_factor, p_lse2, p_grad_scale,
                  n, n_rows, i_columns, weight_scale, undo_scale, SHIFTED: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """The factors of the weights of equation (5), row by row, and what undoes their scale.

    They are relative to a power of two near the largest incoming gradient, so that a small one does
    not leave the range of the weights; ``weight_scale`` keeps small weights in that of float16.
    ``p_lse2`` gets what ``SHIFTED`` weights subtract from logits: the logsumexp in base 2. In both,
    what is not of the ``n_rows`` rows begins at ``i_columns``.
    """
    b_power = gradient_power(tl.load(p_largest))
    o_index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < n
    b_grad = tl.load(p_grad + o_index.to(tl.int64) * grad_stride, mask=m_index, other=0.0)
    b_lse = tl.load(p_lse + o_index, mask=m_index, other=0.0)
    m_empty = b_lse == float("-inf")
    b_exact = tl.where(m_empty, 0.0, b_lse).to(tl.float64)
    b_exact = (b_exact + tl.load(p_lse_lo + o_index, mask=m_index, other=0.0)) * LOG2E
    b_lse2 = b_exact.to(tl.float32)
    b_factor = b_grad / b_power * weight_scale * tl.exp2((b_lse2 - b_exact).to(tl.float32))
    o_place = tl.where(o_index < n_rows, o_index, o_index - n_rows + i_columns)
    if SHIFTED:
        tl.store(p_lse2 + o_place, tl.where(m_empty, float("inf"), b_lse2), mask=m_index)
    else:
        b_factor *= tl.exp2(-b_lse2)
    tl.store(p_factor + o_place, tl.where(m_empty, 0.0, b_factor), mask=m_index)
    if tl.program_id(0) == 0:
        tl.store(p_grad_scale, b_power * undo_scale)


@triton.jit
def _factor_of(p_factor, p_lse2, p_grad_scale, o_index, n, SHIFTED: tl.constexpr,
               DEFERRED: tl.constexpr):  # fmt: skip
    """Factor and logsumexp of some rows or columns; completes a factor that is ``DEFERRED``."""
    m_index = o_index < n
    b_factor = tl.load(p_factor + o_index, mask=m_index, other=0.0)
    b_lse2 = tl.zeros_like(b_factor)
    if SHIFTED or DEFERRED:
        b_lse2 = tl.load(p_lse2 + o_index, mask=m_index, other=0.0)
    if DEFERRED:
        b_factor = b_factor / tl.load(p_grad_scale)
        if not SHIFTED:
            b_factor *= tl.exp2(-b_lse2)
    return b_factor, b_lse2


@triton.jit
def _within_limits(b_w, b_s, b_row_limit, p_column_limit, o_column, n_columns,
                   FROM_ROWS: tl.constexpr, LIMITED: tl.constexpr):  # fmt: skip
    """The weights [BM, BN] without those of logits above the limit of what they are from."""
    if LIMITED:
        if FROM_ROWS:
            b_w = tl.where(b_s > b_row_limit[:, None], 0.0, b_w)
        else:
            b_limit = limits_of(p_column_limit, o_column, n_columns, LIMITED)  # [BN]
            b_w = tl.where(b_s > b_limit[None, :], 0.0, b_w)
    return b_w


@triton.jit
def _weights(b_s, b_row_factor, b_row_lse2, p_column_factor, p_column_lse2, p_grad_scale, o_column,
             n_columns, FROM_ROWS: tl.constexpr, FROM_COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
             DEFERRED: tl.constexpr):  # fmt: skip
    """The weights of equation (5), [BM, BN]; what belongs to the rows is loaded already."""
    if FROM_COLUMNS:
        b_factor, b_lse2 = _factor_of(
            p_column_factor, p_column_lse2, p_grad_scale, o_column, n_columns, SHIFTED, DEFERRED
        )  # [BN]
    if SHIFTED:
        b_w = tl.zeros_like(b_s)
        if FROM_ROWS:
            b_w += tl.exp2(b_s - b_row_lse2[:, None]) * b_row_factor[:, None]
        if FROM_COLUMNS:
            b_w += tl.exp2(b_s - b_lse2[None, :]) * b_factor[None, :]
    else:
        b_w = tl.exp2(b_s)
        if FROM_ROWS and FROM_COLUMNS:
            b_w *= b_row_factor[:, None] + b_factor[None, :]
        elif FROM_ROWS:
            b_w *= b_row_factor[:, None]
        else:
            b_w *= b_factor[None, :]
    return b_w


@triton.jit(do_not_specialize=["n_rows", "n_columns", "period", "beyond_rows", "n_tiles"])
def backward_kernel(
    p_q, p_k, p_row_factor, p_row_lse2, p_column_factor, p_column_lse2, p_row_ids, p_column_ids,
    p_row_limit, p_column_limit, p_grad_scale, p_part, n_rows, n_columns, period, beyond_rows,
    n_tiles,
    RULE: tl.constexpr, LIMITED: tl.constexpr, FROM_ROWS: tl.constexpr, FROM_COLUMNS: tl.constexpr,
    SHIFTED: tl.constexpr, DEFERRED: tl.constexpr, SCALE_LOGITS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of rows from some tiles, equation (5), the weights on chip.

    With ``DEFERRED`` the factors are still to be divided by ``p_grad_scale`` and by exp2 of their
    logsumexp. ``LIMITED`` weights are from rows or from columns, not from both. ``p_part`` is
    (parts, n_rows, BD), with the factors that ``finish_kernel`` undoes.
    """
    i_top = tl.program_id(0) * BM
    i_part = tl.program_id(1)
    o_row = i_top + tl.arange(0, BM)
    b_row_ids = ids_of(p_row_ids, o_row, n_rows, period, RULE)  # [BM]
    b_limit = tl.zeros([BM], tl.float32)
    b_factor = tl.zeros([BM], tl.float32)
    b_lse2 = tl.zeros([BM], tl.float32)
    if FROM_ROWS:
        b_limit = limits_of(p_row_limit, o_row, n_rows, LIMITED)
        b_factor, b_lse2 = _factor_of(
            p_row_factor, p_row_lse2, p_grad_scale, o_row, n_rows, SHIFTED, DEFERRED
        )
    b_q = load_block(p_q, i_top, 0, BM, BD, BD)  # [BM, BD]
    b_dq = tl.zeros([BM, BD], tl.float32)
    i_begin = i_part * n_tiles
    i_end = tl.minimum(i_begin + n_tiles, tl.cdiv(n_columns, BN))
    for i_tile in range(i_begin, i_end):
        i_left = i_tile * BN
        o_column = i_left + tl.arange(0, BN)
        b_k = load_block(p_k, i_left, 0, BN, BD, BD)  # [BN, BD]
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [BM, BN]
        if SCALE_LOGITS:
            b_s *= LOG2E
        b_w = _weights(
            b_s, b_factor, b_lse2, p_column_factor, p_column_lse2, p_grad_scale, o_column,
            n_columns, FROM_ROWS, FROM_COLUMNS, SHIFTED, DEFERRED,
        )  # [BM, BN]  # fmt: skip
        if has_left_out(i_top, i_left, n_rows, n_columns, period, beyond_rows, BM, BN, RULE):
            m_out = is_left_out(
                o_row, b_row_ids, n_rows, o_column, p_column_ids, n_columns, period, RULE
            )
            b_w = tl.where(m_out, 0.0, b_w)
        b_w = _within_limits(
            b_w, b_s, b_limit, p_column_limit, o_column, n_columns, FROM_ROWS, LIMITED
        )
        b_w = as_multiplied(b_w, PRECISION).to(b_k.dtype)
        b_dq = tl.dot(b_w, b_k, b_dq, input_precision=PRECISION)
    p_target = p_part + (tl.cast(i_part, tl.int64) * n_rows + i_top) * BD
    o_block = tl.arange(0, BM)[:, None] * BD + tl.arange(0, BD)[None, :]
    tl.store(p_target + o_block, b_dq, mask=(o_row < n_rows)[:, None])


@triton.jit(do_not_specialize=["n_rows", "n_columns", "n_parts"])
def finish_kernel(p_part, p_grad_scale, p_gradient, n_rows, n_columns, n_parts,
                  BM: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Add the partial gradients up in order, undo their factors, drop the padding."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_column = tl.arange(0, BD)
    m_row = (o_row < n_rows)[:, None]
    o_row = o_row.to(tl.int64)
    b_sum = tl.zeros([BM, BD], tl.float32)
    for i_part in range(0, n_parts):
        o_part = (i_part * tl.cast(n_rows, tl.int64) + o_row)[:, None] * BD + o_column[None, :]
        b_sum += tl.load(p_part + o_part, mask=m_row, other=0.0)
    o_gradient = o_row[:, None] * n_columns + o_column[None, :]
    m_gradient = m_row & (o_column < n_columns)[None, :]
    tl.store(p_gradient + o_gradient, b_sum * tl.load(p_grad_scale), mask=m_gradient)


@triton.jit(do_not_specialize=["i_first_row", "i_first_column", "n_rows", "n_columns", "period",
                               "beyond_rows"])  # fmt: skip
def weights_kernel(
    p_q, p_k, p_row_factor, p_row_lse2, p_column_factor, p_column_lse2, p_row_ids, p_column_ids,
    p_row_limit, p_column_limit, p_strip, stride, i_first_row, i_first_column, n_rows, n_columns,
    period, beyond_rows,
    RULE: tl.constexpr, LIMITED: tl.constexpr, FROM_ROWS: tl.constexpr, FROM_COLUMNS: tl.constexpr,
    SHIFTED: tl.constexpr, SCALE_LOGITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the weights of equation (5), stored: for rows too wide to keep on chip.

    ``p_strip`` holds the weights from (``i_first_row``, ``i_first_column``) on, whole tiles.
    """
    i_strip_row = tl.program_id(0) * BM
    i_strip_column = tl.program_id(1) * BN
    i_top = i_first_row + i_strip_row
    i_left = i_first_column + i_strip_column
    o_row = i_top + tl.arange(0, BM)
    o_column = i_left + tl.arange(0, BN)
    b_row_ids = ids_of(p_row_ids, o_row, n_rows, period, RULE)  # [BM]
    b_limit = tl.zeros([BM], tl.float32)
    b_factor = tl.zeros([BM], tl.float32)
    b_lse2 = tl.zeros([BM], tl.float32)
    if FROM_ROWS:
        b_limit = limits_of(p_row_limit, o_row, n_rows, LIMITED)
        b_factor, b_lse2 = _factor_of(
            p_row_factor, p_row_lse2, p_strip, o_row, n_rows, SHIFTED, False
        )
    b_q = tl.zeros([BM, 1], tl.float32)
    if BK == BD:
        b_q = load_block(p_q, i_top, 0, BM, BD, BD)  # [BM, BD]
    b_s = logits_of(
        p_q, p_k, b_q, i_top, i_left, SCALE_LOGITS, BM, BN, BD, BK, PRECISION
    )  # [BM, BN]
    b_w = _weights(
        b_s, b_factor, b_lse2, p_column_factor, p_column_lse2, p_strip, o_column, n_columns,
        FROM_ROWS, FROM_COLUMNS, SHIFTED, False,
    )  # [BM, BN]  # fmt: skip
    if has_left_out(i_top, i_left, n_rows, n_columns, period, beyond_rows, BM, BN, RULE):
        m_out = is_left_out(
            o_row, b_row_ids, n_rows, o_column, p_column_ids, n_columns, period, RULE
        )
        b_w = tl.where(m_out, 0.0, b_w)
    b_w = _within_limits(b_w, b_s, b_limit, p_column_limit, o_column, n_columns, FROM_ROWS, LIMITED)
    o_block = tl.arange(0, BM)[:, None] * stride + tl.arange(0, BN)[None, :]
    p_target = p_strip + tl.cast(i_strip_row, tl.int64) * stride + i_strip_column + o_block
    tl.store(p_target, as_multiplied(b_w, PRECISION).to(p_strip.dtype.element_ty))


@triton.jit(do_not_specialize=["n_rows", "n_columns", "n_inner"])
def add_product_kernel(
    p_total, p_a, a_row_stride, a_column_stride, p_b, n_rows, n_columns, n_inner,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``total += a @ b`` for float32 ``total`` (n_rows, n_columns) and packed rows ``b``."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_column = tl.program_id(1) * BN + tl.arange(0, BN)
    m_total = (o_row < n_rows)[:, None] & (o_column < n_columns)[None, :]
    p_target = p_total + o_row.to(tl.int64)[:, None] * n_columns + o_column[None, :]
    b_total = tl.load(p_target, mask=m_total, other=0.0)  # [BM, BN]
    p_rows = p_a + o_row.to(tl.int64)[:, None] * a_row_stride
    for i_inner in range(0, n_inner, BK):
        o_inner = i_inner + tl.arange(0, BK)
        m_inner = o_inner < n_inner
        p_block = p_rows + o_inner.to(tl.int64)[None, :] * a_column_stride
        b_a = tl.load(p_block, mask=(o_row < n_rows)[:, None] & m_inner[None, :], other=0.0)
        p_block = p_b + o_inner.to(tl.int64)[:, None] * BD + o_column[None, :]
        b_b = tl.load(p_block, mask=m_inner[:, None] & (o_column < BD)[None, :], other=0.0)
        b_total = tl.dot(b_a, b_b, b_total, input_precision="ieee")
    tl.store(p_target, b_total, mask=m_total)
