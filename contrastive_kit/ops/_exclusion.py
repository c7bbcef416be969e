"""Which pairs are left out of the logsumexp: a rule, never an (R, C) mask."""

from typing import NamedTuple

import torch
from torch import Tensor


class Exclusion(NamedTuple):
    """The pairs (row i, column j) that are not kept.

    Attributes:
        period: if positive, pairs with ``j ≡ i (mod period)``: a sample itself and its other views
            where views are stacked one after the other.
        row_ids: integers (R,) or None. If given, pairs of equal ids are excluded, and ``period`` is
            not looked at.
        column_ids: integers (C,), or None if columns have the ids of rows.
    """

    period: int = 0
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None

    def mask(self, n_rows: int, n_columns: int, device: torch.device) -> Tensor:
        """The rule written out as a boolean (R, C) mask, True where excluded."""
        ids = self._ids()
        if ids is not None:
            return ids[0][:, None] == ids[1][None, :]
        if self.period == 0:
            return torch.zeros(n_rows, n_columns, dtype=torch.bool, device=device)
        row = torch.arange(n_rows, device=device)[:, None]
        column = torch.arange(n_columns, device=device)[None, :]
        return (row - column) % self.period == 0

    def fill_(self, tile: Tensor, value: float, top: int, left: int) -> None:
        """Write ``value`` where ``tile``, whose corner is (``top``, ``left``), is excluded."""
        height, width = tile.shape
        ids = self._ids()
        if ids is not None:
            row_ids, column_ids = ids[0][top : top + height], ids[1][left : left + width]
            tile.masked_fill_(row_ids[:, None] == column_ids[None, :], value)
        elif self.period:
            offset = (top - left) % self.period
            lowest = offset - self.period * ((offset + height - 1) // self.period)
            for diagonal in range(lowest, width, self.period):
                tile.diagonal(diagonal).fill_(value)

    def _ids(self) -> tuple[Tensor, Tensor] | None:
        if self.row_ids is None:
            return None
        return self.row_ids, self.row_ids if self.column_ids is None else self.column_ids
