"""Images from shards of WebDataset: tar files that are read from front to back.

    cd examples && python -m clients.webdataset_source 'shards/train-{000000..000099}.tar'

A sample is a file of the tar, `000012.jpg`, and what else has its name, `000012.cls` for instance.
The order is random within a buffer only; views and batches are made by the workers.
"""

import sys
import tempfile
from pathlib import Path

import torch
import webdataset as wds

import photographs
from contrastive_kit import NTXent, ProjectionHead, SimCLRAugment, resnet_encoder


def write_shards(folder: Path, per_shard: int = 512) -> list[str]:
    """Shards of patches of photographs, where there are none of one's own."""
    images, labels, *_ = photographs.load_patches(64)
    with wds.ShardWriter(f"{folder}/%06d.tar", maxcount=per_shard, verbose=0) as shards:
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            pixels = image.permute(1, 2, 0).numpy()
            shards.write({"__key__": f"{i:06d}", "jpg": pixels, "cls": label})
    return sorted(str(path) for path in folder.glob("*.tar"))


def main(shards: str | None = None, steps: int = 30, batch_size: int = 256) -> list[float]:
    """Train; the loss of each step."""
    torch.manual_seed(0)
    augment = SimCLRAugment(32, strength=0.5)
    with tempfile.TemporaryDirectory() as folder:
        urls = shards or write_shards(Path(folder))
        source = (
            # Without an end: an epoch has no meaning where processes read shards of other lengths.
            wds.WebDataset(urls, resampled=True, shardshuffle=False, nodesplitter=None)
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg")
            .map_tuple(augment)
            .map(lambda sample: sample[0])  # the two views of an image
            .batched(batch_size, partial=False)
        )
        loader = wds.WebLoader(source, batch_size=None, num_workers=1)

        encoder = resnet_encoder("resnet18")
        head = ProjectionHead(encoder.out_dim)
        loss_fn = NTXent(0.2)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
        losses = []
        for views in loader.slice(steps):
            z1, z2 = head(encoder(torch.cat(views))).chunk(2)
            loss = loss_fn(z1, z2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            print(f"step {len(losses)}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
