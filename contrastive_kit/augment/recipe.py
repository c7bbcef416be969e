"""What a view is: the options of a recipe, how its parameters are distributed, and presets.

One call draws one ``torch.rand``; everything a view does follows from its row of uniform numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, TypedDict

import torch
from torch import Tensor

from contrastive_kit._checks import check_choice, check_flag
from contrastive_kit.augment import functional
from contrastive_kit.augment.parameters import (
    CROP_TRIES,
    N_USED,
    several,
    to_number,
    to_numbers,
    to_probability,
)

IMAGENET_NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Range = tuple[float, float]
# One probability for all views, or one a view.
Probability = float | Sequence[float]


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

    The crop is distributed as torchvision's ``RandomResizedCrop.get_params``, its centred fallback
    included. Every gate, every factor and the order of the colour operations is drawn per sample.
    A recipe is changed by ``dataclasses.replace(recipe, strength=0.5)``.

    Attributes:
        size: Height and width of the views in pixels, or both as one number.
        strength: s, the strength of the colour jitter, not negative: 1 for ImageNet, 0.5 for CIFAR.
        views: How many views, at least 1.
        blur: The probability of the blur, one number for all views or one a view. True is 0.5,
            False is 0, and "auto" is 0.5 for views of 64 pixels and more and 0 below, as in the
            paper's appendix B.9.
        normalize: Mean and standard deviation of the three channels, subtracted and divided last;
            `IMAGENET_NORMALIZATION` for instance. The views stay in [0, 1] if None.
        scale: Range of the crop's area, as a fraction of the image's.
        ratio: Range of the crop's width over its height, log-uniform.
        flip: Probability of the horizontal flip.
        jitter: Probability of the four colour operations.
        colors: Brightness, contrast, saturation and hue of the jitter at strength 1.
        grayscale: Probability of losing the colour.
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

    size: tuple[int, int] = (224, 224)
    strength: float = 1.0
    views: int = 2
    blur: Probability | Literal["auto"] = "auto"
    normalize: tuple[Sequence[float], Sequence[float]] | None = None
    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    colors: Sequence[float] = (0.8, 0.8, 0.8, 0.2)
    grayscale: float = 0.2
    sigma: Range = (0.1, 2.0)
    kernel_size: int | None = None
    solarize: Probability = 0.0
    solarize_threshold: float = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    contrast_mean: Literal["gray", "channel"] = "gray"
    saturation_mode: Literal["gray", "hsv"] = "gray"
    blur_padding: Literal["reflect", "zeros"] = "reflect"
    blur_probability: Probability = field(init=False, repr=False, compare=False)
    taps: int = field(init=False, repr=False, compare=False)
    color_ranges: tuple[Range, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_flag("antialias", self.antialias)
        check_choice("contrast_mean", self.contrast_mean, ("gray", "channel"))
        check_choice("saturation_mode", self.saturation_mode, ("gray", "hsv"))
        size, views = functional.check_size(self.size), _positive_int("views", self.views)
        blur: Probability | Literal["auto"] = self.blur
        if isinstance(blur, bool):
            blur = 0.5 if blur else 0.0
        elif not isinstance(blur, str):
            blur = _per_view("blur", blur, views)
        elif blur != "auto":
            raise ValueError(f"blur must be a bool, 'auto' or a probability, got {blur!r}")
        self._keep(
            size=size,
            views=views,
            blur=blur,
            normalize=_to_normalization(self.normalize),
            scale=_to_range("scale", self.scale, 0.0, 1.0),
            ratio=_to_range("ratio", self.ratio, 0.0, math.inf),
            sigma=_to_range("sigma", self.sigma, 0.0, math.inf),
            flip=to_probability("flip", self.flip),
            jitter=to_probability("jitter", self.jitter),
            grayscale=to_probability("grayscale", self.grayscale),
            solarize=_per_view("solarize", self.solarize, views),
            solarize_threshold=to_number("solarize_threshold", self.solarize_threshold),
            interpolation=functional.check_interpolation(self.interpolation),
            strength=to_number("strength", self.strength),
            colors=to_numbers("colors", self.colors),
        )
        if not 0 <= self.solarize_threshold <= 1:
            raise ValueError(f"solarize_threshold must be in [0, 1], got {self.solarize_threshold}")
        if self.scale[0] <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        for name in ("ratio", "sigma"):
            low, high = getattr(self, name)
            if low <= 0 or math.isinf(high):
                raise ValueError(f"{name} must be positive and finite, got {(low, high)}")
        if blur == "auto":
            blur = 0.5 if min(size) >= 64 else 0.0
        blurs = _any(blur)
        kernel_size = self.kernel_size
        if kernel_size is None:
            kernel_size = max(3, min(size) // 10 // 2 * 2 + 1)
        # What is not blurred may be smaller than the kernel.
        radii = functional.check_kernel(kernel_size, size if blurs else (), self.blur_padding)
        if radii[0] != radii[1]:
            raise ValueError(f"kernel_size must be one for both axes, got {kernel_size}")
        taps = 2 * radii[0] + 1
        self._keep(
            kernel_size=None if self.kernel_size is None else taps,
            blur_probability=blur,
            taps=taps if blurs else 0,
            color_ranges=_color_ranges(self.colors, self.strength),
        )

    def _keep(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)  # what the dataclass itself does

    @property
    def solarizes(self) -> bool:
        """Whether any view may be solarized."""
        return _any(self.solarize)

    def table(self, uniforms: Tensor, *, height: int | Tensor, width: int | Tensor) -> Tensor:
        """Turn uniform numbers into a parameter table; deterministic, without a host sync.

        Args:
            uniforms: ``(views, batch, 64)`` float32 in [0, 1). The last 28 are not used yet.
            height: Height of the images in pixels, or ``(batch,)`` where they differ.
            width: Width of the images in pixels, or ``(batch,)`` where they differ.

        Returns:
            The parameter table, ``(views, batch, 18)`` float32 on the device of `uniforms`.
        """
        area_u, ratio_u = uniforms[..., :CROP_TRIES], uniforms[..., CROP_TRIES : 2 * CROP_TRIES]
        order_u = uniforms[..., 2 * CROP_TRIES : 2 * CROP_TRIES + 4]
        (
            top_u, left_u, flip_u, jitter_u, *factors_u, grayscale_u, blur_u, sigma_u, solarize_u,
        ) = uniforms[..., 2 * CROP_TRIES + 4 : N_USED].unbind(-1)  # fmt: skip
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
            *(_scaled(u, ends) for u, ends in zip(factors_u, self.color_ranges, strict=True)),
            _gate(grayscale_u, self.grayscale),
            _view_gates(blur_u, self.blur_probability),
            _scaled(sigma_u, self.sigma),
            _view_gates(solarize_u, self.solarize),
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


def _view_gates(uniforms: Tensor, probability: Probability) -> Tensor:
    if isinstance(probability, (float, int)):  # torch.compile of torch 2.9 cannot trace float | int
        return _gate(uniforms, probability)
    return torch.stack([_gate(row, p) for row, p in zip(uniforms, probability, strict=True)])


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return int(value)


def _any(probability: Probability) -> bool:
    return any(probability) if isinstance(probability, Sequence) else probability > 0


def _per_view(name: str, value: object, views: int) -> Probability:
    """One probability for all views, or one a view."""
    if not several(value):
        return to_probability(name, value)
    numbers = to_numbers(name, value)
    if len(numbers) != views:
        raise ValueError(
            f"{name} must be one probability or one for each of the {views} views, got {numbers}"
        )
    return tuple(to_probability(name, number) for number in numbers)


def _to_range(name: str, value: object, low: float, high: float) -> tuple[float, float]:
    ends = to_numbers(name, value)
    if len(ends) != 2 or not low <= ends[0] <= ends[1] <= high:
        raise ValueError(
            f"{name} must be a range (low, high) with {low} <= low <= high <= {high}, got {value}"
        )
    return ends[0], ends[1]


def _color_ranges(colors: Sequence[float], strength: float) -> tuple[Range, ...]:
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and not negative, got {strength}")
    if len(colors) != 4 or not all(0 <= color < math.inf for color in colors):
        raise ValueError(f"colors must be four finite numbers, not negative, got {colors!r}")
    *factors, hue = (color * strength for color in colors)
    if hue > 0.5:
        raise ValueError(f"strength times the hue of colors must be at most 0.5, got {hue}")
    return *((max(0.0, 1 - factor), 1 + factor) for factor in factors), (-hue, hue)


def _to_normalization(normalize: object) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if normalize is None:
        return None
    try:
        mean, std = (tuple(float(value) for value in part) for part in normalize)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        mean = std = ()
    finite = all(map(math.isfinite, mean)) and all(0 < value < math.inf for value in std)
    if len(mean) != 3 or len(std) != 3 or not finite:
        raise ValueError(
            "normalize must be three means and three positive standard deviations, all finite, "
            f"got {normalize!r}"
        )
    return mean, std


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
that sees black beyond the border. The crop's distribution, its half-pixel centres and the per-image
sigma stay torchvision's.
"""

BYOL = Recipe(
    colors=(0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2), interpolation="bicubic"
)
"""BYOL's asymmetric pair (Grill et al., 2020, table 6).

Weaker colours than SimCLR's; the first view is always blurred, the second with probability 0.1 and
solarized with probability 0.2.
"""
