"""What all operations share: the check of the images, their working precision, the gate."""

import math

import torch
from torch import Tensor

from contrastive_kit.augment.parameters import to_number


def check_images(images: object, channels: int | None = None) -> Tensor:
    """Return `images` if it is a batch of images, else raise an error that says what is wrong."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f"images must be (B, C, H, W) and not empty, got {tuple(images.shape)}"
            f"{_OF_OTHER_DIMENSIONS.get(images.ndim, '')}"
        )
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(
            f"images must be uint8 or floating, got {images.dtype}; "
            "images.to(torch.uint8) if they lie in 0...255"
        )
    if channels is not None and images.shape[1] != channels:
        raise ValueError(
            f"images must have {channels} channels, got {tuple(images.shape)}"
            f"{_of_other_channels(images.shape[1], images.shape[3])}"
        )
    return images


_OF_OTHER_DIMENSIONS = {
    3: "; one image is a batch as images[None]",
    5: "; the frames of videos (B, T, C, H, W) are a batch as images.flatten(0, 1)",
}


def _of_other_channels(count: int, last: int) -> str:
    if last == 3:
        return "; channels come before rows: images.permute(0, 3, 1, 2)"
    if count == 1:
        return "; gray images become RGB by images.expand(-1, 3, -1, -1)"
    return "; images[:, :3] leaves the alpha channel out" if count == 4 else ""


def widen(images: Tensor) -> Tensor:
    """Half precision as float32; other images as they are."""
    return images.float() if images.dtype in (torch.float16, torch.bfloat16) else images


def to_working(images: Tensor) -> Tensor:
    """Floats in [0, 1], at least float32."""
    return images.float() / 255 if images.dtype == torch.uint8 else widen(images)


def checked(images: object, channels: int | None = None) -> Tensor:
    """Images as floats in [0, 1], at least float32, or an error that says what is wrong."""
    return to_working(check_images(images, channels))


def to_result(result: Tensor, images: Tensor) -> Tensor:
    """The result in the dtype of the images; of uint8 images it stays in the working precision."""
    return result.to(images.dtype) if images.is_floating_point() else result


def per_sample(
    name: str, value: float | Tensor, images: Tensor, low: float, high: float = math.inf
) -> Tensor:
    """``(B, 1, 1, 1)``, or ``(1, 1, 1, 1)`` for a plain number, in the working precision."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        # Dynamo traces no more than this for the numbers that are usual.
        value = value if type(value) in (float, int) else to_number(name, value)
        if not low <= value <= high:
            raise ValueError(f"{name} must be between {low} and {high}, got {value}")
        return torch.full((1, 1, 1, 1), value, dtype=dtype, device=images.device)
    if value.ndim == 0 or value.shape == images.shape[:1]:
        return value.to(dtype).reshape(-1, 1, 1, 1)
    raise ValueError(
        f"{name} must be a number or a tensor of shape ({images.shape[0]},), "
        f"got {tuple(value.shape)}"
    )


def gated(result: Tensor, images: Tensor, apply: Tensor | None) -> Tensor:
    """The result where `apply` is not zero, the images elsewhere."""
    if apply is None:
        return result
    if apply.shape != images.shape[:1]:
        raise ValueError(f"apply must have shape ({images.shape[0]},), got {tuple(apply.shape)}")
    return torch.where(apply.reshape(-1, 1, 1, 1) != 0, result, images)
