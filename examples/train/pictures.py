"""The pictures: augmented pairs, curves, neighbors, a map of features."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.utils import make_grid

from train.config import Config
from train.data import Data, InMemory, Streamed
from train.system import write_atomically

MAPPED = 1500


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    write_atomically(path, partial(figure.savefig, format="png", dpi=120))
    plt.close(figure)


def images_of(part: InMemory | Streamed, index: Tensor) -> Tensor:
    """Images of a data set in the order of `index`, as floats in [0, 1] on the CPU."""
    images, _ = next(part.batches(index.cpu(), len(index)))
    return images.cpu().float() / 255


def plot_grid(rows: Tensor, title: str, path: Path) -> None:
    """Images (rows, columns, 3, H, W) in [0, 1]."""
    height, width = rows.shape[:2]
    grid = make_grid(rows.flatten(0, 1).clamp(0, 1), nrow=width, pad_value=1)
    figure, axis = plt.subplots(figsize=(1.1 * width, 1.1 * height + 0.4), layout="constrained")
    axis.imshow(grid.permute(1, 2, 0).numpy())
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)
    save(figure, path)


def plot_pairs(data: Data, augment: nn.Module, path: Path) -> None:
    """A row each of images, first views and second views."""
    index = torch.linspace(0, len(data.train) - 1, 10).long()
    images, _ = next(data.train.batches(index, len(index)))
    rows = torch.stack([images / 255, *augment(images)]).cpu()
    plot_grid(rows, "images, and the views of each", path)


def plot_neighbors(features: Sequence[Tensor], data: Data, path: Path) -> None:
    """Test images and the training images of the most similar features, framed by their class."""
    train, train_labels, test, test_labels = features
    queries = torch.linspace(0, len(test) - 1, min(8, len(test)), device=test.device).long()
    bank, anchors = (F.normalize(x, dim=1) for x in (train, test[queries]))
    nearest = (anchors @ bank.T).topk(min(8, len(train)), dim=1).indices
    right = (train_labels[nearest] == test_labels[queries, None]).cpu()
    images = images_of(data.train, nearest.flatten()).unflatten(0, nearest.shape)
    images = torch.cat([images_of(data.test, queries)[:, None], images], dim=1)
    red, green, black = torch.eye(3)[0], torch.eye(3)[1] * 0.6, torch.zeros(3)
    frames = torch.where(right[..., None], green, red)
    frames = torch.cat([black.expand(len(queries), 1, 3), frames], dim=1)
    width = max(1, images.shape[-1] // 16)
    rows = F.pad(images, [width] * 4, value=-1)  # no pixel is negative
    rows = torch.where(rows < 0, frames[..., None, None], rows)
    plot_grid(rows, "test images, and the nearest training images (green: of the same class)", path)


def plot_curve(
    history: list[dict[str, float]], baselines: dict[str, float], config: Config, path: Path
) -> None:
    """Loss, accuracy on the training objective and kNN accuracy over the epochs."""
    titles = {"loss": "cross entropy", "accuracy": "training accuracy"}
    if not config.supervised:
        titles = {
            "loss": f"{config.loss} loss (τ = {config.temperature:g})",
            "accuracy": f"contrastive accuracy (1 of {2 * config.batch_size - 1})",
        }
    titles["knn"] = f"kNN accuracy (k = {config.knn_k})"
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        points = [(row["epoch"], row[key]) for row in history if key in row]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "")
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for (name, knn), style in zip(baselines.items(), (":", "--"), strict=False):
        axes[2].axhline(knn, linestyle=style, color="gray", label=name)
    if baselines:
        axes[2].legend()
    save(figure, path)


def plot_map(features: Sequence[Tensor], classes: list[str], seed: int, path: Path) -> None:
    """Features of test images in two dimensions, by principal components and by t-SNE."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    _, _, test, labels = (x.cpu() for x in features)
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:MAPPED]
    rows = F.normalize(test[chosen], dim=1).double().numpy()
    maps = {"PCA": PCA(2, random_state=seed).fit_transform(rows)}
    perplexity = min(30, (len(rows) - 1) / 3)
    if perplexity > 1:
        tsne = TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
        maps["t-SNE"] = tsne.fit_transform(rows)
    figure, axes = plt.subplots(
        1, len(maps), figsize=(6 * len(maps), 5.4), squeeze=False, layout="constrained"
    )
    palette = plt.get_cmap("tab20" if len(classes) > 10 else "tab10")
    for axis, (name, points) in zip(axes[0], maps.items(), strict=True):
        axis.scatter(*points.T, c=palette(labels[chosen].numpy() % palette.N), s=8)
        axis.set(title=f"{name} of {len(rows)} test images", xticks=[], yticks=[])
    if len(classes) <= palette.N:
        for i, name in enumerate(classes):
            axes[0, 0].scatter([], [], color=palette(i), label=name)
        figure.legend(loc="outside right center", fontsize=8, frameon=False)
    save(figure, path)
