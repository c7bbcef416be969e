"""The Triton kernels of the views: crop, colors, blur.

A program makes a block of pixels of one view of one image. Everything it branches on is the same
for the whole program: the view's row of the parameter table. The columns of a row and the meaning
of each operation are those of `parameters.ViewParameters` and `functional`.
"""

# Triton decides an `if` on a constexpr when it compiles; an `and` it does not.
# ruff: noqa: SIM102, PLR0915
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from contrastive_kit.augment import parameters
from contrastive_kit.augment.parameters import COLUMN

BRIGHTNESS = tl.constexpr(parameters.BRIGHTNESS)
CONTRAST = tl.constexpr(parameters.CONTRAST)
HUE = tl.constexpr(parameters.HUE)
N_COLUMNS = tl.constexpr(parameters.N_COLUMNS)
COLUMN_TOP = tl.constexpr(COLUMN["box"])
COLUMN_LEFT = tl.constexpr(COLUMN["box"] + 1)
COLUMN_HEIGHT = tl.constexpr(COLUMN["box"] + 2)
COLUMN_WIDTH = tl.constexpr(COLUMN["box"] + 3)
COLUMN_FLIP = tl.constexpr(COLUMN["flip"])
COLUMN_JITTER = tl.constexpr(COLUMN["jitter"])
COLUMN_ORDER = tl.constexpr(COLUMN["order"])
COLUMN_FACTORS = tl.constexpr(COLUMN["brightness"])
COLUMN_GRAYSCALE = tl.constexpr(COLUMN["grayscale"])
COLUMN_BLUR = tl.constexpr(COLUMN["blur"])
COLUMN_SIGMA = tl.constexpr(COLUMN["sigma"])
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _place(batch, views, tiles):
    """Which image, row of the table and tile; all views of an image run while it is in the L2."""
    program = tl.program_id(0)
    tile = program % tiles
    image = program // tiles // views
    view = program // tiles % views
    return image, view * batch + image, tile


@triton.jit
def _gray(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _level(x):
    """The nearest whole number from 0 to 255, halves up as torch's resize of uint8 does."""
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0) + 0.5)


@triton.jit
def _axis(
    start, extent, source, index,
    TARGET: tl.constexpr, SUPPORT: tl.constexpr, ANTIALIAS: tl.constexpr,
):  # fmt: skip
    """The taps of each result pixel along one axis: first pixel, distance from it, scale, number.

    A box that is not inside the image is moved into it, so that no address can be outside. The
    center of a result pixel, extent · (index + 1/2) / TARGET, is split exactly into a whole number
    and a rest: as one float it would be off by 1e-5 pixels at the far end of a photograph.
    """
    extent = tl.minimum(tl.maximum(extent, 1.0), source.to(tl.float32))
    start = tl.minimum(tl.maximum(start, 0.0), source - extent).to(tl.int32)
    stretch = tl.maximum(extent / TARGET, 1.0) if ANTIALIAS else 1.0
    extent = extent.to(tl.int32)
    center = extent * (2 * index + 1)
    whole = center // (2 * TARGET)
    rest = (center % (2 * TARGET)).to(tl.float32) / (2 * TARGET) - 0.5
    first = tl.floor(rest - SUPPORT * stretch) + 1
    taps = tl.ceil(2 * SUPPORT * stretch).to(tl.int32)
    return start, extent, whole + first.to(tl.int32), rest - first, 1.0 / stretch, taps


@triton.jit
def _tap(first, number, away, extent, shrink, BICUBIC: tl.constexpr, ANTIALIAS: tl.constexpr):
    """A tap's pixel, relative to the box, its weight, and whether it is inside the box."""
    pixel = first + number
    distance = tl.abs(number - away) * shrink
    if BICUBIC:
        a: tl.constexpr = -0.5 if ANTIALIAS else -0.75
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weight = tl.where(distance < 1, near, tl.where(distance < 2, far, 0.0))
        if not ANTIALIAS:
            pixel = tl.minimum(tl.maximum(pixel, 0), extent - 1)
    else:
        weight = tl.maximum(1 - distance, 0.0)
    inside = (pixel >= 0) & (pixel < extent)
    return pixel, tl.where(inside, weight, 0.0), inside


@triton.jit
def _hue(red, green, blue, shift):
    lowest = tl.minimum(tl.minimum(red, green), blue)
    spread = tl.maximum(tl.maximum(red, green), blue) - lowest
    sextant = 1 + (green + blue - red - lowest) / tl.maximum(spread, TINY)
    hue = tl.where(green >= blue, sextant, -sextant) + 6 * shift
    hue -= 6 * tl.floor(hue / 6 + 0.5)
    red = lowest + spread * _unit(tl.abs(tl.abs(hue) - 3) - 1)
    green = lowest + spread * _unit(tl.abs(tl.abs(hue - 2) - 3) - 1)
    blue = lowest + spread * _unit(tl.abs(tl.abs(hue + 2) - 3) - 1)
    return red, green, blue


@triton.jit
def _adjust(
    operation, red, green, blue, params, mean_red, mean_green, mean_blue, HSV: tl.constexpr
):
    """One operation of the color jitter; the means are what the contrast moves away from."""
    factor = tl.load(params + COLUMN_FACTORS + operation)
    if operation == HUE:
        red, green, blue = _hue(red, green, blue, factor)
    else:
        if operation == BRIGHTNESS:
            red, green, blue = red * factor, green * factor, blue * factor
        elif operation == CONTRAST:
            red = factor * red + (1 - factor) * mean_red
            green = factor * green + (1 - factor) * mean_green
            blue = factor * blue + (1 - factor) * mean_blue
        elif HSV:
            brightest = tl.maximum(tl.maximum(red, green), blue)
            spread = brightest - tl.minimum(tl.minimum(red, green), blue)
            ratio = tl.minimum(factor, brightest / tl.maximum(spread, TINY))
            red = brightest - (brightest - red) * ratio
            green = brightest - (brightest - green) * ratio
            blue = brightest - (brightest - blue) * ratio
        else:
            gray = (1 - factor) * _gray(red, green, blue)
            red, green, blue = factor * red + gray, factor * green + gray, factor * blue + gray
        red, green, blue = _unit(red), _unit(green), _unit(blue)
    return red, green, blue


@triton.jit
def _store(red, green, blue, out, row, y, x, wanted, stride_n, stride_c, stride_y, stride_x):
    pointer = out + row.to(tl.int64) * stride_n + y * stride_y + x * stride_x
    tl.store(pointer, red, mask=wanted)
    tl.store(pointer + stride_c, green, mask=wanted)
    tl.store(pointer + 2 * stride_c, blue, mask=wanted)


COLUMN_SOLARIZE = tl.constexpr(COLUMN["solarize"])


@triton.jit
def _finish(
    red, green, blue, out, row, y, x, wanted, stride_n, stride_c, stride_y, stride_x,
    params, threshold, mean_red, mean_green, mean_blue, scale_red, scale_green, scale_blue,
):  # fmt: skip
    """The steps after the blur, the normalization and the store."""
    if tl.load(params + COLUMN_SOLARIZE) != 0:
        red = tl.where(red >= threshold, 1 - red, red)
        green = tl.where(green >= threshold, 1 - green, green)
        blue = tl.where(blue >= threshold, 1 - blue, blue)
    red = (red - mean_red) * scale_red
    green = (green - mean_green) * scale_green
    blue = (blue - mean_blue) * scale_blue
    _store(red, green, blue, out, row, y, x, wanted, stride_n, stride_c, stride_y, stride_x)


@triton.jit(do_not_specialize=["batch", "source_height", "source_width"])
def crop_kernel(
    images, stride_n, stride_c, stride_y, stride_x, source_height, source_width,
    table, crops, sums, batch, views, tiles,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BICUBIC: tl.constexpr, ANTIALIAS: tl.constexpr, HSV: tl.constexpr,
):  # fmt: skip
    """Crop, resize and flip; sum each channel of what the contrast will see, tile by tile.

    Writes ``crops`` (V · B, 3, HEIGHT · WIDTH), uint8 or float32, and ``sums`` (V · B, 3, tiles).
    """
    image, row, tile = _place(batch, views, tiles)
    params = table + row * N_COLUMNS
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    wanted = pixel < HEIGHT * WIDTH
    # The last tile may reach beyond the view: there it repeats the last line.
    line = tl.minimum(pixel // WIDTH, HEIGHT - 1)
    column = pixel % WIDTH
    column = tl.where(tl.load(params + COLUMN_FLIP) != 0, WIDTH - 1 - column, column)

    SUPPORT: tl.constexpr = 2 if BICUBIC else 1
    top, height, first_y, away_y, shrink_y, taps_y = _axis(
        tl.load(params + COLUMN_TOP),
        tl.load(params + COLUMN_HEIGHT),
        source_height,
        line,
        HEIGHT,
        SUPPORT,
        ANTIALIAS,
    )
    left, width, first_x, away_x, shrink_x, taps_x = _axis(
        tl.load(params + COLUMN_LEFT),
        tl.load(params + COLUMN_WIDTH),
        source_width,
        column,
        WIDTH,
        SUPPORT,
        ANTIALIAS,
    )
    images += image.to(tl.int64) * stride_n + top * stride_y + left * stride_x
    WHOLE: tl.constexpr = crops.dtype.element_ty == tl.uint8
    # Whole gray levels go from one axis to the next, as in torch; that shows where they overshoot.
    BETWEEN: tl.constexpr = BICUBIC if WHOLE else False
    zero = tl.zeros((BLOCK,), tl.float32)
    total, red, green, blue = zero, zero, zero, zero
    down, sum_red, sum_green, sum_blue = zero, zero, zero, zero
    for number_y in range(taps_y):
        tap_y, weight_y, inside_y = _tap(
            first_y, number_y, away_y, height, shrink_y, BICUBIC, ANTIALIAS
        )
        if BETWEEN:
            total, red, green, blue = zero, zero, zero, zero
        for number_x in range(taps_x):
            tap_x, weight, inside_x = _tap(
                first_x, number_x, away_x, width, shrink_x, BICUBIC, ANTIALIAS
            )
            source = images + (tap_y * stride_y + tap_x * stride_x)
            inside = inside_y & inside_x
            if not BETWEEN:
                weight *= weight_y
            total += weight
            red += weight * tl.load(source, mask=inside, other=0).to(tl.float32)
            green += weight * tl.load(source + stride_c, mask=inside, other=0).to(tl.float32)
            blue += weight * tl.load(source + 2 * stride_c, mask=inside, other=0).to(tl.float32)
        if BETWEEN:
            down += weight_y
            sum_red += weight_y * _level(red / total)
            sum_green += weight_y * _level(green / total)
            sum_blue += weight_y * _level(blue / total)
    if BETWEEN:
        total, red, green, blue = down, sum_red, sum_green, sum_blue
    red, green, blue = red / total, green / total, blue / total

    if WHOLE:
        red, green, blue = _level(red), _level(green), _level(blue)
    elif BICUBIC:
        red, green, blue = _unit(red), _unit(green), _unit(blue)
    crop = crops + row.to(tl.int64) * (3 * HEIGHT * WIDTH) + pixel
    tl.store(crop, red.to(crops.dtype.element_ty), mask=wanted)
    tl.store(crop + HEIGHT * WIDTH, green.to(crops.dtype.element_ty), mask=wanted)
    tl.store(crop + 2 * HEIGHT * WIDTH, blue.to(crops.dtype.element_ty), mask=wanted)
    if WHOLE:
        red, green, blue = red / 255, green / 255, blue / 255

    before_contrast = tl.load(params + COLUMN_JITTER) != 0
    for slot in range(4):
        operation = tl.load(params + COLUMN_ORDER + slot).to(tl.int32)
        before_contrast = before_contrast & (operation != CONTRAST)
        if before_contrast:
            red, green, blue = _adjust(operation, red, green, blue, params, 0.0, 0.0, 0.0, HSV)
    target = sums + row * 3 * tiles + tile
    tl.store(target, tl.sum(tl.where(wanted, red, 0.0)))
    tl.store(target + tiles, tl.sum(tl.where(wanted, green, 0.0)))
    tl.store(target + 2 * tiles, tl.sum(tl.where(wanted, blue, 0.0)))


@triton.jit(do_not_specialize=["batch"])
def color_kernel(
    crops, totals, table, batch, views, tiles,
    sharp, sharp_stride_n, sharp_stride_c, sharp_stride_y, sharp_stride_x,
    out, stride_n, stride_c, stride_y, stride_x,
    threshold, mean_red, mean_green, mean_blue, scale_red, scale_green, scale_blue,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHANNEL_MEAN: tl.constexpr, HSV: tl.constexpr, BLUR: tl.constexpr,
):  # fmt: skip
    """Color jitter and grayscale; then to ``sharp`` what will be blurred, the rest to ``out``."""
    _, row, tile = _place(batch, views, tiles)
    params = table + row * N_COLUMNS
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    wanted = pixel < HEIGHT * WIDTH
    y, x = pixel // WIDTH, pixel % WIDTH
    crop = crops + row.to(tl.int64) * (3 * HEIGHT * WIDTH) + pixel
    red = tl.load(crop, mask=wanted, other=0).to(tl.float32)
    green = tl.load(crop + HEIGHT * WIDTH, mask=wanted, other=0).to(tl.float32)
    blue = tl.load(crop + 2 * HEIGHT * WIDTH, mask=wanted, other=0).to(tl.float32)
    if crops.dtype.element_ty == tl.uint8:
        red, green, blue = red / 255, green / 255, blue / 255

    if tl.load(params + COLUMN_JITTER) != 0:
        center_red = tl.load(totals + 3 * row) / (HEIGHT * WIDTH)
        center_green = tl.load(totals + 3 * row + 1) / (HEIGHT * WIDTH)
        center_blue = tl.load(totals + 3 * row + 2) / (HEIGHT * WIDTH)
        if not CHANNEL_MEAN:
            center_red = _gray(center_red, center_green, center_blue)
            center_green = center_red
            center_blue = center_red
        for slot in range(4):
            operation = tl.load(params + COLUMN_ORDER + slot).to(tl.int32)
            red, green, blue = _adjust(
                operation, red, green, blue, params, center_red, center_green, center_blue, HSV
            )
    if tl.load(params + COLUMN_GRAYSCALE) != 0:
        red = _gray(red, green, blue)
        green = red
        blue = red

    if BLUR:
        if tl.load(params + COLUMN_BLUR) != 0:
            _store(
                red, green, blue, sharp, row, y, x, wanted,
                sharp_stride_n, sharp_stride_c, sharp_stride_y, sharp_stride_x,
            )  # fmt: skip
            return
    _finish(
        red, green, blue, out, row, y, x, wanted, stride_n, stride_c, stride_y, stride_x,
        params, threshold,
        mean_red, mean_green, mean_blue, scale_red, scale_green, scale_blue,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def blur_kernel(
    source, source_stride_n, source_stride_c, source_stride_y, source_stride_x,
    table, batch, views, tiles,
    out, stride_n, stride_c, stride_y, stride_x,
    threshold, mean_red, mean_green, mean_blue, scale_red, scale_green, scale_blue,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    RADIUS: tl.constexpr, REFLECT: tl.constexpr, VERTICAL: tl.constexpr,
):  # fmt: skip
    """Blur along one axis the views that are blurred; the vertical pass finishes them."""
    _, row, tile = _place(batch, views, tiles)
    params = table + row * N_COLUMNS
    if tl.load(params + COLUMN_BLUR) == 0:
        return
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    wanted = pixel < HEIGHT * WIDTH
    y, x = pixel // WIDTH, pixel % WIDTH
    image = source + row.to(tl.int64) * source_stride_n
    LAST: tl.constexpr = (HEIGHT if VERTICAL else WIDTH) - 1
    sigma = tl.load(params + COLUMN_SIGMA)
    # What lies beyond five standard deviations is 6e-7 of the whole.
    radius = tl.minimum(tl.ceil(5 * sigma), RADIUS * 1.0).to(tl.int32)
    total = 0.0
    red = tl.zeros((BLOCK,), tl.float32)
    green = tl.zeros((BLOCK,), tl.float32)
    blue = tl.zeros((BLOCK,), tl.float32)
    for tap in range(-radius, radius + 1):
        offset = tap / sigma
        weight = tl.exp(-0.5 * offset * offset)
        total += weight
        at = (y if VERTICAL else x) + tap
        if REFLECT:
            at = LAST - tl.abs(LAST - tl.abs(at))
            inside = wanted
        else:
            inside = wanted & (at >= 0) & (at <= LAST)
        if VERTICAL:
            pointer = image + at * source_stride_y + x * source_stride_x
        else:
            pointer = image + y * source_stride_y + at * source_stride_x
        red += weight * tl.load(pointer, mask=inside, other=0.0)
        green += weight * tl.load(pointer + source_stride_c, mask=inside, other=0.0)
        blue += weight * tl.load(pointer + 2 * source_stride_c, mask=inside, other=0.0)
    red, green, blue = red / total, green / total, blue / total
    if VERTICAL:
        _finish(
            red, green, blue, out, row, y, x, wanted, stride_n, stride_c, stride_y, stride_x,
            params, threshold,
            mean_red, mean_green, mean_blue, scale_red, scale_green, scale_blue,
        )  # fmt: skip
    else:
        _store(red, green, blue, out, row, y, x, wanted, stride_n, stride_c, stride_y, stride_x)
