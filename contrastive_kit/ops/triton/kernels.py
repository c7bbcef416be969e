"""Triton kernels of the logsumexp; ``host.py`` launches them.

Matrices come packed: contiguous rows of BD numbers in the dtype that tensor cores multiply, padded
with zeros to whole tiles. Half precision rows are scaled so that their dot products are the logits
in base 2; float32 rows are not, and ``SCALE_LOGITS`` does it after the product. Equation numbers
are those of ``docs/nt_xent.md``. No kernel uses floating atomics, so results are the same bit for
bit each run.

A tile is BM rows × BN columns. With ``BK == BD`` a block of rows stays on chip while columns pass
by, otherwise both are read in slices of BK. Names begin with what they are: p_ a pointer, n_ a
size, i_ an index or where a block begins, o_ offsets, m_ a mask, b_ a block on chip; the shape of a
block stands where it is made.
"""

# Triton decides an `if` on a constexpr when it compiles; an `and` it does not.
# ruff: noqa: TID253
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# How pairs are left out: not at all, by j ≡ i (mod period), or by equal ids.
_BY_PERIOD = tl.constexpr(1)
_BY_IDS = tl.constexpr(2)


@triton.jit
def load_block(p_x, i_row, i_column, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """A block of a packed matrix, [BM, BK]."""
    o_block = tl.arange(0, BM)[:, None] * BD + tl.arange(0, BK)[None, :]
    return tl.load(p_x + tl.cast(i_row, tl.int64) * BD + i_column + o_block)


@triton.jit
def logits_of(p_q, p_k, b_q, i_top, i_left, SCALE_LOGITS: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """The logits of a tile in base 2, [BM, BN]; ``b_q`` [BM, BD] is looked at if it is whole."""
    if BK == BD:
        b_k = load_block(p_k, i_left, 0, BN, BD, BD)  # [BN, BD]
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [BM, BN]
    else:
        b_s = tl.zeros([BM, BN], tl.float32)
        for i_k in range(0, BD, BK):
            b_a = load_block(p_q, i_top, i_k, BM, BK, BD)  # [BM, BK]
            b_b = load_block(p_k, i_left, i_k, BN, BK, BD)  # [BN, BK]
            b_s = tl.dot(b_a, b_b.T, b_s, input_precision=PRECISION)
    if SCALE_LOGITS:
        b_s *= LOG2E
    return b_s


@triton.jit
def ids_of(p_ids, o_index, n, period, RULE: tl.constexpr):
    """What must be equal for a pair to be left out, one for each index."""
    if RULE == _BY_IDS:
        b_ids = tl.load(p_ids + o_index, mask=o_index < n, other=0)
    elif RULE == _BY_PERIOD:
        b_ids = o_index % period
    else:
        b_ids = o_index
    return b_ids


@triton.jit
def is_left_out(o_row, b_row_ids, n_rows, o_column, p_column_ids, n_columns, period,
              RULE: tl.constexpr):  # fmt: skip
    """True where a pair is left out, or is none, [BM, BN]."""
    m_out = (o_row >= n_rows)[:, None] | (o_column >= n_columns)[None, :]
    if RULE != 0:
        b_column_ids = ids_of(p_column_ids, o_column, n_columns, period, RULE)  # [BN]
        m_out = m_out | (b_row_ids[:, None] == b_column_ids[None, :])
    return m_out


@triton.jit
def has_left_out(i_top, i_left, n_rows, n_columns, period, beyond_rows, BM: tl.constexpr,
                  BN: tl.constexpr, RULE: tl.constexpr):  # fmt: skip
    """Whether a tile has pairs to leave out. ``beyond_rows`` is a multiple of the period ≥ rows."""
    has_some = (i_top + BM > n_rows) | (i_left + BN > n_columns)
    if RULE == _BY_PERIOD:
        has_some = has_some | ((i_left - i_top + BN - 1 + beyond_rows) % period < BM + BN - 1)
    if RULE == _BY_IDS:
        has_some = i_left >= 0
    return has_some


@triton.jit
def limits_of(p_limit, o_index, n, LIMITED: tl.constexpr):
    """The largest logits that are kept, in base 2, one for each index."""
    b_limit = tl.full(o_index.shape, float("inf"), tl.float32)
    if LIMITED:
        b_limit = tl.load(p_limit + o_index, mask=o_index < n, other=0.0) * LOG2E
    return b_limit


@triton.jit
def within_limits(b_s, b_limit, LIMITED: tl.constexpr):
    """The logits [BM, BN], -inf where they are above the limit of their row."""
    if LIMITED:
        b_s = tl.where(b_s > b_limit[:, None], float("-inf"), b_s)
    return b_s


# Its quotient by the scale of weights, and what divides by that, are in the range of float32.
LEAST_POWER = tl.constexpr(2.0**-112)


@triton.jit
def exponent_power(x):
    """The power of two at or below float32 numbers > 0."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def gradient_power(largest):
    """The power of two that weights are relative to, from the largest gradient of a logsumexp."""
    b_power = tl.maximum(exponent_power(largest), LEAST_POWER)
    return tl.where(b_power < float("inf"), b_power, 1.0)


@triton.jit
def as_multiplied(x, PRECISION: tl.constexpr):
    """Operands rounded as tensor cores expect them.

    Of float32 they read only the upper bits where they multiply tf32: what is not rounded to
    nearest before is truncated, and every product comes out too small.
    """
    if PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
        # Of some NaN the sum carries over into the sign.
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        x = tl.where(is_nan, x, nearest.to(tl.float32, bitcast=True))
    return x


@triton.jit(do_not_specialize=["n_rows", "n_columns"])
def pack_kernel(p_x, row_stride, column_stride, p_packed, n_rows, n_columns, scale,
                BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Rows of any strides, scaled and rounded into a packed matrix."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_column = tl.program_id(1) * BN + tl.arange(0, BN)
    m_x = (o_row < n_rows)[:, None] & (o_column < n_columns)[None, :]
    o_row, o_column = o_row.to(tl.int64), o_column.to(tl.int64)
    o_x = o_row[:, None] * row_stride + o_column[None, :] * column_stride
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0) * scale  # [BM, BN]
    o_packed = o_row[:, None] * BD + o_column[None, :]
    b_x = as_multiplied(b_x, PRECISION)
    tl.store(p_packed + o_packed, b_x.to(p_packed.dtype.element_ty))


@triton.jit
def _store_part(p_part, i_field, i_part, n_parts, n, o_index, b_x):
    """Store one value an index into ``p_part``, (fields, parts, n)."""
    i_start = tl.cast(i_field * n_parts + i_part, tl.int64) * n
    tl.store(p_part + i_start + o_index, b_x, mask=o_index < n)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "period", "beyond_rows", "i_first_block",
                               "n_tiles", "n_row_parts", "n_column_parts"])  # fmt: skip
def forward_kernel(
    p_q, p_k, p_row_ids, p_column_ids, p_row_limit, p_row_part, p_column_part, n_rows, n_columns,
    period, beyond_rows, i_first_block, n_tiles, n_row_parts, n_column_parts,
    RULE: tl.constexpr, LIMITED: tl.constexpr, SELF: tl.constexpr, BY_COLUMN: tl.constexpr,
    SHIFTED: tl.constexpr, SCALE_LOGITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of exponentials of a block of rows over some tiles, equations (2) and (8).

    They are partial results by row, (fields, row_parts, n_rows), one part a chunk of ``n_tiles``
    tiles; and by column, (fields, column_parts, n_columns), one part a block of rows. Fields are
    the sum and, with ``SHIFTED``, the maximum that was subtracted. With ``SELF``, only tiles on and
    above the diagonal, and those right of the block of rows count by column too. ``LIMITED`` rows
    count without the logits above their limits; they are ``SHIFTED``, and no column counts.
    """
    i_block = tl.program_id(0)
    i_part = tl.program_id(1)
    i_top = (i_first_block + i_block) * BM
    i_begin = i_part * n_tiles
    i_end = tl.minimum(i_begin + n_tiles, tl.cdiv(n_columns, BN))
    if SELF:
        i_begin = tl.maximum(i_begin, i_top // BN)
    if i_begin >= i_end:
        return
    o_row = i_top + tl.arange(0, BM)
    b_row_ids = ids_of(p_row_ids, o_row, n_rows, period, RULE)  # [BM]
    b_limit = limits_of(p_row_limit, o_row, n_rows, LIMITED)  # [BM]
    b_q = tl.zeros([BM, 1], tl.float32)
    if BK == BD:
        b_q = load_block(p_q, i_top, 0, BM, BD, BD)  # [BM, BD]
    b_sum = tl.zeros([BM], tl.float32)
    if SHIFTED:
        b_max = tl.full([BM], float("-inf"), tl.float32)
    for i_tile in range(i_begin, i_end):
        i_left = i_tile * BN
        o_column = i_left + tl.arange(0, BN)
        b_s = logits_of(
            p_q, p_k, b_q, i_top, i_left, SCALE_LOGITS, BM, BN, BD, BK, PRECISION
        )  # [BM, BN]
        special = has_left_out(i_top, i_left, n_rows, n_columns, period, beyond_rows, BM, BN, RULE)
        by_column = i_left >= i_top + BM if SELF else BY_COLUMN
        if SHIFTED:
            if special:
                m_out = is_left_out(
                    o_row, b_row_ids, n_rows, o_column, p_column_ids, n_columns, period, RULE
                )  # [BM, BN]
                b_s = tl.where(m_out, float("-inf"), b_s)
            b_s = within_limits(b_s, b_limit, LIMITED)
            b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
            b_max = b_new_max
            if by_column:
                b_column_max = tl.max(b_s, 0)  # [BN]
                b_column_shift = tl.where(b_column_max == float("-inf"), 0.0, b_column_max)
                b_column_sum = tl.sum(tl.exp2(b_s - b_column_shift[None, :]), 0)
                _store_part(
                    p_column_part, 0, i_block, n_column_parts, n_columns, o_column, b_column_sum
                )
                _store_part(
                    p_column_part, 1, i_block, n_column_parts, n_columns, o_column, b_column_max
                )
        else:
            b_p = tl.exp2(b_s)  # [BM, BN]
            if special:
                m_out = is_left_out(
                    o_row, b_row_ids, n_rows, o_column, p_column_ids, n_columns, period, RULE
                )
                b_p = tl.where(m_out, 0.0, b_p)
            b_sum += tl.sum(b_p, 1)
            if by_column:
                b_column_sum = tl.sum(b_p, 0)  # [BN]
                _store_part(
                    p_column_part, 0, i_block, n_column_parts, n_columns, o_column, b_column_sum
                )
    _store_part(p_row_part, 0, i_part, n_row_parts, n_rows, o_row, b_sum)
    if SHIFTED:
        _store_part(p_row_part, 1, i_part, n_row_parts, n_rows, o_row, b_max)


@triton.jit
def merge_parts(b_sum, b_max, p_part, n_parts, n, o_index, b_first, b_end,
                SHIFTED: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Merge the parts from ``b_first`` to ``b_end`` of sums and maxima, which differ by index."""
    for i_lowest in range(0, n_parts, PARTS):
        o_part = i_lowest + tl.arange(0, PARTS)[:, None]
        m_part = (o_part >= b_first[None, :]) & (o_part < b_end[None, :])
        p_sum = p_part + o_part.to(tl.int64) * n + o_index[None, :]
        b_part = tl.load(p_sum, mask=m_part, other=0.0)  # [PARTS, index]
        if SHIFTED:
            n_field = tl.cast(n_parts, tl.int64) * n
            b_part_max = tl.load(p_sum + n_field, mask=m_part, other=float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_part_max, 0))
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_rescale = tl.exp2(b_part_max - b_shift[None, :])
            b_sum = b_sum * tl.exp2(b_max - b_shift)
            b_sum += tl.sum(b_part.to(tl.float64) * b_rescale, 0)
            b_max = b_new_max
        else:
            b_sum += tl.sum(b_part.to(tl.float64), 0)
    return b_sum, b_max


@triton.jit(do_not_specialize=["n", "n_results", "i_offset", "i_first_block", "n_blocks", "n_tiles",
                               "n_row_parts", "n_column_parts"])  # fmt: skip
def reduce_kernel(
    p_row_part, p_column_part, p_running, p_lse, p_lse_lo, n, n_results, i_offset, i_first_block,
    n_blocks, n_tiles, n_row_parts, n_column_parts,
    SELF: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, SHIFTED: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of some blocks of rows into the logsumexp, equation (8).

    They are ``n_blocks`` blocks from ``i_first_block`` on. Until the last of them the sums and
    maxima of all ``n_results`` wait in ``p_running``, (2, n_results) float64. This side's ``n``
    results begin at ``i_offset``. ``p_lse_lo`` gets what float32 cannot hold of the logsumexp.
    """
    o_index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    m_index = o_index < n
    b_sum = tl.zeros([WIDTH], tl.float64)
    if SHIFTED:
        b_max = tl.full([WIDTH], float("-inf"), tl.float32)
    else:
        b_max = tl.zeros([WIDTH], tl.float32)
    p_state = p_running + i_offset + o_index
    if not FIRST:
        b_sum = tl.load(p_state, mask=m_index, other=0.0)
        if SHIFTED:
            b_max = tl.load(p_state + n_results, mask=m_index, other=0.0).to(tl.float32)
    b_block = o_index // BM
    if BY_ROW:
        b_first = tl.zeros([WIDTH], tl.int32)
        if SELF:
            b_first = b_block * BM // BN // n_tiles
        m_block = m_index & (b_block >= i_first_block) & (b_block < i_first_block + n_blocks)
        b_end = tl.where(m_block, n_row_parts, 0)
        b_sum, b_max = merge_parts(
            b_sum, b_max, p_row_part, n_row_parts, n, o_index, b_first, b_end, SHIFTED, PARTS
        )
    if BY_COLUMN:
        b_first = tl.zeros([WIDTH], tl.int32)
        b_end = tl.where(m_index, n_blocks, 0)
        if SELF:
            b_end = tl.minimum(b_end, b_block - i_first_block)
        b_sum, b_max = merge_parts(
            b_sum, b_max, p_column_part, n_column_parts, n, o_index, b_first, b_end, SHIFTED, PARTS
        )
    if LAST:
        b_exact = (b_max + tl.log2(b_sum)) * LN2  # [WIDTH], float64
        b_lse = b_exact.to(tl.float32)
        b_lo = tl.where(tl.abs(b_lse) == float("inf"), 0.0, (b_exact - b_lse).to(tl.float32))
        tl.store(p_lse + i_offset + o_index, b_lse, mask=m_index)
        tl.store(p_lse_lo + i_offset + o_index, b_lo, mask=m_index)
    else:
        tl.store(p_state, b_sum, mask=m_index)
        if SHIFTED:
            tl.store(p_state + n_results, b_max.to(tl.float64), mask=m_index)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "period", "beyond_rows", "n_results"],
            do_not_specialize_on_alignment=["p_lse", "p_statistics"])  # fmt: skip
def statistics_kernel(
    p_q, p_k, p_row_ids, p_column_ids, p_row_limit, p_lse, p_statistics, n_rows, n_columns, period,
    beyond_rows, n_results,
    RULE: tl.constexpr, LIMITED: tl.constexpr, SCALE_LOGITS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum, expected logit, sum and number of the kept logits of a block of rows.

    Stored as (4, n_results), natural logits. The logsumexp is known, and keeps exp in its range.
    """
    i_top = tl.program_id(0) * BM
    o_row = i_top + tl.arange(0, BM)
    m_row = o_row < n_rows
    b_row_ids = ids_of(p_row_ids, o_row, n_rows, period, RULE)  # [BM]
    b_limit = limits_of(p_row_limit, o_row, n_rows, LIMITED)  # [BM]
    b_q = tl.zeros([BM, 1], tl.float32)
    if BK == BD:
        b_q = load_block(p_q, i_top, 0, BM, BD, BD)  # [BM, BD]
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=0.0)
    b_lse2 = tl.where(b_lse == float("-inf"), 0.0, b_lse) * LOG2E
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float64)
    b_weighted = tl.zeros([BM], tl.float64)
    b_total = tl.zeros([BM], tl.float64)
    b_kept = tl.zeros([BM], tl.float64)
    for i_left in range(0, n_columns, BN):
        o_column = i_left + tl.arange(0, BN)
        b_s = logits_of(
            p_q, p_k, b_q, i_top, i_left, SCALE_LOGITS, BM, BN, BD, BK, PRECISION
        )  # [BM, BN]
        if has_left_out(i_top, i_left, n_rows, n_columns, period, beyond_rows, BM, BN, RULE):
            m_out = is_left_out(
                o_row, b_row_ids, n_rows, o_column, p_column_ids, n_columns, period, RULE
            )  # [BM, BN]
            b_s = tl.where(m_out, float("-inf"), b_s)
        b_s = within_limits(b_s, b_limit, LIMITED)
        b_finite = tl.where(b_s == float("-inf"), 0.0, b_s)
        b_p = tl.exp2(b_s - b_lse2[:, None])
        b_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum += tl.sum(b_p, 1)
        b_weighted += tl.sum(b_p * b_finite, 1)
        b_total += tl.sum(b_finite, 1)
        b_kept += tl.sum(tl.where(b_s == float("-inf"), 0.0, 1.0), 1)
    p_figure = p_statistics + o_row
    b_expected = tl.where(b_sum == 0, 0.0, b_weighted / b_sum) * LN2
    tl.store(p_figure, b_max * LN2, mask=m_row)
    tl.store(p_figure + n_results, b_expected.to(tl.float32), mask=m_row)
    tl.store(p_figure + 2 * n_results, (b_total * LN2).to(tl.float32), mask=m_row)
    tl.store(p_figure + 3 * n_results, b_kept.to(tl.float32), mask=m_row)
