"""What callers may pass. Every message names the argument, what was expected and what came."""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from contrastive_kit._dtypes import compute_dtype

# Torch stores these integers, but searches and reduces none of them.
_HARDLY_SUPPORTED = (torch.uint16, torch.uint32, torch.uint64)


def check_embeddings(name: str, x: Tensor, ndim: int = 2) -> None:
    """Raise unless ``x`` is a floating tensor of ``ndim`` dimensions and no dimension is 0."""
    shape = {2: "(N, D)", 3: "(N, K, D)"}[ndim]
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(x).__name__}")
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
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape ({n},), got {ids!r}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {ids.dtype}")
    if ids.dtype in _HARDLY_SUPPORTED:
        raise TypeError(f"{name} must hold signed integers or uint8, got {ids.dtype}")
    if ids.shape != (n,):
        raise ValueError(
            f"{name} must have shape ({n},), one id for each row of {other_name}, "
            f"got {tuple(ids.shape)}"
        )
    check_device(name, ids, other_name, other)


def check_temperature(temperature: float | Tensor, z: Tensor | None = None) -> None:
    """Raise unless ``temperature`` is a finite number above 0, or a floating tensor of one value.

    A tensor must be where the embeddings ``z`` are, or a scalar on the CPU. A number must leave
    logits between which the dtype of the loss can tell 1 apart, or exp of their rounding overflows.

    The value of a tensor is not read: that would wait for the device. A temperature tensor that
    is not positive gives a NaN loss.
    """
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point() or temperature.numel() != 1:
            raise ValueError(
                "temperature must be a number or a floating point tensor of one value, got "
                f"{temperature.dtype} of shape {tuple(temperature.shape)}"
            )
        if z is not None and (temperature.device.type != "cpu" or temperature.ndim):
            check_device("temperature", temperature, "the embeddings", z)
        return
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number or a tensor, got {temperature!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    if z is not None:
        dtype = compute_dtype(z)
        if temperature < torch.finfo(dtype).eps:
            raise ValueError(
                f"temperature must be at least {torch.finfo(dtype).eps:.2g} for a loss in {dtype}, "
                f"got {temperature}"
            )


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
