"""The backward of the primitives: run as often as wanted, its result not differentiated again."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

_Gradients = tuple[Tensor | None, ...]


_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def with_signature(forward: _Forward) -> _Forward:
    """Keep the signature of a forward, for which torch asks at each call.

    To find it takes the host longer than most launches.
    """
    vars(forward)["__signature__"] = inspect.signature(forward)
    return forward


def applier(function: Any, n_outputs: int) -> Callable[..., Any]:
    """``function.apply`` for the first ``n_outputs``, spared what tracing and transforms need.

    Around a function with ``setup_context`` torch inspects the signature at each call and wraps
    every output, which takes longer than the work of a small batch. A function whose ``forward``
    takes the context is called as it is, but can be neither traced nor transformed.
    """

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = function.forward(*arguments)
            function.setup_context(ctx, arguments, outputs)
            results: tuple[Tensor, ...] = outputs[:n_outputs]
            return results

        backward = staticmethod(function.backward)

    def apply(*arguments: Any) -> Any:
        if is_watched(arguments[0]):
            return function.apply(*arguments)[:n_outputs]
        return Plain.apply(*arguments)

    return apply


def is_watched(x: Tensor) -> bool:
    """Whether something must see what ``x`` goes through: a compiler, transform, mode or class."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in (Tensor, torch.nn.Parameter)
    )


def first_is_differentiable(ctx: Any, *outputs: Tensor) -> None:
    """Say that of the outputs only the first has a gradient; no other is given one of zeros."""
    ctx.mark_non_differentiable(*outputs[1:])
    if not torch.compiler.is_compiling():  # Dynamo cannot trace it
        ctx.set_materialize_grads(False)


def differentiable_once(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
    """Make second derivatives raise; every saved tensor counts as what they would depend on.

    Where no gradient comes in, none comes out.

    ``torch.autograd.function.once_differentiable`` only looks at the incoming gradient. Where that
    is a constant, as behind a plain mean, it lets second derivatives vanish without a word.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> _Gradients:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        sources = [x for x in (*grads, *ctx.saved_tensors) if x is not None]
        present = [x for x in results if x is not None]
        guarded = iter(_NoSecondDerivative.apply(len(sources), *sources, *present))
        return tuple(None if x is None else next(guarded) for x in results)

    return wrapper


class _NoSecondDerivative(torch.autograd.Function):
    """Passes tensors on as if they depended on the sources, and raises if that is followed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(n_sources: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[n_sources:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> _Gradients:
        raise RuntimeError(
            "the losses of contrastive_kit can be differentiated once; for second derivatives use "
            "the formulas in contrastive_kit.reference"
        )
