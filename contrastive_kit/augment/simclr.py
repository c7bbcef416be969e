"""SimCLR's stochastic augmentation: V independent views of a batch, in one call."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from contrastive_kit._checks import check_flag
from contrastive_kit.augment import _cpu, _triton, _view, functional
from contrastive_kit.augment._random import Draws
from contrastive_kit.augment.parameters import (
    N_COLUMNS,
    N_UNIFORMS,
    ORDER,
    Column,
    ViewDistribution,
    to_device,
    to_number,
    to_numbers,
    unpack,
)

IMAGENET_NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_BACKENDS = ("cpu", "triton", "torch")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Blur = bool | float | Sequence[float] | Literal["auto"]
Normalization = tuple[Sequence[float], Sequence[float]]
Images = Tensor | Sequence[Tensor]


class SimCLRAugment(Draws):
    r"""Independent random views of each image: crop, flip, colour jitter, grayscale, blur.

    The augmentation of SimCLR (Chen et al., 2020, appendix A), with torchvision's definition of
    each operation: an antialiased bilinear ``RandomResizedCrop``, a mirror image with probability
    0.5, ``ColorJitter(0.8s, 0.8s, 0.8s, 0.2s)`` with probability 0.8, grayscale with probability
    0.2, and a Gaussian blur over 10 % of the side with probability 0.5. Every sample has parameters
    of its own, the order of its colour operations included.

    uint8 images are cropped in uint8 and coloured in floats, as torchvision's tensor transforms do;
    feed uint8 where you can, for it is 4 times less to move and faster to crop.

    All random numbers come from one ``torch.rand`` on the CPU (or on the generator's device), so
    the same seed gives the same views on every device. Nothing waits for the GPU.

    Beside the result the CPU backend needs a few MB and the torch backend about ten times the
    result. The Triton backend needs 3 bytes a pixel for uint8 images and 12 for floats; if there is
    a blur, 12 more for uint8 images and 12 more for views in half precision.

    Args:
        size: Height and width of the views in pixels, or both as one number.
        strength: s, the strength of the colour jitter, not negative: 1 for ImageNet, 0.5 for CIFAR.
        views: How many views, at least 1.
        blur: The probability of the blur, one number for all views or one a view. True is 0.5,
            False is 0, and "auto" is 0.5 for views of 64 pixels and more and 0 below, as in the
            paper's appendix B.9.
        normalize: Mean and standard deviation of the three channels, subtracted and divided last;
            `IMAGENET_NORMALIZATION` for instance. The views stay in [0, 1] if None.
        generator: Where the random numbers come from; the default CPU generator if None. In
            DataLoader workers, and on other ranks than the first, one on the CPU gives each worker,
            epoch and rank numbers of its own.
        backend: "cpu" (in place, in chunks), "triton" (fused kernels on a CUDA device), "torch"
            (batched; any device, differentiable), or "auto": the first of these that takes the
            images.
        scale: Range of the crop's area, as a fraction of the image's.
        ratio: Range of the crop's width over its height.
        flip: Probability of the mirror image.
        jitter: Probability of the four colour operations.
        colors: Brightness, contrast, saturation and hue of the jitter at strength 1.
        grayscale: Probability of losing the colour.
        sigma: Range of the blur's standard deviation, in pixels of the view.
        kernel_size: Odd number of taps of the blur; 10 % of the shorter side made odd if None.
        solarize: The probability of solarizing after the blur, one number or one a view.
        solarize_threshold: Above it pixels are inverted, in [0, 1].
        interpolation: "bilinear" or "bicubic", or torchvision's or Kornia's name for it.
        antialias: Low-pass when the crop shrinks.
        contrast_mean: Contrast about the "gray" mean (torchvision) or each "channel"'s
            (TensorFlow).
        saturation_mode: Saturation by blending with "gray" (torchvision) or in "hsv" (TensorFlow).
        blur_padding: "reflect" (torchvision) or "zeros" (TensorFlow).
        dtype: Of the views: float32, float16, bfloat16 or float64.
        memory_format: Of the views: ``torch.contiguous_format`` or ``torch.channels_last``.
        check_values: Raise where floats lie outside [0, 1]. Waits for the GPU. Without it the CPU
            backend warns, once, where it meets some among the first views of a call.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If `dtype` is not floating, a flag is not True or False, or something is no
            number where one must be.

    Example:
        >>> import torch
        >>> augment = SimCLRAugment(32, strength=0.5, generator=torch.Generator().manual_seed(0))
        >>> images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> (v1, v2), params = augment(images, return_params=True)
        >>> v1.shape, v1.dtype, params.shape
        (torch.Size([8, 3, 32, 32]), torch.float32, torch.Size([2, 8, 18]))
        >>> again, _ = augment(images, params=params)
        >>> torch.equal(v1, again)
        True
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        strength: float = 1.0,
        views: int = 2,
        blur: Blur = "auto",
        normalize: Normalization | None = None,
        generator: torch.Generator | None = None,
        backend: Literal["auto", "cpu", "triton", "torch"] = "auto",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: float = 0.8,
        colors: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2),
        grayscale: float = 0.2,
        sigma: tuple[float, float] = (0.1, 2.0),
        kernel_size: int | None = None,
        solarize: float | Sequence[float] = 0.0,
        solarize_threshold: float = 0.5,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        antialias: bool = True,
        contrast_mean: Literal["gray", "channel"] = "gray",
        saturation_mode: Literal["gray", "hsv"] = "gray",
        blur_padding: Literal["reflect", "zeros"] = "reflect",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        check_values: bool = False,
    ) -> None:
        super().__init__()
        shape = functional.check_size(size)
        views = _positive_int("views", views)
        if backend not in ("auto", *_BACKENDS):
            raise ValueError(f"backend must be 'auto', 'cpu', 'triton' or 'torch', got {backend!r}")
        if dtype not in _DTYPES:
            raise TypeError(
                f"dtype must be floating: torch.float32, float16, bfloat16 or float64; got {dtype}"
            )
        check_flag("antialias", antialias)
        check_flag("check_values", check_values)
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError(
                "memory_format must be torch.contiguous_format or torch.channels_last, "
                f"got {memory_format}"
            )
        interpolation = functional.check_interpolation(interpolation)
        if contrast_mean not in ("gray", "channel"):
            raise ValueError(f"contrast_mean must be 'gray' or 'channel', got {contrast_mean!r}")
        if saturation_mode not in ("gray", "hsv"):
            raise ValueError(f"saturation_mode must be 'gray' or 'hsv', got {saturation_mode!r}")
        solarize_threshold = to_number("solarize_threshold", solarize_threshold)
        if not 0 <= solarize_threshold <= 1:
            raise ValueError(f"solarize_threshold must be in [0, 1], got {solarize_threshold}")
        blur_probability = _blur_probability(blur, shape)
        solarize_probability = _per_view("solarize", solarize)
        for name, probability in (("blur", blur_probability), ("solarize", solarize_probability)):
            if isinstance(probability, tuple) and len(probability) != views:
                raise ValueError(
                    f"{name} must be one probability or one for each of the {views} views, "
                    f"got {probability}"
                )
        if kernel_size is None:
            kernel_size = max(3, min(shape) // 10 // 2 * 2 + 1)
        # What is not blurred may be smaller than the kernel.
        blurred = shape if _any(blur_probability) else ()
        radii = functional.check_kernel(kernel_size, blurred, blur_padding)
        if radii[0] != radii[1]:
            raise ValueError(f"kernel_size must be one for both axes, got {kernel_size}")
        brightness, contrast, saturation, hue = _jitter_ranges(colors, strength)
        self.views = views
        self.strength = strength
        self.generator = generator
        self.backend = backend
        self.dtype = dtype
        self.memory_format = memory_format
        self.check_values = check_values
        self.distribution = ViewDistribution(
            scale=scale,
            ratio=ratio,
            flip=flip,
            jitter=jitter,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            grayscale=grayscale,
            blur=blur_probability,
            sigma=sigma,
            solarize=solarize_probability,
        )
        mean, std = _normalization(normalize)
        self.settings = _view.ViewSettings(
            size=shape,
            interpolation=interpolation,
            antialias=antialias,
            contrast_mean=contrast_mean,
            saturation_mode=saturation_mode,
            kernel_size=2 * radii[0] + 1 if _any(blur_probability) else 0,
            blur_padding=blur_padding,
            solarize_threshold=solarize_threshold if _any(solarize_probability) else None,
            mean=mean,
            std=std,
        )

    @classmethod
    def imagenet(cls, size: int | tuple[int, int] = 224, **options: Any) -> "SimCLRAugment":
        """The paper's ImageNet recipe: strength 1, blur.

        Args:
            size: Height and width of the views.
            options: Any other argument of `SimCLRAugment`.
        """
        return cls(size, **{"strength": 1.0, "blur": True, **options})

    @classmethod
    def cifar(cls, size: int | tuple[int, int] = 32, **options: Any) -> "SimCLRAugment":
        """The paper's CIFAR-10 recipe (appendix B.9): strength 0.5, no blur.

        Args:
            size: Height and width of the views.
            options: Any other argument of `SimCLRAugment`.
        """
        return cls(size, **{"strength": 0.5, "blur": False, **options})

    @classmethod
    def google_research(cls, size: int | tuple[int, int] = 224, **options: Any) -> "SimCLRAugment":
        """The operations of the google-research/simclr code rather than torchvision's.

        Bicubic resize without antialiasing, contrast about each channel's mean, saturation in HSV,
        blur that sees black beyond the border. The crop's distribution, its half-pixel centres and
        the per-image sigma stay torchvision's.

        Args:
            size: Height and width of the views.
            options: Any other argument of `SimCLRAugment`.
        """
        flavour = {
            "interpolation": "bicubic",
            "antialias": False,
            "contrast_mean": "channel",
            "saturation_mode": "hsv",
            "blur_padding": "zeros",
        }
        return cls(size, **{**flavour, **options})

    @classmethod
    def byol(cls, size: int | tuple[int, int] = 224, **options: Any) -> "SimCLRAugment":
        """BYOL's asymmetric pair (Grill et al., 2020, table 6).

        Weaker colours than SimCLR's; the first view is always blurred, the second with probability
        0.1 and solarized with probability 0.2.

        Args:
            size: Height and width of the views.
            options: Any other argument of `SimCLRAugment`.
        """
        recipe = {
            "colors": (0.4, 0.4, 0.2, 0.1),
            "blur": (1.0, 0.1),
            "solarize": (0.0, 0.2),
            "interpolation": "bicubic",
        }
        return cls(size, **{**recipe, **options})

    def draw(self, images: Images) -> Tensor:
        """Draw the parameters of the views of these images, without making the views.

        A generator of one's own in the same state gives the same table on every rank: to divide a
        table of the whole batch among the ranks.

        Args:
            images: ``(B, 3, H, W)``, or a list of B images ``(3, H_i, W_i)``.

        Returns:
            The parameter table, ``(views, B, 18)`` float32 on the generator's device;
            `contrastive_kit.augment.parameters.unpack` names its columns.
        """
        return self._table(images, by_rank=False)

    def _table(self, images: Images, *, by_rank: bool) -> Tensor:
        _check_images(images)
        if isinstance(images, Tensor):
            height: int | Tensor = images.shape[-2]
            width: int | Tensor = images.shape[-1]
        else:
            device = "cpu" if self.generator is None else self.generator.device
            height, width = torch.tensor(
                [image.shape[-2:] for image in images], dtype=torch.float32, device=device
            ).unbind(-1)
        uniforms = self.uniforms(self.views, len(images), N_UNIFORMS, by_rank=by_rank)
        return self.distribution.table(uniforms, height=height, width=width)

    def forward(
        self,
        images: Images,
        *,
        params: Tensor | None = None,
        return_params: bool = False,
        concat: bool = False,
    ) -> Any:
        """Make the views.

        Args:
            images: ``(B, 3, H, W)``, or a list of B images ``(3, H_i, W_i)`` of one dtype on one
                device; uint8, or floating in [0, 1].
            params: A parameter table, to make the same views again or views of one's own.
            return_params: Return the parameter table too.
            concat: Return the views as one batch.

        Returns:
            A tuple of `views` tensors ``(B, 3, *size)`` that share one buffer; with `concat` that
            buffer, ``(views · B, 3, *size)``, view by view. With `return_params` a pair of that
            and the parameter table.

        Raises:
            ValueError: If a shape does not fit, the named backend does not take the images, or
                `check_values` finds some out of range. If `params` on the CPU are not finite, or
                hold a box that is not inside its image, an order of the colour operations that is
                none, a sigma of 0 for a blur, or a blur or a solarization where this module has a
                probability of 0 for it.
            TypeError: If the images are neither uint8 nor floating, or `params` are not floating.
        """
        first = _check_images(images)
        check_flag("return_params", return_params)
        check_flag("concat", concat)
        if self.check_values:
            _check_range(images)
        if params is None:
            table = self._table(images, by_rank=True)
        else:
            table = self._check_params(params, images)
        batch = self._render(images, to_device(table.float(), first.device))
        views = batch if concat else batch.chunk(self.views)
        return (views, table) if return_params else views

    def _render(self, images: Images, table: Tensor) -> Tensor:
        backend: str = self.backend
        if backend == "auto":
            backend = next(name for name in _BACKENDS if not self._refusal(name, images))
        elif refusal := self._refusal(backend, images):
            raise ValueError(f"backend {backend!r} {refusal}")
        if backend == "torch":
            batch = _view.render(images, table, self.settings)
            return batch.to(self.dtype, memory_format=self.memory_format)
        shape = (table.shape[0] * table.shape[1], 3, *self.settings.size)
        out = torch.empty(
            shape, dtype=self.dtype, device=table.device, memory_format=self.memory_format
        )
        if isinstance(images, Tensor) and backend == "triton":
            _triton.render(images, table, self.settings, out)
        else:
            _cpu.render(images, table, self.settings, out)
        return out

    def _refusal(self, backend: str, images: Images) -> str:
        """Why this backend does not take these images; empty if it does."""
        if backend == "cpu":
            return _cpu_refusal(images)
        if backend == "triton":
            return _triton.refusal(images, self.settings, self.dtype)
        return ""

    def _check_params(self, params: Tensor, images: Images) -> Tensor:
        expected = (self.views, len(images), N_COLUMNS)
        if not isinstance(params, Tensor) or params.shape != expected:
            got = tuple(params.shape) if isinstance(params, Tensor) else type(params).__name__
            raise ValueError(f"params must be a tensor of shape {expected}, got {got}")
        if not params.is_floating_point():
            raise TypeError(f"params must be floating, got {params.dtype}")
        if params.device.type == "cpu" and not torch.compiler.is_compiling():
            box = unpack(params).box
            for number, image in enumerate(images if not isinstance(images, Tensor) else ()):
                functional.check_boxes(box[:, number], image.shape[-2], image.shape[-1])
            if isinstance(images, Tensor):
                functional.check_boxes(box, images.shape[-2], images.shape[-1])
            self._check_operations(params)
        return params

    def _check_operations(self, params: Tensor) -> None:
        """Raise where a table asks for what cannot be done, instead of leaving it out."""
        if not bool(params.isfinite().all()):
            raise ValueError("params must be finite, got NaN or inf")
        p = unpack(params)
        no_order = (p.order.sort(dim=-1).values != torch.arange(4, device="cpu")).any(dim=-1)
        no_order &= p.jitter != 0
        # Read, if not followed, also where nothing is jittered.
        no_order |= ((p.order < 0) | (p.order > 3)).any(dim=-1)
        if bool(no_order.any()):
            raise ValueError(
                "params must hold each of 0, 1, 2 and 3 once in the columns of the order, "
                f"{int(ORDER.start)} to {int(ORDER.stop) - 1}, got {p.order[no_order][0].tolist()}"
            )
        for name, column, asked, made in (
            ("blur", Column.BLUR, p.blur, self.settings.kernel_size),
            ("solarize", Column.SOLARIZE, p.solarize, self.settings.solarize_threshold is not None),
        ):
            if not made and bool(asked.any()):
                raise ValueError(
                    f"params must have 0 in column {column:d}, as this SimCLRAugment has {name}=0; "
                    f"got another number for {int(asked.count_nonzero())} of {asked.numel()} views"
                )
        no_sigma = (p.blur != 0) & (p.sigma <= 0)
        if bool(no_sigma.any()):
            raise ValueError(
                f"params must hold a positive sigma in column {Column.SIGMA:d} where column "
                f"{Column.BLUR:d} asks for a blur, got {float(p.sigma[no_sigma][0])}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # torch.save pickles by protocol 2, which knows no torch.memory_format.
        return {**super().__getstate__(), "memory_format": str(self.memory_format)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        name = state["memory_format"].removeprefix("torch.")
        super().__setstate__({**state, "memory_format": getattr(torch, name)})

    def extra_repr(self) -> str:
        """The recipe, as ``repr`` shows it."""
        d, s = self.distribution, self.settings
        parts = [
            f"size={s.size}",
            f"views={self.views}",
            f"scale={d.scale}",
            f"flip={d.flip}",
            f"strength={self.strength}, jitter={d.jitter}: brightness={_rounded(d.brightness)}, "
            f"contrast={_rounded(d.contrast)}, saturation={_rounded(d.saturation)}, "
            f"hue={_rounded(d.hue)}",
            f"grayscale={d.grayscale}",
            f"blur={d.blur}, kernel_size={s.kernel_size}, sigma={d.sigma}"
            if s.kernel_size
            else "blur=False",
        ]
        if s.solarize_threshold is not None:
            parts.append(f"solarize={d.solarize}")
        if s.mean is not None:
            parts.append(f"normalize=({s.mean}, {s.std})")
        for name, default in _view.ViewSettings._field_defaults.items():
            if name in ("interpolation", "antialias", "contrast_mean", "saturation_mode"):
                value = getattr(s, name)
                if value != default:
                    parts.append(f"{name}={value!r}")
        parts.append(f"dtype={self.dtype}, backend={self.backend!r}")
        return "\n".join(parts)


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return int(value)


def _blur_probability(blur: Blur, shape: tuple[int, int]) -> float | tuple[float, ...]:
    if isinstance(blur, str):
        if blur != "auto":
            raise ValueError(f"blur must be a bool, 'auto' or a probability, got {blur!r}")
        return 0.5 if min(shape) >= 64 else 0.0
    if isinstance(blur, bool):
        return 0.5 if blur else 0.0
    return _per_view("blur", blur)


def _per_view(name: str, probability: float | Sequence[float]) -> float | tuple[float, ...]:
    """One number for all views, or one a view."""
    several = isinstance(probability, Sequence) and not isinstance(probability, str)
    if several or getattr(probability, "ndim", False):
        return to_numbers(name, probability)
    return to_number(name, probability)


def _any(probability: float | tuple[float, ...]) -> bool:
    return any(probability) if isinstance(probability, tuple) else probability > 0


def _jitter_ranges(
    colors: Sequence[float], strength: float
) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]:
    strength, colors = to_number("strength", strength), to_numbers("colors", colors)
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and not negative, got {strength}")
    if len(colors) != 4 or not all(0 <= color < math.inf for color in colors):
        raise ValueError(f"colors must be four finite numbers, not negative, got {colors!r}")
    brightness, contrast, saturation, hue = (color * strength for color in colors)
    if hue > 0.5:
        raise ValueError(f"strength times the hue of colors must be at most 0.5, got {hue}")
    return (
        (max(0.0, 1 - brightness), 1 + brightness),
        (max(0.0, 1 - contrast), 1 + contrast),
        (max(0.0, 1 - saturation), 1 + saturation),
        (-hue, hue),
    )


def _normalization(
    normalize: Normalization | None,
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if normalize is None:
        return None, None
    try:
        mean, std = (tuple(float(value) for value in part) for part in normalize)
    except (TypeError, ValueError):
        mean = std = ()
    finite = all(map(math.isfinite, mean)) and all(0 < value < math.inf for value in std)
    if len(mean) != 3 or len(std) != 3 or not finite:
        raise ValueError(
            "normalize must be three means and three positive standard deviations, all finite, "
            f"got {normalize!r}"
        )
    return mean, std


def _check_images(images: Images) -> Tensor:
    """Return the batch, or the first of the images, if they can be augmented, else raise."""
    if isinstance(images, Tensor):
        return functional.check_images(images, channels=3)
    if not isinstance(images, Sequence) or not images:
        raise TypeError(
            f"images must be a tensor or a non-empty list of tensors, got {type(images).__name__}; "
            "PIL images become tensors by torchvision.transforms.functional.pil_to_tensor"
        )
    for image in images:
        if not isinstance(image, Tensor) or image.ndim != 3:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"images in a list must be tensors (3, H, W), got {got}")
        functional.check_images(image[None], channels=3)
        if image.dtype != images[0].dtype or image.device != images[0].device:
            raise ValueError(
                "images must have one dtype and one device, got "
                f"{images[0].dtype} on {images[0].device} and {image.dtype} on {image.device}"
            )
    return images[0]


def _check_range(images: Images) -> None:
    for part in (images,) if isinstance(images, Tensor) else images:
        if part.is_floating_point() and part.numel():
            low, high = part.aminmax()
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"images must lie in [0, 1], got values from {low.item()} to {high.item()}"
                )


def _cpu_refusal(images: Images) -> str:
    """Why the CPU backend does not take these images; empty if it does."""
    parts = (images,) if isinstance(images, Tensor) else images
    if parts[0].device.type != "cpu":
        return f"takes images on the CPU, got them on {parts[0].device}"
    if parts[0].dtype == torch.float64:
        return "takes uint8, float32 and half precision, got float64"
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return "is not differentiable, got images that require a gradient"
    if torch.compiler.is_compiling():
        return "cannot be traced by torch.compile"
    return ""


def _rounded(bounds: tuple[float, float]) -> tuple[float, float]:
    return round(bounds[0], 4), round(bounds[1], 4)
