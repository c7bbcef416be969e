"""What ``benchmarks.reproduce`` trains: each section of the paper as a list of runs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

Settings = Mapping[str, Any]
Label = tuple[str, ...]

# as the tables and the paper call them
TRANSFORMS = {
    "crop": "crop",
    "jitter": "colour",
    "gray": "grayscale",
    "blur": "blur",
    "flip": "flip",
    "solarize": "solarize",
}
HEADS = {0: "none", 1: "linear", 2: "non-linear"}


@dataclass(frozen=True)
class Run:
    """One training: options of examples/simclr.py, the seed included."""

    settings: Settings

    @property
    def key(self) -> str:
        """A folder name that other settings do not have."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def arguments(self) -> list[str]:
        """The command line."""
        texts = []
        for name, value in self.settings.items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                texts.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                values = value if isinstance(value, list) else [value]
                texts += [flag, *map(str, values)]
        return texts


@dataclass(frozen=True)
class Cell:
    """A place in a table: what it is called, and what it changes in the base settings."""

    label: Label
    changes: Settings


@dataclass(frozen=True)
class Claim:
    """What the paper says, as a sum of ±accuracies that it says is positive.

    With `rivals`, the best of them is taken off as well: the claim is then that nothing beats it.
    """

    text: str
    weights: Mapping[Label, float]
    rivals: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Section:
    """A question of the paper, and the runs that answer it here."""

    name: str
    title: str
    question: str
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]
    seeds: int
    claims: tuple[Claim, ...] = ()
    features: tuple[str, ...] = ("h",)


@dataclass(frozen=True)
class Scale:
    """Data and size of all runs."""

    name: str
    title: str
    base: Settings
    file: str
    batches: tuple[int, ...]
    epochs: tuple[int, ...]
    temperatures: tuple[float, ...]
    encoders: Mapping[str, Settings]
    deeper: tuple[str, str]
    wider: tuple[str, str]
    seeds: Mapping[str, int] = field(default_factory=dict)
    needs_root: bool = False

    def run(self, changes: Settings, seed: int) -> Run:
        """The base settings with `changes`."""
        return Run({**self.base, **changes, "seed": seed})


_SEEDS = {"baselines": 1, "augment": 2, "head": 3, "batch": 2, "temperature": 3, "encoder": 2}
_CONVNET = {"encoder": "convnet"}
_WIDE = "convnet, twice as wide"
_SMALL = {"stem": "imagenet"}  # on 32 pixels a seventh of the work of the CIFAR stem, or less
_CPU_ENCODERS = {
    "convnet": _CONVNET,
    _WIDE: {**_CONVNET, "width": 64},
    "ResNet-18": {"encoder": "resnet18", **_SMALL},
    "ResNet-34": {"encoder": "resnet34", **_SMALL},
}

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="photos",
            title="patches of 16 photographs, 24 pixels; a four-layer network; CPU",
            base={
                "recipe": "photos", "size": 24, "encoder": "convnet", "epochs": 3,
                "batch_size": 128, "temperature": 0.2, "eval_every": 1000, "baselines": False,
            },
            file="reproduction_cpu",
            batches=(64, 128, 256),
            epochs=(1, 3, 9),
            temperatures=(0.05, 0.1, 0.2, 0.5, 1.0),
            encoders=_CPU_ENCODERS,
            deeper=("ResNet-18", "ResNet-34"),
            wider=("convnet", _WIDE),
            seeds=_SEEDS,
        ),
        Scale(
            name="cifar-subset",
            title="CIFAR-10 (JPEG), 5000 training images drawn with the seed, all test images; "
            "a four-layer network; CPU",
            base={
                "recipe": "photos", "data": "imagefolder", "train_images": 5000,
                "encoder": "convnet", "epochs": 5, "batch_size": 256, "temperature": 0.2,
                "eval_every": 1000, "baselines": False,
            },
            file="reproduction_cifar_subset",
            batches=(128, 256, 512),
            epochs=(2, 5, 10),
            temperatures=(0.05, 0.1, 0.2, 0.5, 1.0),
            encoders=_CPU_ENCODERS,
            deeper=("ResNet-18", "ResNet-34"),
            wider=("convnet", _WIDE),
            seeds=_SEEDS,
            needs_root=True,
        ),
        Scale(
            name="cifar",
            title="CIFAR-10 (JPEG), all images; ResNets with the CIFAR stem; GPU",
            base={
                "recipe": "cifar10_resnet18", "data": "imagefolder", "encoder": "resnet18",
                "epochs": 100, "batch_size": 512, "temperature": 0.5, "eval_every": 1000,
                "baselines": False,
            },
            file="reproduction_cifar_gpu",
            batches=(256, 512, 1024, 2048),
            epochs=(50, 100, 200),
            temperatures=(0.05, 0.1, 0.2, 0.5, 1.0),
            encoders={
                "ResNet-18": {"encoder": "resnet18"},
                "ResNet-34": {"encoder": "resnet34"},
                "ResNet-50": {"encoder": "resnet50"},
                "ResNet-50, twice as wide inside": {"encoder": "wide_resnet50_2"},
            },
            deeper=("ResNet-18", "ResNet-50"),
            wider=("ResNet-50", "ResNet-50, twice as wide inside"),
            seeds=_SEEDS,
            needs_root=True,
        ),
    )
}  # fmt: skip


def sections(scale: Scale) -> list[Section]:
    """Every section at a scale, in the order of the report."""
    made = [_baselines(scale), _augment(scale), _head(scale)]
    return [*made, _batch(scale), _temperature(scale), _encoder(scale)]


def _baselines(scale: Scale) -> Section:
    return Section(
        "baselines", "What the figures start from",
        "Raw pixels and an untrained encoder, beside SimCLR at the base settings.",
        ("features",), (Cell(("SimCLR",), {"baselines": True}),), scale.seeds["baselines"],
        features=("raw pixels", "random encoder", "h"),
    )  # fmt: skip


def _augment(scale: Scale) -> Section:
    singles = [Cell((name, name), {"augment": [key]}) for key, name in TRANSFORMS.items()]
    pairs = [
        Cell((TRANSFORMS[a], TRANSFORMS[b]), {"augment": [a, b]})
        for a, b in combinations(TRANSFORMS, 2)
    ]
    best = ("crop", "colour", "h")
    return Section(
        "augment", "Composition of augmentations",
        "Section 3.1 and figure 5: each transform alone (the diagonal) and each pair. There one "
        "of the two branches is transformed; here both are, as in the rest of the paper.",
        ("first", "second"), (*singles, *pairs), scale.seeds["augment"],
        (
            Claim(
                "Crop and colour distortion is the best pair",
                {best: 1.0}, tuple((*c.label, "h") for c in pairs if c.label != best[:2]),
            ),
            Claim(
                "No single transform is as good as crop and colour distortion",
                {best: 1.0}, tuple((*c.label, "h") for c in singles),
            ),
            Claim(
                "Colour distortion added to crops helps", {best: 1.0, ("crop", "crop", "h"): -1.0},
            ),
        ),
    )  # fmt: skip


def _head(scale: Scale) -> Section:
    cells = tuple(
        Cell((name,), {"head_layers": layers, "eval_z": True}) for layers, name in HEADS.items()
    )
    none, linear, nonlinear = ((name, "h") for name in HEADS.values())
    return Section(
        "head", "Projection head",
        "Section 4.2 and figure 8: no head, a linear one, a non-linear one; evaluated before it "
        "(h) and after it (z). Without a head h and z are the same.",
        ("head",), cells, scale.seeds["head"],
        (
            Claim(
                "A non-linear head is better than a linear one (there by about 3 points)",
                {nonlinear: 1.0, linear: -1.0},
            ),
            Claim(
                "A non-linear head is better than none (there by more than 10 points)",
                {nonlinear: 1.0, none: -1.0},
            ),
            Claim(
                "With a non-linear head h is better than z (there by more than 10 points)",
                {nonlinear: 1.0, ("non-linear", "z"): -1.0},
            ),
        ),
        ("h", "z"),
    )  # fmt: skip


def _batch(scale: Scale) -> Section:
    cells = tuple(
        Cell((f"batch {batch}", length(epochs)), {"batch_size": batch, "epochs": epochs})
        for batch in scale.batches
        for epochs in scale.epochs
    )
    low, high = (f"batch {b}" for b in (scale.batches[0], scale.batches[-1]))
    short, long = length(scale.epochs[0]), length(scale.epochs[-1])
    share = 1 / len(scale.batches)
    return Section(
        "batch", "Batch size and length of training",
        "Section 5 and table B.1, the learning rate in proportion to the batch.",
        ("batch", "epochs"), cells, scale.seeds["batch"],
        (
            Claim(
                f"Longer training is better ({long} against {short}, mean over the batches)",
                {
                    (f"batch {b}", epochs, "h"): sign * share
                    for b in scale.batches
                    for epochs, sign in ((long, 1.0), (short, -1.0))
                },
            ),
            Claim(
                f"In short training a larger batch is better ({high} against {low}, {short})",
                {(high, short, "h"): 1.0, (low, short, "h"): -1.0},
            ),
            Claim(
                f"Longer training lessens the gain of the larger batch ({short} against {long})",
                {
                    (high, short, "h"): 1.0, (low, short, "h"): -1.0,
                    (high, long, "h"): -1.0, (low, long, "h"): 1.0,
                },
            ),
        ),
    )  # fmt: skip


def length(epochs: int) -> str:
    """So many epochs."""
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _temperature(scale: Scale) -> Section:
    cells = tuple(Cell((f"τ = {t:g}",), {"temperature": t}) for t in scale.temperatures)
    labels = {t: (f"τ = {t:g}", "h") for t in scale.temperatures}
    return Section(
        "temperature", "Temperature",
        "Section 5.1 and table 5: 0.1 was best there among 0.05, 0.1, 0.5 and 1 (100 epochs); on "
        "CIFAR-10, 0.5 after more than 300 epochs (appendix B.9).",
        ("temperature",), cells, scale.seeds["temperature"],
        (
            Claim(
                "τ = 0.1 is the best",
                {labels[0.1]: 1.0}, tuple(label for t, label in labels.items() if t != 0.1),
            ),
            Claim(
                "τ = 0.1 is better than τ = 1 (there by 6.4 points)",
                {labels[0.1]: 1.0, labels[1.0]: -1.0},
            ),
            Claim(
                "τ = 0.1 is better than τ = 0.05 (there by 4.7 points)",
                {labels[0.1]: 1.0, labels[0.05]: -1.0},
            ),
        ),
    )  # fmt: skip


def _encoder(scale: Scale) -> Section:
    cells = tuple(
        Cell((name, kind), {**changes, **extra})
        for name, changes in scale.encoders.items()
        for kind, extra in (("SimCLR", {}), ("supervised", {"supervised": True}))
    )
    (small, deep), (narrow, wide) = scale.deeper, scale.wider
    claims = (
        Claim(
            f"A deeper encoder is better ({deep} against {small})",
            {(deep, "SimCLR", "h"): 1.0, (small, "SimCLR", "h"): -1.0},
        ),
        Claim(
            f"A wider encoder is better ({wide}, against {narrow})",
            {(wide, "SimCLR", "h"): 1.0, (narrow, "SimCLR", "h"): -1.0},
        ),
        Claim(
            "Training with labels is better (mean over the encoders)",
            {
                (name, kind, "h"): sign / len(scale.encoders)
                for name in scale.encoders
                for kind, sign in (("supervised", 1.0), ("SimCLR", -1.0))
            },
        ),
        Claim(
            f"The gap to labels is smaller for the deeper encoder ({deep} against {small})",
            {
                (small, "supervised", "h"): 1.0, (small, "SimCLR", "h"): -1.0,
                (deep, "supervised", "h"): -1.0, (deep, "SimCLR", "h"): 1.0,
            },
        ),
    )  # fmt: skip
    return Section(
        "encoder", "Size of the encoder, and the gap to supervised training",
        "Section 4.1 and figure 7. Supervised training has the same augmentation, optimiser and "
        "epochs, and one view of each image where SimCLR has two; its features are probed in the "
        "same way.",
        ("encoder", "training"), cells, scale.seeds["encoder"], claims,
    )  # fmt: skip


def runs(scale: Scale, chosen: list[Section], seeds: int | None = None) -> list[Run]:
    """All runs of these sections without repetition.

    The first seed of every place comes first, and small tables before large ones: what is stopped
    early has whole tables.
    """
    found: dict[str, Run] = {}
    for seed in range(max((count(s, seeds) for s in chosen), default=0)):
        for section in sorted(chosen, key=lambda s: len(s.cells)):
            if seed < count(section, seeds):
                for cell in section.cells:
                    run = scale.run(cell.changes, seed)
                    found.setdefault(run.key, run)
    return list(found.values())


def count(section: Section, seeds: int | None) -> int:
    """How many seeds a section has; `seeds` overrides its own number."""
    return section.seeds if seeds is None else seeds
