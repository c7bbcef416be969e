"""What is asked of a backend, as one value, and the one check of what callers ask."""

import operator
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_kit._checks import check_device, check_flag, check_ids
from contrastive_kit._dtypes import compute_dtype

_HALF = (torch.float16, torch.bfloat16)

# Roundings average out over the length of a row; shorter ones count as float32.
_SHORTEST_ROUNDED = 32


class Exclusion(NamedTuple):
    """The pairs (row i, column j) that are left out: a rule, never an (R, C) mask.

    Attributes:
        period: if positive, pairs with ``j ≡ i (mod period)``: a sample itself and its other views
            where views are stacked one after the other.
        row_ids: integers (R,) or None. If given, pairs of equal ids are left out, and ``period`` is
            not looked at.
        column_ids: integers (C,), or None if columns have the ids of rows.
        row_classes: integers (R,) or None. If given, pairs of different classes are left out too:
            what is kept is of the same class.
        column_classes: integers (C,), or None if columns have the classes of rows.
    """

    period: int = 0
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    row_classes: Tensor | None = None
    column_classes: Tensor | None = None

    def mask(self, n_rows: int, n_columns: int, device: torch.device) -> Tensor:
        """The rule written out as a boolean (R, C) mask, True where left out."""
        if self.row_ids is not None:
            mask = self.row_ids[:, None] == _or(self.column_ids, self.row_ids)
        elif self.period:
            rows = torch.arange(n_rows, device=device)[:, None]
            mask = (rows - torch.arange(n_columns, device=device)) % self.period == 0
        else:
            mask = torch.zeros(n_rows, n_columns, dtype=torch.bool, device=device)
        if self.row_classes is not None:
            mask = mask | (self.row_classes[:, None] != _or(self.column_classes, self.row_classes))
        return mask

    def fill_(self, tile: Tensor, value: float, top: int, left: int) -> None:
        """Write ``value`` where ``tile``, whose corner is (``top``, ``left``), is left out."""
        height, width = tile.shape
        if self.row_ids is not None:
            rows = self.row_ids[top : top + height, None]
            columns = _or(self.column_ids, self.row_ids)[left : left + width]
            tile.masked_fill_(rows == columns, value)
        elif self.period and height == width == 2 * self.period and top == left == 0:
            # The tile is all of two views, and its three diagonals one view of it.
            n = self.period
            tile.view(2, n, 2, n).diagonal(dim1=1, dim2=3).fill_(value)
        elif self.period:
            offset = (top - left) % self.period
            lowest = offset - self.period * ((offset + height - 1) // self.period)
            for diagonal in range(lowest, width, self.period):
                tile.diagonal(diagonal).fill_(value)
        if self.row_classes is not None:
            rows = self.row_classes[top : top + height, None]
            columns = _or(self.column_classes, self.row_classes)[left : left + width]
            tile.masked_fill_(rows != columns, value)

    def transposed(self) -> "Exclusion":
        """The rule for columns against rows."""
        ids = _swapped(self.row_ids, self.column_ids)
        return Exclusion(self.period, *ids, *_swapped(self.row_classes, self.column_classes))


def _or(x: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if x is None else x


def _swapped(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (rows, None) if columns is None else (columns, rows)


class Problem(NamedTuple):
    """The kept entries of each row of the logits ``q @ k.T``, and what is asked of them.

    It has methods and no properties, which Dynamo of torch 2.9 does not see through.

    Attributes:
        q: rows (R, D), floating.
        k: columns (C, D), or None for ``k = q``.
        exclusion: the pairs left out.
        both: also ask it of each column; only with ``k``.
        bound: a number that no logit exceeds in magnitude, if one is known.
        statistics: also ask for ``LogitStatistics``.
        mma_dtype: what tensor cores may round rows to before they multiply: "bfloat16", "float16",
            or "float32", with which ``torch.get_float32_matmul_precision()`` decides.
        limits: for each result the largest logit that it keeps, (R,) or (R + C,), constant; or
            None. A pair may be kept in one direction and left out in the other.
    """

    q: Tensor
    k: Tensor | None = None
    exclusion: Exclusion = Exclusion()
    both: bool = False
    bound: float = torch.inf
    statistics: bool = False
    mma_dtype: str = "float32"
    limits: Tensor | None = None

    def keys(self) -> Tensor:
        """The columns, which may be the rows."""
        return self.q if self.k is None else self.k

    def n_results(self) -> int:
        """R, or R + C if columns are asked for too."""
        return self.q.shape[0] + (self.k.shape[0] if self.both and self.k is not None else 0)

    def in_compute_dtype(self) -> "Problem":
        """Both matrices in float64 if one is, else in float32."""
        dtype = compute_dtype(self.q, self.keys())
        return self._replace(
            q=self.q.to(dtype),
            k=None if self.k is None else self.k.to(dtype),
            limits=None if self.limits is None else self.limits.to(dtype),
        )

    def mask(self) -> Tensor:
        """Boolean (R, C), True where a pair is left out."""
        return self.exclusion.mask(self.q.shape[0], self.keys().shape[0], self.q.device)

    def flat(self) -> tuple[Any, ...]:
        """The arguments of ``SCHEMA``; ``of_flat`` is the inverse. Tensors come first."""
        period, *ids = self.exclusion
        return (self.q, self.k, *ids, self.limits, period, *self[3:-1])

    @staticmethod
    def of_flat(*flat: Any) -> "Problem":
        """The problem of arguments that ``flat`` has taken apart."""
        q, k, *ids, limits = flat[:N_TENSORS]
        period, both, bound, statistics, mma_dtype = flat[N_TENSORS:]
        exclusion = Exclusion(period, *ids)
        return Problem(q, k, exclusion, both, bound, statistics, mma_dtype, limits)


# What ops take of a problem. The period is the size of the batch: as a SymInt it does not recompile
# for each, which it would inside a tuple.
SCHEMA = (
    "Tensor q, Tensor? k, Tensor? row_ids, Tensor? column_ids, Tensor? row_classes, "
    "Tensor? column_classes, Tensor? limits, SymInt period, bool both, float bound, "
    "bool statistics, str mma_dtype"
)
N_TENSORS = 7


def rounds_float32() -> bool:
    """Whether torch is set to round float32 before it multiplies, to TensorFloat-32 for one."""
    # The same setting as torch.get_float32_matmul_precision(), which breaks a compiled graph.
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # fp32_precision has been set instead, and the two do not mix
        return bool(matmul.fp32_precision == "tf32")


def mma_dtype(*embeddings: Tensor) -> str:
    """What tensor cores may round unit rows of these embeddings to before they multiply.

    Half precision where all embeddings are, and then float16: unit rows do not need the range of
    bfloat16, and three more bits make logits and gradients eight times as exact at the same speed.
    Rows (..., D) of D < 32 count as float32.
    """
    half = all(x.dtype in _HALF and x.shape[-1] >= _SHORTEST_ROUNDED for x in embeddings)
    return "float16" if half else "float32"


def checked_problem(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    *,
    both: bool = False,
    bound: float = torch.inf,
    statistics: bool = False,
    mma_dtype: torch.dtype | None = None,
    limits: Tensor | None = None,
) -> Problem:
    """The problem that a caller asks, whichever backend it is for; raises where it makes no sense.

    What only reading a value of a tensor would tell is not checked: that waits for the device.
    """
    _check_rows("q", q)
    check_flag("both", both)
    check_flag("statistics", statistics)
    if k is not None:
        _check_rows("k", k)
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                f"k must have shape (C, {q.shape[1]}) to match q, got {tuple(k.shape)}"
            )
        check_device("k", k, "q", q)
    elif both:
        raise ValueError("both=True needs k: columns that are the rows have their results")
    if isinstance(bound, bool) or not isinstance(bound, (Real, torch.SymFloat)):
        raise TypeError(f"bound must be a number, got {bound!r}")
    if not bound >= 0:
        raise ValueError(f"bound must be at least 0, got {bound}")
    if mma_dtype is None:
        same = k is None or k.dtype == q.dtype
        mma_dtype = q.dtype if same and q.dtype in _HALF else torch.float32
    choices = (torch.float32, *_HALF)
    if mma_dtype not in choices:
        raise ValueError(f"mma_dtype must be None or one of {choices}, got {mma_dtype}")
    problem = Problem(
        q, k, _checked_exclusion(exclusion, q, k), both, bound, statistics,
        str(mma_dtype).removeprefix("torch."), limits,
    )  # fmt: skip
    if limits is not None:
        _check_limits(limits, problem)
    return problem


def _check_limits(limits: Tensor, problem: Problem) -> None:
    if not isinstance(limits, Tensor) or not limits.is_floating_point():
        got = getattr(limits, "dtype", type(limits).__name__)
        raise TypeError(f"limits must be a floating point tensor, got {got}")
    length = problem.n_results()
    if limits.shape != (length,):
        raise ValueError(
            f"limits must have shape ({length},), one for each result, got {tuple(limits.shape)}"
        )
    check_device("limits", limits, "q", problem.q)
    if limits.requires_grad:
        raise ValueError("limits must be constant, as they have no gradient; give limits.detach()")


def _check_rows(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (rows, D), got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must hold real floating point rows, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have shape (rows, D), D ≥ 1, got {tuple(x.shape)}")


def _checked_exclusion(exclusion: Exclusion, q: Tensor, k: Tensor | None) -> Exclusion:
    if not isinstance(exclusion, Exclusion):
        raise TypeError(f"exclusion must be an Exclusion, got {type(exclusion).__name__}")
    period = exclusion.period
    if isinstance(period, bool) or not isinstance(period, (Integral, torch.SymInt)):
        raise TypeError(f"period must be an integer, got {period!r}")
    if period < 0:
        raise ValueError(f"period must be at least 0, which leaves out nothing, got {period}")
    _check_sides("ids", exclusion.row_ids, exclusion.column_ids, q, k)
    _check_sides("classes", exclusion.row_classes, exclusion.column_classes, q, k)
    if not isinstance(period, (int, torch.SymInt)):  # a number of NumPy; a symbol stays one
        exclusion = exclusion._replace(period=operator.index(period))
    return exclusion


def _check_sides(
    what: str, of_rows: Tensor | None, of_columns: Tensor | None, q: Tensor, k: Tensor | None
) -> None:
    if of_rows is None:
        if of_columns is not None:
            raise ValueError(f"column_{what} need row_{what} to be compared with, got None")
        return
    check_ids(f"row_{what}", of_rows, len(q), "q", q)
    if of_columns is None:
        if k is not None and len(k) != len(q):
            raise ValueError(
                f"column_{what} must be given for k of shape {tuple(k.shape)}: its rows cannot "
                f"have the {len(q)} {what} of q"
            )
    elif k is None:
        raise ValueError(f"column_{what} need k: without it columns have the {what} of rows")
    else:
        check_ids(f"column_{what}", of_columns, len(k), "k", k)
