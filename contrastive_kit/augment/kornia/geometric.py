"""Modules for Kornia's pipelines that move pixels."""

from enum import Enum
from typing import Any

import torch
from kornia.constants import Resample
from kornia.geometry.transform import warp_affine
from torch import Tensor

from contrastive_kit._checks import check_flag
from contrastive_kit.augment import functional
from contrastive_kit.augment.functional.images import gated
from contrastive_kit.augment.kornia.base import (
    Geometric,
    Params,
    crop_matrix,
    resized_to,
    to_device_of,
)
from contrastive_kit.augment.parameters import N_UNIFORMS, unpack
from contrastive_kit.augment.recipe import Recipe

_MODES: dict[str, functional.Interpolation] = {
    "nearest": "nearest",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
}


class Cropping(Geometric):
    """Base of the modules that crop and resize."""

    gated = False

    def keep_flags(self, size: tuple[int, int], interpolation: str, antialias: bool) -> None:
        """Keep what the samples share where Kornia's containers look for it."""
        self.flags: dict[str, Any] = {
            "size": size,
            "resample": Resample.get(interpolation),
            "align_corners": False,
            "antialias": antialias,
        }

    def inverse_transform(
        self,
        input: Tensor,
        flags: dict[str, Any],
        transform: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Put the views back where they were; what the crop cut away is black."""
        if transform is None or size is None:
            raise ValueError("inverse needs the transform and the size of the images, got None")
        mode, matrix = flags["resample"].name.lower(), transform[:, :2].to(input.dtype)
        back: Tensor = warp_affine(
            input, matrix, size, mode, padding_mode="zeros", align_corners=True
        )
        return back


class RandomResizedCrop(Cropping):
    """Cut a random box out of each image and resize it, antialiased.

    torchvision's ``RandomResizedCrop``, with a box of its own for each sample. Masks are resized
    with the nearest pixel; boxes and keypoints move with the image, half-pixel centers respected.

    Args:
        size: Height and width of the result in pixels, or both as one number.
        scale: Range of the crop's area, as a fraction of the image's.
        ratio: Range of the crop's width over its height.
        interpolation: "bilinear" or "bicubic", or torchvision's or Kornia's name for it.
        antialias: Low-pass when the crop shrinks.
        same_on_batch: One box for all samples.
        keepdim: A single ``(C, H, W)`` image stays one.
        generator: Where the random numbers come from; the default CPU generator if None.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If something is no number where one must be, or a flag not True or False.

    Shape:
        ``(B, C, H, W)`` or ``(C, H, W)``, floating or uint8, to ``(B, C, *size)``. uint8 becomes
        float32 in [0, 1]; floats keep their dtype.

    Example:
        >>> import torch
        >>> crop = RandomResizedCrop(8, generator=torch.Generator().manual_seed(0))
        >>> images = torch.rand(4, 3, 32, 32)
        >>> views = crop(images)
        >>> views.shape, torch.equal(crop(images, params=crop._params), views)
        (torch.Size([4, 3, 8, 8]), True)
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str | Enum = "bilinear",
        antialias: bool = True,
        *,
        same_on_batch: bool = False,
        keepdim: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        interpolation = functional.check_interpolation(interpolation)
        check_flag("antialias", antialias)
        shape = functional.check_size(size)
        options = f"size={size}, scale={scale}, ratio={ratio}, interpolation={interpolation!r}"
        super().__init__(
            N_UNIFORMS, options, same_on_batch=same_on_batch, keepdim=keepdim, generator=generator
        )
        self.recipe: Recipe = Recipe(scale=scale, ratio=ratio)
        self.keep_flags(shape, interpolation, antialias)

    def draw(self, uniforms: Tensor, shape: tuple[int, ...]) -> Params:
        """The boxes."""
        table = self.recipe.table(uniforms[None], height=shape[-2], width=shape[-1])
        return {"box": unpack(table).box[0], **resized_to(self.flags["size"], shape[0])}

    def compute_transformation(
        self, input: Tensor, params: Params, flags: dict[str, Any]
    ) -> Tensor:
        """The matrices from source to result pixels."""
        box = to_device_of(params["box"], input).to(input.dtype)
        return crop_matrix(box, torch.zeros_like(box[:, 0]), flags["size"])

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Crop and resize."""
        return functional.crop_resize(
            input,
            to_device_of(params["box"], input),
            flags["size"],
            interpolation=_MODES[flags["resample"].name.lower()],
            antialias=flags["antialias"],
        )


class RandomHorizontalFlip(Geometric):
    """Flip samples horizontally, each with probability p.

    Args:
        p: Probability of the flip.
        same_on_batch: One decision for all samples.
        keepdim: A single ``(C, H, W)`` image stays one.
        generator: Where the random numbers come from; the default CPU generator if None.

    Raises:
        ValueError: If p is not between 0 and 1.
        TypeError: If p is no number, or a flag not True or False.

    Shape:
        ``(B, C, H, W)`` or ``(C, H, W)``, floating or uint8, to ``(B, C, H, W)``. uint8 becomes
        float32 in [0, 1]; floats keep their dtype.

    Example:
        >>> import torch
        >>> RandomHorizontalFlip(p=1.0)(torch.tensor([[[[0.0, 1.0]]]]))
        tensor([[[[1., 0.]]]])
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        same_on_batch: bool = False,
        keepdim: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            0,
            "",
            p=p,
            same_on_batch=same_on_batch,
            keepdim=keepdim,
            generator=generator,
        )

    def compute_transformation(
        self, input: Tensor, params: Params, flags: dict[str, Any]
    ) -> Tensor:
        """The matrices from source to result pixels."""
        flip = to_device_of(params["apply"], input).to(input.dtype)
        identity = torch.eye(3, dtype=input.dtype, device=input.device)
        matrix = identity.repeat(len(flip), 1, 1)
        matrix[:, 0, 0] = 1 - 2 * flip
        matrix[:, 0, 2] = (input.shape[-1] - 1) * flip
        return matrix

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Flip the chosen samples."""
        return gated(input.flip(-1), input, to_device_of(params["apply"], input))

    def inverse_transform(
        self,
        input: Tensor,
        flags: dict[str, Any],
        transform: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Flip the same samples again."""
        if transform is None:
            raise ValueError("inverse needs the transform, got None")
        return gated(input.flip(-1), input, transform[:, 0, 0] < 0)
