"""What a view is: the options of a recipe, how its parameters are distributed, and presets.

One call draws one ``torch.rand``; everything a view does follows from its row of uniform numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from contrastive_kit._checks import check_choice, check_flag
from contrastive_kit.augment import functional
from contrastive_kit.augment.parameters import (
    CROP_TRIES,
    several,
    to_number,
    to_numbers,
    to_probability,
)

IMAGENET_NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Range = tuple[float, float]
# One probability for all views, or one a view.
Probability = float | Sequence[float]


def _flag(name: str, value: bool) -> bool:
    check_flag(name, value)
    return value


def _one_of(*choices: str) -> Callable[[str, str], str]:
    def check(name: str, value: str) -> str:
        check_choice(name, value, choices)
        return value

    return check


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return int(value)


def _probabilities(name: str, value: object) -> Probability:
    """One probability for all views, or one a view."""
    if not several(value):
        return to_probability(name, value)
    return tuple(to_probability(name, number) for number in to_numbers(name, value))


def _blur(name: str, value: object) -> Probability | Literal["auto"]:
    if isinstance(value, bool):
        return 0.5 if value else 0.0
    if isinstance(value, str):
        if value == "auto":
            return "auto"
        raise ValueError(f"{name} must be a bool, 'auto' or a probability, got {value!r}")
    return _probabilities(name, value)


def _range(high: float) -> Callable[[str, object], Range]:
    def check(name: str, value: object) -> Range:
        ends = to_numbers(name, value)
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= high:
            raise ValueError(
                f"{name} must be a range (low, high) with 0.0 <= low <= high <= {high}, got {value}"
            )
        if ends[0] == 0 or ends[1] == math.inf:
            finite = " and finite" if high == math.inf else ""
            raise ValueError(f"{name} must be positive{finite}, got {ends}")
        return ends[0], ends[1]

    return check


def _threshold(name: str, value: object) -> float:
    threshold = to_number(name, value)
    if not 0 <= threshold <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {threshold}")
    return threshold


def _normalization(
    name: str, normalize: object
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if normalize is None:
        return None
    try:
        mean, std = (tuple(float(value) for value in part) for part in normalize)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        mean = std = ()
    finite = all(map(math.isfinite, mean)) and all(0 < value < math.inf for value in std)
    if len(mean) != 3 or len(std) != 3 or not finite:
        raise ValueError(
            f"{name} must be three means and three positive standard deviations, all finite, "
            f"got {normalize!r}"
        )
    return mean, std


def _option(default: Any, check: Callable[[str, Any], Any], *, step: bool = False) -> Any:
    """A field: its default, and what turns a caller's value into the one kept, or raises.

    A `step` is left out of all views where its probability is 0.
    """
    return field(default=default, metadata={"check": check, "step": step})


def _each(probability: Probability) -> Sequence[float]:
    return (probability,) if isinstance(probability, (float, int)) else probability


class Options(TypedDict, total=False):
    """The options of a `Recipe` but for the size, for type checkers."""

    strength: float
    views: int
    blur: Probability | Literal["auto"]
    normalize: tuple[Sequence[float], Sequence[float]] | None
    scale: Range
    ratio: Range
    flip: float
    jitter: float
    colors: Sequence[float]
    grayscale: float
    sigma: Range
    kernel_size: int | None
    solarize: Probability
    solarize_threshold: float
    interpolation: Literal["bilinear", "bicubic"]
    antialias: bool
    contrast_mean: Literal["gray", "channel"]
    saturation_mode: Literal["gray", "hsv"]
    blur_padding: Literal["reflect", "zeros"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all views of a `SimCLRAugment` share; the defaults are SimCLR's at strength 1.

    The crop is distributed as torchvision's ``RandomResizedCrop.get_params``, its centered fallback
    included. Every gate, every factor and the order of the color operations is drawn per sample.
    A recipe is changed by ``dataclasses.replace(recipe, strength=0.5)``.

    Attributes:
        size: Height and width of the views in pixels, or both as one number.
        strength: s, the strength of the color jitter, not negative: 1 for ImageNet, 0.5 for CIFAR.
        views: How many views, at least 1.
        blur: The probability of the blur, one number for all views or one a view. True is 0.5,
            False is 0, and "auto" is 0.5 for views of 64 pixels and more and 0 below, as in the
            paper's appendix B.9.
        normalize: Mean and standard deviation of the three channels, subtracted and divided last;
            `IMAGENET_NORMALIZATION` for instance. The views stay in [0, 1] if None.
        scale: Range of the crop's area, as a fraction of the image's.
        ratio: Range of the crop's width over its height, log-uniform.
        flip: Probability of the horizontal flip.
        jitter: Probability of the four color operations.
        colors: Brightness, contrast, saturation and hue of the jitter at strength 1.
        grayscale: Probability of losing the color.
        sigma: Range of the blur's standard deviation, in pixels of the view.
        kernel_size: Odd number of taps of the blur; 10 % of the shorter side made odd if None.
        solarize: The probability of solarizing after the blur, one number or one a view.
        solarize_threshold: From it on pixels are inverted, in [0, 1].
        interpolation: "bilinear" or "bicubic", or torchvision's or Kornia's name for it.
        antialias: Low-pass when the crop shrinks.
        contrast_mean: Contrast about the "gray" mean (torchvision) or each "channel"'s
            (TensorFlow).
        saturation_mode: Saturation by blending with "gray" (torchvision) or in "hsv" (TensorFlow).
        blur_padding: "reflect" (torchvision) or "zeros" (TensorFlow).
        blur_probability: What `blur` means at this size; not an argument.
        taps: Of the blur along each axis, 0 where no view is blurred; not an argument.
        color_ranges: Of the factors of brightness, contrast and saturation, and of the hue's shift
            in turns; not an argument.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If a flag is not True or False, or something is no number where one must be.

    Example:
        >>> from dataclasses import replace
        >>> replace(CIFAR, strength=1.0).color_ranges[3]
        (-0.2, 0.2)
    """

    size: tuple[int, int] = _option((224, 224), lambda _, size: functional.check_size(size))
    strength: float = _option(1.0, to_number)
    views: int = _option(2, _positive_int)
    blur: Probability | Literal["auto"] = _option("auto", _blur, step=True)
    normalize: tuple[Sequence[float], Sequence[float]] | None = _option(None, _normalization)
    scale: Range = _option((0.08, 1.0), _range(1.0))
    ratio: Range = _option((3 / 4, 4 / 3), _range(math.inf))
    flip: float = _option(0.5, to_probability)
    jitter: float = _option(0.8, to_probability)
    colors: Sequence[float] = _option((0.8, 0.8, 0.8, 0.2), to_numbers)
    grayscale: float = _option(0.2, to_probability)
    sigma: Range = _option((0.1, 2.0), _range(math.inf))
    kernel_size: int | None = _option(None, lambda _, taps: taps)
    solarize: Probability = _option(0.0, _probabilities, step=True)
    solarize_threshold: float = _option(0.5, _threshold)
    interpolation: Literal["bilinear", "bicubic"] = _option(
        "bilinear", lambda _, interpolation: functional.check_interpolation(interpolation)
    )
    antialias: bool = _option(True, _flag)
    contrast_mean: Literal["gray", "channel"] = _option("gray", _one_of("gray", "channel"))
    saturation_mode: Literal["gray", "hsv"] = _option("gray", _one_of("gray", "hsv"))
    # check_kernel reads it.
    blur_padding: Literal["reflect", "zeros"] = _option("reflect", lambda _, padding: padding)
    blur_probability: Probability = field(init=False, repr=False, compare=False)
    taps: int = field(init=False, repr=False, compare=False)
    color_ranges: tuple[Range, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.init:
                value = option.metadata["check"](option.name, getattr(self, option.name))
                self._keep(option.name, value)
                several_views = option.metadata["step"] and isinstance(value, tuple)
                if several_views and len(value) != self.views:
                    raise ValueError(
                        f"{option.name} must be one probability or one for each of the "
                        f"{self.views} views, got {value}"
                    )
        blur = self.blur
        if blur == "auto":
            blur = 0.5 if min(self.size) >= 64 else 0.0
        kernel_size = self.kernel_size
        if kernel_size is None:
            kernel_size = max(3, min(self.size) // 10 // 2 * 2 + 1)
        # What is not blurred may be smaller than the kernel.
        blurred = self.size if any(_each(blur)) else ()
        radii = functional.check_kernel(kernel_size, blurred, self.blur_padding)
        if radii[0] != radii[1]:
            raise ValueError(f"kernel_size must be one for both axes, got {kernel_size}")
        taps = 2 * radii[0] + 1
        self._keep("kernel_size", None if self.kernel_size is None else taps)
        self._keep("blur_probability", blur)
        self._keep("taps", taps if blurred else 0)
        self._keep("color_ranges", _color_ranges(self.colors, self.strength))

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # what the dataclass itself does

    def makes(self, step: str) -> bool:
        """Whether some view may have this step: one that is left out where its probability is 0."""
        return any(_each(self.blur_probability if step == "blur" else getattr(self, step)))

    def steps(self, *, made: bool) -> list[str]:
        """The steps that some view may have, or those that none may, as their probability is 0."""
        steps = [option.name for option in fields(self) if option.metadata.get("step")]
        return [step for step in steps if self.makes(step) == made]

    def table(self, uniforms: Tensor, *, height: int | Tensor, width: int | Tensor) -> Tensor:
        """Turn uniform numbers into a parameter table; deterministic, without a host sync.

        Args:
            uniforms: ``(views, batch, 64)`` float32 in [0, 1); the last ones are for steps to come.
            height: Height of the images in pixels, or ``(batch,)`` where they differ.
            width: Width of the images in pixels, or ``(batch,)`` where they differ.

        Returns:
            The parameter table, ``(views, batch, columns)`` float32 on the device of `uniforms`.
        """
        area_u, ratio_u = uniforms[..., :CROP_TRIES], uniforms[..., CROP_TRIES : 2 * CROP_TRIES]
        order_u = uniforms[..., 2 * CROP_TRIES : 2 * CROP_TRIES + 4]
        (
            top_u, left_u, flip_u, jitter_u, *factors_u, grayscale_u, blur_u, sigma_u, solarize_u,
        ) = uniforms[..., 2 * CROP_TRIES + 4 : 36].unbind(-1)  # fmt: skip
        crop_height, crop_width = self._crop_shape(area_u, ratio_u, height, width)
        fallback_height, fallback_width = self._fallback_shape(height, width)
        missing = crop_height == 0
        room_y, room_x = height - crop_height, width - crop_width
        # u < 1, but u * n may round up to n in float32.
        top = (top_u * (room_y + 1)).floor().minimum(room_y)
        left = (left_u * (room_x + 1)).floor().minimum(room_x)
        order = order_u.argsort(dim=-1).to(uniforms.dtype)

        columns = [
            torch.where(missing, (height - fallback_height) // 2, top),
            torch.where(missing, (width - fallback_width) // 2, left),
            torch.where(missing, fallback_height, crop_height),
            torch.where(missing, fallback_width, crop_width),
            _gate(flip_u, self.flip),
            _gate(jitter_u, self.jitter),
            *order.unbind(-1),
            *(_scaled(u, ends) for u, ends in zip(factors_u, self.color_ranges, strict=True)),
            _gate(grayscale_u, self.grayscale),
            _view_gates(blur_u, self.blur_probability),
            _scaled(sigma_u, self.sigma),
            _view_gates(solarize_u, self.solarize),
        ]
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
        """The largest centered crop whose ratio is in range."""
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


def _view_gates(uniforms: Tensor, probability: Probability) -> Tensor:
    if isinstance(probability, (float, int)):  # torch.compile of torch 2.9 cannot trace float | int
        return _gate(uniforms, probability)
    return torch.stack([_gate(row, p) for row, p in zip(uniforms, probability, strict=True)])


def _color_ranges(colors: Sequence[float], strength: float) -> tuple[Range, ...]:
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and not negative, got {strength}")
    if len(colors) != 4 or not all(0 <= color < math.inf for color in colors):
        raise ValueError(f"colors must be four finite numbers, not negative, got {colors!r}")
    *factors, hue = (color * strength for color in colors)
    if hue > 0.5:
        raise ValueError(f"strength times the hue of colors must be at most 0.5, got {hue}")
    return *((max(0.0, 1 - factor), 1 + factor) for factor in factors), (-hue, hue)


IMAGENET = Recipe(blur=True)
"""The paper's ImageNet recipe: strength 1, blur."""

CIFAR = Recipe(strength=0.5, blur=False)
"""The paper's CIFAR-10 recipe (appendix B.9): strength 0.5, no blur."""

GOOGLE_RESEARCH = Recipe(
    interpolation="bicubic",
    antialias=False,
    contrast_mean="channel",
    saturation_mode="hsv",
    blur_padding="zeros",
)
"""The operations of the google-research/simclr code rather than torchvision's.

Bicubic resize without antialiasing, contrast about each channel's mean, saturation in HSV, blur
that sees black beyond the border. The crop's distribution, its half-pixel centers and the per-image
sigma stay torchvision's.
"""

BYOL = Recipe(
    colors=(0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2), interpolation="bicubic"
)
"""BYOL's asymmetric pair (Grill et al., 2020, table 6).

Weaker colors than SimCLR's; the first view is always blurred, the second with probability 0.1 and
solarized with probability 0.2.
"""
