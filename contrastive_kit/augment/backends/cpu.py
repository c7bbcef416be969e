"""Views on the CPU: in place, in chunks that stay in the cache, each in one pass per step.

What a batched pipeline costs on a CPU is memory traffic: every operation on a whole batch reads and
writes it in main memory, into freshly mapped pages. Here a chunk of samples goes through all its
operations before the next one starts. The samples are sorted by the place of the hue in their
order, so that the hue, the dearest operation, is one call on a contiguous slice of the chunk.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit.augment.functional import (
    GRAY_WEIGHTS,
    can_interpolate,
    crop_matmul,
    resize_matrix,
    to_levels,
)
from contrastive_kit.augment.parameters import (
    BOX,
    BRIGHTNESS,
    CONTRAST,
    FACTORS,
    HUE,
    ORDER,
    SATURATION,
    Column,
    unpack,
)
from contrastive_kit.augment.recipe import Recipe

_CHUNK_BYTES = 1_800_000
# Up to so many pixels a crop is two products of small dense matrices for the whole chunk ...
_CROP_TOGETHER = 48 * 48
# ... and the colour operations of several samples share a call, as does storing them, which for
# larger samples is slower than one copy each.
_JITTER_TOGETHER = 64 * 64
# Beyond this many pixels a sample is a chunk, made in its place in the result.
_ALONE = 128 * 128
_TINY = 1e-30
# So many views of a call are looked at for values out of range: a look costs 2 % of a view.
_LOOKED_AT = 4
# What lies beyond 4.5 sigma weighs 7e-6: below the rounding that is promised.
_BLUR_REACH = 4.5
# Up to this radius shifted sums are faster than products of tiles.
_BLUR_SHIFTS = 3
_BLUR_TILE = 16


class _Row(NamedTuple):
    """One sample of one view: its row of the parameter table, as Python numbers."""

    number: int
    values: list[float]

    @property
    def hue_place(self) -> int:
        """The place of the hue among the operations; after all where there are none."""
        return self.values[ORDER].index(HUE) if self.values[Column.JITTER] else 4


class _Workspace:
    """The buffers of a chunk, allocated once a call."""

    def __init__(self, chunk: int, recipe: Recipe) -> None:
        height, width = recipe.size
        self.x = _empty(chunk, 3, height, width)
        self.planes = _empty(3, chunk, height, width)
        self.pixels = torch.empty(0, dtype=torch.int32, device="cpu")
        padding = recipe.taps // 2 * 2
        self.blurred = _empty(3 * (height + padding) * width)
        self.product = _empty(3 * height * width)


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
        table: ``(V, B, 18)`` on the CPU.
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
    rows = [_Row(number, values) for number, values in enumerate(table.tolist())]
    rows.sort(key=lambda row: (row.hue_place, row.values[Column.GRAYSCALE] != 0))
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
    if pixels > _ALONE:
        chunk = 1
    in_place = chunk == 1 and out.dtype == torch.float32 and out.is_contiguous()
    work = _Workspace(chunk, recipe)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        numbers = [row.number for row in part]
        index = torch.tensor(numbers, device="cpu")
        x = out[numbers[0] : numbers[0] + 1] if in_place else work.x[: len(part)]
        if batch is not None:
            sources = batch.index_select(0, index % len(batch))
            _crop_together(sources, table[numbers], x, recipe)
        else:
            _crop(images, part, x, work, recipe)
        if floats and start < _LOOKED_AT:
            _look_at(x[:_LOOKED_AT], recipe)
        _to_unit_range(x, floats, recipe)
        jittered = sum(row.values[Column.JITTER] != 0 for row in part)
        if jittered and jitter_together:
            _jitter_together(x[:jittered], part[:jittered], table[numbers[:jittered]], work)
        elif jittered:
            _jitter_each(x[:jittered], part[:jittered], work, recipe)
        _finish(x, part, work, recipe)
        if pixels > _JITTER_TOGETHER and not in_place:
            for number, sample in zip(numbers, x, strict=True):
                out[number] = sample
        elif not in_place:
            out.index_copy_(0, index, x.to(out.dtype))


def _to_unit_range(x: Tensor, floats: bool, recipe: Recipe) -> None:
    if not floats:
        x.mul_(1 / 255)
    elif recipe.interpolation == "bicubic":
        x.clamp_(0, 1)


def _look_at(x: Tensor, recipe: Recipe) -> None:
    """Warn where crops leave [0, 1] further than rounding, or a bicubic's overshoot, takes them."""
    low, high = (float(end) for end in x.aminmax())
    slack = 0.5 if recipe.interpolation == "bicubic" else 1e-3
    if not (low >= -slack and high <= 1 + slack):
        warnings.warn(
            "images hold floats outside [0, 1], or NaN: the colour operations will clamp them. "
            "Divide 0...255 by 255, and leave it to normalize= to normalise the views. "
            "check_values=True makes this an error",
            stacklevel=2,
        )


def _crop(
    images: Tensor | Sequence[Tensor],
    rows: list[_Row],
    x: Tensor,
    work: _Workspace,
    recipe: Recipe,
) -> None:
    """Crop images one by one, each from its own box; uint8 keeps its range."""
    sources = [images[row.number % len(images)] for row in rows]
    if not can_interpolate(recipe.size):
        for row, image, target in zip(rows, sources, x, strict=True):
            p = unpack(_floats(row.values)[None])
            options = (recipe.interpolation, recipe.antialias)
            target.copy_(crop_matmul(image[None], p.box, recipe.size, p.flip, *options)[0])
        return
    pack = sources[0].dtype == torch.uint8 and all(image.stride(0) != 1 for image in sources)
    packed: list[Tensor] = []
    for row, image, target in zip(rows, sources, x, strict=True):
        top, left, height, width = map(int, row.values[BOX])
        region = image[:, top : top + height, left : left + width]
        crop = F.interpolate(
            _pack(region, work) if pack else region[None],
            recipe.size,
            mode=recipe.interpolation,
            antialias=recipe.antialias,
        )
        if pack:
            crop = crop.permute(0, 2, 3, 1).contiguous().view(torch.int32)[..., 0]
        if row.values[Column.FLIP]:
            crop = crop.flip(-1)
        if pack:
            packed.append(crop)
        else:
            target.copy_(crop[0])
    if pack:
        _unpack(torch.cat(packed), x)


def _pack(region: Tensor, work: _Workspace) -> Tensor:
    """Three uint8 planes as 32-bit pixels, for which ATen's resize has its fastest loop."""
    height, width = region.shape[1:]
    if work.pixels.numel() < height * width:
        work.pixels = torch.empty(height * width, dtype=torch.int32, device="cpu")
    pixels = work.pixels[: height * width].view(height, width)
    pixels.copy_(region[0]).add_(region[1], alpha=1 << 8).add_(region[2], alpha=1 << 16)
    return pixels.view(torch.uint8).view(1, height, width, 4).permute(0, 3, 1, 2)


def _unpack(pixels: Tensor, x: Tensor) -> None:
    """The planes of ``(n, H, W)`` 32-bit pixels, as floats from 0 to 255.

    A pixel as a number, red + 256 green + 65536 blue, is exact in float32: so are its digits.
    """
    red, green, blue = x.unbind(1)
    red.copy_(pixels)
    torch.mul(red, 1 / (1 << 16), out=blue).floor_()
    red.sub_(blue, alpha=1 << 16)
    torch.mul(red, 1 / (1 << 8), out=green).floor_()
    red.sub_(green, alpha=1 << 8)


def _crop_together(sources: Tensor, table: Tensor, x: Tensor, recipe: Recipe) -> None:
    """Crop small images by two products with their matrices of weights; uint8 keeps its range."""
    p = unpack(table)
    count, _, height, width = sources.shape
    options = (recipe.interpolation, recipe.antialias)
    rows = resize_matrix(p.box[:, 0], p.box[:, 2], height, recipe.size[0], None, *options)
    columns = resize_matrix(p.box[:, 1], p.box[:, 3], width, recipe.size[1], p.flip, *options)
    crops = torch.bmm(sources.float().reshape(count, 3 * height, width), columns.mT)
    in_levels = sources.dtype == torch.uint8
    if in_levels:
        to_levels(crops)
    torch.matmul(rows[:, None], crops.view(count, 3, height, -1), out=x)
    if in_levels:
        to_levels(x)


def _jitter_each(x: Tensor, rows: list[_Row], work: _Workspace, recipe: Recipe) -> None:
    for row, sample in zip(rows, x, strict=True):
        for operation in row.values[ORDER][: row.hue_place]:
            _adjust(sample, operation, row.values, work, recipe)
    _hue(x, rows, work)
    for row, sample in zip(rows, x, strict=True):
        for operation in row.values[ORDER][row.hue_place + 1 :]:
            _adjust(sample, operation, row.values, work, recipe)


def _jitter_together(x: Tensor, rows: list[_Row], table: Tensor, work: _Workspace) -> None:
    """The linear operations of `functional.color_jitter`, slot by slot, in place.

    The samples are sorted by the place of their hue: those with an operation of their own in a slot
    before it are the last ones, those with one in a slot after it the first ones.
    """
    p = unpack(table)
    order = p.order.long()
    factor = table[:, FACTORS].gather(1, order)
    rest = 1 - factor
    centre, gray = rest * (order == CONTRAST), rest * (order == SATURATION)

    def step(first: int, last: int, slot: int) -> None:
        if first == last:
            return
        part, shade = x[first:last], work.planes[0, first:last]
        red, green, blue = part.unbind(1)
        torch.mul(red, GRAY_WEIGHTS[0], out=shade)
        shade.add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2])
        mean = shade.mean(dim=(1, 2)).mul_(centre[first:last, slot])
        shade.mul_(gray[first:last, slot, None, None]).add_(mean[:, None, None])
        part.mul_(factor[first:last, slot, None, None, None])
        part.add_(shade[:, None]).clamp_(0, 1)

    places = [row.hue_place for row in rows]
    for slot in range(3):
        step(sum(place <= slot for place in places), len(rows), slot)
    _hue(x, rows, work)
    for slot in range(1, 4):
        step(0, sum(place < slot for place in places), slot)


def _adjust(
    sample: Tensor,
    operation: float,
    values: list[float],
    work: _Workspace,
    recipe: Recipe,
) -> None:
    """Brightness, contrast or saturation of one image, in place."""
    factor = values[FACTORS][int(operation)]
    if operation == BRIGHTNESS:
        sample.mul_(factor)
    elif operation == CONTRAST and recipe.contrast_mean == "gray":
        means = sample.flatten(1).mean(dim=1).tolist()
        mean = sum(weight * value for weight, value in zip(GRAY_WEIGHTS, means, strict=True))
        torch.add(_floats((1 - factor) * mean), sample, alpha=factor, out=sample)
    elif operation == CONTRAST:
        sample.lerp_(sample.mean(dim=(1, 2), keepdim=True), 1 - factor)
    elif operation == SATURATION and recipe.saturation_mode == "gray":
        sample.lerp_(_gray(sample, work.planes[0, 0]), 1 - factor)
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


def _hue(x: Tensor, rows: list[_Row], work: _Workspace) -> None:
    """`functional.adjust_hue` of ``(n, 3, H, W)`` in place.

    With base = mn − d the channels are base + d · clamp(||t| − 3|, 1, 2). A channel that has been
    read serves as a buffer.
    """
    red, green, blue = x.unbind(1)
    base, spread, hue = work.planes[:, : len(rows)]
    torch.minimum(green, blue, out=base)
    torch.maximum(green, blue, out=spread)
    torch.add(green, blue, out=hue).sub_(red)
    sign = torch.sub(green, blue, out=green)
    torch.minimum(base, red, out=base)
    torch.maximum(spread, red, out=spread).sub_(base).clamp_(min=_TINY)
    hue.sub_(base).div_(spread).add_(1).copysign_(sign)
    shifts = [row.values[Column.HUE] for row in rows]
    if len(shifts) == 1:
        hue.add_(6 * shifts[0])
    else:
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


def _finish(x: Tensor, rows: list[_Row], work: _Workspace, recipe: Recipe) -> None:
    """Grayscale, blur, solarize and normalise, in place."""
    start = 0
    for gray, run in groupby(rows, key=lambda row: row.values[Column.GRAYSCALE] != 0):
        stop = start + len(list(run))
        if gray:
            part = x[start:stop]
            part.copy_(_gray(part, work.planes[0, : len(part)])[:, None])
        start = stop
    for row, sample in zip(rows, x, strict=True):
        blurred, solarized = row.values[Column.BLUR], row.values[Column.SOLARIZE]
        result = sample[:1] if row.values[Column.GRAYSCALE] else sample
        if blurred and recipe.taps:
            result = _blur(result, row.values[Column.SIGMA], work, recipe)
        if solarized and recipe.solarizes:
            result = torch.where(result >= recipe.solarize_threshold, 1 - result, result)
        if blurred or solarized:
            sample.copy_(result)
    if recipe.normalize is not None:
        for channel, mean, std in zip(x.unbind(1), *recipe.normalize, strict=True):
            channel.sub_(mean).div_(std)


def _blur(sample: Tensor, sigma: float, work: _Workspace, recipe: Recipe) -> Tensor:
    """Separable blur of ``(c, H, W)``; the taps that cannot be seen are left out."""
    height, width = recipe.size
    radius = recipe.taps // 2
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    weights = [weight / total for weight in weights]
    reach = min(radius, math.ceil(_BLUR_REACH * sigma - 0.5))
    mode = "reflect" if recipe.blur_padding == "reflect" else "constant"
    padded = F.pad(sample[None], (reach, reach, 0, 0), mode=mode)[0]
    tiled = reach > _BLUR_SHIFTS and height % _BLUR_TILE == 0 and width % _BLUR_TILE == 0
    blur = _blur_by_tiles if tiled else _blur_by_shifts
    return blur(padded, weights[: reach + 1], work, recipe)


def _blur_by_shifts(
    padded: Tensor, weights: list[float], work: _Workspace, recipe: Recipe
) -> Tensor:
    """Weighted sums of the shifted image."""
    (height, width), channels, reach = recipe.size, len(padded), len(weights) - 1
    line = channels * width
    rows = work.blurred[: (height + 2 * reach) * line].view(-1, channels, width)
    inner = rows[reach : reach + height].transpose(0, 1)
    torch.mul(padded[:, :, reach : reach + width], weights[0], out=inner)
    for offset in range(1, reach + 1):
        for side in (reach - offset, reach + offset):
            inner.add_(padded[:, :, side : side + width], alpha=weights[offset])
    _pad_rows(rows, reach, recipe)
    result = work.product[: height * line].view(height, channels, width)
    torch.mul(rows[reach : reach + height], weights[0], out=result)
    for offset in range(1, reach + 1):
        for side in (reach - offset, reach + offset):
            result.add_(rows[side : side + height], alpha=weights[offset])
    return result.transpose(0, 1)


def _blur_by_tiles(
    padded: Tensor, weights: list[float], work: _Workspace, recipe: Recipe
) -> Tensor:
    """Products with the banded matrix of the blur, of which only the band is multiplied.

    A tile of results needs the pixels of the tile and those within reach of it: the windows
    overlap, and are strided views of the padded image.
    """
    (height, width), channels, reach = recipe.size, len(padded), len(weights) - 1
    down, across, line = height // _BLUR_TILE, width // _BLUR_TILE, channels * width
    window = _BLUR_TILE + 2 * reach
    band = _empty(_BLUR_TILE, window).zero_()
    diagonals = band.as_strided((_BLUR_TILE, 2 * reach + 1), (window + 1, 1))
    diagonals.copy_(_floats(weights[:0:-1] + weights))

    tiles = padded.as_strided(
        (across, channels * height, window), (_BLUR_TILE, width + 2 * reach, 1)
    )
    product = work.product[: height * line].view(across, channels * height, _BLUR_TILE)
    torch.bmm(tiles, band.t().expand(across, -1, -1), out=product)
    rows = work.blurred[: (height + 2 * reach) * line].view(-1, line)
    rows[reach : reach + height].view(height, channels, across, _BLUR_TILE).copy_(
        product.view(across, channels, height, _BLUR_TILE).permute(2, 1, 0, 3)
    )
    _pad_rows(rows, reach, recipe)
    tiles = rows.as_strided((down, window, line), (_BLUR_TILE * line, line, 1))
    product = product.view(down, _BLUR_TILE, line)
    torch.bmm(band.expand(down, -1, -1), tiles, out=product)
    return product.view(height, channels, width).transpose(0, 1)


def _pad_rows(rows: Tensor, reach: int, recipe: Recipe) -> None:
    """Fill the `reach` rows above and below the image."""
    above, below = rows[:reach], rows[len(rows) - reach :]
    if recipe.blur_padding == "reflect":
        last = len(rows) - reach - 1
        above.copy_(rows[reach + 1 : 2 * reach + 1].flip(0))
        below.copy_(rows[last - reach : last].flip(0))
    else:
        above.zero_()
        below.zero_()
