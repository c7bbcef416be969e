"""Crop, resize and horizontal flip in one."""

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit.augment.functional.images import check_images, widen
from contrastive_kit.augment.parameters import several

Interpolation = Literal["bilinear", "bicubic", "nearest"]


def check_interpolation(interpolation: object) -> Literal["bilinear", "bicubic"]:
    """The name of an interpolation that images take, of torchvision's and Kornia's enums too."""
    name = interpolation.name if isinstance(interpolation, Enum) else interpolation
    name = name.lower() if isinstance(name, str) else name
    if name == "bilinear":
        return "bilinear"
    if name == "bicubic":
        return "bicubic"
    raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {interpolation!r}")


def crop_resize(
    images: Tensor,
    box: Tensor,
    size: int | tuple[int, int],
    *,
    flip: Tensor | None = None,
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
) -> Tensor:
    """Cut a box out of each image, resize it, and flip it horizontally where asked.

    Equal to torchvision's ``resized_crop`` and ``hflip``, image by image. Bicubic floats may leave
    [0, 1], as there. uint8 is resized across, rounded and clamped to whole gray levels, and then
    down, as in torchvision: equal to it on the CPU, and elsewhere to one gray level, in rare pixels
    two.

    On the CPU each image is resized by itself, reading no more than its box. On other devices,
    under ``torch.compile`` and for results one pixel wide, which torch (2.14) resizes wrongly, the
    resize is two batched matrix products whose banded matrices hold the interpolation weights,
    B · H_out · H + B · W_out · W floats.

    Args:
        images: ``(B, C, H, W)``, floating or uint8. In uint8 ``channels_last`` is 2-3 times faster
            on the CPU.
        box: ``(B, 4)``: top, left, height and width in pixels, whole numbers of any dtype.
        size: Height and width of the result, or both as one number.
        flip: ``(B,)``; samples where it is not zero are flipped horizontally.
        interpolation: "bilinear" or "bicubic", or "nearest" for masks: the pixel whose area holds
            the center, torchvision's NEAREST_EXACT.
        antialias: Low-pass when shrinking. False aliases, as TensorFlow's SimCLR does. Without
            meaning for "nearest".

    Returns:
        ``(B, C, *size)`` in the dtype of `images`.

    Raises:
        TypeError: If `images` is neither floating nor uint8.
        ValueError: If a shape does not fit, a size is not positive or, on the CPU, a box is not
            inside its image or not of whole numbers.

    Example:
        >>> images = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> crop_resize(images, torch.tensor([[0, 0, 2, 2]]), 2, flip=torch.tensor([True]))
        tensor([[[[1., 0.],
                  [5., 4.]]]])
    """
    check_images(images)
    size = check_size(size)
    if interpolation not in ("bilinear", "bicubic", "nearest"):
        raise ValueError(
            f"interpolation must be 'bilinear', 'bicubic' or 'nearest', got {interpolation!r}"
        )
    if box.shape != (images.shape[0], 4):
        raise ValueError(f"box must be ({images.shape[0]}, 4), got {tuple(box.shape)}")
    if flip is not None and flip.shape != images.shape[:1]:
        raise ValueError(f"flip must be ({images.shape[0]},), got {tuple(flip.shape)}")
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        check_boxes(box, images.shape[-2], images.shape[-1])
    if interpolation == "nearest":
        return _crop_nearest(images, box, size, flip)
    return crop(images, box, size, flip, interpolation, antialias)


def check_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, both positive, else an error."""
    pair: tuple[Any, ...] = tuple(size) if several(size) else (size, size)  # type: ignore[arg-type]
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in pair)
    if len(pair) != 2 or not whole or min(pair) < 1:
        raise ValueError(f"size must be a positive int or two of them, got {size!r}")
    return int(pair[0]), int(pair[1])


def check_boxes(box: Tensor, height: int | Tensor, width: int | Tensor) -> None:
    """Raise unless boxes on the CPU are inside their images, and whole pixels."""
    top, left, tall, wide = box.unbind(-1)
    inside = (top >= 0) & (left >= 0) & (tall >= 1) & (wide >= 1)
    inside &= (top + tall <= height) & (left + wide <= width)
    if not bool(inside.all()):
        wrong = int((~inside).flatten().int().argmax())
        raise ValueError(
            f"box must lie inside the image, got (top, left, height, width) = "
            f"{box.reshape(-1, 4)[wrong].tolist()} for sample {wrong}"
        )
    # One way to crop would round them, the other would not.
    broken = (box != box.floor()).any(dim=-1)
    if bool(broken.any()):
        raise ValueError(
            "box must be whole numbers of pixels, got (top, left, height, width) = "
            f"{box[broken][0].tolist()}"
        )


def can_interpolate(size: tuple[int, int]) -> bool:
    """Whether torch's resize is right: to a width of 1 it repeats rows or stops (2.9 to 2.14)."""
    return size[1] > 1


def crop(
    images: Tensor,
    box: Tensor,
    size: tuple[int, int],
    flip: Tensor | None,
    interpolation: Interpolation,
    antialias: bool,
) -> Tensor:
    """`crop_resize` for "bilinear" and "bicubic", without its checks."""
    in_eager_cpu = images.device.type == "cpu" and not torch.compiler.is_compiling()
    if not in_eager_cpu or not can_interpolate(size) or not len(images):
        return crop_matmul(images, box, size, flip, interpolation, antialias)
    crops = crop_each(widen(images), box, size, flip, interpolation, antialias)
    return torch.cat(list(crops)).to(images.dtype)


def crop_each(
    images: Iterable[Tensor],
    box: Tensor,
    size: tuple[int, int],
    flip: Tensor | None,
    interpolation: Interpolation,
    antialias: bool,
) -> Iterator[Tensor]:
    """The crops ``(1, C, *size)`` of images on the CPU, each read no further than its box."""
    flips = [False] * len(box) if flip is None else (flip != 0).tolist()
    for image, (top, left, height, width), flipped in zip(
        images, box.long().tolist(), flips, strict=True
    ):
        region = image[None, :, top : top + height, left : left + width]
        crop = F.interpolate(region, size, mode=interpolation, antialias=antialias)
        yield crop.flip(-1) if flipped else crop


def _crop_nearest(
    images: Tensor, box: Tensor, size: tuple[int, int], flip: Tensor | None
) -> Tensor:
    top, left, height, width = box.float().unbind(-1)
    rows = _nearest_index(top, height, size[0], None)
    columns = _nearest_index(left, width, size[1], flip)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    picked = images[sample, :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1).contiguous()


def _nearest_index(start: Tensor, extent: Tensor, target: int, flip: Tensor | None) -> Tensor:
    """``(B, target)``: the source pixel that each pixel of the result copies."""
    index = _target_index(start, target, flip)
    offset = ((index + 0.5) * (extent / target)[:, None]).floor()
    return (start[:, None] + offset.minimum(extent[:, None] - 1)).long()


def _target_index(start: Tensor, target: int, flip: Tensor | None) -> Tensor:
    index = torch.arange(target, device=start.device, dtype=start.dtype)
    return index if flip is None else torch.where(flip[:, None] != 0, target - 1 - index, index)


def crop_matmul(
    images: Tensor,
    box: Tensor,
    size: tuple[int, int],
    flip: Tensor | None,
    interpolation: Interpolation,
    antialias: bool,
) -> Tensor:
    """`crop_resize` as two products with matrices of weights, without its checks."""
    source = images if images.dtype == torch.float64 else images.float()
    top, left, height, width = box.to(source.dtype).unbind(-1)
    rows = resize_matrix(top, height, images.shape[-2], size[0], None, interpolation, antialias)
    columns = resize_matrix(left, width, images.shape[-1], size[1], flip, interpolation, antialias)
    with torch.autocast(images.device.type, enabled=False):
        across = source @ columns[:, None].mT
        if images.dtype == torch.uint8:
            to_levels(across)
        result = rows[:, None] @ across
    if images.dtype == torch.uint8:
        to_levels(result)
    return result.to(images.dtype)


def to_levels(x: Tensor) -> None:
    """Round to whole gray levels, halves up as torch's resize of uint8 does; in place."""
    x.add_(0.5).floor_().clamp_(0, 255)


def resize_matrix(
    start: Tensor,
    extent: Tensor,
    source: int,
    target: int,
    flip: Tensor | None,
    interpolation: Interpolation,
    antialias: bool,
) -> Tensor:
    """``(B, target, source)``: the weight of each source pixel in each pixel of the result.

    The conventions are ATen's: half-pixel centers; with antialias the kernel is stretched by the
    shrink factor and renormalized at the border, without it the border pixel is repeated.
    """
    index = _target_index(start, target, flip)
    start, extent = start[:, None], extent[:, None]
    scale = extent / target
    center = scale * (index + 0.5)
    pixel = torch.arange(source, device=start.device, dtype=start.dtype) - start
    if antialias:
        stretch = scale.clamp(min=1)[..., None]
        distance = ((pixel + 0.5)[:, None, :] - center[:, :, None]) / stretch
        inside = ((pixel >= 0) & (pixel < extent)).to(pixel.dtype)
        weight = _kernel(distance.abs(), interpolation, -0.5) * inside[:, None, :]
        return weight / weight.sum(dim=-1, keepdim=True)
    position = center - 0.5
    if interpolation == "bilinear":
        position = position.maximum(position.new_zeros(())).minimum(extent - 1)
    first = position.floor() - (0 if interpolation == "bilinear" else 1)
    weight = torch.zeros((), dtype=start.dtype, device=start.device)
    for tap in range(2 if interpolation == "bilinear" else 4):
        at = first + tap
        share = _kernel((at - position).abs(), interpolation, -0.75)
        at = at.maximum(at.new_zeros(())).minimum(extent - 1)
        weight = weight + share[..., None] * (at[..., None] == pixel[:, None, :])
    return weight


def _kernel(distance: Tensor, interpolation: Interpolation, a: float) -> Tensor:
    if interpolation == "bilinear":
        return (1 - distance).clamp(min=0)
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
