"""What the reports have in common: how they begin, their tables and how a figure is written."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

DRY = "dry run: no figures"

Results = dict[str, Any]


def table(header: Iterable[object], rows: Iterable[Iterable[object]], dry: bool = False) -> str:
    """A Markdown table; above that of a dry run it says that there are no figures in it."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return f"*{DRY}*\n\n{text}" if dry else text


def interval(spread: Mapping[str, float]) -> str:
    """Three digits of the median, and of the quartiles in brackets."""
    return f"{spread['median']:.3g} [{spread['q1']:.3g}, {spread['q3']:.3g}]"


def times(spread: Mapping[str, float]) -> str:
    """How many times something is something else."""
    return f"{spread['median']:.2f}× [{spread['q1']:.2f}, {spread['q3']:.2f}]"


def percent(spread: Mapping[str, float]) -> str:
    """A fraction as a percentage."""
    return f"{spread['median']:.0%} [{spread['q1']:.0%}, {spread['q3']:.0%}]"


def mib(memory: Mapping[str, Any] | None) -> str:
    """Extra memory, or a dash where there is no figure."""
    extra = memory["extra_mib"] if memory else None
    return "–" if extra is None else f"{extra:.0f}" if extra >= 10 else f"{extra:.2g}"


def counts(launches: Mapping[str, int] | None) -> str:
    """Kernel launches, with the copies and fills behind a plus."""
    if launches is None:
        return "–"
    copies = launches["copies"]
    return f"{launches['kernels']} + {copies}" if copies else str(launches["kernels"])


def listed(lines: Iterable[str], none: str) -> str:
    """A list, or a sentence where it is empty."""
    return "\n".join(f"- {line}" for line in lines) or none


def by_arm(
    cases: list[Results],
    key: str,
    text: Callable[[Any], str],
    sizes: Mapping[str, list[Any]],
    dry: bool,
) -> str:
    """A table of one figure for each case and arm, behind columns that tell the cases apart."""
    arms = list(dict.fromkeys(name for c in cases for name in c[key]))
    figures = [[text(c[key].get(arm)) for arm in arms] for c in cases]
    rows = [[*size, *row] for *size, row in zip(*sizes.values(), figures, strict=True)]
    return table([*sizes, *arms], rows, dry)


def not_measured(
    cases: list[Results],
    prefix: Callable[[Results], str],
    sizes: Callable[[list[Results]], str],
) -> str:
    """What was left out, at which sizes and why."""
    found: dict[tuple[str, str], list[Results]] = {}
    for c in cases:
        for name, reason in c["absent"].items():
            found.setdefault((prefix(c) + name, reason), []).append(c)
    lines = [f"{name} at {sizes(where)}: {reason}" for (name, reason), where in found.items()]
    return "## Not measured\n\n" + listed(lines, "Nothing was left out.")


def commit(about: Results) -> str:
    """Of the code that was measured."""
    changes = " with uncommitted changes" if about["uncommitted_changes"] else ""
    return f"{about['commit'] or 'unknown'}{changes}"


def introduction(title: str, subject: str, results: Results, text: str = "") -> str:
    """The heading, the command, and what it ran on."""
    about = results["machine"]
    packages = ", ".join(f"{k} {v or 'not installed'}" for k, v in about["packages"].items())
    on_gpu = "capability" in about
    option = " --device cuda" if on_gpu or results["dry"] else ""
    written = f"Written by `python -m benchmarks {subject}{option}`"
    parts = [f"# {title}", f"{written}; the method is in `benchmarks/README.md`."]
    if text:
        parts.append(text)
    if results["dry"]:
        parts.append(f"**{DRY}.** Tiny sizes on a CPU, to see that everything runs.")
    elif results["quick"]:
        parts.append("**Quick mode: too few rounds and sizes to quote.**")
    if not results["complete"]:
        parts.append("**Incomplete: stopped before its last case.**")
    lines = [
        f"Date {about['date']}, commit {commit(about)}",
        f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, "
        f"BLAS {about['blas']}, {about['system']}",
        f"Python {about['python']}, {packages}",
        f"Load average before {about['load_average']}, after {results['load_average_after']}; "
        f"{results['seconds'] / 60:.0f} minutes in all",
    ]
    if on_gpu:
        lines.insert(
            0,
            f"{about['device']}, {about['memory_gib']} GiB, {about['multiprocessors']} "
            f"multiprocessors, compute capability {about['capability']}, CUDA {about['cuda']}, "
            f"driver {about['driver']}; contrastive-kit {about['version']}, source "
            f"{about['source']}",
        )
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)])


def of_kind(results: Results, key: str) -> list[Results]:
    """The cases that have a setting of this name."""
    return [c for c in results["cases"] if key in c["case"]]


def axes(columns: int) -> tuple[Any, Any]:
    """A figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * max(columns, 1.4), 4.5), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save(figure: Any, results: Results, path: Path) -> None:
    """Write a picture that names its device."""
    figure.suptitle(DRY if results["dry"] else results["machine"]["device"], fontsize=10)
    figure.savefig(path, dpi=110)
