"""How the reports write a table, and a median with its quartiles."""

from collections.abc import Iterable, Mapping


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def interval(spread: Mapping[str, float]) -> str:
    """Three digits of the median, and of the quartiles in brackets."""
    return f"{spread['median']:.3g} [{spread['q1']:.3g}, {spread['q3']:.3g}]"


def times(spread: Mapping[str, float]) -> str:
    """How many times something is something else."""
    return f"{spread['median']:.2f}× [{spread['q1']:.2f}, {spread['q3']:.2f}]"


def percent(spread: Mapping[str, float]) -> str:
    """A fraction as a percentage."""
    return f"{spread['median']:.0%} [{spread['q1']:.0%}, {spread['q3']:.0%}]"
