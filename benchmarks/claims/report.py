"""Tables, verdicts and pictures of the claims, computed from finished runs."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import trainer
from benchmarks.claims.plan import SCALES, Claim, Label, Section
from benchmarks.harness.report import page

Values = Mapping[Label, Sequence[float]]

MEASURES = {"linear": "linear probe", "knn": "kNN"}


def deviation(values: Values) -> tuple[float, int] | None:
    """Standard deviation between seeds, pooled over all places, and its degrees of freedom."""
    squares = sum((x - mean(row)) ** 2 for row in values.values() for x in row)
    freedom = sum(len(row) - 1 for row in values.values() if row)
    return (math.sqrt(squares / freedom), freedom) if freedom else None


def judge(claim: Claim, values: Values) -> dict[str, Any]:
    """The sum that the claim says is positive, its error, and what follows.

    The error is half the width of the 95 % interval, from the deviation pooled over the section:
    with two or three seeds a place that of a single place is a matter of luck.
    """
    from scipy.stats import t as student

    weights = dict(claim.weights)
    result: dict[str, Any] = {"claim": claim.text}
    wanted = [*weights, *claim.rivals]
    absent = sum(1 for label in wanted if not values.get(label))
    if absent:
        return {**result, "verdict": "open", "missing": absent, "of": len(wanted)}
    result["seeds"] = min(len(values[label]) for label in wanted)
    if claim.rivals:
        rival = max(claim.rivals, key=lambda label: mean(values[label]))
        weights[rival] = weights.get(rival, 0.0) - 1.0
        result["rival"] = rival
    difference = sum(w * mean(values[label]) for label, w in weights.items())
    spread = deviation(values)
    if spread is None:
        return {**result, "verdict": "open", "difference": difference}
    sigma, freedom = spread
    variance = sum(w * w / len(values[label]) for label, w in weights.items())
    error = float(student.ppf(0.975, freedom)) * sigma * math.sqrt(variance)
    side = (difference > error) - (difference < -error)
    verdict = {1: "reproduced", 0: "undecided", -1: "contradicted"}[side]
    return {**result, "verdict": verdict, "difference": difference, "error": error}


def summary(section: Section, seeds: int, scores: Mapping[Label, list[Mapping[str, float]]]) -> Any:
    values: dict[str, dict[Label, list[float]]] = {
        measure: {label: [s[measure] for s in found] for label, found in scores.items()}
        for measure in MEASURES
    }
    expected = len(section.cells) * len(section.features) * seeds
    return {
        "name": section.name,
        "title": section.title,
        "question": section.question,
        "axes": section.axes,
        "seeds": seeds,
        "missing": expected - sum(map(len, scores.values())),
        "expected": expected,
        "deviation and its degrees of freedom": {
            measure: deviation(rows) for measure, rows in values.items()
        },
        "places": [
            {"label": label, **{measure: rows[label] for measure, rows in values.items()}}
            for label in scores
        ],
        "claims": [judge(claim, values["linear"]) for claim in section.claims],
    }


def markdown(found: Mapping[str, Any], picture: str) -> str:
    scale = SCALES[found["scale"]]
    option = "" if scale.name == "photos" else f" --scale {scale.name}"
    command = f"python -m benchmarks claims{option}{' --root FOLDER' * scale.needs_root}"
    parts = {"command": command, "trainer": trainer.TRAINER, "picture": picture}
    of_numbers = {"measures": MEASURES, "mean": mean, "stdev": stdev}
    return page("claims", **{**found, **parts, **of_numbers})


def heat_map(section: Mapping[str, Any], title: str, path: Path) -> None:
    """The linear probe after each transform and each pair of them."""
    from matplotlib.figure import Figure

    places = {tuple(p["label"][:2]): 100 * mean(p["linear"]) for p in section["places"]}
    names = list(dict.fromkeys(name for label in places for name in label))
    grid = [
        [math.nan] * i + [places.get((a, b), math.nan) for b in names[i:]]
        for i, a in enumerate(names)
    ]
    figure = Figure(figsize=(6.4, 5.4))
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis")
    low, high = min(places.values()), max(places.values())
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            if not math.isnan(value):
                dark = value < low + 0.6 * (high - low)
                color = "white" if dark else "black"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    axes.set_title(f"one transform (diagonal) or two\n{textwrap.fill(title, 70)}", fontsize=9)
    figure.colorbar(image, label="linear probe, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
