"""The random numbers of a view: what is drawn, how it is distributed, how it is packed.

One call draws one ``torch.rand``; everything a view does follows from that row of uniforms. The
result is a packed table, a float32 tensor whose last dimension has the columns named by
`ViewParameters`, so that it is saved, sliced, moved and replayed like any other tensor.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import IntEnum
from numbers import Complex, Real
from typing import NamedTuple

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

CROP_TRIES = 10
N_UNIFORMS = 2 * CROP_TRIES + 16


class Column(IntEnum):
    """The columns of a parameter table. The tensors of `ViewParameters` are made of these.

    The four columns from ORDER on hold the order of the colour operations, and the factor of an
    operation stands its number behind BRIGHTNESS.
    """

    TOP = 0
    LEFT = 1
    HEIGHT = 2
    WIDTH = 3
    FLIP = 4
    JITTER = 5
    ORDER = 6
    BRIGHTNESS = 10
    CONTRAST = 11
    SATURATION = 12
    HUE = 13
    GRAYSCALE = 14
    BLUR = 15
    SIGMA = 16
    SOLARIZE = 17


N_COLUMNS = max(Column) + 1
BOX = slice(Column.TOP, Column.FLIP)
ORDER = slice(Column.ORDER, Column.BRIGHTNESS)
FACTORS = slice(Column.BRIGHTNESS, Column.GRAYSCALE)


class ViewParameters(NamedTuple):
    """The columns of a parameter table, by name. Each field is a view of the table.

    The field's shape is the table's without its last dimension, except `box` and `order`, which
    keep a last dimension of 4.

    Attributes:
        box: Top, left, height and width of the crop, in source pixels.
        flip: 1 where the view is mirrored left to right, else 0.
        jitter: 1 where the four colour operations apply, else 0.
        order: The order of the colour operations: 0 brightness, 1 contrast, 2 saturation, 3 hue.
        brightness: Brightness factor, 1 leaves the image alone.
        contrast: Contrast factor, 1 leaves the image alone.
        saturation: Saturation factor, 1 leaves the image alone.
        hue: Hue shift in turns, between -0.5 and 0.5.
        grayscale: 1 where the view loses its colour, else 0.
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


def unpack(table: Tensor) -> ViewParameters:
    """Name the columns of a parameter table.

    Args:
        table: A table as drawn by `ViewDistribution` or returned by
            ``SimCLRAugment(...)(images, return_params=True)``: ``(..., 18)``, floating.

    Returns:
        Views of the table, so writing to a field writes to the table.

    Raises:
        ValueError: If the last dimension is not 18.

    Example:
        >>> import torch
        >>> table = ViewDistribution().draw(2, 5, height=32, width=32)
        >>> table.shape
        torch.Size([2, 5, 18])
        >>> unpack(table).box.shape, unpack(table).hue.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 5]))
    """
    if table.shape[-1] != N_COLUMNS:
        raise ValueError(
            f"table must have {N_COLUMNS} columns in its last dimension, got {tuple(table.shape)}"
        )
    flip, jitter = table[..., Column.FLIP], table[..., Column.JITTER]
    scalars = table[..., Column.BRIGHTNESS :].unbind(-1)
    return ViewParameters(table[..., BOX], flip, jitter, table[..., ORDER], *scalars)


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """The table on a device; the copy to CUDA does not make the CPU wait."""
    if device.type == "cuda" and table.device.type == "cpu" and not torch.compiler.is_compiling():
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def to_number(name: str, value: object) -> float:
    """A number of any kind, NumPy's and a tensor of one value too, as a float.

    Text is none, nor are True and False, nor complex numbers.
    """
    is_complex = isinstance(value, Complex) and not isinstance(value, Real)
    is_bool = str(getattr(value, "dtype", type(value).__name__)) in ("bool", "torch.bool")
    if not isinstance(value, str | bytes) and not is_complex and not is_bool:
        with suppress(TypeError, ValueError, RuntimeError):
            return float(value)  # type: ignore[arg-type]
    raise TypeError(f"{name} must be a number, got {value!r}")


def several(value: object) -> bool:
    """Whether this holds values, as lists and arrays do, and is not one itself."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
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


def _to_range(name: str, value: object, low: float, high: float) -> tuple[float, float]:
    ends = to_numbers(name, value)
    if len(ends) != 2 or not low <= ends[0] <= ends[1] <= high:
        raise ValueError(
            f"{name} must be a range (low, high) with {low} <= low <= high <= {high}, got {value}"
        )
    return ends[0], ends[1]


@dataclass(frozen=True)
class ViewDistribution:
    """How the parameters of a view are distributed; the defaults are SimCLR's at strength 1.

    The crop is distributed as torchvision's ``RandomResizedCrop.get_params``, its centred fallback
    included. Every gate, every factor and the order of the colour operations is drawn per sample.

    Attributes:
        scale: Range of the crop's area, as a fraction of the source's.
        ratio: Range of the crop's width over its height, log-uniform.
        flip: Probability of mirroring.
        jitter: Probability of the colour operations.
        brightness: Range of the brightness factor.
        contrast: Range of the contrast factor.
        saturation: Range of the saturation factor.
        hue: Range of the hue shift in turns, within -0.5 and 0.5.
        grayscale: Probability of losing the colour.
        blur: Probability of the blur, one number for all views or one a view.
        sigma: Range of the blur's standard deviation in output pixels.
        solarize: Probability of solarizing, one number for all views or one a view.

    Raises:
        TypeError: If a probability is no number, or a range not two.
        ValueError: If a probability or a range is out of its bounds.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: tuple[float, float] = (0.2, 1.8)
    contrast: tuple[float, float] = (0.2, 1.8)
    saturation: tuple[float, float] = (0.2, 1.8)
    hue: tuple[float, float] = (-0.2, 0.2)
    grayscale: float = 0.2
    blur: float | tuple[float, ...] = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        per_view = ("blur", "solarize")
        probabilities = ("flip", "jitter", "grayscale", *per_view)
        bounds = {"hue": (-0.5, 0.5), "scale": (0.0, 1.0)}
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name not in probabilities:
                value = _to_range(name, value, *bounds.get(name, (0.0, math.inf)))
            elif name in per_view and isinstance(value, tuple):
                value = tuple(to_probability(name, each) for each in value)
            else:
                value = to_probability(name, value)
            object.__setattr__(self, name, value)  # what the dataclass itself does
        if self.scale[0] <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        for name in ("ratio", "sigma"):
            low, high = getattr(self, name)
            if low <= 0 or math.isinf(high):
                raise ValueError(f"{name} must be positive and finite, got {(low, high)}")

    def draw(
        self,
        views: int,
        batch: int,
        *,
        height: int | Tensor,
        width: int | Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw the parameters of ``views`` independent views of ``batch`` images.

        Args:
            views: Number of views.
            batch: Number of images.
            height: Height of the images in pixels, or ``(batch,)`` where they differ.
            width: Width of the images in pixels, or ``(batch,)`` where they differ.
            generator: Where the random numbers come from, the default CPU generator if None. The
                table lies on the generator's device.

        Returns:
            The parameter table, ``(views, batch, 18)`` float32.

        Raises:
            ValueError: If `blur` or `solarize` holds another number of views.
        """
        device = torch.device("cpu") if generator is None else generator.device
        uniforms = torch.rand(
            views, batch, N_UNIFORMS, generator=generator, device=device, dtype=torch.float32
        )
        return self.table(uniforms, height=height, width=width)

    def table(self, uniforms: Tensor, *, height: int | Tensor, width: int | Tensor) -> Tensor:
        """Turn uniform numbers into a parameter table; deterministic, without a host sync.

        Args:
            uniforms: ``(views, batch, 36)`` float32 in [0, 1).
            height: Height of the images in pixels, or ``(batch,)`` where they differ.
            width: Width of the images in pixels, or ``(batch,)`` where they differ.

        Returns:
            The parameter table, ``(views, batch, 18)`` float32 on the device of `uniforms`.

        Raises:
            ValueError: If `blur` or `solarize` holds another number of views.
        """
        area_u, ratio_u = uniforms[..., :CROP_TRIES], uniforms[..., CROP_TRIES : 2 * CROP_TRIES]
        order_u = uniforms[..., 2 * CROP_TRIES : 2 * CROP_TRIES + 4]
        (
            top_u, left_u, flip_u, jitter_u, brightness_u, contrast_u, saturation_u,
            hue_u, grayscale_u, blur_u, sigma_u, solarize_u,
        ) = uniforms[..., 2 * CROP_TRIES + 4 :].unbind(-1)  # fmt: skip
        crop_height, crop_width = self._crop_shape(area_u, ratio_u, height, width)
        fallback_height, fallback_width = self._fallback_shape(height, width)
        missing = crop_height == 0
        room_y, room_x = height - crop_height, width - crop_width
        # u < 1, but u * n may round up to n in float32.
        top = (top_u * (room_y + 1)).floor().minimum(room_y)
        left = (left_u * (room_x + 1)).floor().minimum(room_x)
        order = order_u.argsort(dim=-1).to(uniforms.dtype)

        columns = (
            torch.where(missing, (height - fallback_height) // 2, top),
            torch.where(missing, (width - fallback_width) // 2, left),
            torch.where(missing, fallback_height, crop_height),
            torch.where(missing, fallback_width, crop_width),
            _gate(flip_u, self.flip),
            _gate(jitter_u, self.jitter),
            *order.unbind(-1),
            _scaled(brightness_u, self.brightness),
            _scaled(contrast_u, self.contrast),
            _scaled(saturation_u, self.saturation),
            _scaled(hue_u, self.hue),
            _gate(grayscale_u, self.grayscale),
            _view_gates("blur", blur_u, self.blur),
            _scaled(sigma_u, self.sigma),
            _view_gates("solarize", solarize_u, self.solarize),
        )
        return torch.stack(columns, dim=-1)

    def _crop_shape(
        self, area_u: Tensor, ratio_u: Tensor, height: int | Tensor, width: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The first of ten tries that fits into the image; zero where none does."""
        if isinstance(height, Tensor):
            height = height[:, None]
        if isinstance(width, Tensor):
            width = width[:, None]
        area = _scaled(area_u, self.scale) * (height * width)
        log_ratio = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        ratio = _scaled(ratio_u, log_ratio).exp()
        tried_width = (area * ratio).sqrt().round()
        tried_height = (area / ratio).sqrt().round()
        fits = (tried_width > 0) & (tried_width <= width)
        fits &= (tried_height > 0) & (tried_height <= height)
        rank = torch.arange(CROP_TRIES, 0, -1, device=fits.device)
        first = (fits * rank).argmax(dim=-1, keepdim=True)
        found = fits.any(dim=-1)
        crop_height = tried_height.gather(-1, first).squeeze(-1) * found
        return crop_height, tried_width.gather(-1, first).squeeze(-1) * found

    def _fallback_shape(
        self, height: int | Tensor, width: int | Tensor
    ) -> tuple[int | Tensor, int | Tensor]:
        """The largest centred crop whose ratio is in range."""
        narrowest, widest = self.ratio
        if isinstance(height, Tensor) or isinstance(width, Tensor):
            # Named, or as_tensor would move them to the default device.
            device = height.device if isinstance(height, Tensor) else width.device  # type: ignore[union-attr]
            height, width = (torch.as_tensor(side, device=device) for side in (height, width))
            tallest = (width / narrowest).round().clamp(min=1)
            longest = (height * widest).round().clamp(min=1)
            return torch.minimum(height, tallest), torch.minimum(width, longest)
        if width / height < narrowest:
            return max(round(width / narrowest), 1), width
        if width / height > widest:
            return height, max(round(height * widest), 1)
        return height, width


def _scaled(uniform: Tensor, bounds: tuple[float, float]) -> Tensor:
    return uniform * (bounds[1] - bounds[0]) + bounds[0]


def _gate(uniform: Tensor, probability: float) -> Tensor:
    return (uniform < probability).to(uniform.dtype)


def _view_gates(name: str, uniforms: Tensor, probability: float | tuple[float, ...]) -> Tensor:
    if isinstance(probability, (float, int)):  # torch.compile of torch 2.9 cannot trace float | int
        return _gate(uniforms, probability)
    if len(probability) != uniforms.shape[0]:
        raise ValueError(
            f"{name} must be one probability or one for each of the {uniforms.shape[0]} views, "
            f"got {probability}"
        )
    return torch.stack([_gate(row, p) for row, p in zip(uniforms, probability, strict=True)])
