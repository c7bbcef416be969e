"""Time, memory, launches and errors of the losses."""

from benchmarks.losses.bench import cases as cases
from benchmarks.losses.bench import measure as measure
from benchmarks.losses.report import markdown as markdown
