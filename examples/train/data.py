"""The data: photographs, CIFAR-10, and any folder of images."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from photographs import load_patches
from train.config import Config, UserError, flag

IN_MEMORY_BYTES = 4 << 30


class InMemory:
    """Images (N, 3, H, W) uint8 and labels (N,) that lie on the device."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.images, self.labels = images.to(device), labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 3, H, W) uint8 and labels (B,), `size` at a time, on the device."""
        for index in order.to(self.labels.device).split(size):
            yield self.images[index], self.labels[index]


class Streamed:
    """Image files that worker processes decode as they are needed."""

    def __init__(
        self, files: "Subset[tuple[Tensor, int]]", device: torch.device, workers: int
    ) -> None:
        self.files, self.device, self.workers = files, device, workers

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 3, H, W) uint8 and labels (B,), `size` at a time, on the device."""
        loader = DataLoader(
            self.files,
            batch_sampler=[index.tolist() for index in order.split(size)],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the default one would be drawn from, and is saved
        )
        try:
            for batch in loader:
                images, labels = (part.to(self.device, non_blocking=True) for part in batch)
                yield images, labels
        except UserError as error:  # from a worker it comes with the worker's traceback
            # Its frames hold each other and the loader, whose worker would be waited for, 5 seconds
            # long, when they are collected.
            error.__traceback__ = None
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None

    def in_memory(self) -> InMemory:
        """The same images, decoded once."""
        images = torch.empty(len(self), *self.files[0][0].shape, dtype=torch.uint8)
        labels = torch.empty(len(self), dtype=torch.long)
        index = torch.arange(len(self))
        progress = tqdm(index.split(256), "decoding", leave=False, disable=None)
        for rows, batch in zip(progress, self.batches(index, 256), strict=True):
            images[rows], labels[rows] = batch[0].cpu(), batch[1].cpu()
        return InMemory(images, labels, self.device)


class Data(NamedTuple):
    """Both parts of a data set."""

    train: InMemory | Streamed
    test: InMemory | Streamed
    classes: list[str]


def load_image(path: str) -> Image.Image:
    """An image of any format that Pillow knows, as RGB of 8 bits."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("its pixels are floats, of no known range")
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
                levels = np.asarray(image).clip(0, 65535) // 256
                return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {path} ({error}); repair or remove it") from None


def load_data(config: Config, device: torch.device, workers: int | None = None) -> Data:
    """The data set that the settings name."""
    if config.data == "imagefolder":
        if workers is None:
            affinity = getattr(os, "sched_getaffinity", lambda _: range(2))
            workers = min(16, len(affinity(0)))
        data = load_image_folder(config, device, workers)
    else:
        try:
            *train, test_images, test_labels, classes = (
                load_cifar10(config.root) if config.data == "cifar10" else load_patches(config.size)
            )
        except ValueError as error:
            raise UserError(f"--{error}") from error
        chosen = part_of(len(train[1]), config)
        train = InMemory(*(part[chosen] for part in train), device)
        data = Data(train, InMemory(test_images, test_labels, device), classes)
    for name, least in [("batch_size", config.batch_size), ("knn_k", config.knn_k)]:
        if least > len(data.train):
            raise UserError(
                f"{flag(name)} must be at most the number of training images ({len(data.train)}), "
                f"got {least}"
            )
    return data


def part_of(count: int, config: Config) -> Tensor:
    """Indices of the training images to use: all, or --train-images drawn with the seed."""
    if config.train_images is None:
        return torch.arange(count)
    if config.train_images > count:
        raise UserError(f"--train-images must be at most {count}, got {config.train_images}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
    return order[: config.train_images].sort().values


def load_cifar10(root: str) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """CIFAR-10 by torchvision, which downloads it: what `load_patches` returns of photographs."""
    try:
        parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot get CIFAR-10 into --root {root}: {error}") from error
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return images[0], labels[0], images[1], labels[1], list(parts[0].classes)


def load_image_folder(config: Config, device: torch.device, workers: int) -> Data:
    """ROOT/train and ROOT/test with a folder for each class, the same classes in both."""
    side = int(config.load_size or config.size)
    # on the tensor: one definition of the resize for all formats, whatever Pillow's is
    square = v2.Compose([v2.PILToTensor(), v2.Resize(side), v2.CenterCrop(side)])
    folders = []
    for path in (Path(str(config.root)) / "train", Path(str(config.root)) / "test"):
        if not path.is_dir():
            raise UserError(f"--root must hold the folders train and test; {path} is missing")
        try:
            folders.append(ImageFolder(str(path), square, loader=load_image))
        except FileNotFoundError as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    train, test = folders
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(f"train and test differ in their class folders: {', '.join(differing)}")
    chosen = part_of(len(train), config).tolist()
    parts = [
        Streamed(Subset(files, index), device, workers)
        for files, index in ((train, chosen), (test, range(len(test))))
    ]
    if config.stream or sum(map(len, parts)) * 3 * side**2 > IN_MEMORY_BYTES:
        return Data(parts[0], parts[1], train.classes)
    return Data(parts[0].in_memory(), parts[1].in_memory(), train.classes)
