"""SimCLR with an encoder of timm: a ViT, a ConvNeXt, or any other of its thousand.

    cd examples && python -m clients.timm_encoders vit_tiny_patch16_224

All that the rest of the library asks of an encoder is that it maps images (N, 3, H, W) to features
(N, D), and, for convenience, that `out_dim` tells D.
"""

import sys

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import photographs
from clients.feature_quality import feature_quality
from contrastive_kit import NTXent, ProjectionHead, SimCLRAugment


def timm_encoder(name: str, **options: object) -> nn.Module:
    """A model of timm that ends at its pooled features: images -> (N, `out_dim`).

    Args:
        name: one of `timm.list_models()`.
        options: those of `timm.create_model`, such as `pretrained=True` and, for a ViT on images of
            another size than it is made for, `img_size` and `patch_size`.
    """
    encoder = timm.create_model(name, num_classes=0, **options)  # 0: no classifier
    encoder.out_dim = encoder.num_features
    return encoder


def main(
    name: str = "vit_tiny_patch16_224",
    epochs: int = 5,
    batch_size: int = 256,
    **options: object,
) -> dict[str, float]:
    """Train on patches of photographs."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 32
    images, labels, test_images, test_labels, _ = photographs.load_patches(size)
    if name.startswith("vit"):
        options = {"img_size": size, "patch_size": 8, **options}
    encoder = timm_encoder(name, **options).to(device)
    head = ProjectionHead(encoder.out_dim, 512).to(device)
    augment = SimCLRAugment(size, strength=0.5)
    loss_fn = NTXent(0.2)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.05)

    for epoch in range(epochs):
        for index in torch.randperm(len(images)).split(batch_size):
            views = augment(images[index].to(device), concat=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z1, z2 = head(encoder(views)).chunk(2)
            loss, stats = loss_fn(z1, z2, return_stats=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}  loss {loss:.3f}  other view found {stats.accuracy:.1%}")

    train, test = (
        DataLoader(TensorDataset(*part), 512)
        for part in ((images, labels), (test_images, test_labels))
    )
    quality = feature_quality(encoder, train, test)
    print(quality)
    return quality


if __name__ == "__main__":
    main(*sys.argv[1:2])
