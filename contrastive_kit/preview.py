"""A contact sheet of views: ``python -m contrastive_kit.preview IMAGE... --out views.png``.

One row an image: the image itself, then views of it, so that a person can see what a recipe does
before spending a week of GPU time on it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from contrastive_kit.augment.simclr import SimCLRAugment

RECIPES = {
    "simclr": SimCLRAugment.imagenet,
    "cifar": SimCLRAugment.cifar,
    "google-research": SimCLRAugment.google_research,
    "byol": SimCLRAugment.byol,
}
_MARGIN = 4


def contact_sheet(images: Sequence[Tensor], augment: SimCLRAugment) -> Tensor:
    """Draw images and views of them side by side.

    Args:
        images: Each ``(3, H_i, W_i)`` uint8.
        augment: Makes the views, one column each, without normalising them.

    Returns:
        The sheet, ``(3, height, width)`` uint8, white between the pictures.

    Raises:
        ValueError: If there are no images, or the recipe normalises.

    Example:
        >>> image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
        >>> contact_sheet([image], SimCLRAugment(32, views=4)).shape
        torch.Size([3, 40, 184])
    """
    from torchvision.utils import make_grid

    if not images:
        raise ValueError("images must hold at least one image, got none")
    if augment.settings.mean is not None:
        raise ValueError("augment must not normalise, got normalize in the recipe")
    originals = torch.stack([_fit(image, augment.settings.size) for image in images])
    views: tuple[Tensor, ...] = augment(images)
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

    Args:
        path: Any file that Pillow reads.

    Raises:
        OSError: If there is no such file, or it is not a picture.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m contrastive_kit.preview",
        description="Draw a contact sheet: each image, and random views of it.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files")
    parser.add_argument("--size", type=int, default=224, help="side of a view (default 224)")
    parser.add_argument("--recipe", choices=RECIPES, default="simclr", help="default simclr")
    parser.add_argument("--strength", type=float, help="of the colours (the recipe's own)")
    parser.add_argument("--views", type=int, help="views of each image (default 6; byol makes 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="default views.png")
    options = parser.parse_args(arguments)

    views = options.views
    if views is None:
        views = 2 if options.recipe == "byol" else 6
    chosen = {"views": views, "generator": torch.Generator().manual_seed(options.seed)}
    if options.strength is not None:
        chosen["strength"] = options.strength
    try:
        images = [read_image(path) for path in options.images]
        sheet = contact_sheet(images, RECIPES[options.recipe](options.size, **chosen))
        _write(sheet, options.out)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"{options.out}: {views} views of each of {len(images)} images")


def _write(sheet: Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy()).save(path, quality=90)


if __name__ == "__main__":
    main()
