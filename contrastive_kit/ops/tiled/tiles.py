"""The tiles that the logits are cut into: where they are, what they hold, where they are kept.

The memory beyond the results is a few tiles, whatever N is. With one matrix (``k`` None) the logits
are symmetric, and only tiles on and above the diagonal are computed: an entry (i, j) right of its
row block also serves as (j, i).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kit.ops.problem import Problem

# Rows, and columns, of a tile. On a CPU a float32 tile stays in cache with what is computed of it,
# and a power of two from 2048 up is cut almost evenly; on an accelerator tiles are large so that
# launches do not dominate.
CPU_TILE = 688
ACCELERATOR_TILE = 4096

# Bytes of tiles that the forward leaves to the backward, which then need not compute them again:
# a third of the time up to 1024 pairs. Larger blocks glibc would fetch from the system each time.
CPU_SAVED_BYTES = 2**25

# Unused numbers between the rows of a tile. Rows a power of two apart fall on few sets of the
# cache, and a product with the transposed tile takes a sixth longer.
PADDING = 16

# Pieces of a tensor, one for each block of rows, or of columns, of the tiles.
Blocks = tuple[Tensor, ...]


class Tile(NamedTuple):
    """Where a tile is: its blocks of rows and of columns, and its corner."""

    row: int
    column: int
    top: int
    left: int
    mirrored: bool  # it also counts transposed: below the diagonal, or in the other direction


def computed_tiles(
    problem: Problem,
    finish: Callable[[Tensor, Tile], object],
    *,
    scale: float = 1.0,
    saved: Tensor | None = None,
    known: bool = False,
) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with what ``finish`` makes in place of its logits times ``scale``.

    The first tiles are computed into ``saved``, or found there where they are ``known``; all others
    share one buffer.
    """
    q, k, keys = problem.q, problem.k, problem.keys()
    if 0 in (q.shape[0], keys.shape[0]):
        return
    size = tile_size(q)
    rows = blocks(q)
    columns = rows if k is None else blocks(keys)
    n_saved, n_computed, spare = 0 if saved is None else len(saved), 0, None
    for i, row in enumerate(rows):
        for j in range(i if k is None else 0, len(columns)):
            if saved is not None and n_computed < n_saved:
                buffer = saved[n_computed]
            else:
                buffer = spare = empty_tiles(1, problem)[0] if spare is None else spare
            logits = buffer[: row.shape[0], : columns[j].shape[0]]
            tile = Tile(i, j, i * size, j * size, k is not None or i < j)
            if not (known and n_computed < n_saved):
                # What the buffer holds is not read: of beta = 0, not even NaN.
                logits.addmm_(row, columns[j].T, beta=0, alpha=scale)
                finish(logits, tile)
            n_computed += 1
            yield tile, logits


def is_one_tile(problem: Problem) -> bool:
    """Whether all logits are one tile, and there are any."""
    size = tile_size(problem.q)
    return 0 < problem.q.shape[0] <= size and 0 < problem.keys().shape[0] <= size


def one_tile(problem: Problem, saved: Tensor) -> Tensor:
    """The tile of a problem that is one tile, in the room that is saved, if there is any."""
    buffer = saved if saved.shape[0] else empty_tiles(1, problem)
    return buffer[0, :, : problem.keys().shape[0]]


def new_tiles(problem: Problem, save_tiles: bool) -> Tensor:
    """Room for the tiles that the forward may leave to the backward; also for symbolic sizes."""
    q, keys = problem.q, problem.keys()
    if not save_tiles:
        return q.new_empty(0, 0, 0)
    size = tile_size(q)
    n_blocks = (q.shape[0] + size - 1) // size
    if problem.k is None:
        n_tiles = n_blocks * (n_blocks + 1) // 2
    else:
        n_tiles = n_blocks * ((keys.shape[0] + size - 1) // size)
    tile_bytes = size * (size + PADDING) * q.element_size()
    n_saved = CPU_SAVED_BYTES // tile_bytes if q.device.type == "cpu" else 0
    return empty_tiles(_least(n_tiles, n_saved), problem)


def empty_tiles(n_tiles: int | torch.SymInt, problem: Problem) -> Tensor:
    """Room for ``n_tiles``, (n, rows, columns), no larger than the problem needs."""
    size, n_rows, n_columns = tile_size(problem.q), problem.q.shape[0], problem.keys().shape[0]
    return problem.q.new_empty(n_tiles, _least(size, n_rows), _least(size, n_columns) + PADDING)


def _least(a: int | torch.SymInt, b: int | torch.SymInt) -> int | torch.SymInt:
    """``torch.sym_min``, which for plain numbers takes as long as a small product."""
    return min(a, b) if type(a) is int and type(b) is int else torch.sym_min(a, b)


def blocks(x: Tensor, dim: int = 0) -> Blocks:
    """``x`` cut along ``dim`` as the tiles cut its rows or columns."""
    size = tile_size(x)
    pieces: Blocks = (x,) if x.shape[dim] <= size else torch.split(x, size, dim)
    return pieces


def tile_size(x: Tensor) -> int:
    """Rows, and columns, of a tile where ``x`` is."""
    return CPU_TILE if x.device.type == "cpu" else ACCELERATOR_TILE


def row_and_column_blocks(x: Tensor, problem: Problem) -> tuple[Blocks, Blocks | None]:
    """The blocks of ``x`` (..., R or R + C) for rows and for columns, None if not asked for."""
    if problem.k is None:
        rows = blocks(x, -1)
        return rows, rows
    n_rows = problem.q.shape[0]
    rows = blocks(x[..., :n_rows], -1)
    return rows, blocks(x[..., n_rows:], -1) if problem.both else None


def power_of_two(x: Tensor) -> Tensor:
    """The power of two just above ``x``, so that dividing and multiplying by it are exact."""
    power = x / torch.frexp(x).mantissa
    return torch.where((x > 0) & (x < torch.inf), power, 1)
