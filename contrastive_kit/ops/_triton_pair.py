"""The mean NT-Xent of two views on a GPU in five launches, the host's part.

Three forward: unit rows and the logits of pairs; partial sums; the loss. Two backward: partial
gradients; those of the views. Beside the kernels of ``_triton.py`` it has three of its own.
"""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kit.ops import _triton_tiles as tiles
from contrastive_kit.ops._triton import (
    FINISH_ELEMENTS,
    PADDING,
    SLOTS,
    SMALL,
    WIDTH,
    Direction,
    Operands,
    Side,
    Sides,
    architecture_of,
    ceil_div,
    chunks_of,
    needs_shift,
    on_device,
    operands_for,
    partial_gradients,
)

# Rows up to which launches take longer than their work; all partial sums then fit at once.
LARGEST_PAIRED = 2**14


class PairLoss(NamedTuple):
    """The mean NT-Xent of two views and what its backward needs.

    Attributes:
        loss: a scalar.
        packed: the unit rows of both views, (padded 2N, depth).
        state: slope, scale and level of each anchor, (3, 2N).
        unit: what the scales are divided by, (1,).
    """

    loss: Tensor
    packed: Tensor
    state: Tensor
    unit: Tensor


def pair_shapes(n: int, width: int, operands: str) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of ``PairLoss.packed``."""
    half = operands in ("bfloat16", "float16")
    dtype = getattr(torch, operands) if half else torch.float32
    return (
        ceil_div(2 * n, PADDING) * PADDING,
        tiles.packed_depth(width),
    ), dtype


def takes_pairs(n: int, width: int, operands: str) -> bool:
    """Whether ``pair_forward`` does: where launches count, and gradients of a row block fit."""
    widest = {"bfloat16": 256, "float16": 256, "tf32": 0 if torch.version.hip else 128}
    return 2 * n <= LARGEST_PAIRED and width <= widest.get(operands, 0)


def pair_forward(z1: Tensor, z2: Tensor, temperature: float, operands: str) -> PairLoss:
    """Mean NT-Xent of views (N, D) in three launches."""
    from contrastive_kit.ops import _triton_kernels as kernels

    n, width = z1.shape
    m, kind = 2 * n, operands_for(operands, z1.device)
    (padded, depth), dtype = pair_shapes(n, width, operands)

    def floats(*shape: int) -> Tensor:
        return z1.new_empty(shape, dtype=torch.float32)

    packed = z1.new_empty(padded, depth, dtype=dtype)
    loss, state, unit = floats(), floats(3, m), floats(1)
    positive, arrived = floats(n), z1.new_empty(1, dtype=torch.int32)
    shifted = needs_shift(_bound(temperature))
    with on_device(z1.device):
        height = max(1, FINISH_ELEMENTS // depth)
        kernels.pair_prepare_kernel[(ceil_div(max(n, padded - m), height),)](
            z1, *z1.stride(), z2, *z2.stride(), packed, positive, arrived, n, width,
            *_root_scale(temperature), kind.scale, padded, ROWS=height, DEPTH=depth, **SMALL,
        )  # fmt: skip
        sides = _pair_sides(packed, n, kind)
        tile = tiles.forward(*sides.key(), False)
        blocks = ceil_div(m, tile.rows)
        chunk, row_slots = chunks_of(tile, m, m, True, z1.device)
        fields = 2 if shifted else 1
        row_partial, column_partial = floats(fields, row_slots, m), floats(fields, blocks, m)
        kernels.forward_kernel[(blocks, row_slots)](
            *sides.pointers(), row_partial, column_partial, *sides.rule(), 0, chunk, row_slots,
            blocks, SYMMETRIC=True, BY_COLUMN=True, SHIFTED=shifted, STATISTICS=False,
            STEP=tile.slice_of(depth), **sides.constants(), **tile.options(),
        )  # fmt: skip
        programs = ceil_div(m, WIDTH)
        sums = z1.new_empty(programs, dtype=torch.float64)
        kernels.pair_loss_kernel[(programs,)](
            row_partial, column_partial, positive, *state, sums,
            floats(programs), arrived, loss, unit, m, blocks, chunk, row_slots, programs,
            kind.weight_scale, SHIFTED=shifted, ROWS=tile.rows, COLUMNS=tile.columns,
            SLOTS=SLOTS, WIDTH=WIDTH, PROGRAMS=max(256, 1 << (programs - 1).bit_length()),
            **SMALL,
        )  # fmt: skip
    return PairLoss(loss, packed, state, unit)


def pair_backward(
    grad: Tensor,
    z1: Tensor,
    z2: Tensor,
    packed: Tensor,
    state: Tensor,
    unit: Tensor,
    temperature: float,
    operands: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of both views, in two launches."""
    from contrastive_kit.ops import _triton_kernels as kernels

    n, width = z1.shape
    kind, depth = operands_for(operands, z1.device), packed.shape[1]
    dz1, dz2 = z1.new_empty(n, width), z2.new_empty(n, width)
    slope, scale, level = state
    with on_device(z1.device):
        sides = _pair_sides(packed, n, kind)
        tile = tiles.backward(*sides.key())
        assert tile is not None
        shifted = needs_shift(_bound(temperature))
        direction = Direction(sides, shifted, scale, level, scale, level, True, True)
        partial = partial_gradients(direction, tile, unit, True)
        height = max(1, FINISH_ELEMENTS // (2 * depth))
        kernels.pair_finish_kernel[(ceil_div(n, height),)](
            z1, *z1.stride(), z2, *z2.stride(), partial, slope, grad, unit, dz1, dz2, n, width,
            len(partial), *_root_scale(temperature), 1 / kind.scale, ROWS=height, DEPTH=depth,
            **SMALL,
        )  # fmt: skip
    return dz1, dz2


def _pair_sides(packed: Tensor, n: int, kind: Operands) -> Sides:
    side = Side(packed, 2 * n, None)
    return Sides(side, side, kind, architecture_of(packed.device), n)


def _root_scale(temperature: float) -> tuple[float, float]:
    """temperature**-0.5 as two floats of single precision, which is all a kernel is given."""
    exact = float(temperature) ** -0.5
    high = struct.unpack("f", struct.pack("f", exact))[0]
    return high, exact - high


def _bound(temperature: float) -> float:
    """What no logit of unit rows exceeds, rounded as they are."""
    return 1.001 / temperature
