"""
Photographs: from views to neighbors
====================================

Sixteen photographs that come with scikit-image and scikit-learn are cut into patches of 32
pixels. Without being told which patch is from which photograph, an encoder learns to recognize
two views of a patch; then patches of the same photograph are near each other in its features.
Training patches are from the left half of each photograph, test patches from the right.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torchvision.utils import make_grid

from contrastive_kit import NTXent, ProjectionHead, SimCLRAugment
from contrastive_kit.evaluation import extract_features, knn_accuracy, retrieval
from contrastive_kit.metrics import effective_rank, uniformity
from photographs import load_patches

torch.manual_seed(0)
train_images, train_labels, test_images, test_labels, classes = load_patches(32)
print(f"{len(train_images)} + {len(test_images)} patches of {len(classes)} photographs")


def show(rows, title, width):
    """A grid of images (n, 3, H, W), so many in a row."""
    _, axis = plt.subplots(figsize=(8, 8 * len(rows) / width**2), layout="constrained")
    axis.imshow(make_grid(rows, nrow=width, pad_value=1).permute(1, 2, 0).numpy())
    axis.set(title=title, xticks=[], yticks=[])


# %%
# Views
# -----
# A view is a random crop, flipped, in other colors. All views of a batch are made at once, each
# image with random numbers of its own. In the first column is the patch, then six views of it.

augment = SimCLRAugment(32, strength=0.5)
patches = train_images[:3600:600]
views = SimCLRAugment(32, views=6, strength=0.5)(patches)
show(torch.stack([patches / 255, *views], 1).flatten(0, 1), "patches, and six views of each", 7)

# %%
# Encoder, head and loss
# ----------------------
# The head is for the loss alone: what it has to forget, such as the color, the encoder may
# keep. NT-Xent asks of each view which of the other 511 shows the same patch.


def convolution(before, after, stride):
    """A 3x3 convolution of so many channels, normalized."""
    layer = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


encoder = nn.Sequential(
    convolution(3, 32, 2),
    convolution(32, 64, 2),
    convolution(64, 128, 2),
    convolution(128, 256, 1),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
)
head = ProjectionHead(256, out_dim=128)
loss_fn = NTXent(temperature=0.2)
optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3)


def features(model, images, labels):
    """Features (N, D) and labels (N,)."""
    return extract_features(model, zip(images.split(512), labels.split(512), strict=True))


def scores(model):
    """Figures of the features of unseen patches, and of all of them together."""
    train = features(model, train_images, train_labels)
    h, labels = features(model, test_images, test_labels)
    return {
        "kNN": knn_accuracy(*train, h, labels, k=20).accuracy,
        "recall at 1": retrieval(h, query_labels=labels, k=1).recall[1],
        "effective rank": effective_rank(h).item(),
        "uniformity": uniformity(h).item(),
    }


before = scores(encoder)

# %%
# Training
# --------
# Both views go through the network in one batch. ``return_stats`` tells, from the same pass,
# how often the nearest candidate was the other view, and how similar positives and negatives
# are.

curves = {"loss": [], "other view found": [], "positives": [], "negatives": []}
for epoch in range(1, 4):
    for index in torch.randperm(len(train_images)).split(256):
        z1, z2 = head(encoder(torch.cat(augment(train_images[index])))).chunk(2)
        loss, stats = loss_fn(z1, z2, return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        figures = (loss, stats.accuracy, stats.positive_similarity, stats.negative_similarity)
        for curve, value in zip(curves.values(), figures, strict=True):
            curve.append(value.item())
    print(f"epoch {epoch}: loss {loss.item():.3f}, other view found {stats.accuracy.item():.1%}")

_, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
for axis, names in zip(
    axes, (["loss"], ["other view found"], ["positives", "negatives"]), strict=True
):
    for name in names:
        axis.plot(curves[name], label=name)
    axis.set_xlabel("step")
    axis.legend()

# %%
# What was learned
# ----------------
# The class of an unseen patch, from its nearest training patches; how often the nearest other
# unseen patch is of the same photograph; and two figures that need no label: how many
# directions the features use, and how evenly they spread.

after = scores(encoder)
for name in before:
    print(f"{name:15} {before[name]:7.3f} before, {after[name]:7.3f} after")

# %%
# Neighbors
# ---------
# Unseen patches in the first column, then the training patches with the nearest features.

h, _ = features(encoder, test_images, test_labels)
bank, _ = features(encoder, train_images, train_labels)
chosen = torch.arange(50, len(test_images), 200)
nearest = (nn.functional.normalize(h[chosen]) @ nn.functional.normalize(bank).T).topk(6).indices
rows = torch.cat([test_images[chosen, None], train_images[nearest]], 1).flatten(0, 1)
show(rows / 255, "unseen patches, and the nearest of the other halves", 7)

# %%
# The same loop with a real data set is in the README; ``examples/train`` has checkpoints,
# several processes and recipes for CIFAR-10 and ImageNet.
