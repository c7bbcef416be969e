"""Views by batched torch operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_kit.augment.functional.blur import blur
from contrastive_kit.augment.functional.color import gray, invert, jitter
from contrastive_kit.augment.functional.crop import crop
from contrastive_kit.augment.functional.images import gated, to_working, widen
from contrastive_kit.augment.parameters import ViewParameters, unpack
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
        table: ``(V, B, columns)`` on the device of the images.
        recipe: What the samples share.
        dtype: Of the views; it computes in float32, or float64 for float64 images.
        memory_format: Of the views.

    Returns:
        ``(V · B, 3, *size)``, view by view.
    """
    if isinstance(images, Tensor):
        wide = widen(images)
        crops = [_crop(wide, rows, recipe) for rows in table]
    else:
        pairs = ((i, row) for rows in table for i, row in zip(images, rows, strict=True))
        crops = [_crop(widen(image[None]), row[None], recipe) for image, row in pairs]
    x = to_working(torch.cat(crops))
    p = unpack(table.flatten(0, 1))
    factors = torch.stack((p.brightness, p.contrast, p.saturation, p.hue), dim=1).to(x.dtype)
    modes = (recipe.contrast_mean, recipe.saturation_mode)
    x = gated(jitter(x, p.order, factors, *modes), x, p.jitter)
    x = gated(gray(x).expand_as(x), x, p.grayscale)
    if recipe.taps:
        radii = (recipe.taps // 2, recipe.taps // 2)
        x = gated(blur(x, p.sigma.to(x.dtype), radii, recipe.blur_padding), x, p.blur)
    x = after_blur(x, p, recipe)
    if recipe.normalize is not None:
        channels = zip(x.unbind(1), *recipe.normalize, strict=True)
        x = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
    return x.to(dtype, memory_format=memory_format)


def _crop(images: Tensor, rows: Tensor, recipe: Recipe) -> Tensor:
    p = unpack(rows)
    x = crop(images, p.box, recipe.size, p.flip, recipe.interpolation, recipe.antialias)
    return x.clamp(0, 1) if recipe.interpolation == "bicubic" and x.is_floating_point() else x


def after_blur(x: Tensor, p: ViewParameters, recipe: Recipe) -> Tensor:
    """The steps between the blur and the normalization, of the CPU backend too.

    Each is left out where no view may have it, and is the same tensor operations for all samples.
    """
    if recipe.makes("solarize"):
        x = gated(invert(x, recipe.solarize_threshold), x, p.solarize)
    return x
