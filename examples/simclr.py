"""SimCLR (arXiv 2002.05709) from start to finish: a minute or two on a CPU, no download.

    python examples/simclr.py

An encoder learns to recognize two random views of an image among the views of all others, without
a label. Afterwards, the nearest neighbors of a test image in the space of its features tell what it
shows, much more often than the nearest neighbors in the space of pixels do.

Recipes for CIFAR-10 and ImageNet, resuming, several GPUs and more are in examples/train.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from photographs import load_patches
from torch import Tensor, nn
from torchvision.utils import make_grid

from contrastive_kit import NTXent, ProjectionHead, SimCLRAugment
from contrastive_kit.evaluation import extract_features, knn_accuracy

SIZE, BATCH, EPOCHS, TEMPERATURE = 32, 256, 10, 0.2
OUT = Path("runs/simclr")

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Data: images (N, 3, 32, 32) uint8. The labels are for the evaluation alone. Put your own here.
train_images, train_labels, test_images, test_labels, classes = load_patches(SIZE)
train_images = train_images.to(device)

# Views: two random ones of each image of a batch, made on the device. Two crops of one image, in
# other colors, have in common what it shows.
augment = SimCLRAugment(SIZE, strength=0.5)


# Encoder f, image -> features h: four convolutions. contrastive_kit.resnet_encoder makes larger ones.
def convolution(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


encoder = nn.Sequential(
    convolution(3, 32, 2), convolution(32, 64, 2), convolution(64, 128, 2), convolution(128, 256, 1),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(),
).to(device)  # fmt: skip

# Head g, h -> z: the loss compares z, and what it learns to ignore, h may keep.
head = ProjectionHead(256, out_dim=128).to(device)

# Loss: for each of the 2 * BATCH views, which of the others shows the same image?
loss_fn = NTXent(TEMPERATURE)

steps = len(train_images) // BATCH
optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, EPOCHS * steps, pct_start=0.1)


def features(model: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of the training images, then those of the test images."""
    sets = ((train_images, train_labels), (test_images, test_labels))
    parts = [
        extract_features(model, zip(x.split(512), y.split(512), strict=True), device=device)
        for x, y in sets
    ]
    return *parts[0], *parts[1]


# Baselines: how far do raw pixels get, and an encoder that has learned nothing?
knn = {
    "raw pixels": knn_accuracy(*features(nn.Flatten()), k=20).accuracy,
    "untrained encoder": knn_accuracy(*features(encoder), k=20).accuracy,
}
print("kNN accuracy:", ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in knn.items()))

# The loop. Both views go through the network in one batch: in two, batch normalization would give
# away which view is which.
curve = []
for epoch in range(1, EPOCHS + 1):
    losses, accuracies = [], []
    for index in torch.randperm(len(train_images), device=device).split(BATCH)[:steps]:
        view1, view2 = augment(train_images[index])
        z1, z2 = head(encoder(torch.cat([view1, view2]))).chunk(2)
        loss, stats = loss_fn(z1, z2, return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        accuracies.append(stats.accuracy)
    h = features(encoder)
    curve.append(knn_accuracy(*h, k=20).accuracy)
    print(
        f"epoch {epoch:2d}  loss {torch.stack(losses).mean():.3f}  "
        f"right view found {torch.stack(accuracies).mean():.1%}  kNN accuracy {curve[-1]:.3f}"
    )
knn["SimCLR"] = curve[-1]

# One picture: what the views look like, how the accuracy grew, and which training images are
# nearest to some test images.
OUT.mkdir(parents=True, exist_ok=True)
(OUT / "results.json").write_text(json.dumps(knn, indent=2) + "\n")
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
shown = train_images[:: len(train_images) // 10][:10]
rows = torch.stack([shown / 255, *augment(shown)], dim=1).flatten(0, 1).cpu()
left.imshow(make_grid(rows, nrow=3, pad_value=1).permute(1, 2, 0))
left.set_title("images, and two views of each")
middle.plot(range(1, EPOCHS + 1), curve, marker=".", label="SimCLR")
for name, style in (("raw pixels", ":"), ("untrained encoder", "--")):
    middle.axhline(knn[name], linestyle=style, color="gray", label=name)
middle.set(title="kNN accuracy on unseen patches", xlabel="epoch")
middle.legend()
train_h, _, test_h, _ = (F.normalize(x, dim=-1) if x.is_floating_point() else x for x in h)
queries = torch.arange(0, len(test_images), len(test_images) // 10)[:10]
nearest = (test_h[queries] @ train_h.T).topk(7).indices.cpu()
rows = torch.cat([test_images[queries, None], train_images.cpu()[nearest]], dim=1).flatten(0, 1)
right.imshow(make_grid(rows, nrow=8, pad_value=255).permute(1, 2, 0))
right.set_title("test images, and the nearest training images of each")
for axis in (left, right):
    axis.set_axis_off()
figure.savefig(OUT / "simclr.png", dpi=120)
print(f"the picture is {OUT / 'simclr.png'}")
