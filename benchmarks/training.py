"""SimCLR for equal time by this library, by lightly's recipe, and by Kornia with the eager loss.

Images, encoder, head, optimizer and the distribution of the views are the same; who makes views and
loss is not. The clock stands still while the features are judged.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import trainer
from benchmarks.harness import plan, report
from benchmarks.harness.device import Device
from benchmarks.harness.processes import fresh
from benchmarks.harness.report import Results, table
from benchmarks.harness.store import Store
from benchmarks.losses.arms import EAGER, OURS, eager_nt_xent
from contrastive_kit import NTXent, ProjectionHead, SimCLRAugment, resnet_encoder
from contrastive_kit.evaluation import extract_features, knn_accuracy

# Where CIFAR-10 lies as image files, train/CLASS and test/CLASS; set by --root.
ROOT = "CONTRASTIVE_KIT_BENCHMARK_ROOT"
LIGHTLY, KORNIA = "lightly", f"Kornia, {EAGER} loss"
ARMS = (OURS, LIGHTLY, KORNIA)
_TEMPERATURE, _STRENGTH, _SIZE = 0.5, 0.5, 32
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COLORS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}  # at that strength


class Case(NamedTuple):
    encoder: str  # "convnet" or a name of resnet_encoder
    arm: str  # of ARMS
    seed: int
    seconds: float  # of training
    marks: int  # how often kNN is asked, evenly over the time
    images: int = 10_000
    batch: int = 256
    data: str = "cifar10"  # or "photographs"
    threads: int | None = None


cases = partial(plan.read, Case, "training")

Views = Callable[[], Iterator[tuple[Tensor, Tensor]]]
Loss = Callable[[Tensor, Tensor], Tensor]


class Data(NamedTuple):
    train: Tensor  # (N, 3, 32, 32) uint8
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def measure(case: Case, store: Store, device: Device) -> dict[str, Any]:
    """The speed, memory and accuracy of a training in a process of its own."""
    if case.data == "cifar10" and not os.environ.get(ROOT):
        raise RuntimeError("--root must name CIFAR-10 as image files, train/CLASS and test/CLASS")
    found: dict[str, Any] = fresh(_train, case, str(device.device))
    return found


def _train(case: Case, device: str) -> dict[str, Any]:
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    data = _load(case)
    torch.manual_seed(case.seed)
    encoder = _encoder(case.encoder).to(device)
    model = nn.Sequential(encoder, ProjectionHead(int(encoder.out_dim))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    views, loss_fn = _BUILD[case.arm](case, data, device)
    curve: list[list[float]] = []
    images = trained = 0.0
    batches = (batch for _ in count() for batch in views())
    with _PeakMemory() as memory:
        while len(curve) < case.marks:
            start = time.perf_counter()
            z = model(torch.cat(next(batches)))
            loss = loss_fn(*z.chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # a GPU has finished the step
            trained += time.perf_counter() - start
            images += len(z) // 2
            if trained >= case.seconds * (len(curve) + 1) / case.marks:
                curve.append([trained, _knn(encoder, data, device)])
    return {
        "images_per_s": images / trained,
        "epochs": images / case.images,
        "peak_mib": memory.peak_mib,
        "curve": curve,
    }


def _encoder(name: str) -> nn.Module:
    if name != "convnet":
        return resnet_encoder(name, stem="cifar")
    trainer.settings([])  # puts the examples on the path
    from train.learner import small_convnet

    return small_convnet(32)


def _load(case: Case) -> Data:
    """As many images as the case has for training, the same for all seeds, and 2,000 to test."""
    if case.data == "photographs":
        trainer.settings([])
        from photographs import load_patches

        train, train_labels, test, test_labels, _ = load_patches(_SIZE)
    else:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms.v2 import PILToTensor

        parts = [ImageFolder(str(Path(os.environ[ROOT]) / part)) for part in ("train", "test")]
        images = [torch.stack([PILToTensor()(image) for image, _ in part]) for part in parts]
        train, test = images
        train_labels, test_labels = (torch.tensor(part.targets) for part in parts)
    order = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(train), generator=order)[: case.images]
    asked = torch.randperm(len(test), generator=order)[:2000]
    return Data(train[chosen], train_labels[chosen], test[asked], test_labels[asked])


def _knn(encoder: nn.Module, data: Data, device: str) -> float:
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (_MEAN, _STD))

    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, images: Tensor) -> Tensor:
            features: Tensor = self.encoder((images - mean) / std)
            return features

    found = []
    for images, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        batches = zip(images.split(500), labels.split(500), strict=True)
        found += extract_features(Normalized(), batches, device=device)
    return knn_accuracy(*found, k=min(200, len(data.train) // 10)).accuracy


def _epoch(case: Case, images: Tensor) -> Iterator[Tensor]:
    for index in torch.randperm(len(images)).split(case.batch):
        if len(index) == case.batch:
            yield images[index.to(images.device)]


def _ours(case: Case, data: Data, device: str) -> tuple[Views, Loss]:
    images = data.train.to(device)
    augment = SimCLRAugment(_SIZE, strength=_STRENGTH, normalize=(_MEAN, _STD))

    def views() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in _epoch(case, images):
            v1, v2 = augment(batch)
            yield v1, v2

    return views, NTXent(_TEMPERATURE)


def _kornia(case: Case, data: Data, device: str) -> tuple[Views, Loss]:
    import kornia.augmentation as K

    images = data.train.to(device)
    augment = K.AugmentationSequential(
        K.RandomResizedCrop((_SIZE, _SIZE), scale=(0.08, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(**_COLORS, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.Normalize(torch.tensor(_MEAN), torch.tensor(_STD)),
        data_keys=["input"],
    )

    def views() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in _epoch(case, images):
            x = batch.float() / 255
            yield augment(x), augment(x)

    return views, partial(eager_nt_xent, temperature=_TEMPERATURE)


class _AsPil(torch.utils.data.Dataset[Any]):
    """What lightly's transform takes, as torchvision's data sets give it."""

    def __init__(self, images: Tensor, transform: Callable[[Any], Any]) -> None:
        self.images, self.transform = images.permute(0, 2, 3, 1).contiguous().numpy(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index]))


def _lightly(case: Case, data: Data, device: str) -> tuple[Views, Loss]:
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(
        _SIZE,
        cj_strength=_STRENGTH,
        gaussian_blur=0.0,
        normalize={"mean": list(_MEAN), "std": list(_STD)},
    )
    loader = torch.utils.data.DataLoader(
        _AsPil(data.train, transform),
        case.batch,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
    )

    def views() -> Iterator[tuple[Tensor, Tensor]]:
        for v1, v2 in loader:
            yield v1.to(device), v2.to(device)

    return views, NTXentLoss(_TEMPERATURE)


_BUILD = {OURS: _ours, LIGHTLY: _lightly, KORNIA: _kornia}


class _PeakMemory:
    """The largest memory of this process and its workers together, shared pages counted once."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        own = psutil.Process()
        while True:
            total = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, AttributeError):  # it ended, or the system has no such figure
                    continue
            self.peak_mib = max(self.peak_mib, total / 2**20)
            if self._done.wait(1.0):
                return


def markdown(results: Results) -> str:
    """The page; README and documentation include the table."""
    groups: dict[tuple[str, str], list[Results]] = {}
    for c in results["cases"]:
        groups.setdefault((c["case"]["encoder"], c["case"]["arm"]), []).append(c)
    rows = []
    for (encoder, arm), runs in groups.items():
        first = runs[0]["case"]
        marks = [
            f"{100 * _mean([run['curve'][i][1] for run in runs]):.1f}{_range(runs, i)}"
            for i in range(first["marks"])
        ]
        rows.append(
            [
                encoder,
                arm,
                len(runs),
                f"{_mean([run['images_per_s'] for run in runs]):.0f}",
                f"{max(run['peak_mib'] for run in runs):.0f}",
                f"{_mean([run['epochs'] for run in runs]):.1f}",
                f"{first['seconds']:.0f}",
                " → ".join(marks),
            ]
        )
    header = ["encoder", "views and loss", "seeds", "images/s", "peak MiB", "epochs", "seconds"]
    return report.page("training", **results, rows=table([*header, "kNN, %"], rows))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _range(runs: list[Results], mark: int) -> str:
    """The smallest and the largest over the seeds, where there are several."""
    found = [100 * run["curve"][mark][1] for run in runs]
    return f" [{min(found):.1f}, {max(found):.1f}]" if len(found) > 1 else ""
