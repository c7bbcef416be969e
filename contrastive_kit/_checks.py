"""What callers may pass. Every message names the argument, what was expected and what came."""

import math
from collections.abc import Collection
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from contrastive_kit._dtypes import compute_dtype

# Torch stores these integers, but searches and reduces none of them.
_HARDLY_SUPPORTED = (torch.uint16, torch.uint32, torch.uint64)


def check_int(name: str, value: object, at_least: int | None = None) -> int:
    """The integer of Python that ``value``, one of Python or NumPy, is; raise if it is none.

    A bool is none: where a number is expected, it is a mistake.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}")
    return number


def check_number(name: str, value: object) -> float:
    """The number of Python that ``value``, one of Python or NumPy, is; raise if it is none."""
    # First, as under torch.compile a number may be a symbol, which is of this type and no Real.
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def check_dense(name: str, x: Tensor) -> None:
    """Raise if ``x`` is sparse or nested, whose rows cannot be computed with here."""
    if x.is_nested:
        raise ValueError(
            f"{name} must be a dense tensor, got a nested one; join its rows with "
            "torch.cat(x.unbind())"
        )
    if x.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense tensor, got one of layout {x.layout}; call .to_dense() on it"
        )


def check_reverse_mode(name: str, x: object) -> None:
    """Raise if ``x`` carries a tangent of forward-mode differentiation (``torch.func.jvp``)."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return
    if unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(
            f"{name} carries a tangent, but the losses of contrastive_kit have no forward-mode "
            "derivative (torch.func.jvp, jacfwd); use the formulas in contrastive_kit.reference, "
            "or reverse mode (torch.func.grad, vjp, jacrev)"
        )


def check_embeddings(name: str, x: Tensor, ndim: int = 2) -> None:
    """Raise unless ``x`` is a dense floating tensor of ``ndim`` dimensions, none of them 0."""
    shape = {2: "(N, D)", 3: "(N, K, D)"}[ndim]
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace would keep the batch size of its example in what is computed from "
            f"{name}; use torch.export or torch.compile"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(x).__name__}")
    check_dense(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} must hold floating point embeddings, got {x.dtype}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name} must have no empty dimension, got shape {tuple(x.shape)}")


def check_alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``x`` has the shape and the device of ``other``."""
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, "
            f"got {tuple(x.shape)}"
        )
    check_device(name, x, other_name, other)


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``x`` is on the device of ``other``."""
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def check_ids(name: str, ids: Tensor, n: int, other_name: str, other: Tensor) -> None:
    """Raise unless ``ids`` holds ``n`` integers on the device of ``other``."""
    check_ids_of(name, ids, (n,), other_name, other)


def check_ids_of(
    name: str, ids: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor
) -> None:
    """Raise unless ``ids`` holds integers, one for each row of ``other``, of that shape."""
    shape = tuple(shape)
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape {shape}, got {ids!r}")
    check_dense(name, ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {ids.dtype}")
    if ids.dtype in _HARDLY_SUPPORTED:
        raise TypeError(f"{name} must hold signed integers or uint8, got {ids.dtype}")
    if ids.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape}, one id for each row of {other_name}, "
            f"got {tuple(ids.shape)}"
        )
    check_device(name, ids, other_name, other)


def check_temperature(
    temperature: object,
    z: Tensor | None = None,
    name: str = "temperature",
    *,
    per_anchor: bool = False,
) -> float | Tensor:
    """``temperature``, a finite number above 0, or a floating tensor of one value; else raise.

    With ``per_anchor`` also one of a value for each row of ``z``.

    A tensor must be where the embeddings ``z`` are, or a scalar on the CPU. A number must leave
    logits between which the dtype of the loss can tell 1 apart, or exp of their rounding overflows.

    The value of a tensor is not read: that would wait for the device. A temperature tensor that
    is not positive gives a NaN loss.
    """
    if isinstance(temperature, Tensor):
        check_scalar(name, temperature, z, per_anchor=per_anchor)
        return temperature
    number = check_number(name, temperature)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {number}")
    if z is not None:
        dtype = compute_dtype(z)
        if number < torch.finfo(dtype).eps:
            raise ValueError(
                f"{name} must be at least {torch.finfo(dtype).eps:.2g} for a loss in {dtype}, "
                f"got {number}"
            )
    return number


def check_scalar(name: str, x: Tensor, z: Tensor | None, *, per_anchor: bool = False) -> None:
    """Raise unless ``x`` is a floating tensor of one value, where ``z`` is or on the CPU."""
    check_dense(name, x)
    one_each = per_anchor and isinstance(z, Tensor) and z.ndim > 0 and x.shape == z.shape[:1]
    if not x.is_floating_point() or not (x.numel() == 1 or one_each):
        several = ", or of one for each anchor, (N,)" if per_anchor else ""
        raise ValueError(
            f"{name} must be a number or a floating point tensor of one value{several}, got "
            f"{x.dtype} of shape {tuple(x.shape)}"
        )
    if z is not None and (x.device.type != "cpu" or x.ndim):
        check_device(name, x, "the embeddings", z)
    check_reverse_mode(name, x)


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False: any text, "no" too, would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_gathering(gather_distributed: object, process_group: object) -> None:
    """Raise if the flag is none, or a process group is given that would not be used."""
    check_flag("gather_distributed", gather_distributed)
    if process_group is not None and not gather_distributed:
        raise ValueError("process_group is used only with gather_distributed=True")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
