"""What is trained: each section of the paper as a list of runs. Its data are in plan.toml."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations, product
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.plan import read_toml

Settings = Mapping[str, Any]
Label = tuple[str, ...]

# As the tables and the paper call them.
TRANSFORMS = {
    "crop": "crop", "jitter": "colour", "gray": "grayscale", "blur": "blur", "flip": "flip",
    "solarize": "solarize",
}  # fmt: skip
HEADS = {0: "none", 1: "linear", 2: "non-linear"}
SMALL_BATCH = 64


class Run(NamedTuple):
    """One training: options of the trainer, the seed included."""

    settings: Settings

    @property
    def key(self) -> str:
        """A folder name that other settings do not have."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def arguments(self) -> list[str]:
        texts = []
        for name, value in self.settings.items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                texts.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                values = value if isinstance(value, list) else [value]
                texts += [flag, *map(str, values)]
        return texts


class Cell(NamedTuple):
    """A place in a table: what it is called, and what it changes in the base settings."""

    label: Label
    changes: Settings


class Claim(NamedTuple):
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
    cells: tuple[Cell, ...]
    claims: tuple[Claim, ...]
    title: str
    question: str
    axes: tuple[str, ...]
    seeds: int
    features: tuple[str, ...] = ("h",)


@dataclass(frozen=True)
class Scale:
    """Data and size of all runs."""

    name: str
    title: str
    file: str
    base: Settings
    batches: tuple[int, ...]
    epochs: tuple[int, ...]
    temperatures: tuple[float, ...]
    encoders: str
    needs_root: bool = False

    def run(self, changes: Settings, seed: int) -> Run:
        """The base settings with `changes`."""
        return Run({**self.base, **changes, "seed": seed})


_DATA = read_toml(Path(__file__).with_name("plan.toml"))
SCALES = {name: Scale(name, **values) for name, values in _DATA["scales"].items()}
NAMES = tuple(_DATA["sections"])


def sections(scale: Scale) -> list[Section]:
    """Every section at a scale, in the order of the report."""
    found = []
    for name, values in _DATA["sections"].items():
        section = Section(name, tuple(_cells(name, scale)), **{**values, "claims": ()})
        claims = tuple(_claim(section, scale, **data) for data in values.get("claims", ()))
        found.append(replace(section, claims=claims))
    return found


def _cells(section: str, scale: Scale) -> list[Cell]:
    if section == "augment":
        pairs = [*((name, name) for name in TRANSFORMS), *combinations(TRANSFORMS, 2)]
        return [
            Cell((TRANSFORMS[a], TRANSFORMS[b]), {"augment": list(dict.fromkeys((a, b)))})
            for a, b in pairs
        ]
    axes: dict[str, list[dict[str, Settings]]] = {
        "baselines": [{"SimCLR": {"baselines": True}}],
        "head": [{name: {"head_layers": n, "eval_z": True} for n, name in HEADS.items()}],
        "batch": [
            {f"batch {batch}": {"batch_size": batch} for batch in scale.batches},
            {length(epochs): {"epochs": epochs} for epochs in scale.epochs},
        ],
        "loss": [
            _DATA["losses"],
            {
                f"batch {batch}": {"batch_size": batch, "epochs": scale.epochs[-1]}
                for batch in (SMALL_BATCH, scale.batches[-1])
            },
        ],
        "temperature": [{f"τ = {t:g}": {"temperature": t} for t in scale.temperatures}],
        "encoder": [
            _DATA["encoders"][scale.encoders]["changes"],
            {"SimCLR": {}, "supervised": {"supervised": True}},
        ],
    }
    cells = []
    for choice in product(*(axis.items() for axis in axes[section])):
        label, changes = zip(*choice, strict=True)
        cells.append(Cell(label, reduce(or_, changes)))
    return cells


def length(epochs: int) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _claim(
    section: Section,
    scale: Scale,
    text: str,
    better: list[str],
    worse: Sequence[str] = (),
    rivals: str = "",
) -> Claim:
    """A claim of plan.toml about the places of a section."""
    encoders = _DATA["encoders"][scale.encoders]
    words = {
        "tiny": f"batch {SMALL_BATCH}",
        "low": f"batch {scale.batches[0]}", "high": f"batch {scale.batches[-1]}",
        "short": length(scale.epochs[0]), "long": length(scale.epochs[-1]),
        "small": encoders["deeper"][0], "deep": encoders["deeper"][1],
        "narrow": encoders["wider"][0], "wide": encoders["wider"][1],
    }  # fmt: skip
    labels = [(*cell.label, feature) for cell in section.cells for feature in section.features]

    def matching(pattern: str) -> list[Label]:
        wanted = re.compile(pattern.format(**words))
        return [label for label in labels if wanted.fullmatch(" / ".join(label))]

    weights: dict[Label, float] = {}
    for sign, patterns in ((1, better), (-1, worse)):
        for found in map(matching, patterns):
            weights |= {label: sign / len(found) for label in found}
    others = tuple(label for label in matching(rivals) if label not in weights)
    return Claim(text.format(**words), weights, others)


def runs(scale: Scale, chosen: Iterable[Section], seeds: int | None = None) -> list[Run]:
    """All runs of these sections without repetition.

    The first seed of every place comes first, and small tables before large ones: what is stopped
    early has whole tables.
    """
    found: dict[str, Run] = {}
    by_size = sorted(chosen, key=lambda s: len(s.cells))
    for seed in range(max((seeds or s.seeds for s in by_size), default=0)):
        for section in by_size:
            if seed < (seeds or section.seeds):
                for cell in section.cells:
                    run = scale.run(cell.changes, seed)
                    found.setdefault(run.key, run)
    return list(found.values())
