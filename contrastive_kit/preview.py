"""A contact sheet of views: ``python -m contrastive_kit.preview IMAGE... --out views.png``.

One row an image: the image itself, then views of it, so that a person can see what a recipe does
before spending a week of GPU time on it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from contrastive_kit.augment.recipe import BYOL, CIFAR, GOOGLE_RESEARCH, IMAGENET, Options
from contrastive_kit.augment.simclr import SimCLRAugment

if TYPE_CHECKING:
    from PIL import Image

RECIPES = {
    "simclr": IMAGENET,
    "cifar": CIFAR,
    "google-research": GOOGLE_RESEARCH,
    "byol": BYOL,
}
_MARGIN = 4


def contact_sheet(images: Sequence[Tensor], augment: SimCLRAugment) -> Tensor:
    """Draw images and views of them side by side.

    Args:
        images: Each ``(3, H_i, W_i)`` uint8.
        augment: Makes the views, one column each, without normalizing them.

    Returns:
        The sheet, ``(3, height, width)`` uint8, white between the pictures.

    Raises:
        ValueError: If there are no images, or the recipe normalizes.

    Example:
        >>> image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
        >>> contact_sheet([image], SimCLRAugment(32, views=4)).shape
        torch.Size([3, 40, 184])
    """
    from torchvision.utils import make_grid

    if not images:
        raise ValueError("images must hold at least one image, got none")
    if augment.recipe.normalize is not None:
        raise ValueError("augment must not normalize, got normalize in the recipe")
    originals = torch.stack([_fit(image, augment.recipe.size) for image in images])
    views = augment(images)
    rows = torch.stack((originals, *(view.to(originals.dtype) for view in views)), dim=1)
    grid = make_grid(rows.flatten(0, 1), nrow=rows.shape[1], padding=_MARGIN, pad_value=1.0)
    sheet: Tensor = grid.clamp(0, 1).mul(255).round().byte()
    return sheet


def _fit(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The whole image on a white canvas of the size of a view."""
    scale = min(size[0] / image.shape[1], size[1] / image.shape[2])
    height, width = (
        max(1, min(round(side * scale), limit))
        for side, limit in zip(image.shape[1:], size, strict=True)
    )
    small = torch.nn.functional.interpolate(
        image[None].float() / 255, (height, width), mode="bilinear", antialias=True
    )
    canvas = torch.ones(3, *size)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas[:, top : top + height, left : left + width] = small[0]
    return canvas


def read_image(path: Path) -> Tensor:
    """Read a picture as ``(3, H, W)`` uint8, the right way up.

    Of integers of more than 8 bits, white is the largest number of as many bits, 8 or more, as hold
    the brightest pixel; of floats it is 1, or 255 where some are larger. Beyond that, and below 0,
    black and white are the smallest and the largest. Of several frames the first is taken, and what
    is transparent is shown.

    Args:
        path: Any file that Pillow reads.

    Raises:
        OSError: If there is no such file, or Pillow cannot read it; begins with the path.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            deep = upright.mode.startswith(("I", "F"))
            pixels = _to_bytes(upright) if deep else _array(upright.convert("RGB"))
    # Each of Pillow's readers has errors of its own, from SyntaxError to NotImplementedError.
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise OSError(f"{path}: {reason or _one_line(error)}") from error
    if 0 in pixels.shape:
        raise OSError(f"{path}: the picture is empty")
    return pixels.movedim(-1, 0).contiguous()


def _to_bytes(picture: "Image.Image") -> Tensor:
    """``(H, W, 3)`` uint8 of one channel of wide integers or floats."""
    pixels = _array(picture).double().nan_to_num(0, 0, 0)
    black, brightest = (float(end) for end in pixels.aminmax())
    if black >= 0 and picture.mode != "F":
        black, brightest = 0.0, float(2 ** max(8, int(brightest).bit_length()) - 1)
    elif black >= 0 and brightest <= 255:
        black, brightest = 0.0, 1.0 if brightest <= 1 else 255.0
    gray = (pixels - black) / max(brightest - black, 1e-300)
    return gray.mul(255).round().byte()[..., None].expand(-1, -1, 3)


def _array(picture: "Image.Image") -> Tensor:
    import numpy as np

    array = np.array(picture)
    # Torch knows no other order of bytes, and few operations for unsigned 16 bits.
    return torch.from_numpy(
        array.astype(np.int32) if array.dtype.kind in "iu" and array.itemsize > 1 else array
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m contrastive_kit.preview",
        description="Draw a contact sheet: each image, and random views of it.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files")
    parser.add_argument("--size", type=int, default=224, help="side of a view (default 224)")
    parser.add_argument("--recipe", choices=RECIPES, default="simclr", help="default simclr")
    parser.add_argument("--strength", type=float, help="of the colors (the recipe's own)")
    parser.add_argument("--views", type=int, help="views of each image (default 6; byol makes 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="default views.png")
    options = parser.parse_args(arguments)

    views = options.views
    if views is None:
        views = 2 if options.recipe == "byol" else 6
    # Any whole number is a seed; torch takes those of 64 bits.
    generator = torch.Generator().manual_seed(options.seed % 2**64)
    chosen: Options = {"views": views}
    if options.strength is not None:
        chosen["strength"] = options.strength
    try:
        _check_out(options.out, options.images)
        images = [read_image(path) for path in options.images]
        recipe = RECIPES[options.recipe]
        augment = SimCLRAugment(options.size, recipe=recipe, generator=generator, **chosen)
        sheet = contact_sheet(images, augment)
        _write(sheet, options.out)
    # Torch has a RuntimeError where memory does not suffice for a sheet.
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        sys.exit(f"{parser.prog}: {_one_line(error)}")
    print(f"{options.out}: {views} views of each of {len(images)} images")


def _check_out(out: Path, images: Sequence[Path]) -> None:
    for image in images:
        if out.exists() and image.exists() and out.samefile(image):
            raise ValueError(f"--out must not be one of the images, got {out}")


def _write(sheet: Tensor, path: Path) -> None:
    from PIL import Image

    try:
        Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy()).save(path, quality=90)
    except (OSError, ValueError) as error:
        raise OSError(f"{path}: {_one_line(error)}") from error


if __name__ == "__main__":
    main()
