"""Views by batched torch operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_kit.augment import functional
from contrastive_kit.augment.parameters import unpack
from contrastive_kit.augment.recipe import Recipe


def refusal(images: Tensor | Sequence[Tensor], recipe: Recipe, dtype: torch.dtype) -> None:
    """None: it takes all images."""


def render(
    images: Tensor | Sequence[Tensor],
    table: Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Make views with batched torch operations: any device, differentiable, no host sync on CUDA.

    Args:
        images: ``(B, 3, H, W)`` or B images ``(3, H_i, W_i)``.
        table: ``(V, B, 18)`` on the device of the images.
        recipe: What the samples share.
        dtype: Of the views; it computes in float32, or float64 for float64 images.
        memory_format: Of the views.

    Returns:
        ``(V · B, 3, *size)``, view by view.
    """
    batch = _render(images, table, recipe)
    return batch.to(dtype, memory_format=memory_format)


def _render(images: Tensor | Sequence[Tensor], table: Tensor, recipe: Recipe) -> Tensor:
    if isinstance(images, Tensor):
        x = torch.cat([_crop(_at_least_float32(images), rows, recipe) for rows in table])
    else:
        x = torch.cat(
            [
                _crop(_at_least_float32(image[None]), row[None], recipe)
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
        contrast_mean=recipe.contrast_mean,
        saturation_mode=recipe.saturation_mode,
    )
    x = functional.grayscale(x, apply=p.grayscale)
    if recipe.taps:
        x = functional.gaussian_blur(
            x,
            p.sigma,
            kernel_size=recipe.taps,
            padding=recipe.blur_padding,
            apply=p.blur,
        )
    if recipe.solarizes:
        x = functional.solarize(x, recipe.solarize_threshold, apply=p.solarize)
    if recipe.normalize is None:
        return x
    channels = [
        (channel - mean) / std
        for channel, mean, std in zip(x.unbind(1), *recipe.normalize, strict=True)
    ]
    return torch.stack(channels, dim=1)


def _at_least_float32(images: Tensor) -> Tensor:
    return images.float() if images.dtype in (torch.float16, torch.bfloat16) else images


def _crop(images: Tensor, rows: Tensor, recipe: Recipe) -> Tensor:
    p = unpack(rows)
    x = functional.crop_resize(
        images,
        p.box,
        recipe.size,
        flip=p.flip,
        interpolation=recipe.interpolation,
        antialias=recipe.antialias,
    )
    return x.clamp(0, 1) if recipe.interpolation == "bicubic" and x.is_floating_point() else x
