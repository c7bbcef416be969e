"""The data of examples/simclr.py: photographs, CIFAR-10, and any folder of images."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from simclr_settings import Config, UserError, flag
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

IN_MEMORY_BYTES = 4 << 30


class InMemory:
    """Images that lie on the device."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.images, self.labels = images.to(device), labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 3, H, W) uint8 and labels (B,), `size` at a time, on the device."""
        for index in order.to(self.labels.device).split(size):
            yield self.images[index], self.labels[index]


def find_decoder() -> tuple[str, Callable[[str], Tensor]]:
    """The quickest decoder of the common formats: torchcodec's, or the one in torchvision."""
    try:
        from torchcodec.decoders import decode_image

        return "torchcodec", lambda path: decode_image(path, mode="RGB")
    except (ImportError, OSError, RuntimeError):  # not there, too old, or without its libraries
        pass
    if hasattr(torchvision.io, "decode_image"):
        warnings.filterwarnings("ignore", ".*TorchCodec", module="torchvision")
        return "torchvision", lambda path: torchvision.io.decode_image(
            path, torchvision.io.ImageReadMode.RGB
        )
    return "PIL", decode_with_pil


def decode_with_pil(path: str) -> Tensor:
    """An image of any format that Pillow knows, as (3, H, W) uint8."""
    try:
        with Image.open(path) as file:
            if file.mode == "F":
                raise ValueError("its pixels are floats, of no known range")
            image: Image.Image = file
            if file.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
                levels = np.asarray(file).clip(0, 65535) // 256
                image = Image.fromarray(levels.astype(np.uint8))
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {path} ({error}); repair or remove it") from None


DECODER, decode_common = find_decoder()


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, decoded to squares of one size."""

    def __init__(self, files: Sequence[tuple[str, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            image = decode_common(path)
        except (OSError, RuntimeError, ValueError):  # of another format, or damaged
            image = decode_with_pil(path)
        if image.dtype != torch.uint8 or image.ndim != 3:  # 16 bits, or several frames
            image = decode_with_pil(path)
        if image.shape[-2:] != (self.size, self.size):
            image = v2.functional.center_crop(v2.functional.resize(image, [self.size]), [self.size])
        return image, label


class Streamed:
    """Images that worker processes decode as they are needed."""

    def __init__(self, files: ImageFiles, device: torch.device, workers: int) -> None:
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
            generator=torch.Generator(),
        )
        try:
            for batch in loader:
                images, labels = (part.to(self.device, non_blocking=True) for part in batch)
                yield images, labels
        except UserError as error:  # from a worker it comes with the worker's traceback
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


class Data(NamedTuple):
    """Both parts of a data set."""

    train: InMemory | Streamed
    test: InMemory | Streamed
    classes: list[str]


def load_data(config: Config, device: torch.device, workers: int | None) -> Data:
    """The data set that the settings name."""
    if workers is None:
        workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    if config.data == "imagefolder":
        data = load_image_folder(config, device, workers)
    else:
        load = photo_patches if config.data == "photos" else load_cifar10
        train_images, train_labels, test_images, test_labels, classes = load(config)
        chosen = part_of(len(train_labels), config)
        train = InMemory(train_images[chosen], train_labels[chosen], device)
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


def load_photographs() -> dict[str, np.ndarray]:
    """Sixteen photographs that are part of the installed packages, as (H, W, 3) uint8."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    names = [
        "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel",
        "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket",
    ]  # fmt: skip
    photographs = {name: getattr(skimage.data, name)() for name in names}
    photographs["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    for name in ("china", "flower"):
        photographs[name] = load_sample_image(f"{name}.jpg")
    return {
        name: photo if photo.ndim == 3 else np.stack([photo] * 3, axis=2)
        for name, photo in sorted(photographs.items())
    }


def cut_patches(photo: np.ndarray, size: int, per_side: int) -> np.ndarray:
    """An evenly spaced grid of square patches, (per_side², size, size, 3)."""
    height, width = photo.shape[:2]
    rows = np.linspace(0, height - size, per_side).astype(int)
    columns = np.linspace(0, width - size, per_side).astype(int)
    return np.stack([photo[y : y + size, x : x + size] for y in rows for x in columns])


def photo_patches(config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """256 training patches from each left half, 100 test patches from each right half."""
    photographs = load_photographs()
    largest = min(min(photo.shape[0], photo.shape[1] // 2) for photo in photographs.values())
    if config.size > largest:
        raise UserError(f"--size must be at most {largest} with --data photos, got {config.size}")
    halves: list[list[np.ndarray]] = [[], []]
    for photo in photographs.values():
        middle = photo.shape[1] // 2
        halves[0].append(cut_patches(photo[:, :middle], config.size, 16))
        halves[1].append(cut_patches(photo[:, middle:], config.size, 10))
    images = [
        torch.from_numpy(np.concatenate(half)).permute(0, 3, 1, 2).contiguous() for half in halves
    ]
    labels = [torch.arange(len(half)).repeat_interleave(len(half[0])) for half in halves]
    return images[0], labels[0], images[1], labels[1], list(photographs)


def load_cifar10(config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """CIFAR-10 by torchvision, which downloads it into --root."""
    parts: list[Tensor] = []
    for train in (True, False):
        try:
            part = torchvision.datasets.CIFAR10(config.root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot get CIFAR-10 into --root {config.root}: {error}") from error
        parts += [
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
        ]
    return parts[0], parts[1], parts[2], parts[3], list(part.classes)


def load_image_folder(config: Config, device: torch.device, workers: int) -> Data:
    """ROOT/train and ROOT/test with a folder for each class, the same classes in both."""
    root, side = Path(str(config.root)), int(config.load_size or config.size)
    folders = []
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise UserError(
                f"--root must hold the folders train and test; {root / part} is missing"
            )
        try:
            folders.append(torchvision.datasets.ImageFolder(str(root / part)))
        except FileNotFoundError as error:
            raise UserError(f"{root / part}: {str(error).splitlines()[0]}") from None
    train, test = folders
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(f"train and test differ in their class folders: {', '.join(differing)}")

    train_files = [train.samples[i] for i in part_of(len(train.samples), config).tolist()]
    files = [ImageFiles(samples, side) for samples in (train_files, test.samples)]
    size_bytes = sum(map(len, files)) * 3 * side**2
    if config.stream or size_bytes > IN_MEMORY_BYTES:
        streamed = [Streamed(part, device, workers) for part in files]
        return Data(streamed[0], streamed[1], train.classes)
    sets = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for part in files:
            progress = tqdm(desc="decoding", total=len(part), leave=False, disable=None)
            images = torch.empty(len(part), 3, side, side, dtype=torch.uint8)
            for i, (image, _) in enumerate(pool.map(part.__getitem__, range(len(part)))):
                images[i] = image
                progress.update()
            progress.close()
            sets.append(InMemory(images, torch.tensor([label for _, label in part.files]), device))
    return Data(sets[0], sets[1], train.classes)
