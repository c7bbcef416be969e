"""Backend ``triton``: the primitive in fused kernels, the host's part.

A GPU never holds the logits: the forward keeps partial sums, the backward recomputes each tile.
Kernels and their comments are in ``_triton_kernels.py``, imported at the first launch. Nothing here
waits for the GPU or depends on a value it holds, so all of it can be captured in a CUDA graph.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_kit.ops import _triton_tiles as tiles
from contrastive_kit.ops._exclusion import Exclusion

# Triton then runs kernels on the CPU, for tests; it reads this when it is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_OLDEST_TRITON = (3, 5)
_OLDEST_CAPABILITY = (8, 0)

# While every |logit| is at most this, sums of exp neither overflow nor lose a row to underflow,
# and the running maximum of a stable logsumexp is not needed.
_LARGEST_UNSHIFTED_LOGIT = 69.0

_LOG2E = math.log2(math.e)

# Packed rows come in whole tiles of any size in the table.
PADDING = 256

# Bytes of partial sums of a forward, partial gradients of a backward, and weights of a strip.
_PANEL_BYTES = 2**26
_PARTIAL_BYTES = 2**27
_STRIP_BYTES = 2**28
# A strip's product is added to the whole gradient; less high, that traffic would dominate.
_STRIP_ROWS = 2048

# Sizes of the small kernels and how they run.
_PACK_ELEMENTS, FINISH_ELEMENTS = 2048, 2048
SLOTS, WIDTH, _BLOCK = 32, 64, 1024
SMALL: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}

# Programs for each multiprocessor that even out unequal work; and tiles of one forward program.
_WAVES = 8
_LONGEST_CHUNK = 64


def refusal(q: Tensor, k: Tensor | None) -> str | None:
    """Why this backend cannot run on these tensors, or None if it can."""
    if q.device.type != "cuda" and not _INTERPRETED:
        return f"it needs tensors on a CUDA device, got {q.device}"
    if q.dtype == torch.float64 or (k is not None and k.dtype == torch.float64):
        return "it computes in float32 at most, got float64"
    if _MISSING is not None:
        return _MISSING
    if q.device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(q.device)
        if (properties.major, properties.minor) < _OLDEST_CAPABILITY:
            capability = f"{properties.major}.{properties.minor}"
            return f"it needs compute capability 8.0 or higher, {properties.name} has {capability}"
    return None


def _missing(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return "it needs the package triton, which is not installed"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # a build under another name, such as those for AMD
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"it needs triton 3.5 or later, version {version} is installed"
    return None


_MISSING = _missing("triton")


# float32 as exact as its arithmetic, or rounded on its way into the products.
OPERANDS = ("float32", "tf32", "bfloat16", "float16")


class Operands(NamedTuple):
    """What tensor cores multiply: dtype, the precision of their float32, and the scale of rows."""

    dtype: torch.dtype
    precision: str
    scale: float

    @property
    def weight_scale(self) -> float:
        """Keeps weights of about 1 / N² out of the subnormal numbers of float16."""
        return 2.0**13 if self.dtype == torch.float16 else 1.0


class Kernels:
    """The primitive with one way of multiplying, as the registered ops call it.

    Args:
        operands: What tensor cores multiply, a name in ``OPERANDS``.
    """

    def __init__(self, operands: str) -> None:
        self.operands = operands

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        exclusion: Exclusion,
        both: bool,
        bound: float,
        statistics: bool,
        saved_tiles: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logsumexp of rows (and columns if ``both``), what rounding lost of it, statistics.

        Nothing is put into ``saved_tiles``: tensor cores multiply faster than memory is read.
        """
        both = both and k is not None
        length = len(q) + (len(k) if both and k is not None else 0)
        lse, lost = q.new_empty(length), q.new_empty(length)
        stats = q.new_empty((4, length) if statistics else 0)
        if length > 0:
            with on_device(q.device):
                _forward(
                    _sides(q, k, exclusion, operands_for(self.operands, q.device)),
                    k is None,
                    both,
                    statistics or needs_shift(bound),
                    lse,
                    lost,
                    stats,
                )
        return lse, lost, stats

    def backward(
        self,
        grad: Tensor,
        lse: Tensor,
        lost: Tensor,
        saved_tiles: Tensor,
        q: Tensor,
        k: Tensor | None,
        exclusion: Exclusion,
        both: bool,
        bound: float,
        needs_grad: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``q`` and ``k``, equation (5); an empty tensor for the one not needed."""
        needs_q, needs_k = needs_grad[0], needs_grad[1] and k is not None
        dq = q.new_empty(q.shape if needs_q else 0)
        dk = q.new_empty(k.shape if k is not None and needs_k else 0)
        if len(lse) > 0 and (needs_q or needs_k):
            with on_device(q.device):
                sides = _sides(q, k, exclusion, operands_for(self.operands, q.device))
                forth, unit = _scales(sides, k is None, both, needs_shift(bound), grad, lse, lost)
                tile = tiles.backward(*sides.key())
                if tile is None:
                    _strips(forth, dq, dk, unit, k is None)
                else:
                    if needs_q:
                        _fused(forth, tile, unit, dq)
                    if needs_k:
                        _fused(forth.back(), tile, unit, dk)
        return dq, dk


class Side(NamedTuple):
    """Rows or columns of the logits: packed, and the ids that exclude."""

    packed: Tensor
    n: int
    ids: Tensor | None


class Sides(NamedTuple):
    """Both sides of the logits and which pairs are left out."""

    rows: Side
    columns: Side
    kind: Operands
    architecture: str
    period: int

    @property
    def depth(self) -> int:
        """Width of the packed rows."""
        return self.rows.packed.shape[1]

    def key(self) -> tuple[str, torch.dtype, str, int]:
        """Where to look in the table of tiles."""
        return self.architecture, self.kind.dtype, self.kind.precision, self.depth

    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The matrices and the ids, which are not looked at where there are none."""
        rows, columns = self.rows, self.columns
        if rows.ids is None or columns.ids is None:
            return rows.packed, columns.packed, rows.packed, columns.packed
        return rows.packed, columns.packed, rows.ids, columns.ids

    def rule(self) -> tuple[int, int, int, int]:
        """Numbers of rows and columns, the period, and a multiple of it beyond all rows."""
        period = max(self.period, 1)
        lift = ceil_div(self.rows.n + PADDING, period) * period
        return self.rows.n, self.columns.n, period, lift

    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        by_ids = self.rows.ids is not None
        return {
            "RULE": 2 if by_ids else 1 if self.period > 0 else 0,
            "SCALE_LOGITS": self.kind.scale == 1,
            "DEPTH": self.depth,
            "PRECISION": self.kind.precision,
        }


def _sides(q: Tensor, k: Tensor | None, exclusion: Exclusion, kind: Operands) -> Sides:
    period, row_ids, column_ids = exclusion
    row_ids = None if row_ids is None else row_ids.contiguous()
    rows = columns = Side(_pack(q, kind), len(q), row_ids)
    if k is not None:
        column_ids = row_ids if column_ids is None else column_ids.contiguous()
        columns = Side(_pack(k, kind), len(k), column_ids)
    return Sides(rows, columns, kind, architecture_of(q.device), period)


def _pack(x: Tensor, kind: Operands) -> Tensor:
    """Contiguous, padded, scaled and rounded, as the kernels read it."""
    from contrastive_kit.ops import _triton_kernels as kernels

    n, width = x.shape
    depth = tiles.packed_depth(width)
    padded = ceil_div(n, PADDING) * PADDING
    if (padded, depth) == (n, width) and x.dtype == kind.dtype and x.is_contiguous():
        return x
    packed = x.new_empty(padded, depth, dtype=kind.dtype)
    block = math.gcd(depth, 256)
    height = _PACK_ELEMENTS // block
    kernels.pack_kernel[(padded // height, depth // block)](
        x, *x.stride(), packed, n, width, kind.scale,
        ROWS=height, COLUMNS=block, DEPTH=depth, **SMALL,
    )  # fmt: skip
    return packed


def _forward(
    sides: Sides,
    symmetric: bool,
    both: bool,
    shifted: bool,
    lse: Tensor,
    lost: Tensor,
    stats: Tensor,
) -> None:
    """Partial sums, panel of row blocks by panel, each merged into the result."""
    from contrastive_kit.ops import _triton_kernels as kernels

    n_rows, n_columns = sides.rows.n, sides.columns.n
    length, statistics, by_column = len(lse), len(stats) > 0, symmetric or both
    tile = tiles.forward(*sides.key(), statistics)
    blocks = ceil_div(n_rows, tile.rows)
    chunk, row_slots = chunks_of(tile, n_rows, n_columns, symmetric, lse.device)
    fields = 5 if statistics else 2 if shifted else 1
    panel = blocks
    if by_column:
        panel = ceil_div(
            blocks, min(ceil_div(blocks * fields * n_columns * 4, _PANEL_BYTES), blocks)
        )
    row_partial = lse.new_empty(fields, row_slots, n_rows)
    column_partial = lse.new_empty(fields, panel if by_column else 0, n_columns)
    running = lse.new_empty((5, length) if panel < blocks else 0, dtype=torch.float64)
    # Offset, size, whether partial sums by row count, and those by column.
    results = [(0, n_rows, True, symmetric)]
    if both:
        results.append((n_rows, n_columns, False, True))
    options = {"SYMMETRIC": symmetric, "SHIFTED": shifted, "STATISTICS": statistics}
    for first in range(0, blocks, panel):
        height = min(panel, blocks - first)
        kernels.forward_kernel[(height, row_slots)](
            *sides.pointers(), row_partial, column_partial, *sides.rule(), first, chunk, row_slots,
            panel, BY_COLUMN=by_column, STEP=tile.slice_of(sides.depth), **options,
            **sides.constants(), **tile.options(),
        )  # fmt: skip
        for offset, n, by_row, mirrored in results:
            kernels.reduce_kernel[(ceil_div(n, WIDTH),)](
                row_partial, column_partial, running, lse, lost, stats, n, length, offset, first,
                height, chunk, row_slots, panel, BY_ROW=by_row, BY_COLUMN=mirrored,
                FIRST=first == 0, LAST=first + height == blocks, ROWS=tile.rows,
                COLUMNS=tile.columns, SLOTS=SLOTS, WIDTH=WIDTH, **options, **SMALL,
            )  # fmt: skip


def chunks_of(
    tile: tiles.Tile, n_rows: int, n_columns: int, symmetric: bool, device: torch.device
) -> tuple[int, int]:
    """How many tiles of a row block a program of the forward takes, and how many programs."""
    blocks, across = ceil_div(n_rows, tile.rows), ceil_div(n_columns, tile.columns)
    n_tiles = ceil_div(blocks * across, 2 if symmetric else 1)
    chunk = min(ceil_div(n_tiles, _WAVES * _processors(device)), _LONGEST_CHUNK, across)
    return chunk, ceil_div(across, chunk)


class Direction(NamedTuple):
    """Whose gradient, from whom, and what scales the weights of equation (5) on both sides."""

    sides: Sides
    shifted: bool
    row_scale: Tensor
    row_level: Tensor
    column_scale: Tensor
    column_level: Tensor
    from_rows: bool
    from_columns: bool

    def back(self) -> "Direction":
        """Rows and columns exchanged."""
        sides = self.sides._replace(rows=self.sides.columns, columns=self.sides.rows)
        scales = (self.column_scale, self.column_level, self.row_scale, self.row_level)
        return Direction(sides, self.shifted, *scales, self.from_columns, self.from_rows)

    def pointers(self) -> tuple[Tensor, ...]:
        """What the kernels read."""
        packed_and_ids = self.sides.pointers()
        scales = (self.row_scale, self.row_level, self.column_scale, self.column_level)
        return *packed_and_ids[:2], *scales, *packed_and_ids[2:]

    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        return {
            "FROM_ROWS": self.from_rows,
            "FROM_COLUMNS": self.from_columns,
            "SHIFTED": self.shifted,
            **self.sides.constants(),
        }


def _scales(
    sides: Sides,
    symmetric: bool,
    both: bool,
    shifted: bool,
    grad: Tensor,
    lse: Tensor,
    lost: Tensor,
) -> tuple[Direction, Tensor]:
    """The scales of the weights, and what their gradients are multiplied by at the end."""
    from contrastive_kit.ops import _triton_kernels as kernels

    length, kind = len(lse), sides.kind
    scale, unit = torch.empty_like(lse), lse.new_empty(1)
    level = lse.new_empty(length if shifted else 0)
    kernels.scale_kernel[(ceil_div(length, _BLOCK),)](
        grad, grad.stride(0), lse, lost, torch.linalg.vector_norm(grad, math.inf), scale, level,
        unit, length, kind.weight_scale, 1 / (kind.weight_scale * kind.scale),
        SHIFTED=shifted, BLOCK=_BLOCK, **SMALL,
    )  # fmt: skip
    if symmetric:
        return Direction(sides, shifted, scale, level, scale, level, True, True), unit
    n = sides.rows.n
    scales = (scale[:n], level[:n], scale[n:], level[n:])
    return Direction(sides, shifted, *scales, True, both), unit


def _fused(direction: Direction, tile: tiles.Tile, unit: Tensor, gradient: Tensor) -> None:
    """The gradient of the rows, the weights never leaving the chip."""
    from contrastive_kit.ops import _triton_kernels as kernels

    sides = direction.sides
    n_rows, depth = sides.rows.n, sides.depth
    partial = partial_gradients(direction, tile, unit, False)
    height = FINISH_ELEMENTS // depth
    kernels.finish_kernel[(ceil_div(n_rows, height),)](
        partial, unit, gradient, n_rows, gradient.shape[1], len(partial),
        ROWS=height, DEPTH=depth, **SMALL,
    )  # fmt: skip


def partial_gradients(
    direction: Direction, tile: tiles.Tile, unit: Tensor, deferred: bool
) -> Tensor:
    """Gradients of the rows by chunk of columns, (chunks, R, depth)."""
    from contrastive_kit.ops import _triton_kernels as kernels

    sides = direction.sides
    n_rows, depth = sides.rows.n, sides.depth
    blocks, across = ceil_div(n_rows, tile.rows), ceil_div(sides.columns.n, tile.columns)
    slots = min(
        ceil_div(_WAVES * _processors(unit.device), blocks),
        max(1, _PARTIAL_BYTES // (n_rows * depth * 4)),
        across,
    )
    chunk = ceil_div(across, slots)
    slots = ceil_div(across, chunk)
    partial = unit.new_empty(slots, n_rows, depth)
    kernels.backward_kernel[(blocks, slots)](
        *direction.pointers(), unit, partial, *sides.rule(), chunk,
        DEFERRED=deferred, **direction.constants(), **tile.options(),
    )  # fmt: skip
    return partial


def _strips(direction: Direction, dq: Tensor, dk: Tensor, unit: Tensor, symmetric: bool) -> None:
    """Gradients from strips of stored weights, which the vendor's library multiplies.

    With ``symmetric`` a strip begins at its own diagonal block, and what is right of that block
    counts for both of its sides.
    """
    from contrastive_kit.ops import _triton_kernels as kernels

    sides = direction.sides
    (rows, n_rows, _), (columns, n_columns, _) = sides.rows, sides.columns
    tile = tiles.weights(*sides.key())
    whole = math.lcm(tile.rows, tile.columns)
    padded = ceil_div(n_columns, whole) * whole
    height = min(_STRIP_ROWS, _STRIP_BYTES // (padded * rows.element_size()), n_rows)
    height = ceil_div(max(height, 1), whole) * whole
    buffer = rows.new_empty(height * padded)
    mirrored = dq if symmetric else dk
    width = max(dq.shape[-1], dk.shape[-1])
    for gradient in (dq, dk):
        gradient.zero_()
    for top in range(0, n_rows, height):
        bottom = min(top + height, n_rows)
        left = top if symmetric else 0
        stride = padded - left
        kernels.weights_kernel[(ceil_div(bottom - top, tile.rows), stride // tile.columns)](
            *direction.pointers(), buffer, stride, top, left, *sides.rule(),
            STEP=tile.slice_of(sides.depth), **direction.constants(), **tile.options(),
        )  # fmt: skip
        strip = buffer[: height * stride].view(height, stride)
        strip = strip[: bottom - top, : n_columns - left]
        if dq.ndim == 2:
            _add_product(dq[top:bottom], strip, columns[left:n_columns, :width])
        right = bottom if symmetric else 0
        if mirrored.ndim == 2 and right < n_columns:
            _add_product(mirrored[right:], strip[:, right - left :].T, rows[top:bottom, :width])
    for gradient in (dq, dk):
        gradient.mul_(unit)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in float32, whatever the dtype of the factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda" and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def operands_for(name: str, device: torch.device) -> Operands:
    if name in ("bfloat16", "float16"):
        return Operands(getattr(torch, name), "ieee", math.sqrt(_LOG2E))
    # float32 is multiplied as three products of its parts, as exact as float32 arithmetic.
    precision = "ieee" if torch.version.hip else "tf32" if name == "tf32" else "tf32x3"
    return Operands(torch.float32, precision, 1.0)


def needs_shift(bound: float) -> bool:
    return not bound <= _LARGEST_UNSHIFTED_LOGIT


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture_of(device: torch.device) -> str:
    if device.type != "cuda":
        return tiles.INTERPRETED
    if torch.version.hip:
        return "hip"
    properties = torch.cuda.get_device_properties(device)
    return tiles.architecture(properties.major, properties.minor)
