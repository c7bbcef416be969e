"""The views of a batch on CUDA, made by Triton kernels: the host's part.

Three launches: the crop with the sums that the contrast needs, the total of those sums, the
colors; two more where views are blurred. None of it depends on the batch or waits for the GPU.

Beside the result this takes 3 bytes a pixel of the views for uint8 images and 12 for floats; where
views may be blurred 12 more for uint8 images, and 12 more for a result in half precision.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_kit import _gpu
from contrastive_kit.augment.recipe import Recipe

# Pixels of a program: two for each thread of four warps, so that they fit into 64 registers.
BLOCK = 256
_LARGEST_OFFSET = 2**31 - 1
_OLDEST_CAPABILITY = (7, 0)


def refusal(images: Tensor | Sequence[Tensor], recipe: Recipe, dtype: torch.dtype) -> str | None:
    """Why these views cannot be made here, or None if they can."""
    if not isinstance(images, Tensor):
        return "it takes one batch tensor, got a list of images"
    height, width = recipe.size
    largest = max(
        sum(n * stride for n, stride in zip(images.shape[1:], images.stride()[1:], strict=True)),
        3 * height * width,
        2 * height * images.shape[2],
        2 * width * images.shape[3],
    )
    reasons = {
        f"it takes images on CUDA, got {images.device}": images.device.type != "cuda",
        "it computes in float32, got float64": torch.float64 in (images.dtype, dtype),
        "it is not differentiable, got images that require grad": (
            images.requires_grad and torch.is_grad_enabled()
        ),
        "it takes images and makes views of less than 2³¹ elements each": largest > _LARGEST_OFFSET,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    return reason or _gpu.refusal(images.device, _OLDEST_CAPABILITY)


def render(
    images: Tensor | Sequence[Tensor],
    table: Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Make views as the torch backend does, in at most five launches."""
    assert isinstance(images, Tensor)  # or it would have refused
    shape = (table.shape[0] * table.shape[1], 3, *recipe.size)
    out = torch.empty(shape, dtype=dtype, device=table.device, memory_format=memory_format)
    render_into(images, table, recipe, out)
    return out


def render_into(images: Tensor, table: Tensor, recipe: Recipe, out: Tensor) -> None:
    """Make views in a tensor that is there.

    Args:
        images: ``(B, 3, H, W)``, uint8, float32, float16 or bfloat16, with any strides.
        table: ``(V, B, columns)`` on the device of the images. A box that is not inside its image
            is moved into it.
        recipe: What the samples share.
        out: ``(V · B, 3, *size)``, float32, float16 or bfloat16, with any strides; overwritten.
    """
    _op(
        images,
        table,
        out,
        recipe.interpolation == "bicubic",
        recipe.antialias,
        recipe.contrast_mean == "channel",
        recipe.saturation_mode == "hsv",
        recipe.taps,
        recipe.blur_padding == "reflect",
        recipe.solarize_threshold if recipe.makes("solarize") else math.inf,
        *map(list, recipe.normalize or ((0.0,) * 3, (1.0,) * 3)),
    )


def _launch(
    images: Tensor,
    table: Tensor,
    out: Tensor,
    bicubic: bool,
    antialias: bool,
    channel_mean: bool,
    hsv: bool,
    kernel_size: int,
    reflect: bool,
    solarize_threshold: float,
    mean: list[float],
    std: list[float],
) -> None:
    from contrastive_kit.augment.backends import triton_kernels as kernels

    if out.numel() == 0:
        return
    views, batch = table.shape[:2]
    rows, _, height, width = out.shape
    table = table.to(torch.float32).contiguous()
    tiles = -(-height * width // BLOCK)
    # A crop of uint8 images is rounded to uint8, so it can be kept as such: a quarter of the bytes.
    kept = torch.uint8 if images.dtype == torch.uint8 else torch.float32
    crops = torch.empty(out.shape, dtype=kept, device=out.device)
    sums = torch.empty((rows, 3, tiles), dtype=torch.float32, device=out.device)
    sharp = across = out
    if kernel_size:
        # What is blurred is never rounded on its way; the result holds it if it is wide enough.
        sharp = out if out.dtype == torch.float32 else _float32(out)
        across = crops if kept == torch.float32 else _float32(out)

    grid = (rows * tiles,)
    place = (batch, views, tiles)
    finish = (solarize_threshold, *mean, *(1 / value for value in std))
    # Fused multiply-adds round once instead of twice; their default differs between releases.
    shared: dict[str, Any] = {
        "HEIGHT": height,
        "WIDTH": width,
        "BLOCK": BLOCK,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        kernels.crop_kernel[grid](
            images, *images.stride(), *images.shape[2:], table, crops, sums, *place,
            BICUBIC=bicubic, ANTIALIAS=antialias, HSV=hsv, **shared,
        )  # fmt: skip
        kernels.color_kernel[grid](
            crops, sums.sum(dim=2), table, *place,
            sharp, *sharp.stride(), out, *out.stride(), *finish,
            CHANNEL_MEAN=channel_mean, HSV=hsv, BLUR=kernel_size > 0, **shared,
        )  # fmt: skip
        passes = ((False, sharp, across), (True, across, out)) if kernel_size else ()
        for vertical, source, target in passes:
            kernels.blur_kernel[grid](
                source, *source.stride(), table, *place, target, *target.stride(), *finish,
                RADIUS=kernel_size // 2, REFLECT=reflect, VERTICAL=vertical, **shared,
            )  # fmt: skip


def _float32(out: Tensor) -> Tensor:
    return torch.empty(out.shape, dtype=torch.float32, device=out.device)


def _register(name: str, schema: str, kernel: Callable[..., None]) -> Any:
    """Register an op that writes into an argument, so that ``torch.compile`` need not look inside.

    Unlike ``torch.library.custom_op`` this does not import Dynamo.
    """
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CompositeExplicitAutograd", kernel)
    torch.library.register_fake(name, lambda *arguments: None)
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op).default


_op = _register(
    "contrastive_kit::render_views",
    "(Tensor images, Tensor table, Tensor(a!) out, bool bicubic, bool antialias, "
    "bool channel_mean, bool hsv, int kernel_size, bool reflect, float solarize_threshold, "
    "float[] mean, float[] std) -> ()",
    _launch,
)
