"""What the pages have in common: where a text gets its figures, tables, how a figure is written."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

DRY = "dry run: no figures"
NONE = "–"
_PAGES = Path(__file__).parents[1] / "pages"

Results = dict[str, Any]
Spread = Mapping[str, float]

# A median with its quartiles: three digits; how many times something is something else; a fraction.
interval: Callable[[Spread], str] = "{median:.3g} [{q1:.3g}, {q3:.3g}]".format_map
times: Callable[[Spread], str] = "{median:.2f}× [{q1:.2f}, {q3:.2f}]".format_map
percent: Callable[[Spread], str] = "{median:.0%} [{q1:.0%}, {q3:.0%}]".format_map


def page(name: str, /, **parts: object) -> str:
    """The text of benchmarks/pages/NAME.md, a Jinja template, with its figures."""
    templates = Environment(
        loader=FileSystemLoader(_PAGES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"commit": commit, "interval": interval, "times": times}
    return templates.get_template(f"{name}.md").render(parts)


def table(header: Iterable[object], rows: Iterable[Iterable[object]], dry: bool = False) -> str:
    """A Markdown table; above that of a dry run it says that there are no figures in it."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return f"*{DRY}*\n\n{text}" if dry else text


def records(rows: Iterable[Mapping[str, object]], dry: bool = False) -> str:
    """A table of rows that name their columns, all of them the same."""
    rows = list(rows)
    return table(rows[0], map(dict.values, rows), dry) if rows else NONE


def mib(memory: Mapping[str, Any]) -> str:
    extra = memory["extra_mib"]
    return f"{extra:.0f}" if extra >= 10 else f"{extra:.2g}"


def counts(launches: Mapping[str, int]) -> str:
    """Kernel launches, with the copies and fills behind a plus."""
    copies = launches["copies"]
    return f"{launches['kernels']} + {copies}" if copies else str(launches["kernels"])


def commit(about: Results) -> str:
    """Of the code that was measured."""
    changes = " with uncommitted changes" if about["uncommitted_changes"] else ""
    return f"{about['commit'] or 'unknown'}{changes}"


def on_gpu(results: Results) -> bool:
    """Whether the results are of a GPU, or of a dry run in its place."""
    return results["dry"] or "capability" in results["machine"]


def of_kind(results: Results, key: str) -> list[Results]:
    """The cases that have a setting of this name."""
    return [c for c in results["cases"] if key in c["case"]]


def by_arm(
    cases: list[Results],
    key: str,
    text: Callable[[Any], str],
    sizes: Mapping[str, list[Any]],
    dry: bool,
) -> str:
    """A table of one figure for each case and arm, behind columns that tell the cases apart."""
    arms = list(dict.fromkeys(name for c in cases for name in c[key]))
    figures = [[text(c[key][arm]) if c[key].get(arm) else NONE for arm in arms] for c in cases]
    rows = [[*size, *row] for *size, row in zip(*sizes.values(), figures, strict=True)]
    return table([*sizes, *arms], rows, dry)


def not_measured(
    cases: list[Results], prefix: Callable[[Results], str], sizes: Callable[[list[Results]], str]
) -> list[str]:
    """What was left out, at which sizes and why."""
    found: dict[tuple[str, str], list[Results]] = {}
    for c in cases:
        for name, reason in c["absent"].items():
            found.setdefault((prefix(c) + name, reason), []).append(c)
    return [f"{name} at {sizes(where)}: {reason}" for (name, reason), where in found.items()]
