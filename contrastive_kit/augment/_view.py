"""What a view is, once its parameters are drawn, and the backends that make it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from contrastive_kit.augment import functional
from contrastive_kit.augment.parameters import unpack


class ViewSettings(NamedTuple):
    """What all samples of all views share.

    Attributes:
        size: Height and width of a view.
        interpolation: Of the crop.
        antialias: Of the crop.
        contrast_mean: As in `functional.adjust_contrast`.
        saturation_mode: As in `functional.adjust_saturation`.
        kernel_size: Taps of the blur along each axis; 0 where nothing is blurred.
        blur_padding: As in `functional.gaussian_blur`.
        solarize_threshold: As in `functional.solarize`; None where nothing is solarized.
        mean: Subtracted from each channel at the end.
        std: Each channel is divided by it at the end.
    """

    size: tuple[int, int]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    contrast_mean: Literal["gray", "channel"] = "gray"
    saturation_mode: Literal["gray", "hsv"] = "gray"
    kernel_size: int = 0
    blur_padding: Literal["reflect", "zeros"] = "reflect"
    solarize_threshold: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def render(images: Tensor | Sequence[Tensor], table: Tensor, settings: ViewSettings) -> Tensor:
    """Make views with batched torch operations: any device, differentiable, no host sync on CUDA.

    Args:
        images: ``(B, 3, H, W)`` or B images ``(3, H_i, W_i)``.
        table: ``(V, B, 18)`` on the device of the images.
        settings: What the samples share.

    Returns:
        ``(V · B, 3, *size)``, view by view; float32, or float64 for float64 images.
    """
    if isinstance(images, Tensor):
        x = torch.cat([_crop(_at_least_float32(images), rows, settings) for rows in table])
    else:
        x = torch.cat(
            [
                _crop(_at_least_float32(image[None]), row[None], settings)
                for rows in table
                for image, row in zip(images, rows, strict=True)
            ]
        )
    p = unpack(table.flatten(0, 1))
    x = functional.color_jitter(
        x,
        p.order,
        p.brightness,
        p.contrast,
        p.saturation,
        p.hue,
        apply=p.jitter,
        contrast_mean=settings.contrast_mean,
        saturation_mode=settings.saturation_mode,
    )
    x = functional.grayscale(x, apply=p.grayscale)
    if settings.kernel_size:
        x = functional.gaussian_blur(
            x,
            p.sigma,
            kernel_size=settings.kernel_size,
            padding=settings.blur_padding,
            apply=p.blur,
        )
    if settings.solarize_threshold is not None:
        x = functional.solarize(x, settings.solarize_threshold, apply=p.solarize)
    if settings.mean is None or settings.std is None:
        return x
    channels = [
        (channel - mean) / std
        for channel, mean, std in zip(x.unbind(1), settings.mean, settings.std, strict=True)
    ]
    return torch.stack(channels, dim=1)


def _at_least_float32(images: Tensor) -> Tensor:
    return images.float() if images.dtype in (torch.float16, torch.bfloat16) else images


def _crop(images: Tensor, rows: Tensor, settings: ViewSettings) -> Tensor:
    p = unpack(rows)
    x = functional.crop_resize(
        images,
        p.box,
        settings.size,
        flip=p.flip,
        interpolation=settings.interpolation,
        antialias=settings.antialias,
    )
    return x.clamp(0, 1) if settings.interpolation == "bicubic" and x.is_floating_point() else x
