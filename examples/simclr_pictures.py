"""The pictures of examples/simclr.py: augmented pairs, curves, neighbours, a map of features."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from simclr_data import Data
from simclr_session import write_atomically
from simclr_settings import Config
from torch import Tensor

MAPPED = 1500


def save(figure: Figure, path: Path, right: float = 0.0) -> None:
    """Write a PNG, with that many inches left free on the right."""
    figure.tight_layout(rect=(0, 0, 1 - right / figure.get_figwidth(), 1))
    write_atomically(path, partial(figure.savefig, format="png", dpi=120))
    plt.close(figure)


def show(axis: Axes, image: Tensor, colour: str | None = None) -> None:
    """Draw an image (3, H, W) in [0, 1], in a frame of that colour."""
    axis.imshow(image.permute(1, 2, 0).clamp(0, 1).float().cpu().numpy())
    axis.set_xticks([])
    axis.set_yticks([])
    if colour is not None:
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=3)


def plot_pairs(images: Tensor, views: Sequence[Tensor], path: Path) -> None:
    """A row each of images, first views and second views."""
    rows = [images, *views]
    names = ["image", *(f"view {i}" for i in range(1, len(rows)))]
    size = (len(images), 1.1 * len(rows))
    figure, axes = plt.subplots(len(rows), len(images), figsize=size, squeeze=False)
    for name, row, line in zip(names, rows, axes, strict=True):
        line[0].set_ylabel(name)
        for image, axis in zip(row, line, strict=True):
            show(axis, image)
    save(figure, path)


def plot_curve(
    history: list[dict[str, float]], baselines: dict[str, float], config: Config, path: Path
) -> None:
    """Loss, accuracy on the training objective and kNN accuracy over the epochs."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    epochs = [row["epoch"] for row in history]
    names = ("cross entropy", "training accuracy")
    if not config.supervised:
        others = 2 * config.batch_size - 1
        names = (
            f"NT-Xent loss (τ = {config.temperature:g})",
            f"contrastive accuracy (1 of {others})",
        )
    for axis, key, name in zip(axes, ("loss", "accuracy"), names, strict=False):
        axis.plot(epochs, [row[key] for row in history], marker="." if len(epochs) < 50 else "")
        axis.set_title(name)
    evaluated = [row for row in history if "knn" in row]
    axes[2].plot(
        [row["epoch"] for row in evaluated],
        [row["knn"] for row in evaluated],
        marker=".",
        label="supervised" if config.supervised else "SimCLR",
    )
    for (name, knn), style in zip(baselines.items(), (":", "--"), strict=False):
        axes[2].axhline(knn, linestyle=style, color="gray", label=name)
    axes[2].set_title(f"kNN accuracy (k = {config.knn_k})")
    axes[2].legend()
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    save(figure, path)


def plot_neighbours(features: Sequence[Tensor], data: Data, path: Path) -> None:
    """Test images and the training images of the most similar features, framed by their class."""
    train, train_labels, test, test_labels = features
    queries = torch.linspace(0, len(test) - 1, min(8, len(test)), device=test.device).long()
    bank, rows = (F.normalize(x, dim=1) for x in (train, test[queries]))
    similarity, nearest = (rows @ bank.T).topk(min(8, len(train)), dim=1)
    images = images_of(data.test, queries)
    size = (nearest.shape[1] + 1.6, len(queries) * 1.15)
    figure, axes = plt.subplots(len(queries), nearest.shape[1] + 1, figsize=size, squeeze=False)
    for i, line in enumerate(axes):
        label = int(test_labels[queries[i]])
        show(line[0], images[i], "black")
        line[0].set_ylabel(data.classes[label][:12], fontsize=8)
        found = images_of(data.train, nearest[i])
        for image, j, value, axis in zip(found, nearest[i], similarity[i], line[1:], strict=True):
            show(axis, image, "green" if train_labels[j] == label else "red")
            axis.set_title(f"{value:.2f}", fontsize=7, pad=2)
    figure.suptitle("test image, and the nearest training images by cosine similarity", fontsize=9)
    save(figure, path)


def images_of(part: object, index: Tensor) -> Tensor:
    """Images of a data set in the order of `index`, as floats in [0, 1]."""
    images, _ = next(part.batches(index.cpu(), len(index)))  # type: ignore[attr-defined]
    return images.float() / 255


def plot_map(features: Tensor, labels: Tensor, classes: list[str], seed: int, path: Path) -> None:
    """Features in two dimensions, by their principal components and by t-SNE."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:MAPPED]
    rows = F.normalize(features.cpu()[chosen], dim=1).double().numpy()
    colours = labels.cpu()[chosen].numpy()
    perplexity = min(30, (len(rows) - 1) / 3)
    maps = {"PCA": PCA(2, random_state=seed).fit_transform(rows)}
    if perplexity > 1:
        maps["t-SNE"] = TSNE(
            2, perplexity=perplexity, metric="cosine", init="pca", random_state=seed
        ).fit_transform(rows)
    figure, axes = plt.subplots(1, len(maps), figsize=(6 * len(maps) + 1.6, 5.4), squeeze=False)
    palette = plt.get_cmap("tab20" if len(classes) > 10 else "tab10")
    for axis, (name, points) in zip(axes[0], maps.items(), strict=True):
        axis.scatter(*points.T, c=palette(colours % palette.N), s=8)
        axis.set_title(f"{name} of {len(rows)} test images")
        axis.set_xticks([])
        axis.set_yticks([])
    named = len(classes) <= palette.N
    if named:
        handles = [
            plt.Line2D([], [], linestyle="", marker="o", color=palette(i))
            for i in range(len(classes))
        ]
        figure.legend(handles, classes, loc="center right", fontsize=8, frameon=False)
    save(figure, path, right=1.6 if named else 0.0)
