"""The primitive as registered ops, with one autograd rule for every backend that brings kernels.

The ops are functional and opaque to ``torch.compile``, which sees their fakes. Their bodies run
with autocast off: it would round the logits to half precision.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contrastive_kit.ops import _tiled, _triton
from contrastive_kit.ops._differentiable_once import differentiable_once, first_is_differentiable
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
    save_tiles: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logsumexp of the kept logits, what the backward needs of it, statistics, and tiles.

    The first two are (R,) or (R + C,), the statistics (4, the same) or (0,). With ``save_tiles``
    some of the tiles are left for the backward, which need not compute them again.
    """
    exclusion = Exclusion(period, row_ids, column_ids)
    saved_tiles = _new_tiles(q, k, save_tiles, backend)
    with torch.autocast(q.device.type, enabled=False):
        lse, saved, stats = _KERNELS[backend].forward(
            q, k, exclusion, both, bound, statistics, saved_tiles
        )
    return lse, saved, stats, saved_tiles


def _fake_forward(
    q: Tensor,
    k: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    period: int,
    both: bool,
    bound: float,
    statistics: bool,
    save_tiles: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = q.shape[0] + (k.shape[0] if both and k is not None else 0)
    stats = q.new_empty((4, length)) if statistics else q.new_empty(0)
    return q.new_empty(length), q.new_empty(length), stats, _new_tiles(q, k, save_tiles, backend)


def _new_tiles(q: Tensor, k: Tensor | None, save_tiles: bool, backend: str) -> Tensor:
    if save_tiles and backend.startswith("tiled"):
        return _tiled.new_tiles(q, k)
    return q.new_empty(0, 0, 0)


def _backward(
    grad: Tensor,
    lse: Tensor,
    saved: Tensor,
    saved_tiles: Tensor,
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
            grad, lse, saved, saved_tiles, q, k, exclusion, both, bound, (needs_q, needs_k)
        )
    return result


def _fake_backward(
    grad: Tensor,
    lse: Tensor,
    saved: Tensor,
    saved_tiles: Tensor,
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
    f"({_SHARED_ARGUMENTS}, bool statistics, bool save_tiles, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
logsumexp_backward = _register(
    "contrastive_kit::kept_logsumexp_backward",
    f"(Tensor grad, Tensor lse, Tensor saved, Tensor saved_tiles, {_SHARED_ARGUMENTS}, "
    "bool needs_q, bool needs_k, str backend) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def registered_logsumexp(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    both: bool,
    bound: float,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The ops with their gradient: logsumexp and statistics."""
    period, row_ids, column_ids = exclusion
    differentiable = q.requires_grad or (k is not None and k.requires_grad)
    # With statistics the forward takes another path than the backward. In an exported graph the
    # number of tiles, the smaller of two, would bound the size of the batch.
    save_tiles = differentiable and torch.is_grad_enabled() and not statistics
    save_tiles = save_tiles and not torch.compiler.is_exporting()
    lse, _, stats, _ = _KeptLogSumExp.apply(
        q, k, row_ids, column_ids, period, both, bound, statistics, save_tiles, backend
    )
    return lse, stats


class _KeptLogSumExp(torch.autograd.Function):
    """Differentiable form of the two ops; takes what the forward op takes.

    Only the inputs, the logsumexp and a few tiles are kept. The rule of exclusion comes as its
    parts: inside a tuple, torch would compile the period of the first batch into the graph.
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
        save_tiles: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the forward op."""
        result: tuple[Tensor, Tensor, Tensor, Tensor] = logsumexp_forward(
            q, k, row_ids, column_ids, period, both, bound, statistics, save_tiles, backend
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward op needs."""
        q, k, row_ids, column_ids, ctx.period, ctx.both, ctx.bound, _, _, ctx.backend = inputs
        lse, saved, _, saved_tiles = output
        first_is_differentiable(ctx, *output)
        ctx.save_for_backward(lse, saved, saved_tiles, q, k, row_ids, column_ids)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Run the backward op for the inputs that need it."""
        needs_q, needs_k = ctx.needs_input_grad[:2]
        dq, dk = logsumexp_backward(
            grad, *ctx.saved_tensors, ctx.period, ctx.both, ctx.bound, needs_q, needs_k, ctx.backend
        )
        return dq if needs_q else None, dk if needs_k else None, *[None] * 8


# torch.export keeps the op of the forward and leaves the function around it out.
torch.library.register_autograd(
    "contrastive_kit::kept_logsumexp",
    _KeptLogSumExp.backward,
    setup_context=_KeptLogSumExp.setup_context,
)
