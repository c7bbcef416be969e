"""Patches of sixteen photographs that ship inside scikit-image and scikit-learn: no download.

The task is to tell which photograph an unseen patch comes from. Training patches are cut from the
left half of each photograph and test patches from the right, so that they share no pixel.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor


@cache
def load_photographs() -> dict[str, np.ndarray]:
    """The photographs by name, each (H, W, 3) uint8; read once."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    names = [
        "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel",
        "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket",
    ]  # fmt: skip
    photographs = {name: getattr(skimage.data, name)() for name in names}
    photographs["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    for name in ("china", "flower"):
        photographs[name] = load_sample_image(f"{name}.jpg")
    return {
        name: photo if photo.ndim == 3 else np.stack([photo] * 3, axis=2)
        for name, photo in sorted(photographs.items())
    }


def cut(photo: np.ndarray, size: int, per_side: int) -> np.ndarray:
    """An evenly spaced grid of square patches, (per_side², size, size, 3)."""
    height, width = photo.shape[:2]
    rows = np.linspace(0, height - size, per_side).astype(int)
    columns = np.linspace(0, width - size, per_side).astype(int)
    return np.stack([photo[y : y + size, x : x + size] for y in rows for x in columns])


def load_patches(size: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """256 training and 100 test patches of each photograph.

    Args:
        size: side of the patches in pixels, at most 192.

    Returns:
        Training images (4096, 3, size, size) uint8 and labels (4096,), test images and labels
        (1600 of each), and the names of the classes.

    Raises:
        ValueError: a photograph is smaller than two patches beside each other.
    """
    photographs = load_photographs()
    largest = min(min(photo.shape[0], photo.shape[1] // 2) for photo in photographs.values())
    if size > largest:
        raise ValueError(f"size must be at most {largest} with the photographs, got {size}")
    parts: list[Tensor] = []
    halves = [np.array_split(p, [p.shape[1] // 2], axis=1) for p in photographs.values()]
    for half, grid in zip(zip(*halves, strict=True), (16, 10), strict=True):
        patches = [cut(photo, size, grid) for photo in half]
        parts.append(torch.from_numpy(np.concatenate(patches)).permute(0, 3, 1, 2).contiguous())
        parts.append(torch.arange(len(patches)).repeat_interleave(grid**2))
    return parts[0], parts[1], parts[2], parts[3], list(photographs)
