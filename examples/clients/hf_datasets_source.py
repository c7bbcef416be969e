"""Images from a data set of Hugging Face: views are made as rows are read.

    cd examples && python -m clients.hf_datasets_source

`load_dataset("ylecun/mnist", split="train")` or `load_dataset("imagefolder", data_dir="photos")`
takes the place of `patches()`; with `streaming=True` it is `data.map(...)` that makes the views.
"""

from typing import Any

import torch
from datasets import Dataset, Features, Image
from torch.utils.data import DataLoader

import photographs
from contrastive_kit import NTXent, ProjectionHead, SimCLRAugment, resnet_encoder


def patches() -> Dataset:
    """Patches of photographs, as PIL images in the column "image"."""
    images = photographs.load_patches(64)[0].permute(0, 2, 3, 1).numpy()
    return Dataset.from_dict({"image": list(images)}, features=Features({"image": Image()}))


def main(epochs: int = 3, batch_size: int = 256, workers: int = 0) -> list[float]:
    """Train; the loss of each step."""
    torch.manual_seed(0)
    augment = SimCLRAugment(32, strength=0.5)

    def two_views(rows: dict[str, list[Any]]) -> dict[str, list[torch.Tensor]]:
        # All rows of a batch at once, of whatever sizes: a list of images is a batch, too.
        view1, view2 = augment([image.convert("RGB") for image in rows["image"]])
        return {"view1": list(view1), "view2": list(view2)}

    data = patches().with_transform(two_views)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, num_workers=workers)

    encoder = resnet_encoder("resnet18")
    head = ProjectionHead(encoder.out_dim)
    loss_fn = NTXent(0.2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for epoch in range(epochs):
        for batch in loader:
            z1, z2 = head(encoder(torch.cat([batch["view1"], batch["view2"]]))).chunk(2)
            loss = loss_fn(z1, z2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
