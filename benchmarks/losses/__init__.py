"""Time, memory, launches and errors of the losses."""

from benchmarks.losses.bench import cases as cases
from benchmarks.losses.bench import markdown as markdown
from benchmarks.losses.bench import measure as measure
