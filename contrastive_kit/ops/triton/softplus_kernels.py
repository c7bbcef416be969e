"""The Triton kernel of the sum of softplus; conventions are those of ``kernels.py``."""

# ruff: noqa: TID253
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from contrastive_kit.ops.triton.kernels import (
    LN2,
    LOG2E,
    as_multiplied,
    has_left_out,
    ids_of,
    is_left_out,
    load_block,
    logits_of,
)


@triton.jit
def _log1p(x):
    """log(1 + x) for x from 0 to 1, to the last digits however small x is."""
    b_u = x / (2.0 + x)
    b_square = b_u * b_u
    # 2 artanh(u), whose next term is 2e-8 of the sum at most.
    b_series = 1.0 / 11.0 + b_square * (1.0 / 13.0)
    b_series = 1.0 / 9.0 + b_square * b_series
    b_series = 1.0 / 7.0 + b_square * b_series
    b_series = 1.0 / 5.0 + b_square * b_series
    b_series = 1.0 / 3.0 + b_square * b_series
    return 2.0 * b_u * (1.0 + b_square * b_series)


@triton.jit(do_not_specialize=["i_first_row", "n_rows", "n_columns", "period", "beyond_rows"])
def softplus_kernel(
    p_q, p_k, p_row_ids, p_column_ids, p_bias, p_row_grad, p_strip, p_sum, p_slope, stride,
    i_first_row, n_rows, n_columns, period, beyond_rows, weight_scale,
    RULE: tl.constexpr, LIMITED: tl.constexpr, WEIGHTED: tl.constexpr, SUMMED: tl.constexpr,
    STORED: tl.constexpr, SCALE_LOGITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of pairs: its softplus by row, (26), and the weights of its gradient, (27).

    It belongs to the strip of rows from ``i_first_row`` on. ``p_sum`` and ``p_slope`` are (tiles
    across, rows of the strip): the sums of softplus with ``SUMMED``, and with ``STORED`` those of
    the weights, sigmoid times the gradient of the row, which also go times ``weight_scale`` into
    ``p_strip``, whole tiles. There are no ``LIMITED`` logits.
    """
    i_strip_row = tl.program_id(0) * BM
    i_left = tl.program_id(1) * BN
    i_top = i_first_row + i_strip_row
    o_row = i_top + tl.arange(0, BM)
    o_column = i_left + tl.arange(0, BN)
    b_row_ids = ids_of(p_row_ids, o_row, n_rows, period, RULE)  # [BM]
    b_q = tl.zeros([BM, 1], tl.float32)
    if BK == BD:
        b_q = load_block(p_q, i_top, 0, BM, BD, BD)  # [BM, BD]
    b_s = logits_of(
        p_q, p_k, b_q, i_top, i_left, SCALE_LOGITS, BM, BN, BD, BK, PRECISION
    )  # [BM, BN]
    b_s += tl.load(p_bias) * LOG2E
    b_small = tl.exp2(-tl.abs(b_s))
    special = has_left_out(i_top, i_left, n_rows, n_columns, period, beyond_rows, BM, BN, RULE)
    o_part = tl.program_id(1) * (tl.num_programs(0) * BM) + i_strip_row + tl.arange(0, BM)
    if SUMMED:
        b_softplus = tl.maximum(b_s, 0.0) * LN2 + _log1p(b_small)
        if special:
            m_out = is_left_out(
                o_row, b_row_ids, n_rows, o_column, p_column_ids, n_columns, period, RULE
            )
            b_softplus = tl.where(m_out, 0.0, b_softplus)
        tl.store(p_sum + o_part, tl.sum(b_softplus, 1))
    if STORED:
        b_w = tl.where(b_s < 0, b_small, 1.0) / (1.0 + b_small)
        if special:
            m_out = is_left_out(
                o_row, b_row_ids, n_rows, o_column, p_column_ids, n_columns, period, RULE
            )
            b_w = tl.where(m_out, 0.0, b_w)
        if WEIGHTED:
            b_grad = tl.load(p_row_grad + o_row, mask=o_row < n_rows, other=0.0)
            b_w *= b_grad[:, None]
        tl.store(p_slope + o_part, tl.sum(b_w, 1))
        o_block = tl.arange(0, BM)[:, None] * stride + tl.arange(0, BN)[None, :]
        p_target = p_strip + tl.cast(i_strip_row, tl.int64) * stride + i_left + o_block
        b_w = as_multiplied(b_w * weight_scale, PRECISION)
        tl.store(p_target, b_w.to(p_strip.dtype.element_ty))
