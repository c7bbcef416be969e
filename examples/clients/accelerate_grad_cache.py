"""SimCLR with Hugging Face Accelerate, at a batch whose activations do not fit into memory.

    cd examples && python -m clients.accelerate_grad_cache
    cd examples && accelerate launch --num_processes 2 -m clients.accelerate_grad_cache

`GradCache` goes around what `accelerator.prepare` returns. `accelerator.accumulate` would be no
substitute: it averages the losses of small batches, each of which has few negatives.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import photographs
from clients.feature_quality import feature_quality
from contrastive_kit import GradCache, NTXent, ProjectionHead, SimCLRAugment, resnet_encoder


def main(
    epochs: int = 5, batch_size: int = 512, chunk_size: int = 64
) -> tuple[nn.Module, dict[str, float]]:
    """Train, `batch_size` images at a time on each process; the encoder, and what it is worth."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    images, labels, test_images, test_labels, _ = photographs.load_patches(32)
    train = TensorDataset(images, labels)
    encoder = resnet_encoder("resnet18")
    model = nn.Sequential(encoder, ProjectionHead(encoder.out_dim))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(train, batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    encode = GradCache(model, chunk_size=chunk_size)
    # Each rank has numbers of its own from one seed.
    augment = SimCLRAugment(32, strength=0.5, generator=torch.Generator().manual_seed(0))
    loss_fn = NTXent(0.2, gather_distributed=True).to(accelerator.device)

    for epoch in range(epochs):
        for batch, _ in loader:
            z1, z2 = encode.views(*augment(batch))
            loss, stats = loss_fn(z1, z2, return_stats=True)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch}  loss {loss:.3f}  other view found {stats.accuracy:.1%}")

    encoder = accelerator.unwrap_model(model)[0]
    test = DataLoader(TensorDataset(test_images, test_labels), 512)
    quality = feature_quality(encoder, DataLoader(train, 512), test)
    accelerator.print(quality)
    return encoder, quality


if __name__ == "__main__":
    main()
