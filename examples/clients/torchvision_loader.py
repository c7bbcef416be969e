"""Views where torchvision makes them: the transform of a data set, in the workers of a DataLoader.

    cd examples && python -m clients.torchvision_loader PHOTOS    # PHOTOS/CLASS/*.jpg

Workers draw views of their own, in each epoch others, from one generator or from none. On a GPU it
is faster to load whole images here and to call the same `SimCLRAugment` in the loop, for a batch on
the device at once: `on_device=True`.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

import photographs
from contrastive_kit import NTXent, ProjectionHead, SimCLRAugment, resnet_encoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_patches(folder: Path) -> Path:
    """Patches of photographs as `folder`/CLASS/*.jpg, where there are no pictures of one's own."""
    images, labels, *_, names = photographs.load_patches(64)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        place = folder / names[label]
        place.mkdir(exist_ok=True)
        to_pil_image(image).save(place / f"{i}.jpg", quality=95)
    return folder


def main(
    photos: str | None = None,
    epochs: int = 3,
    batch_size: int = 256,
    workers: int = 2,
    on_device: bool = False,
) -> list[float]:
    """Train; the loss of each step."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 32
    augment = SimCLRAugment(size, strength=0.5, normalize=(MEAN, STD))
    with tempfile.TemporaryDirectory() as folder:
        photos = photos or write_patches(Path(folder))
        square = [v2.RGB(), v2.Resize(64), v2.CenterCrop(64)]
        # An image is decoded by PIL; `augment` makes a tuple of two views of it, or a batch is made
        # of the images, which then have to be of one size.
        last = [v2.PILToTensor()] if on_device else [augment]
        data = ImageFolder(photos, transform=v2.Compose([*square, *last]))
        loader = DataLoader(
            data,
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        encoder = resnet_encoder("resnet18").to(device)
        head = ProjectionHead(encoder.out_dim).to(device)
        loss_fn = NTXent(0.2)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)

        losses = []
        for epoch in range(epochs):
            for images_or_views, _ in loader:  # uint8 (B, 3, 64, 64), or views of (B, 3, 32, 32)
                if on_device:
                    views = augment(images_or_views.to(device, non_blocking=True), concat=True)
                else:
                    views = torch.cat(images_or_views).to(device, non_blocking=True)
                z1, z2 = head(encoder(views)).chunk(2)
                loss = loss_fn(z1, z2)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            print(f"epoch {epoch}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
