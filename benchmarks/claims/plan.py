"""What is trained: each section of the paper as a list of runs. Its data are in plan.toml."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
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
    made = {
        "baselines": ([Cell(("SimCLR",), {"baselines": True})], []),
        "augment": _augment(),
        "head": _head(),
        "batch": _batch(scale),
        "temperature": _temperature(scale),
        "encoder": _encoder(scale),
    }
    return [
        Section(name, tuple(made[name][0]), tuple(made[name][1]), **values)
        for name, values in _DATA["sections"].items()
    ]


Made = tuple[list[Cell], list[Claim]]


def _better(text: str, *pairs: tuple[Label, Label], share: float = 1.0) -> Claim:
    """The first of each pair is better than the second, in the sum of the pairs."""
    weights = {
        label: sign * share for pair in pairs for label, sign in zip(pair, (1, -1), strict=True)
    }
    return Claim(text, weights)


def _augment() -> Made:
    cells = [
        Cell((TRANSFORMS[a], TRANSFORMS[b]), {"augment": list(dict.fromkeys((a, b)))})
        for a, b in [*((a, a) for a in TRANSFORMS), *combinations(TRANSFORMS, 2)]
    ]
    best = ("crop", "colour", "h")
    labels = [(*c.label, "h") for c in cells]
    alone = tuple(label for label in labels if label[0] == label[1])
    others = tuple(label for label in labels if label not in (best, *alone))
    return cells, [
        Claim("Crop and colour distortion is the best pair", {best: 1.0}, others),
        Claim("No single transform is as good as crop and colour distortion", {best: 1.0}, alone),
        _better("Colour distortion added to crops helps", (best, ("crop", "crop", "h"))),
    ]


def _head() -> Made:
    cells = [Cell((name,), {"head_layers": n, "eval_z": True}) for n, name in HEADS.items()]
    none, linear, nonlinear = ((name, "h") for name in HEADS.values())
    than = "A non-linear head is better than"
    h_than_z = "With a non-linear head h is better than z (there by more than 10 points)"
    return cells, [
        _better(f"{than} a linear one (there by about 3 points)", (nonlinear, linear)),
        _better(f"{than} none (there by more than 10 points)", (nonlinear, none)),
        _better(h_than_z, (nonlinear, ("non-linear", "z"))),
    ]


def _batch(scale: Scale) -> Made:
    cells = [
        Cell((f"batch {batch}", length(epochs)), {"batch_size": batch, "epochs": epochs})
        for batch in scale.batches
        for epochs in scale.epochs
    ]
    batches = [f"batch {b}" for b in scale.batches]
    low, high = batches[0], batches[-1]
    short, long = length(scale.epochs[0]), length(scale.epochs[-1])
    longer = [((b, long, "h"), (b, short, "h")) for b in batches]
    gain, kept = ((high, short, "h"), (low, short, "h")), ((low, long, "h"), (high, long, "h"))
    is_better = f"Longer training is better ({long} against {short}, mean over the batches)"
    larger = f"In short training a larger batch is better ({high} against {low}, {short})"
    lessens = f"Longer training lessens the gain of the larger batch ({short} against {long})"
    return cells, [
        _better(is_better, *longer, share=1 / len(batches)),
        _better(larger, gain),
        _better(lessens, gain, kept),
    ]


def length(epochs: int) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _temperature(scale: Scale) -> Made:
    at = {t: (f"τ = {t:g}", "h") for t in scale.temperatures}
    cells = [Cell(label[:1], {"temperature": t}) for t, label in at.items()]
    others = tuple(label for t, label in at.items() if t != 0.1)
    than = "τ = 0.1 is better than"
    return cells, [
        Claim("τ = 0.1 is the best", {at[0.1]: 1.0}, others),
        _better(f"{than} τ = 1 (there by 6.4 points)", (at[0.1], at[1.0])),
        _better(f"{than} τ = 0.05 (there by 4.7 points)", (at[0.1], at[0.05])),
    ]


def _encoder(scale: Scale) -> Made:
    data = _DATA["encoders"][scale.encoders]
    cells = [
        Cell((name, kind), {**changes, **extra})
        for name, changes in data["changes"].items()
        for kind, extra in (("SimCLR", {}), ("supervised", {"supervised": True}))
    ]
    (small, deep), (narrow, wide) = data["deeper"], data["wider"]
    ours = {name: (name, "SimCLR", "h") for name in data["changes"]}
    labels = {name: (name, "supervised", "h") for name in data["changes"]}
    deeper = f"A deeper encoder is better ({deep} against {small})"
    wider = f"A wider encoder is better ({wide}, against {narrow})"
    gap = f"The gap to labels is smaller for the deeper encoder ({deep} against {small})"
    with_labels = [(labels[name], ours[name]) for name in ours]
    return cells, [
        _better(deeper, (ours[deep], ours[small])),
        _better(wider, (ours[wide], ours[narrow])),
        _better(
            "Training with labels is better (mean over the encoders)",
            *with_labels,
            share=1 / len(ours),
        ),
        _better(gap, (labels[small], ours[small]), (ours[deep], labels[deep])),
    ]


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
