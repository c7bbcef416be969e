"""Backend ``tiled``: the logits one tile at a time, in plain torch.

Any device, float32 and float64; the memory beyond the results is a few tiles, whatever N is. With
one matrix (``k`` None) the logits are symmetric, and only tiles on and above the diagonal are
computed: an entry (i, j) right of its row block also serves as (j, i). Equation numbers are those
of ``docs/nt_xent.md``.
"""

import math
from collections.abc import Iterator
from itertools import chain, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kit.ops._exclusion import Exclusion
from contrastive_kit.ops._statistics import merge_statistics, row_statistics
from contrastive_kit.ops._unit_rows import accumulator_dtype

# Rows, and columns, of a tile. On a CPU a float32 tile stays in cache with what is computed of it,
# and a power of two from 2048 up is cut almost evenly; on an accelerator tiles are large so that
# launches do not dominate.
_CPU_TILE = 688
_ACCELERATOR_TILE = 4096

# Bytes of tiles that the forward leaves to the backward, which then need not compute them again:
# a third of the time up to 1024 pairs. Larger blocks glibc would fetch from the system each time.
_CPU_SAVED_BYTES = 2**25

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
    known: bool  # it holds what the forward left in it


def new_tiles(q: Tensor, k: Tensor | None) -> Tensor:
    """Room for the tiles that the forward may leave to the backward; also for symbolic sizes."""
    size = _tile_size(q)
    n_blocks = (q.shape[0] + size - 1) // size
    if k is None:
        n_tiles = n_blocks * (n_blocks + 1) // 2
    else:
        n_tiles = n_blocks * ((k.shape[0] + size - 1) // size)
    tile_bytes = size * (size + _PADDING) * q.element_size()
    n_saved = _CPU_SAVED_BYTES // tile_bytes if q.device.type == "cpu" else 0
    return _empty_tiles(torch.sym_min(n_tiles, n_saved), q, k)


def forward(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    both: bool,
    bound: float,
    statistics: bool,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexp of rows (and columns if ``both``), what its rounding lost, and its statistics.

    The first tiles are left in ``saved``: their exp where no logit is large, else their logits.

    A logsumexp of 100 in float32 is uncertain by 4e-6, and so would be the scale of the whole row
    in the backward. Sums are therefore kept in double precision, and the part of the logsumexp
    that float32 cannot hold comes back as the second result. Statistics are empty if not wanted.
    """
    length = len(q) + (len(k) if both and k is not None else 0)
    bound = torch.inf if statistics else _largest_logit(q, k, bound)
    if _needs_shift(q, bound):
        lse, stats = _forward_shifted(q, k, exclusion, both, length, statistics, saved)
    else:
        lse = _forward_unshifted(q, k, exclusion, both, length, bound, saved)
        stats = q.new_empty(0)
    rounded = lse.to(q.dtype)
    lost = torch.where(rounded.isinf(), 0, lse - rounded).to(q.dtype)
    return rounded, lost, stats


def _forward_unshifted(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    both: bool,
    length: int,
    bound: float,
    saved: Tensor,
) -> Tensor:
    sums = q.new_zeros(length, dtype=accumulator_dtype(q))
    row_sums, column_sums = _row_and_column_blocks(sums, q, k, both)
    for tile, exps in _exp_tiles(q, k, exclusion, bound, saved, known=False):
        row_sums[tile.row].add_(exps.sum(1))
        if column_sums is not None and tile.mirrored:
            column_sums[tile.column].add_(exps.sum(0))
    return sums.log_()


def _forward_shifted(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    both: bool,
    length: int,
    statistics: bool,
    saved: Tensor,
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

    for tile, logits in _masked_logit_tiles(q, k, exclusion, saved, known=False):
        merge(row_lse[tile.row], row_stats[tile.row], logits, 1)
        if column_lse is not None and column_stats is not None and tile.mirrored:
            merge(column_lse[tile.column], column_stats[tile.column], logits, 0)
    return lse, stats if statistics else q.new_empty(0)


def backward(
    grad: Tensor,
    lse: Tensor,
    lost: Tensor,
    saved: Tensor,
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
        weight_tiles = _weight_tiles_shifted(q, k, exclusion, lse_blocks, scales, saved)
    else:
        weight_tiles = _weight_tiles_unshifted(q, k, exclusion, scales, bound, saved)
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
    saved: Tensor,
) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with the weights of equation (5), both directions summed."""
    row_scale, column_scale = scales
    (buffer,) = _empty_tiles(1, q, k)
    for tile, exps in _exp_tiles(q, k, exclusion, bound, saved, known=True):
        weights = buffer[: exps.shape[0], : exps.shape[1]]
        scale = row_scale[tile.row].unsqueeze(1)
        if column_scale is not None:
            scale = torch.add(scale, column_scale[tile.column], out=weights)
        yield tile, torch.mul(exps, scale, out=weights)


def _weight_tiles_shifted(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    lse: tuple[Blocks, Blocks | None],
    scales: tuple[Blocks, Blocks | None],
    saved: Tensor,
) -> Iterator[tuple[Tile, Tensor]]:
    """The same where exp of a logit may overflow."""
    (row_lse, column_lse), (row_scale, column_scale) = lse, scales
    buffers = _empty_tiles(2, q, k)
    for tile, logits in _masked_logit_tiles(q, k, exclusion, saved, known=True):
        weights, shifted = buffers[:, : logits.shape[0], : logits.shape[1]]
        torch.sub(logits, row_lse[tile.row].unsqueeze(1), out=weights)
        _exp_(weights).mul_(row_scale[tile.row].unsqueeze(1))
        if column_lse is not None and column_scale is not None:
            torch.sub(logits, column_lse[tile.column], out=shifted)
            weights.addcmul_(_exp_(shifted), column_scale[tile.column])
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
    q: Tensor, k: Tensor | None, exclusion: Exclusion, bound: float, saved: Tensor, *, known: bool
) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with the exp of its logits, 0 where excluded."""
    in_bits = bound <= _LARGEST_LOGIT_IN_BITS
    for tile, exps in logit_tiles(q, k, _BITS_PER_NAT if in_bits else 1.0, saved, known):
        if not tile.known:
            _ = exps.exp2_() if in_bits else exps.exp_()
            exclusion.fill_(exps, 0.0, tile.top, tile.left)
        yield tile, exps


def _masked_logit_tiles(
    q: Tensor, k: Tensor | None, exclusion: Exclusion, saved: Tensor, *, known: bool
) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with its logits, -inf where excluded."""
    for tile, logits in logit_tiles(q, k, 1.0, saved, known):
        if not tile.known:
            exclusion.fill_(logits, -torch.inf, tile.top, tile.left)
        yield tile, logits


def _exp_(x: Tensor) -> Tensor:
    return x.mul_(_BITS_PER_NAT).exp2_()


def logit_tiles(
    q: Tensor,
    k: Tensor | None,
    unit: float = 1.0,
    saved: Tensor | None = None,
    known: bool = False,
) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with its logits times ``unit``, the first in ``saved``, all others in one buffer.

    If the tiles in ``saved`` are ``known``, they are not computed.
    """
    if 0 in (len(q), len(q if k is None else k)):
        return
    size = _tile_size(q)
    rows = blocks(q)
    columns = [block.T for block in (rows if k is None else blocks(k))]
    spare = _empty_tiles(1, q, k)[0]
    buffers = chain(zip(() if saved is None else saved, repeat(True)), repeat((spare, False)))
    for i, row in enumerate(rows):
        # Scaling the rows costs nothing next to scaling the product.
        scaled = row if unit == 1.0 else row * unit
        for j in range(i if k is None else 0, len(columns)):
            buffer, is_saved = next(buffers)
            logits = buffer[: len(row), : columns[j].shape[1]]
            tile = Tile(i, j, i * size, j * size, k is not None or i < j, known and is_saved)
            if not tile.known:
                torch.mm(scaled, columns[j], out=logits)
            yield tile, logits


def _empty_tiles(n_tiles: int | torch.SymInt, q: Tensor, k: Tensor | None) -> Tensor:
    size = _tile_size(q)
    n_rows, n_columns = q.shape[0], (q if k is None else k).shape[0]
    return q.new_empty(
        n_tiles, torch.sym_min(size, n_rows), torch.sym_min(size, n_columns) + _PADDING
    )


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
