"""The primitive as registered ops, with one autograd rule for every backend that brings kernels.

The ops are functional and opaque to ``torch.compile``, which sees their fakes. Their bodies run
with autocast off: it would round the logits to half precision.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contrastive_kit.ops import _tiled, _triton
from contrastive_kit.ops._differentiable_once import differentiable_once
from contrastive_kit.ops._exclusion import Exclusion

# By the name the ops are given. A backend that rounds what it multiplies has a name for each way.
_KERNELS: dict[str, Any] = {
    "tiled": _tiled,
    **{f"triton {name}": _triton.Kernels(name) for name in _triton.OPERANDS},
}

# The period is the size of the batch: as a SymInt it does not recompile for each.
_SHARED_ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? row_ids, Tensor? column_ids, SymInt period, bool both, "
    "float bound"
)


def _forward(
    q: Tensor,
    k: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    period: int,
    both: bool,
    bound: float,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexp of the kept logits, what the backward needs of it, and statistics.

    The first two are (R,) or (R + C,), the statistics (4, the same) or (0,).
    """
    exclusion = Exclusion(period, row_ids, column_ids)
    with torch.autocast(q.device.type, enabled=False):
        result: tuple[Tensor, Tensor, Tensor] = _KERNELS[backend].forward(
            q, k, exclusion, both, bound, statistics
        )
    return result


def _fake_forward(
    q: Tensor,
    k: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    period: int,
    both: bool,
    bound: float,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    length = q.shape[0] + (k.shape[0] if both and k is not None else 0)
    stats = q.new_empty((4, length)) if statistics else q.new_empty(0)
    return q.new_empty(length), q.new_empty(length), stats


def _backward(
    grad: Tensor,
    lse: Tensor,
    saved: Tensor,
    q: Tensor,
    k: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    period: int,
    both: bool,
    bound: float,
    needs_q: bool,
    needs_k: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``q`` and ``k`` from that of the logsumexp; (0,) for the one not needed."""
    exclusion = Exclusion(period, row_ids, column_ids)
    with torch.autocast(q.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _KERNELS[backend].backward(
            grad, lse, saved, q, k, exclusion, both, bound, (needs_q, needs_k)
        )
    return result


def _fake_backward(
    grad: Tensor,
    lse: Tensor,
    saved: Tensor,
    q: Tensor,
    k: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    period: int,
    both: bool,
    bound: float,
    needs_q: bool,
    needs_k: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dq = q.new_empty(q.shape if needs_q else 0)
    return dq, q.new_empty(k.shape if k is not None and needs_k else 0)


def _register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an op. Unlike ``torch.library.custom_op`` this does not import Dynamo."""
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CompositeExplicitAutograd", kernel)
    torch.library.register_fake(name, fake)
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op).default


logsumexp_forward = _register(
    "contrastive_kit::kept_logsumexp",
    f"({_SHARED_ARGUMENTS}, bool statistics, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
logsumexp_backward = _register(
    "contrastive_kit::kept_logsumexp_backward",
    f"(Tensor grad, Tensor lse, Tensor saved, {_SHARED_ARGUMENTS}, bool needs_q, bool needs_k, "
    "str backend) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class KeptLogSumExp(torch.autograd.Function):
    """Differentiable form of the two ops; takes what the forward op takes.

    Only the inputs and the logsumexp are kept. The rule of exclusion comes as its parts: inside a
    tuple, torch 2.6 would compile the period of the first batch into the graph.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor | None,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        period: int,
        both: bool,
        bound: float,
        statistics: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the forward op."""
        result: tuple[Tensor, Tensor, Tensor] = logsumexp_forward(
            q, k, row_ids, column_ids, period, both, bound, statistics, backend
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward op needs."""
        q, k, row_ids, column_ids, ctx.period, ctx.both, ctx.bound, _, ctx.backend = inputs
        lse, saved, stats = output
        ctx.mark_non_differentiable(saved, stats)
        ctx.save_for_backward(lse, saved, q, k, row_ids, column_ids)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Run the backward op for the inputs that need it."""
        needs_q, needs_k = ctx.needs_input_grad[:2]
        dq, dk = logsumexp_backward(
            grad, *ctx.saved_tensors, ctx.period, ctx.both, ctx.bound, needs_q, needs_k, ctx.backend
        )
        return dq if needs_q else None, dk if needs_k else None, *[None] * 7
