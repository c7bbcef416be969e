"""SimCLR from start to finish: data, two views, encoder, head, NT-Xent, evaluation.

    python examples/simclr.py                                  # photos: two minutes on a CPU
    python examples/simclr.py --data cifar10 --amp             # ResNet-18, 100 epochs, on a GPU
    python examples/simclr.py --data imagefolder --root PATH   # PATH/train/CLASS/*.jpg, PATH/test/…
    python examples/simclr.py --resume runs/RUN                # continue an interrupted run

The default data need no download: patches of photographs that ship inside scikit-image and
scikit-learn. The task is to tell which photograph an unseen patch comes from; training patches are
cut from the left half of each photograph, test patches from the right half.

A run folder holds config.json (settings, versions, seed), pairs.png (what the augmentation does),
curve.png, checkpoint.pt (everything that --resume needs), encoder.pt and results.json.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

# Read when torch loads: threads that wait asleep. Where other programs use the same cores,
# threads that wait busily make a step several times slower.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

import contrastive_kit
from contrastive_kit import NTXent, ProjectionHead, SimCLRAugment, resnet_encoder
from contrastive_kit.augment.simclr import IMAGENET_NORMALIZATION
from contrastive_kit.evaluation import extract_features, knn_accuracy, linear_probe

IN_MEMORY_BYTES = 4 << 30
KNN_TEMPERATURE = 0.1
CHECKPOINT_FORMAT = "contrastive-kit examples/simclr.py, version 1"


class UserError(Exception):
    """Something that the user can put right; shown as one line, without a traceback."""


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of Config; `least` and `above` are bounds, with and without equality."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Config:
    """What defines a run. Each field is an option of the command line."""

    data: str = option("photos", "what to train on", choices=["photos", "cifar10", "imagefolder"])
    root: str | None = option(None, "imagefolder: has train/ and test/; cifar10: download folder")
    size: int = option(32, "side of the views in pixels", least=8)
    load_size: int | None = option(
        None, "imagefolder: side that images are kept at [size; from 64 pixels up, 8/7 of it]"
    )
    stream: bool = option(False, "imagefolder: decode in each epoch even if all fits in memory")
    train_images: int | None = option(
        None, "train on this many, drawn with the seed [all]", least=2
    )
    encoder: str = option("convnet", "convnet (four layers) or a torchvision ResNet")
    stem: str | None = option(
        None, "of a ResNet [cifar up to 64 pixels]", choices=["cifar", "imagenet"]
    )
    head_layers: int = option(2, "layers of the projection head", choices=[0, 1, 2, 3])
    head_dim: int | None = option(None, "size of z [128; of h without a head]", least=1)
    temperature: float = option(0.2, "temperature of NT-Xent", above=0)
    strength: float = option(0.5, "strength of the colour jitter", least=0)
    epochs: int = option(10, "length of the schedule", least=1)
    batch_size: int = option(256, "images per step; each gives two views", least=2)
    optimizer: str = option("adamw", "optimiser", choices=["adamw", "sgd"])
    lr: float = option(2e-3, "peak learning rate at batch size 256; linear in it", above=0)
    weight_decay: float = option(1e-2, "not applied to biases and normalisation", least=0)
    warmup_epochs: float | None = option(
        None, "linear warm-up, then a cosine to zero [a tenth of --epochs]", least=0
    )
    amp: bool = option(False, "bfloat16 autocast")
    eval_every: int = option(2, "epochs between kNN evaluations", least=1)
    knn_k: int = option(20, "neighbours of the kNN evaluation", least=1)
    seed: int = option(0, "of initial weights, order and augmentation", least=0)


# the published settings for 100 epochs that are easiest to compare with
RESNET_RECIPE: dict[str, Any] = {
    "encoder": "resnet18", "temperature": 0.5, "epochs": 100, "batch_size": 512,
    "optimizer": "sgd", "lr": 0.06, "weight_decay": 5e-4,
    "eval_every": 10, "knn_k": 200,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "photos": {},
    "cifar10": {"root": "data", **RESNET_RECIPE},
    "imagefolder": {"size": 224, "strength": 1.0, **RESNET_RECIPE},
}
ONLY_FOR = {
    "root": ("cifar10", "imagefolder"),
    "load_size": ("imagefolder",),
    "stream": ("imagefolder",),
}


def flag(name: str) -> str:
    """The command-line option of a field."""
    return f"--{name.replace('_', '-')}"


def make_config(given: dict[str, Any]) -> Config:
    """The recipe of the data set, overridden by what the user gave, checked and completed."""
    data = given.get("data", "photos")
    for name, data_sets in ONLY_FOR.items():
        if name in given and data not in data_sets:
            raise UserError(f"{flag(name)} has no meaning with --data {data}")
    config = Config(**{**RECIPES[data], **given})
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None:
            continue
        if "least" in f.metadata and not f.metadata["least"] <= value < math.inf:
            raise UserError(f"{flag(f.name)} must be at least {f.metadata['least']}, got {value}")
        if "above" in f.metadata and not f.metadata["above"] < value < math.inf:
            raise UserError(f"{flag(f.name)} must be above {f.metadata['above']}, got {value}")
    if config.warmup_epochs is None:
        config = replace(config, warmup_epochs=config.epochs / 10)
    if config.warmup_epochs >= config.epochs:
        raise UserError(
            f"--warmup-epochs must be below --epochs ({config.epochs}), got {config.warmup_epochs}"
        )
    if config.encoder == "convnet" and config.stem is not None:
        raise UserError("--stem has no meaning with --encoder convnet")
    if config.encoder != "convnet" and config.stem is None:
        config = replace(config, stem="cifar" if config.size <= 64 else "imagenet")
    if data == "cifar10" and config.size != 32:
        raise UserError(f"--size must be 32 with --data cifar10, got {config.size}")
    return complete_image_folder(config) if data == "imagefolder" else config


def complete_image_folder(config: Config) -> Config:
    """Check and fill in what only an image folder has."""
    if config.root is None:
        raise UserError("--data imagefolder needs --root, a folder with train/ and test/")
    if config.load_size is None:
        kept = config.size if config.size < 64 else round(config.size * 8 / 7)
        return replace(config, load_size=kept)
    if config.load_size < config.size:
        raise UserError(
            f"--load-size must be at least --size ({config.size}), got {config.load_size}"
        )
    return config


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


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, decoded to squares of one size."""

    def __init__(self, files: Sequence[tuple[str, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read {path} ({error}); repair or remove it") from None
        if image.size != (self.size, self.size):
            image = v2.functional.center_crop(v2.functional.resize(image, [self.size]), [self.size])
        return v2.functional.pil_to_tensor(image), label


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


def load_data(config: Config, device: torch.device, workers: int) -> Data:
    """The data set that the settings name."""
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
            raise UserError(f"{root / part}: {error}") from None
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


def small_convnet(width: int = 32) -> nn.Module:
    """Four 3x3 convolutions, for the photographs: enough to learn from, quick on a CPU."""
    layers: list[nn.Module] = []
    for i, (out, stride) in enumerate([(1, 2), (2, 2), (4, 2), (8, 1)]):
        channels = 3 if i == 0 else width * out // 2
        layers += [
            nn.Conv2d(channels, width * out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width * out),
            nn.ReLU(inplace=True),
        ]
    encoder: Any = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder.out_dim = 8 * width
    return encoder


def build_model(config: Config) -> tuple[nn.Module, ProjectionHead]:
    """Encoder and projection head, with random weights."""
    try:
        encoder: Any
        if config.encoder == "convnet":
            encoder = small_convnet()
        else:
            stem: Any = config.stem
            encoder = resnet_encoder(config.encoder, stem=stem)
        head_dim = config.head_dim or (encoder.out_dim if config.head_layers == 0 else 128)
        return encoder, ProjectionHead(encoder.out_dim, out_dim=head_dim, layers=config.head_layers)
    except ValueError as error:
        raise UserError(str(error)) from error


def build_optimizer(config: Config, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum, its learning rate scaled to the batch."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = config.lr * config.batch_size / 256
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=lr)


def warmup_cosine(step: int, warmup: float, total: int) -> float:
    """Factor of the peak learning rate at `step`, 0 … total - 1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Scores(NamedTuple):
    """Accuracies on the test set, and the penalty that the linear probe chose."""

    knn: float
    linear: float | None = None
    l2: float | None = None


def evaluate(encoder: nn.Module, data: Data, config: Config, *, linear: bool) -> Scores:
    """Scores of the encoder's output h, with the encoder in evaluation mode and frozen."""
    preprocess = nn.Sequential(v2.CenterCrop(config.size), v2.Normalize(*IMAGENET_NORMALIZATION))
    frozen = nn.Sequential(preprocess, encoder)
    features: list[Tensor] = []
    for part in (data.train, data.test):
        features += extract_features(frozen, part.batches(torch.arange(len(part)), 512))
    knn = knn_accuracy(*features, k=config.knn_k, temperature=KNN_TEMPERATURE).accuracy
    if not linear:
        return Scores(knn)
    probe = linear_probe(*features)
    return Scores(knn, probe.accuracy, probe.l2)


def raw_pixels(config: Config) -> nn.Module:
    """Pixels as features; large images as thumbnails, for the sake of memory."""
    shrink = nn.AdaptiveAvgPool2d(32) if config.size > 32 else nn.Identity()
    return nn.Sequential(shrink, nn.Flatten())


def table(scores: dict[str, Scores], config: Config) -> str:
    """The scores as text."""
    lines = [f"{'':28}{f'kNN (k={config.knn_k})':>14}{'linear probe':>16}"]
    lines += [f"{name:28}{s.knn:14.3f}{s.linear:16.3f}" for name, s in scores.items()]
    return "\n".join(lines)


def plot_pairs(data: Data, config: Config, path: Path) -> None:
    """A row each of images, first views and second views, from a random stream of its own."""
    generator = torch.Generator().manual_seed(config.seed)
    augment = SimCLRAugment(config.size, strength=config.strength, generator=generator)
    chosen = torch.linspace(0, len(data.train) - 1, 10).long()
    images, _ = next(data.train.batches(chosen, len(chosen)))
    rows = [
        ("image", images.float() / 255),
        *zip(("view 1", "view 2"), augment(images), strict=True),
    ]
    figure, axes = plt.subplots(3, len(chosen), figsize=(len(chosen), 3.3), squeeze=False)
    for (name, row), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(name)
        for image, axis in zip(row.cpu(), line, strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout()
    write_atomically(path, partial(figure.savefig, format="png", dpi=120))
    plt.close(figure)


def plot_curve(
    history: list[dict[str, float]], baselines: dict[str, Scores], config: Config, path: Path
) -> None:
    """Loss, contrastive accuracy and kNN accuracy over the epochs."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    epochs = [row["epoch"] for row in history]
    axes[0].plot(epochs, [row["loss"] for row in history], marker=".")
    axes[0].set_title(f"NT-Xent loss (τ = {config.temperature:g})")
    axes[1].plot(epochs, [row["contrastive_accuracy"] for row in history], marker=".")
    axes[1].set_title(f"contrastive accuracy (1 of {2 * config.batch_size - 1})")
    evaluated = [row for row in history if "knn" in row]
    axes[2].plot(
        [row["epoch"] for row in evaluated],
        [row["knn"] for row in evaluated],
        marker=".",
        label="SimCLR",
    )
    for (name, scores), style in zip(baselines.items(), (":", "--"), strict=True):
        axes[2].axhline(scores.knn, linestyle=style, color="gray", label=name)
    axes[2].set_title(f"kNN accuracy (k = {config.knn_k})")
    axes[2].legend()
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    write_atomically(path, partial(figure.savefig, format="png", dpi=120))
    plt.close(figure)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, then put it in place: a crash or full disk leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); what was there is unchanged") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON that a person can read."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `train` saved, or a UserError that says what is wrong with the file."""
    if not path.is_file():
        raise UserError(f"nothing to resume: {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no checkpoint can fail to load in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this script ({CHECKPOINT_FORMAT})")
    return state


class Run:
    """Everything that changes in the course of training, and can be saved and restored."""

    MODULES = ("encoder", "head", "optimizer", "schedule")

    def __init__(self, config: Config, device: torch.device, steps: int) -> None:
        self.config, self.device, self.steps = config, device, steps
        torch.manual_seed(config.seed)
        self.encoder, self.head = (module.to(device) for module in build_model(config))
        self.optimizer = build_optimizer(config, (self.encoder, self.head))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: warmup_cosine(step, config.warmup_epochs * steps, config.epochs * steps),
        )
        # on the CPU, where the same seed gives the same order and the same views for any device
        self.order = torch.Generator().manual_seed(config.seed)
        self.views = torch.Generator().manual_seed(config.seed + 1)
        self.augment = SimCLRAugment(
            config.size,
            strength=config.strength,
            normalize=IMAGENET_NORMALIZATION,
            generator=self.views,
        )
        self.criterion = NTXent(config.temperature)
        self.history: list[dict[str, float]] = []
        self.baselines: dict[str, Scores] = {}

    def train_epoch(self, images: InMemory | Streamed) -> dict[str, float]:
        """One pass over the training images; an incomplete last batch is left out."""
        self.encoder.train()
        self.head.train()
        loss_sum, accuracy_sum = torch.zeros(2, device=self.device)
        batch_size, epoch = self.config.batch_size, len(self.history) + 1
        order = torch.randperm(len(images), generator=self.order)[: self.steps * batch_size]
        batches = images.batches(order, batch_size)
        progress = tqdm(batches, f"epoch {epoch}", self.steps, leave=False, disable=None)
        for step, (batch, _) in enumerate(progress, 1):
            views = self.augment(batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
                # both views in one forward: with one each, batch norm would tell them apart
                z1, z2 = self.head(self.encoder(torch.cat(views))).chunk(2)
            loss, stats = self.criterion(z1, z2, return_stats=True)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            loss_sum += loss.detach()
            accuracy_sum += stats.accuracy
            if step % 10 == 0:  # not in each step: reading a value waits for the device
                loss_so_far, accuracy_so_far = loss_sum.item() / step, accuracy_sum.item() / step
                progress.set_postfix(loss=f"{loss_so_far:.3f}", acc=f"{accuracy_so_far:.3f}")
        return {
            "epoch": epoch,
            "loss": loss_sum.item() / self.steps,
            "contrastive_accuracy": accuracy_sum.item() / self.steps,
        }

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, enough to go on as if there had been no break."""
        return {
            "history": self.history,
            "baselines": {name: tuple(scores) for name, scores in self.baselines.items()},
            "random": {
                "default": torch.get_rng_state(),
                "order": self.order.get_state(),
                "views": self.views.get_state(),
            },
            **{name: getattr(self, name).state_dict() for name in self.MODULES},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        for name in self.MODULES:
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"]["default"])
        self.order.set_state(state["random"]["order"])
        self.views.set_state(state["random"]["views"])
        self.history = state["history"]
        self.baselines = {name: Scores(*scores) for name, scores in state["baselines"].items()}


def train(
    config: Config,
    data: Data,
    folder: Path,
    device: torch.device,
    *,
    checkpoint: dict[str, Any] | None = None,
    stop_after: int | None = None,
) -> dict[str, Scores] | None:
    """Train, or continue from a checkpoint. Returns the final scores, None if stopped before."""
    fingerprint = {"classes": data.classes, "train": len(data.train), "test": len(data.test)}
    run = Run(config, device, steps=len(data.train) // config.batch_size)
    if checkpoint is None:
        plot_pairs(data, config, folder / "pairs.png")
        for name, encoder in [("raw pixels", raw_pixels(config)), ("random encoder", run.encoder)]:
            print(f"evaluating {name}", flush=True)
            run.baselines[name] = evaluate(encoder, data, config, linear=True)
    else:
        if checkpoint["data"] != fingerprint:
            raise UserError("the data are not those that the run began with (classes or counts)")
        run.restore(checkpoint)
    print(table(run.baselines, config), flush=True)

    first = len(run.history)
    last = config.epochs if stop_after is None else min(config.epochs, first + stop_after)
    for epoch in range(first + 1, last + 1):
        started = time.perf_counter()
        row = run.train_epoch(data.train)
        rate = run.steps * config.batch_size / (time.perf_counter() - started)
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"the loss is {row['loss']} in epoch {epoch}; the checkpoint of the epoch before "
                "is kept. Try a lower --lr or a higher --temperature"
            )
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            row["knn"] = evaluate(run.encoder, data, config, linear=False).knn
        run.history.append(row)
        state = {
            "format": CHECKPOINT_FORMAT,
            "config": asdict(config),
            "data": fingerprint,
            **run.state(),
        }
        write_atomically(folder / "checkpoint.pt", partial(torch.save, state))
        if "knn" in row:
            plot_curve(run.history, run.baselines, config, folder / "curve.png")
        print(
            f"epoch {epoch:4d}  loss {row['loss']:.4f}  "
            f"contrastive accuracy {row['contrastive_accuracy']:.3f}  "
            + (f"kNN {row['knn']:.3f}  " if "knn" in row else " " * 11)
            + f"{rate:6.0f} images/s",
            flush=True,
        )

    if last < config.epochs:
        print(f"stopped after epoch {last} of {config.epochs}; continue with --resume {folder}")
        return None
    print("evaluating SimCLR", flush=True)
    scores = {**run.baselines, "SimCLR": evaluate(run.encoder, data, config, linear=True)}
    write_atomically(folder / "encoder.pt", partial(torch.save, run.encoder.state_dict()))
    results: dict[str, Any] = {name: accuracies._asdict() for name, accuracies in scores.items()}
    results["kNN settings"] = {"k": config.knn_k, "temperature": KNN_TEMPERATURE}
    write_json(folder / "results.json", results)
    print(table(scores, config))
    return scores


def parse(argv: Sequence[str] | None) -> tuple[dict[str, Any], argparse.Namespace]:
    """What the user gave: the settings of the run, and those of this session."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate SimCLR.", argument_default=argparse.SUPPRESS
    )
    session = parser.add_argument_group("session")
    session.add_argument("--out", type=Path, help="new run folder [runs/DATA-DATE-TIME]")
    session.add_argument("--resume", type=Path, help="run folder to continue, with its settings")
    session.add_argument("--stop-after", type=int, help="stop after so many epochs, to be resumed")
    session.add_argument("--device", help="torch device [cuda if there is one]")
    session.add_argument("--workers", type=int, help="processes that decode images [2]")
    group = parser.add_argument_group("run; values in brackets are defaults, of photos")
    for f in fields(Config):
        name, text = flag(f.name), f.metadata["help"]
        if f.default is not None:
            text += f" [{f.default}]"
        if f.type is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = f.type if isinstance(f.type, type) else get_args(f.type)[0]
            group.add_argument(name, type=kind, choices=f.metadata.get("choices"), help=text)
    given = vars(parser.parse_args(argv))
    defaults = {"out": None, "resume": None, "stop_after": None, "device": None, "workers": 2}
    own = {name: given.pop(name, default) for name, default in defaults.items()}
    return given, argparse.Namespace(**own)


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the best one there is."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def new_folder(out: Path | None, config: Config, device: torch.device) -> Path:
    """An empty run folder with its config.json."""
    folder = out or Path("runs") / f"{config.data}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "checkpoint.pt").exists():
        raise UserError(f"{folder} holds a run: continue it with --resume, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error}") from error
    about = {
        "device": str(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "contrastive_kit": contrastive_kit.__version__,
        "torch": str(torch.__version__),
        **{name: version(name) for name in ("torchvision", "kornia", "einops")},
    }
    write_json(folder / "config.json", {**asdict(config), "about": about})
    return folder


def main(argv: Sequence[str] | None = None) -> dict[str, Scores] | None:
    """Run the command line; returns the final scores, None if stopped before the end."""
    started = time.perf_counter()
    given, session = parse(argv)
    for name, least in [("stop_after", 1), ("workers", 0)]:
        value = getattr(session, name)
        if value is not None and value < least:
            raise UserError(f"{flag(name)} must be at least {least}, got {value}")
    device = choose_device(session.device)
    checkpoint = None
    if session.resume is None:
        config = make_config(given)
    else:
        surplus = [*(["out"] if session.out else []), *given]
        if surplus:
            raise UserError(
                f"--resume keeps the run's settings; omit {', '.join(map(flag, surplus))}"
            )
        checkpoint = read_checkpoint(session.resume / "checkpoint.pt")
        config = Config(**checkpoint["config"])
    data = load_data(config, device, session.workers)
    folder = session.resume or new_folder(session.out, config, device)
    print(
        f"{config.data}: {len(data.train)} training and {len(data.test)} test images "
        f"of {len(data.classes)} classes, on {device}"
    )
    try:
        scores = train(
            config, data, folder, device, checkpoint=checkpoint, stop_after=session.stop_after
        )
    except KeyboardInterrupt:
        raise UserError(f"interrupted; finished epochs are kept: --resume {folder}") from None
    print(f"{time.perf_counter() - started:.0f} s in all; pictures and results are in {folder}")
    return scores


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
