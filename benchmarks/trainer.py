"""The training program, in the one place that names it: ``python -m benchmarks.trainer …``."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
TRAINER = "examples/train"


def command(*arguments: str) -> list[str]:
    """What runs it."""
    return [sys.executable, str(REPOSITORY / TRAINER), *arguments]


def settings(arguments: Sequence[str]) -> dict[str, Any]:
    """What it makes of a command line, as it writes that to config.json."""
    folder = str(REPOSITORY / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from train.config import make_config, parse

    return dict(vars(make_config(parse(arguments)[0])))


if __name__ == "__main__":
    os.execv(sys.executable, command(*sys.argv[1:]))
