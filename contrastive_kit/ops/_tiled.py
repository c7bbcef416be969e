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

# Rows and columns of a tile. On a CPU a float32 tile is 1 MiB, and stays in cache with what is
# computed from it; on an accelerator tiles are large so that launches do not dominate. A tile is
# at least as wide as high, so that the first of a row block holds its whole diagonal block.
_CPU_TILE = (512, 512)
_ACCELERATOR_TILE = (2048, 8192)

# While every |logit| is at most this, sums of exp neither overflow nor lose a row to underflow,
# and the running maximum of a stable logsumexp is not needed.
_LARGEST_UNSHIFTED_LOGIT = {torch.float32: 69.0, torch.float64: 600.0}

# exp(x) = exp2(x · log2 e). On x86 torch takes exp from MKL, which needs 3.6 times as long on a
# processor of AMD as torch's own exp2. But a logit in bits is a larger number, and is rounded once
# more: above this largest |logit| that would show in the gradient.
_BITS_PER_NAT = math.log2(math.e)
_LARGEST_LOGIT_IN_BITS = 32.0


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    mirrored: (
        slice  # the columns for which this tile also counts as rows, or as the other direction
    )


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
    row_sums, column_sums = _split(sums, q, k, both)
    for tile, exps in _exp_tiles(q, k, exclusion, bound):
        row_sums[tile.rows].add_(exps.sum(1))
        if column_sums is not None:
            column_sums[tile.mirrored].add_(_mirrored(exps, tile).sum(0))
    return sums.log_()


def _forward_shifted(
    q: Tensor, k: Tensor | None, exclusion: Exclusion, both: bool, length: int, statistics: bool
) -> tuple[Tensor, Tensor]:
    lse = q.new_full((length,), -torch.inf, dtype=accumulator_dtype(q))
    stats = q.new_zeros(4, length if statistics else 0)
    stats[0] = -torch.inf
    row_lse, column_lse = _split(lse, q, k, both)
    row_stats, column_stats = _split(stats, q, k, both)

    def merge(lse: Tensor, stats: Tensor, logits: Tensor, where: slice, dim: int) -> None:
        peak = logits.amax(dim)
        shift = peak.masked_fill(peak == -torch.inf, 0)
        sums = _exp_(logits - shift.unsqueeze(dim)).sum(dim)
        tile_lse = shift.to(lse.dtype) + sums.to(lse.dtype).log()
        merged = torch.logaddexp(lse[where], tile_lse)
        if statistics:
            tile_stats = row_statistics(logits, tile_lse.to(q.dtype), dim)
            stats[:, where] = merge_statistics(
                merged, stats[:, where], lse[where], tile_stats, tile_lse
            )
        lse[where] = merged

    for tile, logits in _logit_tiles(q, k):
        exclusion.fill_(logits, -torch.inf, tile.rows.start, tile.columns.start)
        merge(row_lse, row_stats, logits, tile.rows, 1)
        if column_lse is not None and column_stats is not None:
            merge(column_lse, column_stats, _mirrored(logits, tile), tile.mirrored, 0)
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
    keys = q if k is None else k
    dq = q.new_zeros(q.shape) if needs_grad[0] else q.new_empty(0)
    dk = k.new_zeros(k.shape) if k is not None and needs_grad[1] else q.new_empty(0)
    mirrored_grad = dq if k is None else dk
    # An empty row has logsumexp -inf and no gradient; +inf makes its weights exp(-inf) = 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    bound = _largest_logit(q, k, bound)
    shifted = _needs_shift(q, bound)
    # exp(logit - lse - lost) · grad, with as much of the exponent as is safe taken out of the tile
    outside = -lost.to(accumulator_dtype(q))
    # Relative to the largest, or a small incoming gradient would leave the range of float32.
    unit = _power_of_two(grad.abs().amax())
    scale = (grad / unit * (outside if shifted else outside - lse).exp()).to(q.dtype)
    scales = _split(scale, q, k, both)
    if shifted:
        weight_tiles = _weight_tiles_shifted(q, k, exclusion, _split(lse, q, k, both), scales)
    else:
        weight_tiles = _weight_tiles_unshifted(q, k, exclusion, scales, bound)
    for tile, weights in weight_tiles:
        if needs_grad[0]:
            dq[tile.rows].addmm_(weights, keys[tile.columns])
        if k is None or needs_grad[1]:
            mirrored_grad[tile.mirrored].addmm_(_mirrored(weights, tile).T, q[tile.rows])
    return dq.mul_(unit), dk.mul_(unit)


def _weight_tiles_unshifted(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    scales: tuple[Tensor, Tensor | None],
    bound: float,
) -> Iterator[tuple[_Tile, Tensor]]:
    """Each tile with the weights of equation (5), both directions summed."""
    row_scale, column_scale = scales
    scratch: Tensor | None = None
    for tile, exps in _exp_tiles(q, k, exclusion, bound):
        if column_scale is None:
            yield tile, exps.mul_(row_scale[tile.rows, None])
        else:
            if scratch is None:  # the first tile is the largest
                scratch = exps.new_empty(exps.numel())
            both_scales = scratch[: exps.numel()].view(exps.shape)
            torch.add(row_scale[tile.rows, None], column_scale[tile.columns], out=both_scales)
            yield tile, exps.mul_(both_scales)


def _weight_tiles_shifted(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    lse: tuple[Tensor, Tensor | None],
    scales: tuple[Tensor, Tensor | None],
) -> Iterator[tuple[_Tile, Tensor]]:
    """The same where exp of a logit may overflow."""
    (row_lse, column_lse), (row_scale, column_scale) = lse, scales
    for tile, logits in _logit_tiles(q, k):
        exclusion.fill_(logits, -torch.inf, tile.rows.start, tile.columns.start)
        weights = _exp_(logits - row_lse[tile.rows, None]).mul_(row_scale[tile.rows, None])
        if column_lse is not None and column_scale is not None:
            _exp_(logits.sub_(column_lse[tile.columns]))
            weights.addcmul_(logits, column_scale[tile.columns])
        yield tile, weights


def _power_of_two(x: Tensor) -> Tensor:
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
) -> Iterator[tuple[_Tile, Tensor]]:
    """Each tile with the exp of its logits, 0 where excluded."""
    in_bits = bound <= _LARGEST_LOGIT_IN_BITS
    for tile, logits in _logit_tiles(q, k, _BITS_PER_NAT if in_bits else 1.0):
        exps = logits.exp2_() if in_bits else logits.exp_()
        exclusion.fill_(exps, 0.0, tile.rows.start, tile.columns.start)
        yield tile, exps


def _exp_(x: Tensor) -> Tensor:
    return x.mul_(_BITS_PER_NAT).exp2_()


def _logit_tiles(q: Tensor, k: Tensor | None, unit: float = 1.0) -> Iterator[tuple[_Tile, Tensor]]:
    """Each tile with its logits times ``unit``, in one buffer that the next tile overwrites."""
    keys = q if k is None else k
    height, width = _CPU_TILE if q.device.type == "cpu" else _ACCELERATOR_TILE
    buffer = q.new_empty(min(height, len(q)) * min(width, len(keys)))
    for top in range(0, len(q), height):
        bottom = min(top + height, len(q))
        for left in range(top if k is None else 0, len(keys), width):
            right = min(left + width, len(keys))
            mirrored = slice(max(left, bottom) if k is None else left, right)
            logits = buffer[: (bottom - top) * (right - left)].view(bottom - top, right - left)
            logits.addmm_(q[top:bottom], keys[left:right].T, beta=0, alpha=unit)
            yield _Tile(slice(top, bottom), slice(left, right), mirrored), logits


def _mirrored(tile_values: Tensor, tile: _Tile) -> Tensor:
    return tile_values[:, tile.mirrored.start - tile.columns.start :]


def _split(x: Tensor, q: Tensor, k: Tensor | None, both: bool) -> tuple[Tensor, Tensor | None]:
    """Views of ``x`` (..., R or R + C) for the rows and for the columns, None if not wanted."""
    if k is None:
        return x, x
    return x[..., : len(q)], x[..., len(q) :] if both else None
