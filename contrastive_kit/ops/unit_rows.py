"""Unit rows: embeddings normalized, and scaled so that their dot products are the logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contrastive_kit._checks import check_alike, check_temperature
from contrastive_kit._dtypes import compute_dtype
from contrastive_kit.ops.differentiable_once import (
    applier,
    differentiable_once,
    first_is_differentiable,
    with_signature,
)

# Numbers in a piece of rows on a CPU. What is computed from it stays in cache, and in memory that
# the allocator has at hand, instead of new pages of the system.
_CPU_PIECE = 2**17

# Numbers of a row that are added in its own precision, where there are four times as many.
_PART = 64

# Between this length and its reciprocal nothing that is made of it leaves the range of float32.
_SHORTEST = 1e-15


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """What sums over rows of ``x`` are kept in: float64, except on MPS, which has none."""
    return x.dtype if x.device.type == "mps" else torch.float64


def scaled_unit_rows(views: tuple[Tensor, ...], temperature: float | Tensor) -> Tensor:
    """The views stacked, each row divided by its length and by the root of the temperature.

    The dot product of two such rows is their logit, cosine / temperature: equation (3) of
    ``docs/nt_xent.md``, and (7) for the gradient. A zero row (subnormal numbers count as zero)
    stays zero and has a zero gradient; no other length over- or underflows. A row with NaN or inf
    comes out NaN.

    Args:
        views: V ≥ 1 tensors (..., D) of one shape and any floating dtype.
        temperature: a finite number above 0, or a tensor of one value, which receives its gradient.
            The value of a tensor is not checked.

    Returns:
        (V, ..., D) in float32, or in float64 if a view is float64.

    Raises:
        TypeError: for views that are not real floating tensors, a temperature that is no number.
        ValueError: for no view, views of different shapes or devices, a temperature out of range or
            a tensor of several values.

    Example:
        >>> import torch
        >>> from contrastive_kit.ops import scaled_unit_rows
        >>> rows = scaled_unit_rows((torch.tensor([[3.0, 4.0]]),), temperature=0.25)
        >>> rows[0] @ rows[0].T  # 1 / temperature
        tensor([[4.]])
    """
    _check_views(views)
    check_temperature(temperature)
    dtype = compute_dtype(*views)
    if isinstance(temperature, Tensor):
        root_scale: float | Tensor = temperature.reshape(()).to(dtype).rsqrt()
    else:
        root_scale = temperature**-0.5
    of_dtype = [view.to(dtype) for view in views]
    stacked = torch.stack(of_dtype) if len(views) > 1 else of_dtype[0].unsqueeze(0)  # no copy
    rows: Tensor = _apply_scaled_unit_rows(stacked, root_scale)[0]
    return rows


def to_unit_rows_(z: Tensor, length: float) -> tuple[Tensor, ...]:
    """Give the rows (..., D) of ``z``, on a CPU, that length in place; not differentiable.

    The rows are those of ``scaled_unit_rows``.

    Returns:
        The lengths (..., 1) before, in double precision and inf for a row of zeros; and those
        after, as rounding has left them.
    """
    return _piece_by_piece(lambda z: _to_unit_rows_(z, length), z)


def _to_unit_rows_(z: Tensor, length: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(
        _in_parts(z, lambda parts: torch.linalg.vector_norm(parts, dim=-1)),
        dim=-1, keepdim=True, dtype=torch.float64,
    )  # fmt: skip
    shortest, longest = norm.aminmax()
    if float(shortest) > _SHORTEST and float(longest) < 1 / _SHORTEST:
        divisor = (norm / length).to(z.dtype)
        z.div_(divisor)
        return norm, norm / divisor
    rows, power, factor, length_of_rows = _scaled(z, length)
    z.copy_(rows)
    return power / factor.to(torch.float64) * length, length_of_rows


def _in_parts(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Long rows (..., D) of float32 reduced by parts, (..., D / 64), whose roundings average out.

    A copy in double precision would take longer than all else that is done with them.
    """
    width = x.shape[-1]
    if x.dtype != torch.float32 or width % _PART or width < 4 * _PART:
        return x
    return reduce(x.view(*x.shape[:-1], -1, _PART))


def to_gradients_(grad: Tensor, rows: Tensor, length: Tensor, factor: Tensor) -> Tensor:
    """Turn gradients of unit rows into those of what they were made of, in place, equation (7).

    ``factor`` is ``length`` over that of the embedding. Returns the part along each row, (..., 1).
    """
    (along,) = _piece_by_piece(_to_gradients_, grad, rows, length, factor)
    return along


def _to_gradients_(grad: Tensor, rows: Tensor, length: Tensor, factor: Tensor) -> tuple[Tensor]:
    products = _in_parts(grad * rows, lambda parts: parts.sum(-1))
    along = products.sum(-1, keepdim=True, dtype=length.dtype)
    projection = (along / length.square()).to(rows.dtype)
    grad.addcmul_(rows, projection, value=-1).mul_(factor)
    return (along,)


def _power_of_two(z: Tensor) -> Tensor:
    """A power of two near the largest entry of each row, inf for a row of zeros."""
    # Dividing by it is exact, and keeps squares in range.
    largest = torch.maximum(z.amax(-1, keepdim=True), -z.amin(-1, keepdim=True))
    power = largest / (2 * torch.frexp(largest).mantissa)
    return torch.where(largest < torch.finfo(z.dtype).tiny, torch.inf, power)


def _check_views(views: tuple[Tensor, ...]) -> None:
    if isinstance(views, Tensor):
        raise TypeError("views must be a tuple of tensors, got Tensor")
    if not views:
        raise ValueError("views must be one or more tensors, got none")
    for i, view in enumerate(views):
        if not isinstance(view, Tensor):
            raise TypeError(f"views[{i}] must be a tensor, got {type(view).__name__}")
        if not view.is_floating_point():
            raise TypeError(f"views[{i}] must hold real floating point numbers, got {view.dtype}")
        if view.ndim == 0:
            raise ValueError(f"views[{i}] must have shape (..., D), got ()")
        check_alike(f"views[{i}]", view, "views[0]", views[0])


class _ScaledUnitRows(torch.autograd.Function):
    """Fewer and smaller buffers than autograd would keep: the result and three figures a row."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(z: Tensor, root_scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, power, factor, length = _piece_by_piece(lambda z: _scaled(z, root_scale), z)
        return rows, power, factor, length

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, float | Tensor], output: tuple[Tensor, ...]
    ) -> None:
        ctx.root_scale = inputs[1]
        first_is_differentiable(ctx, *output)
        ctx.save_for_backward(*output)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        dz, along = _piece_by_piece(_projected, grad, *ctx.saved_tensors)
        d_root_scale = None
        if ctx.needs_input_grad[1]:
            d_root_scale = (along.sum() / ctx.root_scale).to(ctx.root_scale.dtype)
        return dz, d_root_scale


_apply_scaled_unit_rows = applier(_ScaledUnitRows, 1)


def _scaled(z: Tensor, root_scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of length ``root_scale``, and the three figures a row that the backward needs."""
    power = _power_of_two(z)
    z = z / power
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=accumulator_dtype(z))
    norm = torch.where(norm > 0, norm, 1)
    factor = (root_scale / norm).to(z.dtype)
    # Their length as the rounded factor makes it; any but 0 where that has rounded to 0.
    length = torch.where(factor > 0, norm * factor, 1)
    return z * factor, power, factor, length


def _projected(
    grad: Tensor, rows: Tensor, power: Tensor, factor: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of ``_scaled`` by equation (7), and the part of ``grad`` along each row."""
    # Projecting on rows of the length that the rounded factor gave them, not on ideal ones, keeps
    # the gradient of nearly identical views right: it is the small difference of two nearly
    # parallel vectors.
    along = (grad * rows).sum(-1, keepdim=True, dtype=length.dtype)
    projection = (along / length.square()).to(rows.dtype)
    across = torch.addcmul(grad, rows, projection, value=-1)
    return across.mul_(factor).div_(power), along


def _piece_by_piece(
    of_rows: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
) -> tuple[Tensor, ...]:
    """``of_rows`` of tensors (..., D) or (..., 1), whose rows do not depend on each other.

    On a CPU a few rows at a time: the copies in double precision of a whole batch would take
    longer than everything else in the preparation of rows.
    """
    first = tensors[0]
    # In a graph first, where the size may be a symbol that a comparison would fix.
    if torch.compiler.is_compiling() or first.device.type != "cpu":
        return of_rows(*tensors)
    if first.numel() <= _CPU_PIECE:
        return of_rows(*tensors)
    n_rows = max(1, _CPU_PIECE // first.shape[-1])
    flat = (x.reshape(-1, x.shape[-1]) for x in tensors)
    pieces = zip(*(torch.split(x, n_rows) for x in flat), strict=True)
    results = zip(*(of_rows(*piece) for piece in pieces), strict=True)
    return tuple(torch.cat(parts).view(*first.shape[:-1], -1) for parts in results)
