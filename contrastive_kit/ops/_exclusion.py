"""Which pairs are left out of the logsumexp: a rule, never an (R, C) mask."""

from typing import NamedTuple

import torch
from torch import Tensor


class Exclusion(NamedTuple):
    """The pairs (row i, column j) that are not kept.

    Attributes:
        period: if positive, pairs with ``j ≡ i (mod period)``: a sample itself and its other views
            where views are stacked one after the other.
        row_ids: integers (R,) or None. With ``column_ids``, pairs of equal ids are excluded, and
            ``period`` is not looked at.
        column_ids: integers (C,) or None.
    """

    period: int = 0
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None

    def mask(self, n_rows: int, n_columns: int, device: torch.device) -> Tensor:
        """The rule written out as a boolean (R, C) mask, True where excluded."""
        if self.row_ids is not None and self.column_ids is not None:
            return self.row_ids[:, None] == self.column_ids[None, :]
        if self.period == 0:
            return torch.zeros(n_rows, n_columns, dtype=torch.bool, device=device)
        row = torch.arange(n_rows, device=device)[:, None]
        column = torch.arange(n_columns, device=device)[None, :]
        return (row - column) % self.period == 0

    def fill_(self, tile: Tensor, value: float, top: int, left: int) -> None:
        """Write ``value`` where ``tile``, whose corner is (``top``, ``left``), is excluded."""
        height, width = tile.shape
        if self.row_ids is not None and self.column_ids is not None:
            row_ids = self.row_ids[top : top + height, None]
            tile.masked_fill_(row_ids == self.column_ids[None, left : left + width], value)
        elif self.period:
            offset = (top - left) % self.period
            lowest = offset - self.period * ((offset + height - 1) // self.period)
            for diagonal in range(lowest, width, self.period):
                tile.diagonal(diagonal).fill_(value)
