"""Copy the figures that README.md shows from the results: ``python -m benchmarks readme``."""

import re

from benchmarks.harness.machine import REPOSITORY, RESULTS


def _section(report: str, title: str) -> str:
    """The text below a heading, up to the next one."""
    return re.split(r"^## ", report.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0].strip()


def numbers() -> str:
    """What README.md shows, from the pages of the results."""
    loss = (RESULTS / "loss_cpu.md").read_text()
    views = (RESULTS / "augment_cpu.md").read_text()
    described = [line[2:] for line in loss.splitlines() if line.startswith("- ")][1]
    return f"""\
On a CPU ({described}), beside the targets set before anything was measured.
All sizes, spreads and the cases where others are faster are in
`benchmarks/results/loss_cpu.md` and `benchmarks/results/augment_cpu.md`.

**Losses** (`python -m benchmarks losses`)

{_section(loss, "Targets")}

**Views** (`python -m benchmarks views`), times as long as `SimCLRAugment`

{_section(views, "Targets")}"""


def main() -> None:
    path = REPOSITORY / "README.md"
    text = path.read_text()
    start, end = "<!-- numbers start -->", "<!-- numbers end -->"
    head, _, rest = text.partition(start)
    _, _, tail = rest.partition(end)
    if not tail:
        raise SystemExit(f"README.md has no {start} … {end}")
    path.write_text(f"{head}{start}\n{numbers()}\n{end}{tail}")
