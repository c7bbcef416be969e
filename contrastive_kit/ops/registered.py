"""Kernels as registered ops, with one autograd rule for every backend that brings some.

The ops are functional and opaque to ``torch.compile``, which sees their fakes. Their bodies run
with autocast off: it would round the logits to half precision.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from contrastive_kit.ops.differentiable_once import (
    applier,
    differentiable_once,
    first_is_differentiable,
    with_signature,
)
from contrastive_kit.ops.problem import N_TENSORS, SCHEMA, Problem
from contrastive_kit.ops.statistics import LogitStatistics

# Logsumexp and statistics of a problem; sums of softplus of a problem with a bias.
LogSumExp = Callable[[Problem], tuple[Tensor, LogitStatistics | None]]
SoftplusSum = Callable[[Problem, Tensor], Tensor]
# The sum of them all, each row with its weight, if there are any.
SoftplusTotal = Callable[[Problem, Tensor, Tensor | None], Tensor]


def register(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an op. Unlike ``torch.library.custom_op`` this does not import Dynamo."""
    qualified = f"contrastive_kit::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "CompositeExplicitAutograd", body)
    torch.library.register_fake(qualified, fake)
    return registered(name)


def registered(name: str) -> Any:
    """The op of that name."""
    return getattr(torch.ops.contrastive_kit, name).default


def no_tiles(problem: Problem, save_tiles: bool) -> Tensor:
    """Room for no tile, for a backend that leaves none to its backward."""
    return problem.q.new_empty(0, 0, 0)


def register_logsumexp(
    backend: str,
    forward: Callable[[Problem, Tensor], tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor]],
    new_tiles: Callable[[Problem, bool], Tensor] = no_tiles,
) -> LogSumExp:
    """Register the logsumexp of a backend; returns its differentiable form.

    Args:
        backend: its name, that of the ops begins with it.
        forward: called as ``forward(problem, saved_tiles)``; returns the logsumexp (R,) or (R + C,)
            rounded to the dtype of the rows, what that rounding has lost of it, and its statistics
            (4, the same) as ``row_statistics`` orders them, or (0,) where none are asked for. A row
            that keeps nothing has logsumexp -inf and has lost 0.
        backward: called as ``backward(problem, grad, lse, lse_lo, saved_tiles, needs_grad)`` with
            the gradient of the logsumexp and what the forward has returned; returns the gradients
            of ``q`` and ``k``, equation (5), (0,) for one that ``needs_grad`` says is not needed.
        new_tiles: room for what ``forward`` may leave to ``backward``, also for symbolic sizes.
    """

    def run_forward(*arguments: Any) -> tuple[Tensor, ...]:
        problem = Problem.of_flat(*arguments[:-1])
        saved_tiles = new_tiles(problem, arguments[-1])
        with torch.autocast(problem.q.device.type, enabled=False):
            return *forward(problem, saved_tiles), saved_tiles

    def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
        problem = Problem.of_flat(*arguments[:-1])
        q, length = problem.q, problem.n_results()
        stats = q.new_empty((4, length) if problem.statistics else 0)
        return q.new_empty(length), q.new_empty(length), stats, new_tiles(problem, arguments[-1])

    def run_backward(
        grad: Tensor, lse: Tensor, lse_lo: Tensor, saved_tiles: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        problem = Problem.of_flat(*arguments[:-2])
        with torch.autocast(problem.q.device.type, enabled=False):
            return backward(problem, grad, lse, lse_lo, saved_tiles, arguments[-2:])

    register(
        f"{backend}_logsumexp",
        f"({SCHEMA}, bool save_tiles) -> (Tensor, Tensor, Tensor, Tensor)",
        run_forward,
        fake_forward,
    )
    register(
        f"{backend}_logsumexp_backward",
        f"(Tensor grad, Tensor lse, Tensor lse_lo, Tensor saved_tiles, {SCHEMA}, bool needs_q, "
        "bool needs_k) -> (Tensor, Tensor)",
        run_backward,
        lambda *arguments: _fake_gradients(*arguments[4:6], *arguments[-2:]),
    )
    _register_autograd(f"{backend}_logsumexp", backend, _LogSumExp)
    return partial(_logsumexp, backend)


def _register_autograd(name: str, backend: str, function: Any) -> None:
    """Give an op the gradient of the function around it, which torch.export leaves out."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        function.setup_context(ctx, (*inputs, backend), output)

    torch.library.register_autograd(
        f"contrastive_kit::{name}", function.backward, setup_context=setup_context
    )


def _fake_gradients(q: Tensor, k: Tensor | None, *others_and_needs: Any) -> tuple[Tensor, Tensor]:
    needs_q, needs_k = others_and_needs[-2:]
    return (
        q.new_empty(q.shape if needs_q else 0),
        q.new_empty(k.shape if k is not None and needs_k else 0),
    )


def _logsumexp(backend: str, problem: Problem) -> tuple[Tensor, LogitStatistics | None]:
    problem = problem.in_compute_dtype()
    # With statistics the forward takes another path than the backward. In an exported graph the
    # number of tiles, the smaller of two, would bound the size of the batch.
    save_tiles = _wants_gradient(problem) and not problem.statistics
    save_tiles = save_tiles and not torch.compiler.is_exporting()
    lse, _, stats = _apply_logsumexp(*problem.flat(), save_tiles, backend)
    return lse, LogitStatistics(lse.detach(), *stats.unbind(0)) if problem.statistics else None


def _wants_gradient(problem: Problem) -> bool:
    return (problem.q.requires_grad or problem.keys().requires_grad) and torch.is_grad_enabled()


class _LogSumExp(torch.autograd.Function):
    """Differentiable form of the two ops of a backend; takes what the first op takes, and its name.

    Only the inputs, the logsumexp and a few tiles are kept. Arguments are written out, because
    Dynamo counts them to tell whether the first is a context.
    """

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        q: Any, k: Any, row_ids: Any, column_ids: Any, row_classes: Any, column_classes: Any,
        limits: Any, period: Any, both: Any, bound: Any, statistics: Any, mma_dtype: Any,
        save_tiles: Any, backend: str,
    ) -> Any:  # fmt: skip
        return registered(f"{backend}_logsumexp")(
            q, k, row_ids, column_ids, row_classes, column_classes, limits, period, both, bound,
            statistics, mma_dtype, save_tiles,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, ctx.backend = inputs[N_TENSORS:-2], inputs[-1]
        lse, lse_lo, _, saved_tiles = output
        first_is_differentiable(ctx, *output)
        ctx.save_for_backward(lse, lse_lo, saved_tiles, *inputs[:N_TENSORS])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        op = registered(f"{ctx.backend}_logsumexp_backward")
        gradients = op(grad, *ctx.saved_tensors, *ctx.settings, *needs)
        return *_wanted(gradients, needs), *[None] * (len(ctx.needs_input_grad) - 2)


_apply_logsumexp = applier(_LogSumExp, 3)


def _wanted(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [x if needed else None for x, needed in zip(gradients, needs, strict=True)]


def register_softplus_sum(
    backend: str,
    forward: Callable[[Problem, Tensor], Tensor],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> SoftplusSum:
    """Register the sum of softplus of a backend; returns its differentiable form.

    Args:
        backend: its name, that of the ops begins with it.
        forward: called as ``forward(problem, bias)``; returns the sums (R,) of equation (26). The
            bias is one number (0-dim), or one of each row (R,) with classes in the rule.
        backward: called as ``backward(problem, bias, grad, needs_grad)``; returns the gradients of
            ``bias``, ``q`` and ``k``, equation (27), (0,) for a matrix that ``needs_grad`` says
            needs none.
    """

    def run_forward(bias: Tensor, *flat: Any) -> Tensor:
        with torch.autocast(bias.device.type, enabled=False):
            return forward(Problem.of_flat(*flat), bias)

    def run_backward(grad: Tensor, bias: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        with torch.autocast(bias.device.type, enabled=False):
            return backward(Problem.of_flat(*arguments[:-2]), bias, grad, arguments[-2:])

    def fake_backward(grad: Tensor, bias: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(bias), *_fake_gradients(*arguments)

    register(
        f"{backend}_softplus_sum",
        f"(Tensor bias, {SCHEMA}) -> Tensor",
        run_forward,
        lambda bias, q, *rest: q.new_empty(q.shape[0]),
    )
    register(
        f"{backend}_softplus_sum_backward",
        f"(Tensor grad, Tensor bias, {SCHEMA}, bool needs_q, bool needs_k) -> "
        "(Tensor, Tensor, Tensor)",
        run_backward,
        fake_backward,
    )
    _register_autograd(f"{backend}_softplus_sum", backend, _SoftplusSum)
    return partial(_softplus_sum, backend)


def _softplus_sum(backend: str, problem: Problem, bias: Tensor) -> Tensor:
    sums: Tensor = _SoftplusSum.apply(bias, *problem.in_compute_dtype().flat(), backend)
    return sums


class _SoftplusSum(torch.autograd.Function):
    """Differentiable form of the two ops of a backend. Only the inputs are kept."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        bias: Any, q: Any, k: Any, row_ids: Any, column_ids: Any, row_classes: Any,
        column_classes: Any, limits: Any, period: Any, both: Any, bound: Any, statistics: Any,
        mma_dtype: Any, backend: str,
    ) -> Any:  # fmt: skip
        return registered(f"{backend}_softplus_sum")(
            bias, q, k, row_ids, column_ids, row_classes, column_classes, limits, period, both,
            bound, statistics, mma_dtype,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.settings, ctx.backend = inputs[1 + N_TENSORS : -1], inputs[-1]
        ctx.save_for_backward(*inputs[: 1 + N_TENSORS])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        op = registered(f"{ctx.backend}_softplus_sum_backward")
        gradients = op(grad, *ctx.saved_tensors, *ctx.settings, *needs[1:])
        return *_wanted(gradients, needs), *[None] * (len(ctx.needs_input_grad) - 3)


def register_softplus_total(
    backend: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
) -> SoftplusTotal:
    """Register the weighted sum of softplus over all kept logits, which makes its own gradients.

    What the sum of a row is multiplied by is known in the forward, and the sigmoid of a logit needs
    no sum over its row: so the gradients come from the same pass over the logits.

    Args:
        backend: its name, that of the op begins with it.
        forward: called as ``forward(problem, bias, weights, needs_grad)`` with a bias of no
            dimension and weights (R,) or None for 1; returns the sum and its gradients with respect
            to ``bias``, ``q`` and ``k``, of which ``needs_grad`` says which are needed. A matrix
            that needs none has (0,), a bias anything.
    """

    def run(bias: Tensor, weights: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        with torch.autocast(bias.device.type, enabled=False):
            return forward(Problem.of_flat(*arguments[:-3]), bias, weights, arguments[-3:])

    def fake(bias: Tensor, weights: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        q = arguments[0]
        return q.new_empty(()), torch.empty_like(bias), *_fake_gradients(*arguments)

    register(
        f"{backend}_softplus_total",
        f"(Tensor bias, Tensor? weights, {SCHEMA}, bool needs_bias, bool needs_q, bool needs_k) -> "
        "(Tensor, Tensor, Tensor, Tensor)",
        run,
        fake,
    )
    _register_autograd(f"{backend}_softplus_total", backend, _SoftplusTotal)
    return partial(_softplus_total, backend)


def _softplus_total(backend: str, problem: Problem, bias: Tensor, weights: Tensor | None) -> Tensor:
    problem = problem.in_compute_dtype()
    enabled = torch.is_grad_enabled()
    needs = [enabled and x.requires_grad for x in (bias, problem.q, problem.keys())]
    total: Tensor = _apply_softplus_total(bias, weights, *problem.flat(), *needs, backend)[0]
    return total


class _SoftplusTotal(torch.autograd.Function):
    """Differentiable form of the op of a backend. The gradients are kept."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        bias: Any, weights: Any, q: Any, k: Any, row_ids: Any, column_ids: Any, row_classes: Any,
        column_classes: Any, limits: Any, period: Any, both: Any, bound: Any, statistics: Any,
        mma_dtype: Any, needs_bias: Any, needs_q: Any, needs_k: Any, backend: str,
    ) -> Any:  # fmt: skip
        return registered(f"{backend}_softplus_total")(
            bias, weights, q, k, row_ids, column_ids, row_classes, column_classes, limits, period,
            both, bound, statistics, mma_dtype, needs_bias, needs_q, needs_k,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        first_is_differentiable(ctx, *output)
        # The inputs tell that second derivatives are wanted.
        bias, _, q, k = inputs[:4]
        ctx.save_for_backward(*output[1:], bias, q, k)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dbias, dq, dk = ctx.saved_tensors[:3]
        needs = ctx.needs_input_grad
        gradients = [
            grad * x if needed else None
            for x, needed in zip((dbias, dq, dk), (needs[0], needs[2], needs[3]), strict=True)
        ]
        return gradients[0], None, *gradients[1:], *[None] * (len(needs) - 4)


_apply_softplus_total = applier(_SoftplusTotal, 2)
