"""SimCLR (arXiv 2002.05709) from start to finish: a minute or two on a CPU, no download.

    python examples/simclr.py

Without a label, an encoder learns to recognize two random views of an image among the views of many
others. Afterwards the images that are near each other in its features show the same thing, which
the classes of the nearest neighbors measure.

Recipes for CIFAR-10 and ImageNet, resuming, several GPUs and more are in examples/train.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from contrastive_kit import NTXent, ProjectionHead, SimCLRAugment
from contrastive_kit.evaluation import extract_features, knn_accuracy
from photographs import load_patches

SIZE, BATCH, EPOCHS = 32, 256, 10
OUT = Path("runs/simclr")

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# 1. Data: images (N, 3, 32, 32) uint8, and labels for the evaluation alone. Put your own here.
train_images, train_labels, test_images, test_labels, classes = load_patches(SIZE)
train_images = train_images.to(device)
print(f"{len(train_images)} + {len(test_images)} images of {len(classes)} classes, on {device}")

# 2. Views: two random crops of each image, in other colors, made for a whole batch at once.
augment = SimCLRAugment(SIZE, strength=0.5)


# 3. Encoder, image -> features h. Four convolutions will do here; for more there is
#    contrastive_kit.resnet_encoder("resnet18", stem="cifar").
def convolution(before: int, after: int, stride: int) -> nn.Sequential:
    """A 3x3 convolution of so many channels, normalized."""
    layer = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


encoder = nn.Sequential(
    *(convolution(3, 32, 2), convolution(32, 64, 2), convolution(64, 128, 2)),
    *(convolution(128, 256, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
).to(device)

# 4. Head, h -> z: the loss compares z. What z has to forget, such as the color, h may keep.
head = ProjectionHead(256, out_dim=128).to(device)

# 5. Loss: which of the other 2 * BATCH - 1 views shows the same image?
loss_fn = NTXent(temperature=0.2)

# 6. Optimizer, with a short warm-up before the learning rate falls to zero.
steps = len(train_images) // BATCH
optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, EPOCHS * steps, pct_start=0.1)


# 7. Evaluation: a test image takes the class of the training images with the nearest features.
def features(model: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of the training images, and those of the test images."""
    train = zip(train_images.split(512), train_labels.split(512), strict=True)
    test = zip(test_images.split(512), test_labels.split(512), strict=True)
    return (
        *extract_features(model, train, device=device),
        *extract_features(model, test, device=device),
    )


def knn(model: nn.Module) -> float:
    """The share of test images whose class is that of their 20 nearest neighbors."""
    return knn_accuracy(*features(model), k=20).accuracy


results = {"raw pixels": knn(nn.Flatten()), "untrained encoder": knn(encoder)}
print("kNN accuracy:", ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in results.items()))

# 8. Training. Both views go through the network in one batch: in a batch of its own, the statistics
#    of batch normalization would tell the network which of the two a view is.
curve = []
for epoch in range(1, EPOCHS + 1):
    totals = torch.zeros(2, device=device)
    for index in torch.randperm(len(train_images), device=device).split(BATCH)[:steps]:
        view1, view2 = augment(train_images[index])
        z1, z2 = head(encoder(torch.cat([view1, view2]))).chunk(2)
        loss, stats = loss_fn(z1, z2, return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        totals += torch.stack([loss.detach(), stats.accuracy])
    curve.append(knn(encoder))
    mean_loss, found = (totals / steps).tolist()
    print(
        f"epoch {epoch:2d}  loss {mean_loss:.3f}  other view found {found:5.1%}  "
        f"kNN accuracy {curve[-1]:.3f}"
    )
results["SimCLR"] = curve[-1]
OUT.mkdir(parents=True, exist_ok=True)
(OUT / "results.json").write_text(json.dumps(results, indent=2) + "\n")

# 9. One picture: what the network sees, how the accuracy grows, which images are near each other.
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(13, 5), width_ratios=(3, 9, 8), layout="constrained"
)
shown = train_images[:: len(train_images) // 10][:10]
rows = torch.stack([shown / 255, *augment(shown)], dim=1).flatten(0, 1).cpu()
left.imshow(make_grid(rows, nrow=3, pad_value=1).permute(1, 2, 0).numpy())
left.set_title("image, two views")
middle.plot(range(1, EPOCHS + 1), curve, marker=".", label="SimCLR")
for name, style in (("raw pixels", ":"), ("untrained encoder", "--")):
    middle.axhline(results[name], linestyle=style, color="gray", label=name)
middle.set(title="kNN accuracy on unseen images", xlabel="epoch")
middle.legend()
train_h, _, test_h, _ = features(encoder)
queries = torch.arange(0, len(test_images), len(test_images) // 10)[:10]
similarity = F.normalize(test_h[queries]) @ F.normalize(train_h).T
nearest = train_images.cpu()[similarity.topk(7).indices.cpu()]
rows = torch.cat([test_images[queries, None], nearest], dim=1).flatten(0, 1)
right.imshow(make_grid(rows, nrow=8, pad_value=255).permute(1, 2, 0).numpy())
right.set_title("unseen image, nearest training images")
for axis in (left, right):
    axis.set_axis_off()
figure.savefig(OUT / "simclr.png", dpi=120)
print(f"accuracies and a picture are in {OUT}")
