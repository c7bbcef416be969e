"""Views on the CPU: in place, in chunks that stay in the cache, each in one pass per step.

What a batched pipeline costs on a CPU is memory traffic: every operation on a whole batch reads and
writes it in main memory, into freshly mapped pages. Here a chunk of samples goes through all its
operations before the next one starts. The samples are sorted by the place of the hue in their
order, so that the hue, the dearest operation, is one call on a contiguous slice of the chunk.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit.augment._view import ViewSettings
from contrastive_kit.augment.functional import GRAY_WEIGHTS
from contrastive_kit.augment.parameters import BRIGHTNESS, CONTRAST, HUE, SATURATION

_CHUNK_BYTES = 900_000
_TINY = 1e-30
# The taps beyond 4.5 sigma weigh 7e-6 together: below the rounding that is promised.
_BLUR_REACH = 4.5


class _Row:
    """One sample of one view: its row of the parameter table, as Python numbers."""

    __slots__ = (
        "blur",
        "box",
        "factors",
        "flip",
        "gray",
        "hue_place",
        "jitter",
        "number",
        "order",
        "sigma",
        "solarize",
    )

    def __init__(self, number: int, values: list[float]) -> None:
        self.number = number
        self.box = [int(value) for value in values[:4]]
        self.flip = values[4] != 0
        self.jitter = values[5] != 0
        self.order = [int(value) for value in values[6:10]]
        self.factors = values[10:14]
        self.gray = values[14] != 0
        self.blur = values[15] != 0
        self.sigma = values[16]
        self.solarize = values[17] != 0
        self.hue_place = self.order.index(HUE) if self.jitter else 4


class _Workspace:
    """The buffers of a chunk, allocated once a call."""

    def __init__(self, chunk: int, settings: ViewSettings) -> None:
        height, width = settings.size
        self.x = torch.empty(chunk, 3, height, width)
        self.planes = torch.empty(4, chunk, height, width)
        self.blurred = torch.empty(3, height, width)


def render(
    images: Tensor | Sequence[Tensor], table: Tensor, settings: ViewSettings, out: Tensor
) -> None:
    """Make views of uint8 or float32 images on the CPU.

    Args:
        images: ``(B, 3, H, W)`` or B images ``(3, H_i, W_i)``.
        table: ``(V, B, 18)`` on the CPU.
        settings: What the samples share.
        out: ``(V · B, 3, *size)``, floating; overwritten.
    """
    rows = [_Row(number, values) for number, values in enumerate(table.flatten(0, 1).tolist())]
    rows.sort(key=lambda row: row.hue_place)
    height, width = settings.size
    chunk = max(1, min(len(rows), _CHUNK_BYTES // (12 * height * width)))
    work = _Workspace(chunk, settings)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        x = work.x[: len(part)]
        for row, target in zip(part, x, strict=True):
            target.copy_(_crop(images[row.number % len(images)], row, settings))
        if images[0].dtype == torch.uint8:
            x.mul_(1 / 255)
        elif settings.interpolation == "bicubic":
            x.clamp_(0, 1)
        _jitter(x, part, work, settings)
        for row, sample in zip(part, x, strict=True):
            _finish(sample, row, work, settings, out[row.number])


def _crop(image: Tensor, row: _Row, settings: ViewSettings) -> Tensor:
    top, left, height, width = row.box
    region = image[:, top : top + height, left : left + width]
    if image.dtype == torch.uint8 and region.stride(0) != 1:
        # Interleaved channels take ATen's vectorised uint8 path, which is worth the copy.
        region = torch.stack(region.unbind(0), dim=-1).permute(2, 0, 1)
    crop = F.interpolate(
        region[None], settings.size, mode=settings.interpolation, antialias=settings.antialias
    )
    return (crop.flip(-1) if row.flip else crop)[0]


def _jitter(x: Tensor, rows: list[_Row], work: _Workspace, settings: ViewSettings) -> None:
    jittered = sum(row.jitter for row in rows)
    if not jittered:
        return
    for row, sample in zip(rows[:jittered], x, strict=False):
        for operation in row.order[: row.hue_place]:
            _adjust(sample, operation, row.factors[operation], work, settings)
    shifts = [row.factors[HUE] for row in rows[:jittered]]
    _hue(x[:jittered], shifts, work.planes[:, :jittered])
    for row, sample in zip(rows[:jittered], x, strict=False):
        for operation in row.order[row.hue_place + 1 :]:
            _adjust(sample, operation, row.factors[operation], work, settings)


def _adjust(
    sample: Tensor, operation: int, factor: float, work: _Workspace, settings: ViewSettings
) -> None:
    """Brightness, contrast or saturation of one image, in place."""
    if operation == BRIGHTNESS:
        sample.mul_(factor)
    elif operation == CONTRAST and settings.contrast_mean == "gray":
        means = sample.flatten(1).mean(dim=1).tolist()
        mean = sum(weight * value for weight, value in zip(GRAY_WEIGHTS, means, strict=True))
        sample.mul_(factor).add_((1 - factor) * mean)
    elif operation == CONTRAST:
        sample.lerp_(sample.mean(dim=(1, 2), keepdim=True), 1 - factor)
    elif operation == SATURATION and settings.saturation_mode == "gray":
        sample.lerp_(_gray(sample, work.planes[0, 0]), 1 - factor)
    else:
        brightest, share = sample.amax(dim=0), sample.amin(dim=0)
        torch.sub(brightest, share, out=share).clamp_(min=_TINY)
        torch.div(brightest, share, out=share).clamp_(max=factor)
        sample.sub_(brightest).mul_(share).add_(brightest)
    # With a factor up to 1 the result lies between two values that are in range.
    if factor > 1:
        sample.clamp_(0, 1)


def _gray(sample: Tensor, out: Tensor) -> Tensor:
    red, green, blue = sample
    torch.mul(red, GRAY_WEIGHTS[0], out=out)
    return out.add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2])


def _hue(x: Tensor, shifts: list[float], planes: Tensor) -> None:
    """`functional.adjust_hue` of ``(n, 3, H, W)`` in place, by way of four ``(n, H, W)`` buffers.

    With base = mn − d the channels are base + d · clamp(||t| − 3|, 1, 2).
    """
    red, green, blue = x.unbind(1)
    base, spread, hue, scratch = planes
    torch.minimum(red, green, out=base)
    torch.minimum(base, blue, out=base)
    torch.maximum(red, green, out=spread)
    torch.maximum(spread, blue, out=spread).sub_(base).clamp_(min=_TINY)
    torch.add(green, blue, out=hue).sub_(red).sub_(base).div_(spread).add_(1)
    hue.copysign_(torch.sub(green, blue, out=scratch))
    if len(shifts) == 1:
        hue.add_(6 * shifts[0])
    else:
        hue.add_(torch.tensor(shifts).mul_(6)[:, None, None])
    if max(map(abs, shifts)) > 1 / 3:
        hue.sub_(torch.mul(hue, 1 / 6, out=scratch).round_(), alpha=6)
    base.sub_(spread)
    for channel, phase in ((red, 0), (green, -2), (blue, 2)):
        torch.add(hue, phase, out=scratch).abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(base, spread, scratch, out=channel)


def _finish(
    sample: Tensor, row: _Row, work: _Workspace, settings: ViewSettings, out: Tensor
) -> None:
    """Grayscale, blur, solarize and normalise one image into its place."""
    if row.gray:
        sample = _gray(sample, work.planes[0, 0])[None]
    if row.blur and settings.kernel_size:
        sample = _blur(sample, row.sigma, work, settings)
    threshold = settings.solarize_threshold
    if row.solarize and threshold is not None:
        sample = torch.where(sample >= threshold, 1 - sample, sample)
    if settings.mean is None or settings.std is None:
        out.copy_(sample)
        return
    for number, (mean, std) in enumerate(zip(settings.mean, settings.std, strict=True)):
        plane = sample[number % len(sample)]
        out[number].copy_(torch.sub(plane, mean, out=work.planes[1, 0]).div_(std))


def _blur(sample: Tensor, sigma: float, work: _Workspace, settings: ViewSettings) -> Tensor:
    """Separable blur by shifted sums; the taps that cannot be seen are left out."""
    channels, height, width = sample.shape
    radius = settings.kernel_size // 2
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    weights = [weight / total for weight in weights]
    radius = min(radius, math.ceil(_BLUR_REACH * sigma))
    out = work.blurred[:channels]
    mode = "reflect" if settings.blur_padding == "reflect" else "constant"
    padded = F.pad(sample[None], (radius, radius, 0, 0), mode=mode)[0]
    torch.mul(padded[:, :, radius : radius + width], weights[0], out=out)
    for offset in range(1, radius + 1):
        for side in (radius - offset, radius + offset):
            out.add_(padded[:, :, side : side + width], alpha=weights[offset])
    padded = F.pad(out[None], (0, 0, radius, radius), mode=mode)[0]
    torch.mul(padded[:, radius : radius + height], weights[0], out=out)
    for offset in range(1, radius + 1):
        for side in (radius - offset, radius + offset):
            out.add_(padded[:, side : side + height], alpha=weights[offset])
    return out
