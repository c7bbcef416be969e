"""Which cases are measured, from benchmarks/plan.toml."""

import sys
from itertools import product
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE = Path(__file__).parents[1] / "plan.toml"


def read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def read(form: Any, subject: str, kind: str, quick: bool) -> list[Any]:
    """Cases in the given form, a NamedTuple; a list where one value belongs is a case each."""
    data = read_toml(_FILE)[subject]
    found = []
    for row in data[f"{kind}_quick" if quick else kind]:
        choices = {}
        for name, value in (data.get(f"{kind}_all", {}) | row).items():
            is_tuple = isinstance(form._field_defaults.get(name), tuple)
            several = isinstance(value, list) and not is_tuple
            choices[name] = value if several else [tuple(value) if is_tuple else value]
        found += [
            form(**dict(zip(choices, each, strict=True))) for each in product(*choices.values())
        ]
    return found
