"""Backend ``tiled``: the logits one tile at a time, in plain torch.

Any device, float32 and float64; the memory beyond the results is a few tiles, whatever N is. With
one matrix (``k`` None) the logits are symmetric, and only tiles on and above the diagonal are
computed: an entry (i, j) right of its row block also serves as (j, i). Equation numbers are those
of ``docs/nt_xent.md``.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kit.ops._exclusion import Exclusion
from contrastive_kit.ops._statistics import merge_statistics, row_statistics
from contrastive_kit.ops._unit_rows import accumulator_dtype

# Rows, and columns, of a tile. On a CPU a float32 tile is 1 MiB, and stays in cache with what is
# computed from it; on an accelerator tiles are large so that launches do not dominate.
_CPU_TILE = 512
_ACCELERATOR_TILE = 4096

# Unused numbers between the rows of a tile. Rows a power of two apart fall on few sets of the
# cache, and a product with the transposed tile takes a sixth longer.
_PADDING = 16

# While every |logit| is at most this, sums of exp neither overflow nor lose a row to underflow,
# and the running maximum of a stable logsumexp is not needed.
_LARGEST_UNSHIFTED_LOGIT = {torch.float32: 69.0, torch.float64: 600.0}

# exp(x) = exp2(x · log2 e). On x86 torch takes exp from MKL, which needs 3.6 times as long on a
# processor of AMD as torch's own exp2. But a logit in bits is a larger number, and is rounded once
# more: above this largest |logit| that would show in the gradient.
_BITS_PER_NAT = math.log2(math.e)
_LARGEST_LOGIT_IN_BITS = 32.0


# Pieces of a tensor, one for each block of rows, or of columns, of the tiles.
Blocks = tuple[Tensor, ...]


class Tile(NamedTuple):
    """Where a tile is: its blocks of rows and of columns, and its corner."""

    row: int
    column: int
    top: int
    left: int
    mirrored: bool  # it also counts transposed: below the diagonal, or in the other direction


def forward(
    q: Tensor, k: Tensor | None, exclusion: Exclusion, both: bool, bound: float, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexp of rows (and columns if ``both``), what its rounding lost, and its statistics.

    A logsumexp of 100 in float32 is uncertain by 4e-6, and so would be the scale of the whole row
    in the backward. Sums are therefore kept in double precision, and the part of the logsumexp
    that float32 cannot hold comes back as the second result. Statistics are empty if not wanted.
    """
    length = len(q) + (len(k) if both and k is not None else 0)
    bound = torch.inf if statistics else _largest_logit(q, k, bound)
    if _needs_shift(q, bound):
        lse, stats = _forward_shifted(q, k, exclusion, both, length, statistics)
    else:
        lse = _forward_unshifted(q, k, exclusion, both, length, bound)
        stats = q.new_empty(0)
    rounded = lse.to(q.dtype)
    lost = torch.where(rounded.isinf(), 0, lse - rounded).to(q.dtype)
    return rounded, lost, stats


def _forward_unshifted(
    q: Tensor, k: Tensor | None, exclusion: Exclusion, both: bool, length: int, bound: float
) -> Tensor:
    sums = q.new_zeros(length, dtype=accumulator_dtype(q))
    row_sums, column_sums = _row_and_column_blocks(sums, q, k, both)
    for tile, exps in _exp_tiles(q, k, exclusion, bound):
        row_sums[tile.row].add_(exps.sum(1))
        if column_sums is not None and tile.mirrored:
            column_sums[tile.column].add_(exps.sum(0))
    return sums.log_()


def _forward_shifted(
    q: Tensor, k: Tensor | None, exclusion: Exclusion, both: bool, length: int, statistics: bool
) -> tuple[Tensor, Tensor]:
    lse = q.new_full((length,), -torch.inf, dtype=accumulator_dtype(q))
    stats = q.new_zeros(4 if statistics else 0, length)
    stats[:1] = -torch.inf
    row_lse, column_lse = _row_and_column_blocks(lse, q, k, both)
    row_stats, column_stats = _row_and_column_blocks(stats, q, k, both)

    def merge(lse: Tensor, stats: Tensor, logits: Tensor, dim: int) -> None:
        peak = logits.amax(dim)
        shift = peak.masked_fill(peak == -torch.inf, 0)
        sums = _exp_(logits - shift.unsqueeze(dim)).sum(dim)
        tile_lse = shift.to(lse.dtype) + sums.to(lse.dtype).log()
        merged = torch.logaddexp(lse, tile_lse)
        if statistics:
            tile_stats = row_statistics(logits, tile_lse.to(q.dtype), dim)
            stats.copy_(merge_statistics(merged, stats, lse, tile_stats, tile_lse))
        lse.copy_(merged)

    for tile, logits in logit_tiles(q, k):
        exclusion.fill_(logits, -torch.inf, tile.top, tile.left)
        merge(row_lse[tile.row], row_stats[tile.row], logits, 1)
        if column_lse is not None and column_stats is not None and tile.mirrored:
            merge(column_lse[tile.column], column_stats[tile.column], logits, 0)
    return lse, stats if statistics else q.new_empty(0)


def backward(
    grad: Tensor,
    lse: Tensor,
    lost: Tensor,
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    both: bool,
    bound: float,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of ``q`` and ``k``, equation (5); an empty tensor for the one not needed."""
    dq = q.new_zeros(q.shape) if needs_grad[0] else q.new_empty(0)
    dk = k.new_zeros(k.shape) if k is not None and needs_grad[1] else q.new_empty(0)
    # An empty row has logsumexp -inf and no gradient; +inf makes its weights exp(-inf) = 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    bound = _largest_logit(q, k, bound)
    shifted = _needs_shift(q, bound)
    # exp(logit - lse - lost) · grad, with as much of the exponent as is safe taken out of the tile
    outside = -lost.to(accumulator_dtype(q))
    # Relative to the largest, or a small incoming gradient would leave the range of float32.
    unit = power_of_two(grad.abs().amax())
    scale = (grad / unit * (outside if shifted else outside - lse).exp()).to(q.dtype)
    scales = _row_and_column_blocks(scale, q, k, both)
    if shifted:
        lse_blocks = _row_and_column_blocks(lse, q, k, both)
        weight_tiles = _weight_tiles_shifted(q, k, exclusion, lse_blocks, scales)
    else:
        weight_tiles = _weight_tiles_unshifted(q, k, exclusion, scales, bound)
    rows, drows = blocks(q), blocks(dq)
    columns, dcolumns = (rows, drows) if k is None else (blocks(k), blocks(dk))
    for tile, weights in weight_tiles:
        if needs_grad[0]:
            drows[tile.row].addmm_(weights, columns[tile.column])
        if tile.mirrored and (k is None or needs_grad[1]):
            dcolumns[tile.column].addmm_(weights.T, rows[tile.row])
    return dq.mul_(unit), dk.mul_(unit)


def _weight_tiles_unshifted(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    scales: tuple[Blocks, Blocks | None],
    bound: float,
) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with the weights of equation (5), both directions summed."""
    row_scale, column_scale = scales
    scratch: Tensor | None = None
    for tile, exps in _exp_tiles(q, k, exclusion, bound):
        scale = row_scale[tile.row].unsqueeze(1)
        if column_scale is not None:
            if scratch is None:  # the first tile is the largest
                scratch = exps.new_empty(exps.numel())
            both_scales = scratch[: exps.numel()].view(exps.shape)
            scale = torch.add(scale, column_scale[tile.column], out=both_scales)
        yield tile, exps.mul_(scale)


def _weight_tiles_shifted(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    lse: tuple[Blocks, Blocks | None],
    scales: tuple[Blocks, Blocks | None],
) -> Iterator[tuple[Tile, Tensor]]:
    """The same where exp of a logit may overflow."""
    (row_lse, column_lse), (row_scale, column_scale) = lse, scales
    for tile, logits in logit_tiles(q, k):
        exclusion.fill_(logits, -torch.inf, tile.top, tile.left)
        weights = _exp_(logits - row_lse[tile.row].unsqueeze(1))
        weights.mul_(row_scale[tile.row].unsqueeze(1))
        if column_lse is not None and column_scale is not None:
            _exp_(logits.sub_(column_lse[tile.column]))
            weights.addcmul_(logits, column_scale[tile.column])
        yield tile, weights


def power_of_two(x: Tensor) -> Tensor:
    """The power of two just above ``x``, so that dividing and multiplying by it are exact."""
    power = x / torch.frexp(x).mantissa
    return torch.where((x > 0) & (x < torch.inf), power, 1)


def _largest_logit(q: Tensor, k: Tensor | None, bound: float) -> float:
    """What no |logit| exceeds: ``bound``, or where that is of no use, by the lengths of rows."""
    if bound <= _LARGEST_UNSHIFTED_LOGIT[q.dtype]:
        return bound
    if 0 in (len(q), len(q if k is None else k)):
        return 0.0
    if q.device.type != "cpu":
        return torch.inf  # reading the norms would wait for the device
    longest = torch.linalg.vector_norm(q, dim=1).amax()
    longest_key = longest if k is None else torch.linalg.vector_norm(k, dim=1).amax()
    return float(longest * longest_key)


def _needs_shift(q: Tensor, bound: float) -> bool:
    return not bound <= _LARGEST_UNSHIFTED_LOGIT[q.dtype]  # NaN does


def _exp_tiles(
    q: Tensor, k: Tensor | None, exclusion: Exclusion, bound: float
) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with the exp of its logits, 0 where excluded."""
    in_bits = bound <= _LARGEST_LOGIT_IN_BITS
    for tile, logits in logit_tiles(q, k, _BITS_PER_NAT if in_bits else 1.0):
        exps = logits.exp2_() if in_bits else logits.exp_()
        exclusion.fill_(exps, 0.0, tile.top, tile.left)
        yield tile, exps


def _exp_(x: Tensor) -> Tensor:
    return x.mul_(_BITS_PER_NAT).exp2_()


def logit_tiles(q: Tensor, k: Tensor | None, unit: float = 1.0) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with its logits times ``unit``, in one buffer that the next tile overwrites."""
    keys = q if k is None else k
    if 0 in (len(q), len(keys)):
        return
    size = _tile_size(q)
    rows = blocks(q)
    columns = [block.T for block in (rows if k is None else blocks(k))]
    buffer = q.new_empty(min(size, len(q)), min(size, len(keys)) + _PADDING)
    whole = buffer[:, :-_PADDING]
    for i, row in enumerate(rows):
        # Scaling the rows costs nothing next to scaling the product.
        scaled = row if unit == 1.0 else row * unit
        for j in range(i if k is None else 0, len(columns)):
            shape = len(row), columns[j].shape[1]
            logits = whole if shape == whole.shape else buffer[: shape[0], : shape[1]]
            torch.mm(scaled, columns[j], out=logits)
            yield Tile(i, j, i * size, j * size, k is not None or i < j), logits


def blocks(x: Tensor, dim: int = 0) -> Blocks:
    """``x`` cut along ``dim`` as the tiles cut its rows or columns."""
    pieces: Blocks = torch.split(x, _tile_size(x), dim)
    return pieces


def _tile_size(x: Tensor) -> int:
    return _CPU_TILE if x.device.type == "cpu" else _ACCELERATOR_TILE


def _row_and_column_blocks(
    x: Tensor, q: Tensor, k: Tensor | None, both: bool
) -> tuple[Blocks, Blocks | None]:
    """The blocks of ``x`` (..., R or R + C) for rows and for columns, None if not wanted."""
    rows = blocks(x[..., : len(q)], -1)
    if k is None:
        return rows, rows
    return rows, blocks(x[..., len(q) :], -1) if both else None
