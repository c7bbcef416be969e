"""The kernels that make views on a GPU; what they compute is in `functional`.

A program makes one block of pixels of one view, so that everything drawn for the view (its crop,
its order of operations, its gates) is the same for the whole program and costs no divergence.
"""

# Triton decides an `if` on a constexpr when it compiles; an `and` or an early return it does not.
# ruff: noqa: RET505, SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _weight(distance, BICUBIC: tl.constexpr):
    distance = tl.abs(distance)
    if BICUBIC:
        near = (1.5 * distance - 2.5) * distance * distance + 1.0
        far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
        return tl.where(distance < 1.0, near, tl.where(distance < 2.0, far, 0.0))
    else:
        return tl.maximum(1.0 - distance, 0.0)


@triton.jit
def _crop(
    source, box, stride_c, stride_h, stride_w, y, x, mask,
    height: tl.constexpr, width: tl.constexpr, SCALE: tl.constexpr, BICUBIC: tl.constexpr,
    ANTIALIAS: tl.constexpr,
):  # fmt: skip
    """Pixels (y, x) of the resized crop: ATen's weights, normalised by what lies in the crop."""
    top = tl.load(box).to(tl.int32)
    left = tl.load(box + 1).to(tl.int32)
    tall = tl.load(box + 2)
    wide = tl.load(box + 3)
    mirrored = tl.load(box + 4) != 0.0
    x = tl.where(mirrored, width - 1 - x, x)
    scale_y = tall / height
    scale_x = wide / width
    stretch_y = tl.maximum(scale_y, 1.0) if ANTIALIAS else scale_y * 0.0 + 1.0
    stretch_x = tl.maximum(scale_x, 1.0) if ANTIALIAS else scale_x * 0.0 + 1.0
    support: tl.constexpr = 2.0 if BICUBIC else 1.0
    centre_y = scale_y * (y.to(tl.float32) + 0.5)
    centre_x = scale_x * (x.to(tl.float32) + 0.5)
    first_y = tl.floor(centre_y - support * stretch_y + 0.5).to(tl.int32)
    first_x = tl.floor(centre_x - support * stretch_x + 0.5).to(tl.int32)
    taps_y = tl.ceil(2.0 * support * stretch_y).to(tl.int32)
    taps_x = tl.ceil(2.0 * support * stretch_x).to(tl.int32)
    red = tl.zeros_like(centre_y)
    green = tl.zeros_like(centre_y)
    blue = tl.zeros_like(centre_y)
    total = tl.zeros_like(centre_y)
    for tap_y in range(0, taps_y):
        row = first_y + tap_y
        in_y = mask & (row >= 0) & (row < tall)
        weight_y = _weight((row.to(tl.float32) + 0.5 - centre_y) / stretch_y, BICUBIC)
        line = source + (top + row) * stride_h
        for tap_x in range(0, taps_x):
            column = first_x + tap_x
            inside = in_y & (column >= 0) & (column < wide)
            weight = _weight((column.to(tl.float32) + 0.5 - centre_x) / stretch_x, BICUBIC)
            weight = tl.where(inside, weight * weight_y, 0.0)
            pixel = line + (left + column) * stride_w
            red += weight * tl.load(pixel, inside, 0.0).to(tl.float32)
            green += weight * tl.load(pixel + stride_c, inside, 0.0).to(tl.float32)
            blue += weight * tl.load(pixel + 2 * stride_c, inside, 0.0).to(tl.float32)
            total += weight
    total = tl.where(mask, total, 1.0) * SCALE
    red, green, blue = red / total, green / total, blue / total
    if BICUBIC:
        red, green, blue = _clamp(red), _clamp(green), _clamp(blue)
    return red, green, blue


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _hue_channel(lowest, spread, hue):
    return lowest + spread * _clamp(tl.abs(tl.abs(hue) - 3.0) - 1.0)


@triton.jit
def _adjust(red, green, blue, operation, factors, mean):
    """One of the four colour operations; the mean is that of the gray image."""
    if operation == 3:
        shift = tl.load(factors + 3)
        lowest = tl.minimum(tl.minimum(red, green), blue)
        spread = tl.maximum(tl.maximum(red, green), blue) - lowest
        hue = 1.0 + (green + blue - red - lowest) / tl.maximum(spread, 1e-30)
        hue = tl.where(green - blue < 0.0, -hue, hue) + 6.0 * shift
        hue = hue - 6.0 * tl.floor(hue / 6.0 + 0.5)
        red = _hue_channel(lowest, spread, hue)
        green = _hue_channel(lowest, spread, hue - 2.0)
        blue = _hue_channel(lowest, spread, hue + 2.0)
    else:
        factor = tl.load(factors + operation)
        target = tl.where(operation == 2, _gray(red, green, blue), 0.0)
        target = (1.0 - factor) * tl.where(operation == 1, mean, target)
        red = _clamp(factor * red + target)
        green = _clamp(factor * green + target)
        blue = _clamp(factor * blue + target)
    return red, green, blue


@triton.jit
def gray_sums(
    source, table, sums, images, stride_b, stride_c, stride_h, stride_w, tiles,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BICUBIC: tl.constexpr,
    ANTIALIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the gray image that the contrast will see, over one block; (views, tiles) floats.

    Partial sums rather than atomics: the same bits in every run.
    """
    view, tile = tl.program_id(0), tl.program_id(1)
    row = table + view * 18
    if tl.load(row + 5) == 0.0:
        return
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < HEIGHT * WIDTH
    image = source + (view % images).to(tl.int64) * stride_b
    red, green, blue = _crop(
        image, row, stride_c, stride_h, stride_w, pixel // WIDTH, pixel % WIDTH, mask,
        HEIGHT, WIDTH, SCALE, BICUBIC, ANTIALIAS,
    )  # fmt: skip
    before = 1
    for slot in range(0, 4):
        operation = tl.load(row + 6 + slot).to(tl.int32)
        before = tl.where(operation == 1, 0, before)
        if before == 1:
            red, green, blue = _adjust(red, green, blue, operation, row + 10, 0.0)
    gray = tl.where(mask, _gray(red, green, blue), 0.0)
    tl.store(sums + view * tiles + tile, tl.sum(gray))


@triton.jit
def views(
    source, table, sums, out, blurred, images, stride_b, stride_c, stride_h, stride_w,
    out_n, out_c, out_h, out_w, tiles, threshold, mean_r, mean_g, mean_b, std_r, std_g, std_b,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BICUBIC: tl.constexpr,
    ANTIALIAS: tl.constexpr, BLUR: tl.constexpr, SOLARIZE: tl.constexpr,
    NORMALIZE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Crop, mirror, colours and grayscale; then to `blurred` if a blur follows, else finished."""
    view, tile = tl.program_id(0), tl.program_id(1)
    row = table + view * 18
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < HEIGHT * WIDTH
    y, x = pixel // WIDTH, pixel % WIDTH
    image = source + (view % images).to(tl.int64) * stride_b
    red, green, blue = _crop(
        image, row, stride_c, stride_h, stride_w, y, x, mask,
        HEIGHT, WIDTH, SCALE, BICUBIC, ANTIALIAS,
    )  # fmt: skip
    if tl.load(row + 5) != 0.0:
        part = tl.arange(0, TILES)
        mean = tl.sum(tl.load(sums + view * tiles + part, part < tiles, 0.0)) / (HEIGHT * WIDTH)
        for slot in range(0, 4):
            operation = tl.load(row + 6 + slot).to(tl.int32)
            red, green, blue = _adjust(red, green, blue, operation, row + 10, mean)
    if tl.load(row + 14) != 0.0:
        gray = _gray(red, green, blue)
        red, green, blue = gray, gray, gray
    to_blur = tl.load(row + 15) != 0.0 if BLUR else False
    if to_blur:
        plane = HEIGHT * WIDTH
        held = blurred + view.to(tl.int64) * 3 * plane + pixel
        tl.store(held, red, mask)
        tl.store(held + plane, green, mask)
        tl.store(held + 2 * plane, blue, mask)
    else:
        finished = out + view.to(tl.int64) * out_n + y * out_h + x * out_w
        _finish(
            finished, out_c, red, green, blue, row, mask,
            threshold, mean_r, mean_g, mean_b, std_r, std_g, std_b, SOLARIZE, NORMALIZE,
        )  # fmt: skip


@triton.jit
def _finish(
    target, stride_c, red, green, blue, row, mask,
    threshold, mean_r, mean_g, mean_b, std_r, std_g, std_b,
    SOLARIZE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Solarize, normalise, round once, store."""
    if SOLARIZE:
        if tl.load(row + 17) != 0.0:
            red = tl.where(red >= threshold, 1.0 - red, red)
            green = tl.where(green >= threshold, 1.0 - green, green)
            blue = tl.where(blue >= threshold, 1.0 - blue, blue)
    if NORMALIZE:
        red = (red - mean_r) / std_r
        green = (green - mean_g) / std_g
        blue = (blue - mean_b) / std_b
    tl.store(target, red, mask)
    tl.store(target + stride_c, green, mask)
    tl.store(target + 2 * stride_c, blue, mask)


@triton.jit
def blur(
    source, target, table, out_n, out_c, out_h, out_w,
    threshold, mean_r, mean_g, mean_b, std_r, std_g, std_b,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS: tl.constexpr, TAPS: tl.constexpr,
    VERTICAL: tl.constexpr, MIRROR: tl.constexpr, SOLARIZE: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blur along one axis the views that are to be blurred; the vertical pass finishes them."""
    view, tile = tl.program_id(0), tl.program_id(1)
    row = table + view * 18
    if tl.load(row + 15) == 0.0:
        return
    sigma = tl.load(row + 16)
    tap = tl.arange(0, TAPS) - RADIUS
    weights = tl.exp(-0.5 * (tap / sigma) * (tap / sigma))
    total = tl.sum(tl.where(tap <= RADIUS, weights, 0.0))
    # What lies beyond 4.5 sigma weighs 7e-6: below the rounding that is promised.
    reach = tl.minimum(tl.ceil(4.5 * sigma - 0.5).to(tl.int32), RADIUS)

    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    plane = HEIGHT * WIDTH
    mask = pixel < plane
    y, x = pixel // WIDTH, pixel % WIDTH
    image = source + view.to(tl.int64) * 3 * plane
    along = y if VERTICAL else x
    last: tl.constexpr = (HEIGHT if VERTICAL else WIDTH) - 1
    step: tl.constexpr = WIDTH if VERTICAL else 1
    fixed = x if VERTICAL else y * WIDTH
    red = tl.zeros((BLOCK,), tl.float32)
    green = tl.zeros((BLOCK,), tl.float32)
    blue = tl.zeros((BLOCK,), tl.float32)
    for shift in range(-reach, reach + 1):
        place = along + shift
        inside = mask
        if MIRROR:
            place = last - tl.abs(last - tl.abs(place))
        else:
            inside = mask & (place >= 0) & (place <= last)
        weight = tl.exp(-0.5 * (shift / sigma) * (shift / sigma)) / total
        at = image + fixed + place * step
        red += weight * tl.load(at, inside, 0.0)
        green += weight * tl.load(at + plane, inside, 0.0)
        blue += weight * tl.load(at + 2 * plane, inside, 0.0)
    if VERTICAL:
        finished = target + view.to(tl.int64) * out_n + y * out_h + x * out_w
        _finish(
            finished, out_c, red, green, blue, row, mask,
            threshold, mean_r, mean_g, mean_b, std_r, std_g, std_b, SOLARIZE, NORMALIZE,
        )  # fmt: skip
    else:
        passed = target + view.to(tl.int64) * 3 * plane + pixel
        tl.store(passed, red, mask)
        tl.store(passed + plane, green, mask)
        tl.store(passed + 2 * plane, blue, mask)
