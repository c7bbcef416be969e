"""Views on a CUDA device by Triton kernels: two launches, and two more if there is a blur."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from contrastive_kit.augment._view import ViewSettings

_BLOCK = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(images: Tensor | Sequence[Tensor], settings: ViewSettings, dtype: torch.dtype) -> str:
    """Why these views cannot be made here; empty if they can."""
    if not isinstance(images, Tensor):
        return "takes a batch of images of one size, got a list"
    reasons = {
        f"takes images on a CUDA device, got them on {images.device}": images.device.type != "cuda",
        f"makes float32 and half precision, got {images.dtype} images and {dtype} views": (
            images.dtype == torch.float64 or dtype not in _DTYPES
        ),
        "is not differentiable, got images that require a gradient": (
            torch.is_grad_enabled() and images.requires_grad
        ),
        "is not traced by torch.compile": torch.compiler.is_compiling(),
        f"makes torchvision's colours, got contrast_mean={settings.contrast_mean!r} and "
        f"saturation_mode={settings.saturation_mode!r}": (
            settings.contrast_mean != "gray" or settings.saturation_mode != "gray"
        ),
        "needs antialias for 'bicubic'": (
            settings.interpolation == "bicubic" and not settings.antialias
        ),
        "needs triton, which is not installed": find_spec("triton") is None,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def render(images: Tensor, table: Tensor, settings: ViewSettings, out: Tensor) -> None:
    """Make views of uint8 or floating images.

    Args:
        images: ``(B, 3, H, W)``, in any memory format.
        table: ``(V, B, 18)`` float32 on the device of the images.
        settings: What the samples share.
        out: ``(V · B, 3, *size)``, floating, in any memory format; overwritten.
    """
    if not len(out):
        return
    if images.device.type != "cuda":
        _launch(images, table.flatten(0, 1).contiguous(), settings, out)
        return
    with torch.cuda.device(images.device):
        _launch(images, table.flatten(0, 1).contiguous(), settings, out)


def _launch(images: Tensor, table: Tensor, settings: ViewSettings, out: Tensor) -> None:
    import triton

    from contrastive_kit.augment import _triton_kernels as kernels

    height, width = settings.size
    tiles = triton.cdiv(height * width, _BLOCK)
    grid = (len(out), tiles)
    blurs = settings.kernel_size > 0
    sums = torch.empty(grid, dtype=torch.float32, device=out.device)
    held = torch.empty((2 if blurs else 0, *out.shape), dtype=torch.float32, device=out.device)
    constants = (*(settings.mean or (0.0,) * 3), *(settings.std or (1.0,) * 3))
    crop = {
        "HEIGHT": height,
        "WIDTH": width,
        "SCALE": 255.0 if images.dtype == torch.uint8 else 1.0,
        "BICUBIC": settings.interpolation == "bicubic",
        "ANTIALIAS": settings.antialias,
        "BLOCK": _BLOCK,
    }
    last = {
        "SOLARIZE": settings.solarize_threshold is not None,
        "NORMALIZE": settings.mean is not None,
    }
    threshold = settings.solarize_threshold or 0.0
    kernels.gray_sums[grid](images, table, sums, len(images), *images.stride(), tiles, **crop)
    kernels.views[grid](
        images, table, sums, out, held[0] if blurs else out, len(images), *images.stride(),
        *out.stride(), tiles, threshold, *constants, BLUR=blurs,
        TILES=triton.next_power_of_2(tiles), **last, **crop,
    )  # fmt: skip
    if not blurs:
        return
    for vertical in (False, True):
        kernels.blur[grid](
            held[int(vertical)], out if vertical else held[1], table, *out.stride(),
            threshold, *constants, HEIGHT=height, WIDTH=width, RADIUS=settings.kernel_size // 2,
            TAPS=triton.next_power_of_2(settings.kernel_size), VERTICAL=vertical,
            MIRROR=settings.blur_padding == "reflect", BLOCK=_BLOCK, **last,
        )  # fmt: skip
