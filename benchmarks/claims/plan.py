"""What is trained: each section of the paper as a list of runs. Its data are in plan.toml."""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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


_DATA = tomllib.loads(Path(__file__).with_name("plan.toml").read_text(encoding="utf-8"))
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


def _difference(*pairs: tuple[Label, Label], share: float = 1.0) -> dict[Label, float]:
    """The first of each pair less the second."""
    weights: dict[Label, float] = {}
    for better, worse in pairs:
        weights |= {better: share, worse: -share}
    return weights


def _augment() -> Made:
    singles = [Cell((name, name), {"augment": [key]}) for key, name in TRANSFORMS.items()]
    pairs = [
        Cell((TRANSFORMS[a], TRANSFORMS[b]), {"augment": [a, b]})
        for a, b in combinations(TRANSFORMS, 2)
    ]
    best = ("crop", "colour", "h")
    others = tuple((*c.label, "h") for c in pairs if c.label != best[:2])
    alone = tuple((*c.label, "h") for c in singles)
    better = _difference((best, ("crop", "crop", "h")))
    return [*singles, *pairs], [
        Claim("Crop and colour distortion is the best pair", {best: 1.0}, others),
        Claim("No single transform is as good as crop and colour distortion", {best: 1.0}, alone),
        Claim("Colour distortion added to crops helps", better),
    ]


def _head() -> Made:
    cells = [Cell((name,), {"head_layers": n, "eval_z": True}) for n, name in HEADS.items()]
    none, linear, nonlinear = ((name, "h") for name in HEADS.values())
    than = "A non-linear head is better than"
    h_than_z = "With a non-linear head h is better than z (there by more than 10 points)"
    return cells, [
        Claim(f"{than} a linear one (there by about 3 points)", _difference((nonlinear, linear))),
        Claim(f"{than} none (there by more than 10 points)", _difference((nonlinear, none))),
        Claim(h_than_z, _difference((nonlinear, ("non-linear", "z")))),
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
    return cells, [
        Claim(
            f"Longer training is better ({long} against {short}, mean over the batches)",
            _difference(*longer, share=1 / len(batches)),
        ),
        Claim(
            f"In short training a larger batch is better ({high} against {low}, {short})",
            _difference(gain),
        ),
        Claim(
            f"Longer training lessens the gain of the larger batch ({short} against {long})",
            _difference(gain, kept),
        ),
    ]


def length(epochs: int) -> str:
    """So many epochs."""
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _temperature(scale: Scale) -> Made:
    cells = [Cell((f"τ = {t:g}",), {"temperature": t}) for t in scale.temperatures]
    at = {t: (f"τ = {t:g}", "h") for t in scale.temperatures}
    others = tuple(label for t, label in at.items() if t != 0.1)
    than = "τ = 0.1 is better than"
    return cells, [
        Claim("τ = 0.1 is the best", {at[0.1]: 1.0}, others),
        Claim(f"{than} τ = 1 (there by 6.4 points)", _difference((at[0.1], at[1.0]))),
        Claim(f"{than} τ = 0.05 (there by 4.7 points)", _difference((at[0.1], at[0.05]))),
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
    gaps = ((labels[small], ours[small]), (ours[deep], labels[deep]))
    return cells, [
        Claim(
            f"A deeper encoder is better ({deep} against {small})",
            _difference((ours[deep], ours[small])),
        ),
        Claim(
            f"A wider encoder is better ({wide}, against {narrow})",
            _difference((ours[wide], ours[narrow])),
        ),
        Claim(
            "Training with labels is better (mean over the encoders)",
            _difference(*((labels[n], ours[n]) for n in ours), share=1 / len(ours)),
        ),
        Claim(
            f"The gap to labels is smaller for the deeper encoder ({deep} against {small})",
            _difference(*gaps),
        ),
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
