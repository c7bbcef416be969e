"""Tables, verdicts and pictures of the claims, computed from finished runs."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import trainer
from benchmarks.claims.plan import SCALES, Claim, Label, Section
from benchmarks.harness.report import listed, table

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
    if difference > error:
        verdict = "reproduced"
    elif difference < -error:
        verdict = "contradicted"
    else:
        verdict = "undecided"
    return {**result, "verdict": verdict, "difference": difference, "error": error}


def sentence(judged: Mapping[str, Any]) -> str:
    """A verdict in words."""
    if "missing" in judged:
        return (
            f"{judged['claim']}: open, {judged['missing']} of the {judged['of']} accuracies that "
            "it needs are missing."
        )
    difference = f"{100 * judged['difference']:+.1f}"
    if "rival" in judged:
        difference += f" against {name_of(judged['rival'])}, the best of the others"
    if judged["verdict"] == "open":
        return f"{judged['claim']}: open, {difference}, with one seed a place and so no spread."
    numbers = f"{difference}, error ± {100 * judged['error']:.1f}, {number(judged['seeds'])}"
    words = {
        "reproduced": f"reproduced ({numbers}).",
        "contradicted": f"**not reproduced: here it is the other way round** ({numbers}).",
        "undecided": f"**not reproduced: no difference beyond the spread** ({numbers}).",
    }
    return f"{judged['claim']}: {words[judged['verdict']]}"


def number(seeds: int) -> str:
    """So many seeds."""
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def name_of(label: Label) -> str:
    """A place in words."""
    *parts, feature = label
    names = " + ".join(dict.fromkeys(parts))
    return names if feature == "h" else f"{names}, {feature}"


def summary(section: Section, seeds: int, scores: Mapping[Label, list[Mapping[str, float]]]) -> Any:
    """Everything that the report says about a section."""
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
    """The whole report."""
    versions = "; ".join(
        ", ".join(f"{name} {value}" for name, value in about.items()) for about in found["about"]
    )
    scale = SCALES[found["scale"]]
    command = "python -m benchmarks claims"
    if scale.name != "photos":
        command += f" --scale {scale.name}" + " --root FOLDER" * scale.needs_root
    failed = f"; failed: {len(found['failed'])}" if found["failed"] else ""
    about = [
        f"{found['finished']} of {found['planned']} runs are finished, "
        f"{found['seconds'] / 60:.0f} minutes of training and evaluation in all{failed}",
        f"Base settings: `{trainer.TRAINER} {found['base']}`",
        versions or "no run is finished",
        f"{found['machine']['processor']}, {found['machine']['cores']} cores; commit "
        + (", ".join(found["commits"]) or "unknown"),
        "Accuracies are percentages on the test images, mean ± standard deviation over "
        "the seeds, (n) how many where some are missing. Verdicts are on the linear probe: "
        "the error is the 95 % interval of the difference, from the deviation between "
        "seeds pooled over the section. Against the best of several others a claim "
        "has the luck of the draw against it.",
    ]
    parts = [f"# The paper's claims: {found['title']}", f"Written by `{command}`."]
    parts += [listed(about, ""), _overview(found["sections"])]
    for section in found["sections"]:
        parts += _section(section, picture)
    parts += [f"- failed: `{name}`: {why}" for name, why in found["failed"].items()]
    return "\n\n".join(parts) + "\n"


def _overview(sections: Sequence[Mapping[str, Any]]) -> str:
    judged = [claim for section in sections for claim in section["claims"]]
    counts = [
        (words, sum(claim["verdict"] == verdict for claim in judged))
        for verdict, words in (
            ("reproduced", "are reproduced"),
            ("undecided", "show no difference beyond the spread"),
            ("contradicted", "are contradicted"),
            ("open", "are open"),
        )
    ]
    listed = ", ".join(f"{number} {words}" for words, number in counts)
    return f"Of {len(judged)} claims of the paper, {listed}."


def _section(section: Mapping[str, Any], picture: str) -> list[str]:
    parts = [f"## {section['title']}", section["question"]]
    if not section["places"]:
        return [*parts, "**No run of this section is finished**: its claims are open."]
    if section["missing"]:
        parts.append(
            f"**{section['missing']} of {section['expected']} accuracies are missing.** "
            f"Planned: {number(section['seeds'])}."
        )
    else:
        parts.append(f"{number(section['seeds'])}.".capitalize())
    if section["name"] == "augment":
        parts.append(f"![heat map of the linear probe]({picture})")
    if len(section["axes"]) == 2:
        for measure, name in MEASURES.items():
            parts.append(f"**{name}**\n\n" + _grid(section, measure))
    else:
        parts.append(_list(section))
    if section["claims"]:
        parts.append("\n".join(f"- {sentence(claim)}" for claim in section["claims"]))
    return parts


def _figure(values: Sequence[float] | None, seeds: int) -> str:
    if not values:
        return "–"
    text = f"{100 * mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {100 * stdev(values):.1f}"
    return text if len(values) == seeds else f"{text} ({len(values)})"


def _grid(section: Mapping[str, Any], measure: str) -> str:
    places = {tuple(p["label"]): p[measure] for p in section["places"]}
    rows = list(dict.fromkeys(label[0] for label in places))
    columns = list(dict.fromkeys(label[1] for label in places))
    body = [
        [row, *(_figure(places.get((row, column, "h")), section["seeds"]) for column in columns)]
        for row in rows
    ]
    return table(["", *columns], body)


def _list(section: Mapping[str, Any]) -> str:
    header = [section["axes"][0]]
    features = list(dict.fromkeys(p["label"][-1] for p in section["places"]))
    rows = []
    for place in section["places"]:
        *parts, feature = place["label"]
        several = len(features) > 1
        name = feature if several and feature not in ("h", "z") else " ".join(parts)
        cells = [name, feature] if several and "z" in features else [name]
        figures = [_figure(place[m], section["seeds"]) for m in MEASURES]
        rows.append([*cells, *figures])
    if "z" in features:
        header.append("evaluated on")
    return table([*header, *MEASURES.values()], rows)


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
                axes.text(
                    j, i, f"{value:.1f}", ha="center", va="center",
                    color="white" if dark else "black",
                )  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    axes.set_title(f"one transform (diagonal) or two\n{textwrap.fill(title, 70)}", fontsize=9)
    figure.colorbar(image, label="linear probe, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
