"""The parameters of views: how they are packed, and the numbers that callers pass.

They are one table, a float32 tensor whose last dimension is made of the fields of `ViewParameters`,
so that it is saved, sliced, moved and replayed like any other tensor.
"""

from collections.abc import Iterable
from contextlib import suppress
from itertools import accumulate
from numbers import Complex, Real
from typing import NamedTuple

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

CROP_TRIES = 10
# Uniform numbers of a sample of a view. Those of a step never move: a new step takes the first that
# no step has, so that the views of a seed stay what they are.
N_UNIFORMS = 64


class ViewParameters(NamedTuple):
    """The columns of a parameter table, by name. Each field is a view of the table.

    The field's shape is the table's without its last dimension, except `box` and `order`, which
    keep a last dimension of 4.

    Attributes:
        box: Top, left, height and width of the crop, in source pixels.
        flip: 1 where the view is flipped horizontally, else 0.
        jitter: 1 where the four color operations apply, else 0.
        order: The order of the color operations: 0 brightness, 1 contrast, 2 saturation, 3 hue.
        brightness: Brightness factor, 1 leaves the image alone.
        contrast: Contrast factor, 1 leaves the image alone.
        saturation: Saturation factor, 1 leaves the image alone.
        hue: Hue shift in turns, between -0.5 and 0.5.
        grayscale: 1 where the view loses its color, else 0.
        blur: 1 where the view is blurred, else 0.
        sigma: Standard deviation of the blur in output pixels.
        solarize: 1 where the view is solarized, else 0.
    """

    box: Tensor
    flip: Tensor
    jitter: Tensor
    order: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor


# A field is one column of the table, but for these.
_WIDE = {"box": 4, "order": 4}
_WIDTHS = [_WIDE.get(name, 1) for name in ViewParameters._fields]
N_COLUMNS = sum(_WIDTHS)
# The first column of each field.
COLUMN = dict(zip(ViewParameters._fields, accumulate([0, *_WIDTHS]), strict=False))


def unpack(table: Tensor) -> ViewParameters:
    """Name the columns of a parameter table.

    Args:
        table: A table as returned by ``SimCLRAugment(...)(images, return_params=True)``:
            ``(..., columns)``, floating.

    Returns:
        Views of the table, so writing to a field writes to the table.

    Raises:
        ValueError: If the last dimension is not that of a table.

    Example:
        >>> import torch
        >>> from contrastive_kit import SimCLRAugment
        >>> _, table = SimCLRAugment(8)(torch.rand(5, 3, 9, 9), return_params=True)
        >>> unpack(table).box.shape, unpack(table).hue.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 5]))
    """
    if table.shape[-1] != N_COLUMNS:
        raise ValueError(
            f"table must have {N_COLUMNS} columns in its last dimension, got {tuple(table.shape)}"
        )
    fields = zip(torch.split(table, _WIDTHS, dim=-1), _WIDTHS, strict=True)
    return ViewParameters(*(field if width > 1 else field[..., 0] for field, width in fields))


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """The table on a device; the copy to CUDA does not make the CPU wait."""
    if device.type == "cuda" and table.device.type == "cpu" and not torch.compiler.is_compiling():
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def to_number(name: str, value: object) -> float:
    """A real number of Python or NumPy, or a tensor of one value, as a float.

    Strings, bools and complex numbers raise.
    """
    is_complex = isinstance(value, Complex) and not isinstance(value, Real)
    is_bool = str(getattr(value, "dtype", type(value).__name__)) in ("bool", "torch.bool")
    if not isinstance(value, str | bytes) and not is_complex and not is_bool:
        with suppress(TypeError, ValueError, RuntimeError):
            return float(value)  # type: ignore[arg-type]
    raise TypeError(f"{name} must be a number, got {value!r}")


def several(value: object) -> bool:
    """Whether this holds values, as lists and arrays do, and is not one itself."""
    # torch.compile of torch 2.9 cannot trace str | bytes.
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return False
    return bool(getattr(value, "ndim", 1))


def to_numbers(name: str, values: object) -> tuple[float, ...]:
    """Numbers as floats, where there must be several."""
    if not several(values) or getattr(values, "ndim", 1) != 1:
        raise TypeError(f"{name} must hold several numbers, got {values!r}")
    return tuple(to_number(name, value) for value in values)  # type: ignore[attr-defined]


def to_probability(name: str, value: object) -> float:
    """A number between 0 and 1, as a float."""
    probability = to_number(name, value)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"{name} must be a probability between 0 and 1, got {value}")
    return probability
