"""Triton kernels of the primitive; ``_triton.py`` launches them.

Matrices come packed: contiguous rows in the dtype that tensor cores multiply, padded with zeros to
whole tiles. Half precision rows are scaled so that their dot products are the logits in base 2;
float32 rows are not, and ``SCALE_LOGITS`` does it after the product. Equation numbers are those of
``docs/nt_xent.md``. No kernel uses floating atomics, so results are the same bit for bit each run.

A tile is ``ROWS × COLUMNS``; ``DEPTH`` is the packed width D. With ``STEP == DEPTH`` the row block
stays on chip while columns pass by, otherwise both are read in slices of ``STEP``.
"""

# Triton decides an `if` on a constexpr when it compiles; an `and` it does not.
# ruff: noqa: TID253, PLR0912, PLR0915, SIM108
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

# How pairs are left out: not at all, by j ≡ i (mod period), or by equal ids.
_BY_PERIOD = tl.constexpr(1)
_BY_IDS = tl.constexpr(2)


@triton.jit
def _load(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """A block of a packed matrix."""
    offsets = tl.arange(0, ROWS)[:, None] * DEPTH + tl.arange(0, COLUMNS)[None, :]
    return tl.load(matrix + tl.cast(row, tl.int64) * DEPTH + column + offsets)


@triton.jit
def _products(queries, keys, top, left, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              DEPTH: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The dot products of a tile, both blocks read in slices."""
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, DEPTH, STEP):
        a = _load(queries, top, step, ROWS, STEP, DEPTH)
        b = _load(keys, left, step, COLUMNS, STEP, DEPTH)
        product = tl.dot(a, b.T, product, input_precision=PRECISION)
    return product


@triton.jit
def _class_of(index, ids, size, period, RULE: tl.constexpr):
    """What must be equal for a pair to be left out."""
    if RULE == _BY_IDS:
        result = tl.load(ids + index, mask=index < size, other=0)
    elif RULE == _BY_PERIOD:
        result = index % period
    else:
        result = index
    return result


@triton.jit
def _excluded(rows, row_class, n_rows, columns, ids, n_columns, period,
              RULE: tl.constexpr):  # fmt: skip
    """True where a pair is left out, or is none."""
    outside = (rows >= n_rows)[:, None] | (columns >= n_columns)[None, :]
    if RULE != 0:
        column_class = _class_of(columns, ids, n_columns, period, RULE)
        outside = outside | (row_class[:, None] == column_class[None, :])
    return outside


@triton.jit
def _is_special(top, left, n_rows, n_columns, period, lift, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, RULE: tl.constexpr):  # fmt: skip
    """Whether a tile has pairs to leave out. ``lift`` is a multiple of the period, ≥ any row."""
    special = (top + ROWS > n_rows) | (left + COLUMNS > n_columns)
    if RULE == _BY_PERIOD:
        special = special | ((left - top + COLUMNS - 1 + lift) % period < ROWS + COLUMNS - 1)
    if RULE == _BY_IDS:
        special = left >= 0
    return special


@triton.jit(do_not_specialize=["n_rows", "n_columns"])
def pack_kernel(source, row_stride, column_stride, packed, n_rows, n_columns, scale,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """Rows of any strides, scaled and rounded into a packed matrix."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    values = tl.load(source + offsets, mask=there, other=0.0) * scale
    target = packed + rows[:, None] * DEPTH + columns[None, :]
    tl.store(target, values.to(packed.dtype.element_ty))


@triton.jit
def _store_partial(partial, field, slot, slots, n, index, values):
    """Store into ``partial``, (fields, slots, n)."""
    start = tl.cast(field * slots + slot, tl.int64) * n
    tl.store(partial + start + index, values, mask=index < n)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "period", "lift", "first_block", "chunk",
                               "row_slots", "column_slots"])  # fmt: skip
def forward_kernel(
    queries, keys, row_ids, column_ids, row_partial, column_partial, n_rows, n_columns, period,
    lift, first_block, chunk, row_slots, column_slots,
    RULE: tl.constexpr, SYMMETRIC: tl.constexpr, BY_COLUMN: tl.constexpr, SHIFTED: tl.constexpr,
    STATISTICS: tl.constexpr, SCALE_LOGITS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of exponentials of a row block over a chunk of columns, equations (2) and (8).

    They are partial results by row, (fields, row_slots, n_rows), one slot a chunk; and by column,
    (fields, column_slots, n_columns), one slot a row block. Fields are the sum; with ``SHIFTED``
    also the maximum that was subtracted; with ``STATISTICS`` also the sums of exponential times
    logit, of logits, and of pairs. With ``SYMMETRIC``, only tiles on and above the diagonal, and
    those right of the row block count by column too.
    """
    block = tl.program_id(0)
    slot = tl.program_id(1)
    top = (first_block + block) * ROWS
    begin = slot * chunk
    end = tl.minimum(begin + chunk, tl.cdiv(n_columns, COLUMNS))
    if SYMMETRIC:
        begin = tl.maximum(begin, top // COLUMNS)
    if begin >= end:
        return
    rows = top + tl.arange(0, ROWS)
    row_class = _class_of(rows, row_ids, n_rows, period, RULE)
    if STEP == DEPTH:
        resident = _load(queries, top, 0, ROWS, DEPTH, DEPTH)
    sums = tl.zeros([ROWS], tl.float32)
    if SHIFTED:
        peak = tl.full([ROWS], float("-inf"), tl.float32)
    if STATISTICS:
        weighted = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        kept = tl.zeros([ROWS], tl.float32)
    for tile in range(begin, end):
        left = tile * COLUMNS
        columns = left + tl.arange(0, COLUMNS)
        if STEP == DEPTH:
            block_of_keys = _load(keys, left, 0, COLUMNS, DEPTH, DEPTH)
            logits = tl.dot(resident, block_of_keys.T, input_precision=PRECISION)
        else:
            logits = _products(queries, keys, top, left, ROWS, COLUMNS, DEPTH, STEP, PRECISION)
        if SCALE_LOGITS:
            logits *= _LOG2E
        special = _is_special(top, left, n_rows, n_columns, period, lift, ROWS, COLUMNS, RULE)
        by_column = left >= top + ROWS if SYMMETRIC else BY_COLUMN
        if SHIFTED:
            if special:
                excluded = _excluded(
                    rows, row_class, n_rows, columns, column_ids, n_columns, period, RULE
                )
                logits = tl.where(excluded, float("-inf"), logits)
            higher = tl.maximum(peak, tl.max(logits, 1))
            origin = tl.where(higher == float("-inf"), 0.0, higher)
            rescale = tl.exp2(peak - origin)
            exps = tl.exp2(logits - origin[:, None])
            sums = sums * rescale + tl.sum(exps, 1)
            peak = higher
            if STATISTICS:
                finite = tl.where(logits == float("-inf"), 0.0, logits)
                present = tl.where(logits == float("-inf"), 0.0, 1.0)
                weighted = weighted * rescale + tl.sum(exps * finite, 1)
                total += tl.sum(finite, 1)
                kept += tl.sum(present, 1)
            if by_column:
                column_peak = tl.max(logits, 0)
                column_origin = tl.where(column_peak == float("-inf"), 0.0, column_peak)
                exps = tl.exp2(logits - column_origin[None, :])
                column_sums = tl.sum(exps, 0)
                _store_partial(
                    column_partial, 0, block, column_slots, n_columns, columns, column_sums
                )
                _store_partial(
                    column_partial, 1, block, column_slots, n_columns, columns, column_peak
                )
                if STATISTICS:
                    column_sums = tl.sum(exps * finite, 0)
                    _store_partial(
                        column_partial, 2, block, column_slots, n_columns, columns, column_sums
                    )
                    column_sums = tl.sum(finite, 0)
                    _store_partial(
                        column_partial, 3, block, column_slots, n_columns, columns, column_sums
                    )
                    column_sums = tl.sum(present, 0)
                    _store_partial(
                        column_partial, 4, block, column_slots, n_columns, columns, column_sums
                    )
        else:
            exps = tl.exp2(logits)
            if special:
                excluded = _excluded(
                    rows, row_class, n_rows, columns, column_ids, n_columns, period, RULE
                )
                exps = tl.where(excluded, 0.0, exps)
            sums += tl.sum(exps, 1)
            if by_column:
                column_sums = tl.sum(exps, 0)
                _store_partial(
                    column_partial, 0, block, column_slots, n_columns, columns, column_sums
                )
    _store_partial(row_partial, 0, slot, row_slots, n_rows, rows, sums)
    if SHIFTED:
        _store_partial(row_partial, 1, slot, row_slots, n_rows, rows, peak)
    if STATISTICS:
        _store_partial(row_partial, 2, slot, row_slots, n_rows, rows, weighted)
        _store_partial(row_partial, 3, slot, row_slots, n_rows, rows, total)
        _store_partial(row_partial, 4, slot, row_slots, n_rows, rows, kept)


@triton.jit
def _merge_slots(sums, peak, weighted, total, kept, partial, slots, n, index, first, end,
                 SHIFTED: tl.constexpr, STATISTICS: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """Merge the slots ``first`` to ``end`` of partial results, which differ by entry."""
    for lowest in range(0, slots, SLOTS):
        slot = lowest + tl.arange(0, SLOTS)[:, None]
        valid = (slot >= first[None, :]) & (slot < end[None, :])
        source = partial + slot.to(tl.int64) * n + index[None, :]
        field = tl.cast(slots, tl.int64) * n
        part = tl.load(source, mask=valid, other=0.0)
        if SHIFTED:
            part_peak = tl.load(source + field, mask=valid, other=float("-inf"))
            higher = tl.maximum(peak, tl.max(part_peak, 0))
            origin = tl.where(higher == float("-inf"), 0.0, higher)
            rescale = tl.exp2(peak - origin)
            part_scale = tl.exp2(part_peak - origin[None, :])
            sums = sums * rescale + tl.sum(part.to(tl.float64) * part_scale, 0)
            peak = higher
        else:
            sums += tl.sum(part.to(tl.float64), 0)
        if STATISTICS:
            part = tl.load(source + 2 * field, mask=valid, other=0.0)
            weighted = weighted * rescale + tl.sum(part.to(tl.float64) * part_scale, 0)
            part = tl.load(source + 3 * field, mask=valid, other=0.0)
            total += tl.sum(part.to(tl.float64), 0)
            part = tl.load(source + 4 * field, mask=valid, other=0.0)
            kept += tl.sum(part.to(tl.float64), 0)
    return sums, peak, weighted, total, kept


@triton.jit(do_not_specialize=["n", "length", "offset", "first_block", "blocks", "chunk",
                               "row_slots", "column_slots"])  # fmt: skip
def reduce_kernel(
    row_partial, column_partial, running, lse, lost, statistics, n, length, offset, first_block,
    blocks, chunk, row_slots, column_slots,
    SYMMETRIC: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, SHIFTED: tl.constexpr,
    STATISTICS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of a panel of row blocks into the logsumexp, equation (8).

    The panel is ``blocks`` row blocks from ``first_block``. Between panels the state of all
    ``length`` results waits in ``running``, (5, length) float64. This side's ``n`` results begin
    at ``offset``. ``lost`` is what float32 cannot hold of the logsumexp.
    """
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    there = index < n
    sums = tl.zeros([WIDTH], tl.float64)
    weighted = tl.zeros([WIDTH], tl.float64)
    total = tl.zeros([WIDTH], tl.float64)
    kept = tl.zeros([WIDTH], tl.float64)
    if SHIFTED:
        peak = tl.full([WIDTH], float("-inf"), tl.float32)
    else:
        peak = tl.zeros([WIDTH], tl.float32)
    state = running + offset + index
    if not FIRST:
        sums = tl.load(state, mask=there, other=0.0)
        if SHIFTED:
            peak = tl.load(state + length, mask=there, other=0.0).to(tl.float32)
        if STATISTICS:
            weighted = tl.load(state + 2 * length, mask=there, other=0.0)
            total = tl.load(state + 3 * length, mask=there, other=0.0)
            kept = tl.load(state + 4 * length, mask=there, other=0.0)
    block = index // ROWS
    if BY_ROW:
        first = tl.zeros([WIDTH], tl.int32)
        if SYMMETRIC:
            first = block * ROWS // COLUMNS // chunk
        in_panel = there & (block >= first_block) & (block < first_block + blocks)
        end = tl.where(in_panel, row_slots, 0)
        sums, peak, weighted, total, kept = _merge_slots(
            sums, peak, weighted, total, kept, row_partial, row_slots, n, index, first, end,
            SHIFTED, STATISTICS, SLOTS,
        )  # fmt: skip
    if BY_COLUMN:
        first = tl.zeros([WIDTH], tl.int32)
        end = tl.where(there, blocks, 0)
        if SYMMETRIC:
            end = tl.minimum(end, block - first_block)
        sums, peak, weighted, total, kept = _merge_slots(
            sums, peak, weighted, total, kept, column_partial, column_slots, n, index, first, end,
            SHIFTED, STATISTICS, SLOTS,
        )  # fmt: skip
    if LAST:
        exact = (peak + tl.log2(sums)) * _LN2
        rounded = exact.to(tl.float32)
        rest = tl.where(tl.abs(rounded) == float("inf"), 0.0, (exact - rounded).to(tl.float32))
        tl.store(lse + offset + index, rounded, mask=there)
        tl.store(lost + offset + index, rest, mask=there)
        if STATISTICS:
            figure = statistics + offset + index
            expected = tl.where(sums == 0, 0.0, weighted / sums) * _LN2
            tl.store(figure, peak * _LN2, mask=there)
            tl.store(figure + length, expected.to(tl.float32), mask=there)
            tl.store(figure + 2 * length, (total * _LN2).to(tl.float32), mask=there)
            tl.store(figure + 3 * length, kept.to(tl.float32), mask=there)
    else:
        tl.store(state, sums, mask=there)
        if SHIFTED:
            tl.store(state + length, peak.to(tl.float64), mask=there)
        if STATISTICS:
            tl.store(state + 2 * length, weighted, mask=there)
            tl.store(state + 3 * length, total, mask=there)
            tl.store(state + 4 * length, kept, mask=there)


@triton.jit(do_not_specialize=["n", "grad_stride"])
def scale_kernel(grad, grad_stride, lse, lost, largest, scale, level, unit, n, weight_scale,
                 unit_scale, SHIFTED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """What the weights of equation (5) are scaled by, row by row, and what undoes it at the end.

    ``unit`` is a power of two near the largest incoming gradient, so that a small one does not
    leave the range of the weights; ``weight_scale`` keeps small weights in the range of float16.
    """
    peak = tl.load(largest)
    power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where((power > 0) & (power < float("inf")), power, 1.0)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = index < n
    incoming = tl.load(grad + index.to(tl.int64) * grad_stride, mask=there, other=0.0)
    rounded = tl.load(lse + index, mask=there, other=0.0)
    empty = rounded == float("-inf")
    exact = tl.where(empty, 0.0, rounded).to(tl.float64)
    exact = (exact + tl.load(lost + index, mask=there, other=0.0)) * _LOG2E
    high = exact.to(tl.float32)
    result = incoming / power * weight_scale * tl.exp2((high - exact).to(tl.float32))
    if SHIFTED:
        tl.store(level + index, tl.where(empty, float("inf"), high), mask=there)
    else:
        result *= tl.exp2(-high)
    tl.store(scale + index, tl.where(empty, 0.0, result), mask=there)
    if tl.program_id(0) == 0:
        tl.store(unit, power * unit_scale)


@triton.jit
def _scale_of(scale, level, unit, index, size, SHIFTED: tl.constexpr, DEFERRED: tl.constexpr):
    """Scale and level of some rows or columns; the rest of a scale that is not complete."""
    there = index < size
    own_scale = tl.load(scale + index, mask=there, other=0.0)
    own_level = tl.zeros_like(own_scale)
    if SHIFTED or DEFERRED:
        own_level = tl.load(level + index, mask=there, other=0.0)
    if DEFERRED:
        own_scale = own_scale / tl.load(unit)
        if not SHIFTED:
            own_scale *= tl.exp2(-own_level)
    return own_scale, own_level


@triton.jit
def _weights(logits, row_scale, row_level, column_scale, column_level, unit, columns, n_columns,
             FROM_ROWS: tl.constexpr, FROM_COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
             DEFERRED: tl.constexpr):  # fmt: skip
    """The weights of equation (5); ``row_scale`` and ``row_level`` are loaded already."""
    if FROM_COLUMNS:
        scale, level = _scale_of(
            column_scale, column_level, unit, columns, n_columns, SHIFTED, DEFERRED
        )
    if SHIFTED:
        weights = tl.zeros_like(logits)
        if FROM_ROWS:
            weights += tl.exp2(logits - row_level[:, None]) * row_scale[:, None]
        if FROM_COLUMNS:
            weights += tl.exp2(logits - level[None, :]) * scale[None, :]
    else:
        weights = tl.exp2(logits)
        if FROM_ROWS and FROM_COLUMNS:
            weights *= row_scale[:, None] + scale[None, :]
        elif FROM_ROWS:
            weights *= row_scale[:, None]
        else:
            weights *= scale[None, :]
    return weights


@triton.jit(do_not_specialize=["n_rows", "n_columns", "period", "lift", "chunk"])
def backward_kernel(
    queries, keys, row_scale, row_level, column_scale, column_level, row_ids, column_ids, unit,
    partial, n_rows, n_columns, period, lift, chunk,
    RULE: tl.constexpr, FROM_ROWS: tl.constexpr, FROM_COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
    DEFERRED: tl.constexpr, SCALE_LOGITS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a row block from a chunk of columns, equation (5), the weights on chip.

    With ``DEFERRED`` the scales are still to be divided by ``unit`` and lowered by their levels.
    ``partial`` is (chunks, n_rows, DEPTH), with the factors that ``finish_kernel`` undoes.
    """
    top = tl.program_id(0) * ROWS
    slot = tl.program_id(1)
    rows = top + tl.arange(0, ROWS)
    there = rows < n_rows
    row_class = _class_of(rows, row_ids, n_rows, period, RULE)
    own_scale = tl.zeros([ROWS], tl.float32)
    own_level = tl.zeros([ROWS], tl.float32)
    if FROM_ROWS:
        own_scale, own_level = _scale_of(
            row_scale, row_level, unit, rows, n_rows, SHIFTED, DEFERRED
        )
    resident = _load(queries, top, 0, ROWS, DEPTH, DEPTH)
    gradient = tl.zeros([ROWS, DEPTH], tl.float32)
    begin = slot * chunk
    end = tl.minimum(begin + chunk, tl.cdiv(n_columns, COLUMNS))
    for tile in range(begin, end):
        left = tile * COLUMNS
        columns = left + tl.arange(0, COLUMNS)
        block_of_keys = _load(keys, left, 0, COLUMNS, DEPTH, DEPTH)
        logits = tl.dot(resident, block_of_keys.T, input_precision=PRECISION)
        if SCALE_LOGITS:
            logits *= _LOG2E
        weights = _weights(
            logits, own_scale, own_level, column_scale, column_level, unit, columns, n_columns,
            FROM_ROWS, FROM_COLUMNS, SHIFTED, DEFERRED,
        )  # fmt: skip
        if _is_special(top, left, n_rows, n_columns, period, lift, ROWS, COLUMNS, RULE):
            excluded = _excluded(
                rows, row_class, n_rows, columns, column_ids, n_columns, period, RULE
            )
            weights = tl.where(excluded, 0.0, weights)
        gradient = tl.dot(
            weights.to(block_of_keys.dtype), block_of_keys, gradient, input_precision=PRECISION
        )
    target = partial + (tl.cast(slot, tl.int64) * n_rows + top) * DEPTH
    offsets = tl.arange(0, ROWS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    tl.store(target + offsets, gradient, mask=there[:, None])


@triton.jit(do_not_specialize=["n_rows", "n_columns", "slots"])
def finish_kernel(partial, unit, gradient, n_rows, n_columns, slots,
                  ROWS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """Add the partial gradients up in order, undo their factors, drop the padding."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, DEPTH)
    there = (rows < n_rows)[:, None]
    rows = rows.to(tl.int64)
    result = tl.zeros([ROWS, DEPTH], tl.float32)
    for slot in range(0, slots):
        places = slot * tl.cast(n_rows, tl.int64) + rows
        source = partial + places[:, None] * DEPTH + columns[None, :]
        result += tl.load(source, mask=there, other=0.0)
    target = gradient + rows[:, None] * n_columns + columns[None, :]
    tl.store(target, result * tl.load(unit), mask=there & (columns < n_columns)[None, :])


@triton.jit(do_not_specialize=["first_row", "first_column", "n_rows", "n_columns", "period",
                               "lift"])  # fmt: skip
def weights_kernel(
    queries, keys, row_scale, row_level, column_scale, column_level, row_ids, column_ids, strip,
    stride, first_row, first_column, n_rows, n_columns, period, lift,
    RULE: tl.constexpr, FROM_ROWS: tl.constexpr, FROM_COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
    SCALE_LOGITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the weights of equation (5), stored: for rows too wide to keep on chip.

    ``strip`` holds the weights from (``first_row``, ``first_column``) on, whole tiles of them.
    """
    across = tl.program_id(0) * ROWS
    along = tl.program_id(1) * COLUMNS
    top = first_row + across
    left = first_column + along
    rows = top + tl.arange(0, ROWS)
    columns = left + tl.arange(0, COLUMNS)
    row_class = _class_of(rows, row_ids, n_rows, period, RULE)
    own_scale = tl.zeros([ROWS], tl.float32)
    own_level = tl.zeros([ROWS], tl.float32)
    if FROM_ROWS:
        own_scale, own_level = _scale_of(row_scale, row_level, strip, rows, n_rows, SHIFTED, False)
    logits = _products(queries, keys, top, left, ROWS, COLUMNS, DEPTH, STEP, PRECISION)
    if SCALE_LOGITS:
        logits *= _LOG2E
    weights = _weights(
        logits, own_scale, own_level, column_scale, column_level, strip, columns, n_columns,
        FROM_ROWS, FROM_COLUMNS, SHIFTED, False,
    )  # fmt: skip
    if _is_special(top, left, n_rows, n_columns, period, lift, ROWS, COLUMNS, RULE):
        excluded = _excluded(rows, row_class, n_rows, columns, column_ids, n_columns, period, RULE)
        weights = tl.where(excluded, 0.0, weights)
    offsets = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    target = strip + tl.cast(across, tl.int64) * stride + along + offsets
    tl.store(target, weights.to(strip.dtype.element_ty))


@triton.jit
def _load_rows(view, index, row_stride, column_stride, n_rows, n_columns, DEPTH: tl.constexpr):
    """Rows of a view in float32, 0 beyond its ends."""
    columns = tl.arange(0, DEPTH)
    there = (index < n_rows)[:, None] & (columns < n_columns)[None, :]
    offsets = index.to(tl.int64)[:, None] * row_stride
    offsets += columns.to(tl.int64)[None, :] * column_stride
    return tl.load(view + offsets, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _unit_rows(z, root_high, root_low):
    """Rows of length 1 / sqrt(temperature), equation (3), and the two numbers that made them."""
    peak = tl.max(tl.abs(z), 1)
    # The power of two below the largest entry: dividing by it is exact, and keeps squares in range.
    power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(power == 0, float("inf"), power)  # a row of zeros or subnormal numbers
    z = z / power[:, None]
    square = tl.sum(z.to(tl.float64) * z, 1)
    length = tl.sqrt(tl.where(square > 0, square, 1.0))
    factor = ((tl.cast(root_high, tl.float64) + root_low) / length).to(tl.float32)
    return z * factor[:, None], power, factor


@triton.jit(do_not_specialize=["n", "n_columns"])
def pair_prepare_kernel(
    first, first_row_stride, first_column_stride, second, second_row_stride, second_column_stride,
    packed, positive, arrived, n, n_columns, root_high, root_low, scale, n_padded,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Unit rows of two views, packed one after the other, and the logit of each pair."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = index < n
    z = _load_rows(first, index, first_row_stride, first_column_stride, n, n_columns, DEPTH)
    first_rows, _, _ = _unit_rows(z, root_high, root_low)
    z = _load_rows(second, index, second_row_stride, second_column_stride, n, n_columns, DEPTH)
    second_rows, _, _ = _unit_rows(z, root_high, root_low)
    logit = tl.sum(first_rows.to(tl.float64) * second_rows, 1)
    tl.store(positive + index, logit, mask=there)
    columns = tl.arange(0, DEPTH)[None, :]
    target = packed + index.to(tl.int64)[:, None] * DEPTH + columns
    kind = packed.dtype.element_ty
    tl.store(target, (first_rows * scale).to(kind), mask=there[:, None])
    tl.store(
        target + tl.cast(n, tl.int64) * DEPTH, (second_rows * scale).to(kind), mask=there[:, None]
    )
    padding = index.to(tl.int64) + 2 * n
    target = packed + padding[:, None] * DEPTH + columns
    tl.store(target, tl.zeros([ROWS, DEPTH], kind), mask=(padding < n_padded)[:, None])
    if tl.program_id(0) == 0:
        tl.store(arrived, 0)


@triton.jit(do_not_specialize=["n", "blocks", "chunk", "row_slots", "programs"])
def pair_loss_kernel(
    row_partial, column_partial, positive, slope, scale, level, sums, peaks, arrived, loss, unit,
    n, blocks, chunk, row_slots, programs, weight_scale,
    SHIFTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The mean loss of equation (4) from partial sums, and what its gradient needs of each anchor.

    ``slope`` is the derivative by the logsumexp. The program that arrives last adds up the losses
    of all, in the order of their rows whichever it is, and finds the unit of the gradients.
    """
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    there = index < n
    nothing = tl.zeros([WIDTH], tl.float64)
    if SHIFTED:
        peak = tl.full([WIDTH], float("-inf"), tl.float32)
    else:
        peak = tl.zeros([WIDTH], tl.float32)
    block = index // ROWS
    total, peak, _, _, _ = _merge_slots(
        nothing, peak, nothing, nothing, nothing, row_partial, row_slots, n, index,
        block * ROWS // COLUMNS // chunk, tl.where(there, row_slots, 0), SHIFTED, False, SLOTS,
    )  # fmt: skip
    total, peak, _, _, _ = _merge_slots(
        total, peak, nothing, nothing, nothing, column_partial, blocks, n, index,
        tl.zeros([WIDTH], tl.int32), tl.where(there, block, 0), SHIFTED, False, SLOTS,
    )  # fmt: skip
    exact = peak + tl.log2(total)
    empty = exact == float("-inf")
    gap = exact * _LN2 - tl.load(positive + index % (n // 2), mask=there, other=0.0)
    small = tl.exp(-tl.abs(gap))
    # log(1 + small) by way of what 1 + small is rounded to: exact however small.
    above = 1.0 + small
    logarithm = tl.where(above == 1.0, small, tl.log(above) * small / (above - 1.0))
    softplus = tl.where(empty, 0.0, tl.maximum(gap, 0.0) + logarithm)
    sigmoid = tl.where(gap < 0, small, 1.0) / above
    sigmoid = tl.where(empty, 0.0, sigmoid)
    high = exact.to(tl.float32)
    tl.store(slope + index, sigmoid.to(tl.float32), mask=there)
    rest = tl.where(empty, 0.0, high - exact).to(tl.float32)
    tl.store(scale + index, (sigmoid * tl.exp2(rest)).to(tl.float32), mask=there)
    tl.store(level + index, tl.where(empty, float("inf"), high), mask=there)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(there, softplus, 0.0), 0))
    tl.store(peaks + tl.program_id(0), tl.max(tl.where(there, sigmoid, 0.0), 0).to(tl.float32))
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == programs - 1:
        program = tl.arange(0, PROGRAMS)
        all_sums = tl.load(sums + program, mask=program < programs, other=0.0)
        tl.store(loss, (tl.sum(all_sums, 0) / n).to(tl.float32))
        largest = tl.max(tl.load(peaks + program, mask=program < programs, other=0.0), 0)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.where((power > 0) & (power < float("inf")), power, 1.0)
        tl.store(unit, power / weight_scale)


@triton.jit
def _gradient_of_rows(rows, power, factor, gradient):
    """The part orthogonal to unit rows, for the rows they were made of: equation (7)."""
    along = tl.sum(gradient.to(tl.float64) * rows, 1)
    square = tl.sum(rows.to(tl.float64) * rows, 1)
    projection = (along / tl.where(square > 0, square, 1.0)).to(tl.float32)
    return (gradient - rows * projection[:, None]) * factor[:, None] / power[:, None]


@triton.jit(do_not_specialize=["n", "n_columns", "slots"])
def pair_finish_kernel(
    first, first_row_stride, first_column_stride, second, second_row_stride, second_column_stride,
    partial, slope, incoming, unit, first_gradient, second_gradient, n, n_columns, slots,
    root_high, root_low, unit_scale, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of both views from partial gradients of their unit rows, and from their pairs."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = index < n
    columns = tl.arange(0, DEPTH)
    z = _load_rows(first, index, first_row_stride, first_column_stride, n, n_columns, DEPTH)
    first_rows, first_power, first_factor = _unit_rows(z, root_high, root_low)
    z = _load_rows(second, index, second_row_stride, second_column_stride, n, n_columns, DEPTH)
    second_rows, second_power, second_factor = _unit_rows(z, root_high, root_low)
    first_sum = tl.zeros([ROWS, DEPTH], tl.float32)
    second_sum = tl.zeros([ROWS, DEPTH], tl.float32)
    n_wide = tl.cast(n, tl.int64)
    for slot in range(0, slots):
        places = (2 * slot * n_wide + index)[:, None] * DEPTH + columns[None, :]
        first_sum += tl.load(partial + places, mask=there[:, None], other=0.0)
        places += n_wide * DEPTH
        second_sum += tl.load(partial + places, mask=there[:, None], other=0.0)
    factor = tl.load(unit) * unit_scale
    pull = tl.load(slope + index, mask=there, other=0.0)
    pull += tl.load(slope + n + index, mask=there, other=0.0)
    first_sum = first_sum * factor - second_rows * pull[:, None]
    second_sum = second_sum * factor - first_rows * pull[:, None]
    first_sum = _gradient_of_rows(first_rows, first_power, first_factor, first_sum)
    second_sum = _gradient_of_rows(second_rows, second_power, second_factor, second_sum)
    scale = tl.load(incoming).to(tl.float32) / (2 * n)
    kept = there[:, None] & (columns < n_columns)[None, :]
    places = index.to(tl.int64)[:, None] * n_columns + columns[None, :]
    kind = first_gradient.dtype.element_ty
    tl.store(first_gradient + places, (first_sum * scale).to(kind), mask=kept)
    tl.store(second_gradient + places, (second_sum * scale).to(kind), mask=kept)
