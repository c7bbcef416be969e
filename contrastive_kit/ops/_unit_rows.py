"""Unit rows: embeddings normalised, and scaled so that their dot products are the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: half precision is never computed in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def scaled_unit_rows(views: tuple[Tensor, ...], temperature: float | Tensor) -> Tensor:
    """The views stacked, each row divided by its length and by the root of the temperature.

    The dot product of two such rows is their logit, cosine / temperature: equation (3) of
    ``docs/nt_xent.md``, and (7) for its gradient. A zero row stays zero and has a zero gradient;
    rows of any other length that the dtype represents come out exact, without overflow. Rows with
    NaN or inf come out NaN.

    Args:
        views: V tensors (..., D) of one shape and any floating dtype.
        temperature: number, or tensor of one value, which receives its gradient.

    Returns:
        (V, ..., D) in float32, or in float64 if a view is float64.
    """
    dtype = compute_dtype(*views)
    if isinstance(temperature, Tensor):
        root_scale: float | Tensor = temperature.reshape(()).to(dtype).rsqrt()
    else:
        root_scale = temperature**-0.5
    rows: Tensor = _ScaledUnitRows.apply(root_scale, dtype, *views)[0]
    return rows


class _ScaledUnitRows(torch.autograd.Function):
    """Fewer and smaller buffers than autograd would keep: the result and two figures a row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        root_scale: float | Tensor, dtype: torch.dtype, *views: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.stack([view.to(dtype) for view in views])
        # Dividing by the largest entry first keeps the squares of the norm in range.
        peak = torch.linalg.vector_norm(z, torch.inf, dim=-1, keepdim=True)
        peak = torch.where(peak >= torch.finfo(dtype).tiny, peak, torch.inf)
        z = z / peak
        norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        norm = torch.where(norm > 0, norm, 1)
        return z.mul_(root_scale / norm), peak, norm

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        ctx.root_scale, _, *views = inputs
        ctx.dtypes = [view.dtype for view in views]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        rows, peak, norm = ctx.saved_tensors
        along = (grad * rows).sum(-1, keepdim=True) / ctx.root_scale
        d_root_scale = along.sum() if ctx.needs_input_grad[0] else None
        dz = (grad * ctx.root_scale - rows * along).div_(norm).div_(peak)
        d_views = [
            d.to(dtype) if needs_grad else None
            for d, dtype, needs_grad in zip(
                dz.unbind(0), ctx.dtypes, ctx.needs_input_grad[2:], strict=True
            )
        ]
        return d_root_scale, None, *d_views
