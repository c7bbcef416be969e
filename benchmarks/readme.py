"""Copy figures from the results into docs/benchmarks.md: ``python -m benchmarks readme``."""

import re

from benchmarks.harness.machine import REPOSITORY, RESULTS
from benchmarks.harness.report import page

PAGE = REPOSITORY / "docs" / "benchmarks.md"

_PLACE = re.compile(r"(?<=<!-- numbers start -->\n).*?(?=\n<!-- numbers end -->)", re.DOTALL)


def numbers() -> str:
    """What docs/benchmarks.md shows, from the pages of the results."""
    losses, views = ((RESULTS / f"{name}_cpu.md").read_text() for name in ("loss", "augment"))
    described = re.findall(r"^- (.*)", losses, re.MULTILINE)[1]
    targets = [x.split("\n## Targets\n")[1].split("\n## ")[0].strip() for x in (losses, views)]
    return page("readme", described=described, losses=targets[0], views=targets[1]).strip()


def main() -> None:
    text, found = _PLACE.subn(lambda _: numbers(), PAGE.read_text())
    if not found:
        raise SystemExit(f"{PAGE} has no <!-- numbers start --> … <!-- numbers end -->")
    PAGE.write_text(text)
