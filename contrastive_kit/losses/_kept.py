"""What a row keeps, without a tile: how many columns, and their sum. O(N·D), never N × N."""

import torch
from torch import Tensor

from contrastive_kit.ops import Exclusion


def kept_counts(n_rows: int, n_columns: int, exclusion: Exclusion, device: torch.device) -> Tensor:
    """How many of ``n_columns`` columns each of ``n_rows`` rows keeps, int64 (R,)."""
    ids = _written_out(n_rows, n_columns, exclusion, device)
    if ids is None:
        return torch.full((n_rows,), n_columns, device=device)
    return n_columns - equal_id_counts(*ids)


def kept_sums(n_rows: int, columns: Tensor, exclusion: Exclusion) -> Tensor:
    """The sum of those of ``columns`` (C, D) that each row keeps, (R, D)."""
    ids = _written_out(n_rows, columns.shape[0], exclusion, columns.device)
    everything = columns.sum(0)
    if ids is None:
        return everything.expand(n_rows, -1)
    return everything - equal_id_sums(columns, *ids)


def equal_id_counts(row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """How many columns have the id of each row, int64 (R,)."""
    ordered = column_ids.sort().values
    last = torch.searchsorted(ordered, row_ids, right=True)
    return last - torch.searchsorted(ordered, row_ids)


def equal_id_sums(columns: Tensor, row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """The sum of those of ``columns`` (C, D) that have the id of each row, (R, D)."""
    # A class is named by where its id would stand among the sorted ids of the columns, and a row
    # whose id no column has by C. Unlike torch.unique this has shapes that depend on no value.
    ordered = column_ids.sort().values
    column_class = torch.searchsorted(ordered, column_ids)
    row_class = torch.searchsorted(ordered, row_ids)
    absent = torch.searchsorted(ordered, row_ids, right=True) == row_class
    row_class = row_class.masked_fill(absent, columns.shape[0])
    zeros = columns.new_zeros(columns.shape[0] + 1, columns.shape[1])
    if columns.device.type == "cpu":
        return zeros.index_add(0, column_class, columns).index_select(0, row_class)
    return _sorted_sums(zeros, column_class, columns, row_class)


def _sorted_sums(zeros: Tensor, column_class: Tensor, columns: Tensor, row_class: Tensor) -> Tensor:
    """Sums that CUDA adds in a fixed order, by sorting, where ``index_add`` has none."""
    return zeros.index_put((column_class,), columns, accumulate=True)[row_class]


def _written_out(
    n_rows: int, n_columns: int, exclusion: Exclusion, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """The rule as ids of rows and columns, or None if every pair is kept."""
    period, row_ids, column_ids, *_ = exclusion
    if row_ids is not None:
        return row_ids, row_ids if column_ids is None else column_ids
    if period == 0:
        return None
    return (
        torch.arange(n_rows, device=device) % period,
        torch.arange(n_columns, device=device) % period,
    )
