"""The rule filled into tiles equals the rule written out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from contrastive_kit.ops import Exclusion

sizes = st.integers(1, 20)


def paint(exclusion, n_rows, n_columns, height, width):
    painted = torch.zeros(n_rows, n_columns)
    for top in range(0, n_rows, height):
        for left in range(0, n_columns, width):
            tile = painted[top : top + height, left : left + width]
            exclusion.fill_(tile, 1.0, top, left)
    return painted.bool()


@given(rows=sizes, columns=sizes, height=sizes, width=sizes, period=st.integers(0, 25))
def test_periodic_tiles_cover_the_mask(rows, columns, height, width, period):
    exclusion = Exclusion(period)
    mask = exclusion.mask(rows, columns, torch.device("cpu"))
    expected = [
        [period > 0 and i % period == j % period for j in range(columns)] for i in range(rows)
    ]
    assert mask.tolist() == expected
    assert torch.equal(paint(exclusion, rows, columns, height, width), mask)


@given(
    row_ids=st.lists(st.integers(-2, 3), min_size=1, max_size=12),
    column_ids=st.lists(st.integers(-2, 3), min_size=1, max_size=12),
    height=sizes,
    width=sizes,
)
def test_equal_id_tiles_cover_the_mask(row_ids, column_ids, height, width):
    exclusion = Exclusion(3, torch.tensor(row_ids), torch.tensor(column_ids))
    mask = exclusion.mask(len(row_ids), len(column_ids), torch.device("cpu"))
    assert mask.tolist() == [[a == b for b in column_ids] for a in row_ids]
    assert torch.equal(paint(exclusion, len(row_ids), len(column_ids), height, width), mask)


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12),
    columns=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12),
    height=sizes,
    width=sizes,
    rule=st.sampled_from(["ids", "period", "classes alone"]),
)
def test_tiles_of_classes_cover_the_mask(rows, columns, height, width, rule):
    """What is kept is of the same class, and not what the other rule leaves out."""
    period = 3 if rule == "period" else 0
    (row_ids, row_classes), (column_ids, column_classes) = (
        [torch.tensor(x) for x in zip(*side, strict=True)] for side in (rows, columns)
    )
    ids = (row_ids, column_ids) if rule == "ids" else (None, None)
    exclusion = Exclusion(period, *ids, row_classes, column_classes)
    mask = exclusion.mask(len(rows), len(columns), torch.device("cpu"))
    expected = [
        [
            row[1] != column[1]
            or (rule == "ids" and row[0] == column[0])
            or (rule == "period" and (i - j) % 3 == 0)
            for j, column in enumerate(columns)
        ]
        for i, row in enumerate(rows)
    ]
    assert mask.tolist() == expected
    assert torch.equal(paint(exclusion, len(rows), len(columns), height, width), mask)
    turned = exclusion.transposed().mask(len(columns), len(rows), torch.device("cpu"))
    assert torch.equal(turned, mask.T)
