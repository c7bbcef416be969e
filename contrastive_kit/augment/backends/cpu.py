"""Views on the CPU: in place, in chunks that stay in the cache, each in one pass per step.

What a batched pipeline costs on a CPU is memory traffic: every operation on a whole batch reads and
writes it in main memory, into freshly mapped pages. Here a chunk of samples goes through all its
operations before the next one starts. The samples are sorted by the place of the hue in their
order, so that the hue, the most expensive operation, is one call on a slice of the chunk.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from contrastive_kit.augment.backends.batched import after_blur
from contrastive_kit.augment.functional.color import GRAY_WEIGHTS
from contrastive_kit.augment.functional.crop import (
    can_interpolate,
    crop_each,
    crop_matmul,
    resize_matrix,
    to_levels,
)
from contrastive_kit.augment.parameters import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    ViewParameters,
    unpack,
)
from contrastive_kit.augment.recipe import Recipe

_CHUNK_BYTES = 1_800_000
# Up to so many pixels a crop is two products of small dense matrices for the whole chunk ...
_CROP_TOGETHER = 48 * 48
# ... and the color operations of several samples share a call, as does storing them, which for
# larger samples, in channels_last above all, is slower than one copy each.
_JITTER_TOGETHER = 64 * 64
_TINY = 1e-30
# What lies beyond 4.5 sigma weighs 7e-6: below the rounding that is promised.
_BLUR_REACH = 4.5


class _Row(NamedTuple):
    """One sample of one view: its number among them, and its `ViewParameters` as plain numbers."""

    number: int
    p: Any

    @property
    def hue_place(self) -> int:
        """The place of the hue among the operations; after all where there are none."""
        return self.p.order.index(HUE) if self.p.jitter else 4


# Said wherever a tensor is made: torch.set_default_dtype and torch.set_default_device are for the
# user's own tensors.
def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _floats(values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def refusal(images: Tensor | Sequence[Tensor], recipe: Recipe, dtype: torch.dtype) -> str | None:
    """Why these views cannot be made here, or None if they can."""
    parts = (images,) if isinstance(images, Tensor) else images
    if parts[0].device.type != "cpu":
        return f"it takes images on the CPU, got them on {parts[0].device}"
    if parts[0].dtype == torch.float64:
        return "it takes uint8, float32 and half precision, got float64"
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return "it is not differentiable, got images that require a gradient"
    if torch.compiler.is_compiling():
        return "it cannot be traced by torch.compile"
    return None


def render(
    images: Tensor | Sequence[Tensor],
    table: Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Make views of uint8, float32 or half-precision images on the CPU.

    Args:
        images: ``(B, 3, H, W)`` or B images ``(3, H_i, W_i)``.
        table: ``(V, B, columns)`` on the CPU.
        recipe: What the samples share.
        dtype: Of the views.
        memory_format: Of the views.
    """
    shape = (table.shape[0] * table.shape[1], 3, *recipe.size)
    out = torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format)
    if len(images) and images[0].dtype in (torch.float16, torch.bfloat16):
        images = images.float() if isinstance(images, Tensor) else [i.float() for i in images]
    with torch.autocast("cpu", enabled=False):
        _render(images, table.flatten(0, 1), recipe, out)
    return out


def _render(images: Tensor | Sequence[Tensor], table: Tensor, recipe: Recipe, out: Tensor) -> None:
    columns = (field.tolist() for field in unpack(table))
    rows = [_Row(n, ViewParameters(*row)) for n, row in enumerate(zip(*columns, strict=True))]
    rows.sort(key=lambda row: (row.hue_place, row.p.grayscale != 0))
    pixels = math.prod(recipe.size)
    batch = None
    if isinstance(images, Tensor) and max(pixels, images.shape[2:].numel()) <= _CROP_TOGETHER:
        batch = images
    jitter_together = (
        pixels <= _JITTER_TOGETHER
        and recipe.contrast_mean == "gray"
        and recipe.saturation_mode == "gray"
    )
    floats = len(rows) > 0 and images[0].dtype != torch.uint8
    chunk = max(1, min(len(rows), _CHUNK_BYTES // (12 * pixels)))
    buffer, planes = _empty(chunk, 3, *recipe.size), _empty(3, chunk, *recipe.size)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        numbers = [row.number for row in part]
        index, own = torch.tensor(numbers, device="cpu"), table[numbers]
        x = buffer[: len(part)]
        if batch is not None:
            _crop_together(batch.index_select(0, index % len(batch)), own, x, recipe)
        else:
            _crop(images, part, own, x, recipe)
        _to_unit_range(x, floats, recipe)
        jittered = sum(row.p.jitter != 0 for row in part)
        if jittered and jitter_together:
            _jitter_together(x[:jittered], part[:jittered], own[:jittered], planes)
        elif jittered:
            _jitter_each(x[:jittered], part[:jittered], planes, recipe)
        _finish(x, part, own, planes[0], recipe)
        if pixels > _JITTER_TOGETHER:
            for number, sample in zip(numbers, x, strict=True):
                out[number] = sample
        else:
            out.index_copy_(0, index, x.to(out.dtype))


def _to_unit_range(x: Tensor, floats: bool, recipe: Recipe) -> None:
    if not floats:
        x.mul_(1 / 255)
    elif recipe.interpolation == "bicubic":
        x.clamp_(0, 1)


def _crop(
    images: Tensor | Sequence[Tensor],
    rows: list[_Row],
    table: Tensor,
    x: Tensor,
    recipe: Recipe,
) -> None:
    """Crop images one by one, each from its own box; uint8 keeps its range."""
    p = unpack(table)
    sources = [images[row.number % len(images)] for row in rows]
    options = (recipe.interpolation, recipe.antialias)
    if can_interpolate(recipe.size):
        crops = crop_each(sources, p.box, recipe.size, p.flip, *options)
    else:
        parts = zip(sources, p.box[:, None], p.flip[:, None], strict=True)
        crops = (crop_matmul(i[None], box, recipe.size, flip, *options) for i, box, flip in parts)
    for target, crop in zip(x, crops, strict=True):
        target.copy_(crop[0])


def _crop_together(sources: Tensor, table: Tensor, x: Tensor, recipe: Recipe) -> None:
    """Crop small images by two products with their matrices of weights; uint8 keeps its range."""
    p = unpack(table)
    height, width = sources.shape[2:]
    options = (recipe.interpolation, recipe.antialias)
    rows = resize_matrix(p.box[:, 0], p.box[:, 2], height, recipe.size[0], None, *options)
    columns = resize_matrix(p.box[:, 1], p.box[:, 3], width, recipe.size[1], p.flip, *options)
    crops = torch.bmm(rearrange(sources.float(), "n c h w -> n (c h) w"), columns.mT)
    in_levels = sources.dtype == torch.uint8
    if in_levels:
        to_levels(crops)
    torch.matmul(rows[:, None], rearrange(crops, "n (c h) w -> n c h w", c=3), out=x)
    if in_levels:
        to_levels(x)


def _jitter_each(x: Tensor, rows: list[_Row], planes: Tensor, recipe: Recipe) -> None:
    for row, sample in zip(rows, x, strict=True):
        for operation in row.p.order[: row.hue_place]:
            _adjust(sample, operation, row.p, planes, recipe)
    _hue(x, rows, planes)
    for row, sample in zip(rows, x, strict=True):
        for operation in row.p.order[row.hue_place + 1 :]:
            _adjust(sample, operation, row.p, planes, recipe)


def _jitter_together(x: Tensor, rows: list[_Row], table: Tensor, planes: Tensor) -> None:
    """The linear operations of `functional.color_jitter`, slot by slot, in place.

    The samples are sorted by the place of their hue: those with an operation of their own in a slot
    before it are the last ones, those with one in a slot after it the first ones.
    """
    p = unpack(table)
    order = p.order.long()
    factors = torch.stack((p.brightness, p.contrast, p.saturation, p.hue), dim=1)
    factor = factors.gather(1, order)
    rest = 1 - factor
    center, gray = rest * (order == CONTRAST), rest * (order == SATURATION)

    def step(first: int, last: int, slot: int) -> None:
        if first == last:
            return
        part, shade = x[first:last], planes[0, first:last]
        red, green, blue = part.unbind(1)
        torch.mul(red, GRAY_WEIGHTS[0], out=shade)
        shade.add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2])
        mean = shade.mean(dim=(1, 2)).mul_(center[first:last, slot])
        shade.mul_(gray[first:last, slot, None, None]).add_(mean[:, None, None])
        part.mul_(factor[first:last, slot, None, None, None])
        part.add_(shade[:, None]).clamp_(0, 1)

    places = [row.hue_place for row in rows]
    for slot in range(3):
        step(sum(place <= slot for place in places), len(rows), slot)
    _hue(x, rows, planes)
    for slot in range(1, 4):
        step(0, sum(place < slot for place in places), slot)


def _adjust(
    sample: Tensor,
    operation: float,
    p: Any,
    planes: Tensor,
    recipe: Recipe,
) -> None:
    """Brightness, contrast or saturation of one image, in place."""
    factor = (p.brightness, p.contrast, p.saturation)[int(operation)]
    if operation == BRIGHTNESS:
        sample.mul_(factor)
    elif operation == CONTRAST and recipe.contrast_mean == "gray":
        means = sample.flatten(1).mean(dim=1).tolist()
        mean = sum(weight * value for weight, value in zip(GRAY_WEIGHTS, means, strict=True))
        torch.add(_floats((1 - factor) * mean), sample, alpha=factor, out=sample)
    elif operation == CONTRAST:
        sample.lerp_(sample.mean(dim=(1, 2), keepdim=True), 1 - factor)
    elif operation == SATURATION and recipe.saturation_mode == "gray":
        sample.lerp_(_gray(sample, planes[0, 0]), 1 - factor)
    else:
        brightest, share = sample.amax(dim=0), sample.amin(dim=0)
        torch.sub(brightest, share, out=share).clamp_(min=_TINY)
        torch.div(brightest, share, out=share).clamp_(max=factor)
        sample.sub_(brightest).mul_(share).add_(brightest)
    # With a factor up to 1 the result lies between two values that are in range.
    if factor > 1:
        sample.clamp_(0, 1)


def _gray(x: Tensor, out: Tensor) -> Tensor:
    red, green, blue = x.unbind(-3)
    torch.mul(red, GRAY_WEIGHTS[0], out=out)
    return out.add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2])


def _hue(x: Tensor, rows: list[_Row], planes: Tensor) -> None:
    """`functional.adjust_hue` of ``(n, 3, H, W)`` in place.

    With base = mn − d the channels are base + d · clamp(||t| − 3|, 1, 2). A channel that has been
    read serves as a buffer.
    """
    red, green, blue = x.unbind(1)
    base, spread, hue = planes[:, : len(rows)]
    torch.minimum(green, blue, out=base)
    torch.maximum(green, blue, out=spread)
    torch.add(green, blue, out=hue).sub_(red)
    sign = torch.sub(green, blue, out=green)
    torch.minimum(base, red, out=base)
    torch.maximum(spread, red, out=spread).sub_(base).clamp_(min=_TINY)
    hue.sub_(base).div_(spread).add_(1).copysign_(sign)
    shifts = [row.p.hue for row in rows]
    hue.add_(_floats(shifts).mul_(6)[:, None, None])
    if max(map(abs, shifts)) > 1 / 3:
        hue.sub_(torch.mul(hue, 1 / 6, out=red).round_(), alpha=6)
    base.sub_(spread)
    torch.abs(hue, out=red).sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(base, spread, red, out=red)
    torch.sub(hue, 2, out=green).abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(base, spread, green, out=green)
    hue.add_(2).abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(base, spread, hue, out=blue)


def _finish(x: Tensor, rows: list[_Row], table: Tensor, plane: Tensor, recipe: Recipe) -> None:
    """Grayscale, blur, the steps after it, and normalization, in place."""
    start = 0
    for loses_color, run in groupby(rows, key=lambda row: row.p.grayscale != 0):
        stop = start + len(list(run))
        if loses_color:
            part = x[start:stop]
            part.copy_(_gray(part, plane[: len(part)])[:, None])
        start = stop
    later = [step for step in recipe.steps(made=True) if step != "blur"]
    for number, (row, sample) in enumerate(zip(rows, x, strict=True)):
        if row.p.blur and recipe.taps:
            sample.copy_(_blur(sample[:1] if row.p.grayscale else sample, row.p.sigma, recipe))
        if any(getattr(row.p, step) for step in later):
            own = unpack(table[number : number + 1])
            sample.copy_(after_blur(sample[None], own, recipe)[0])
    if recipe.normalize is not None:
        for channel, mean, std in zip(x.unbind(1), *recipe.normalize, strict=True):
            channel.sub_(mean).div_(std)


def _blur(sample: Tensor, sigma: float, recipe: Recipe) -> Tensor:
    """Separable blur of ``(c, H, W)`` by shifted sums, but for taps too small to be seen."""
    radius = recipe.taps // 2
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    reach = min(radius, math.ceil(_BLUR_REACH * sigma - 0.5))
    mode = "reflect" if recipe.blur_padding == "reflect" else "constant"
    x = F.pad(sample[None], (reach,) * 4, mode=mode)[0]
    for dim, side in ((2, recipe.size[1]), (1, recipe.size[0])):
        blurred = x.narrow(dim, reach, side) * (weights[0] / total)
        for offset in range(1, reach + 1):
            for start in (reach - offset, reach + offset):
                blurred.add_(x.narrow(dim, start, side), alpha=weights[offset] / total)
        x = blurred
    return x
