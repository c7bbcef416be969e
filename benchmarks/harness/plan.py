"""Which cases are measured, from benchmarks/plan.toml."""

import sys
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE = Path(__file__).parents[1] / "plan.toml"


def read(
    form: Any, subject: str, kind: str, quick: bool, defaults: Mapping[str, Any] = {}
) -> Iterator[Any]:
    """Cases in the given form, a NamedTuple; a list where one value belongs is a case each."""
    key = f"{kind}_quick" if quick else kind
    for row in tomllib.loads(_FILE.read_text(encoding="utf-8"))[subject][key]:
        choices = [
            [tuple(v)] if isinstance(form._field_defaults.get(k), tuple) else v
            for k, v in row.items()
        ]
        choices = [v if isinstance(v, list) else [v] for v in choices]
        for values in product(*choices):
            yield form(**{**defaults, **dict(zip(row, values, strict=True))})
