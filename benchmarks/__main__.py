"""Measure, and report what was measured.

    python -m benchmarks losses                 # time, memory and errors of the losses on a CPU
    python -m benchmarks views --device cuda    # SimCLR's views on a GPU
    python -m benchmarks steps                  # large batches: GradCache, gathering, memory
    python -m benchmarks training --root FOLDER # SimCLR for equal time, ours and that of peers
    python -m benchmarks ddp                    # gradients under DDP, beside one process
    python -m benchmarks host                   # what a step costs the host of a GPU, without one
    python -m benchmarks correctness --device cuda  # pytest -m gpu, and what it said is kept
    python -m benchmarks claims --help          # the claims of the paper, by training
    python -m benchmarks report                 # the pages again, from the JSON files
    python -m benchmarks readme                 # the figures of docs/benchmarks.md

Results are JSON files in benchmarks/results, whole after every case, and pages made from them. What
was interrupted goes on where it stopped; what is complete for the same machine and source is kept.
The exit status is 0 if all is complete and right, 3 if time ran out, 1 if something failed.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import RESULTS

FILES = {
    "losses": {"cpu": "loss_cpu", "cuda": "loss_gpu"},
    "views": {"cpu": "augment_cpu", "cuda": "augment_gpu"},
    "steps": {"cpu": "large_batches_cpu"},
    "training": {"cpu": "training_cpu", "cuda": "training_gpu"},
    "ddp": {"cpu": "ddp_truth"},
    "host": {"cpu": "host_cpu"},
    "correctness": {"cuda": "correctness_gpu"},
}


def write(subject: str, path: Path) -> str:
    """Write the page of a JSON file; returns it."""
    module: Any = import_module(f"benchmarks.{subject}")
    page: str = module.markdown(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(page)
    return page


def measure(given: argparse.Namespace, out: Path) -> int:
    """Measure a subject, write its page and print it."""
    from benchmarks.harness import stage

    path = out / f"{FILES[given.subject][given.device]}.json"
    wanted = stage.Stage(given.subject, path, given.device, given.quick, given.dry)
    try:
        status = stage.run(wanted, force=given.force, limit_s=given.limit)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(write(given.subject, path))
    return status


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("subject", choices=[*FILES, "claims", "report", "readme"])
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--quick", action="store_true", help="few small sizes: does everything run? Printed only")
    add("--dry", action="store_true", help="--quick for a GPU, with the CPU in its place")
    add("--out", type=Path, help="folder of the results [benchmarks/results]")
    add("--limit", type=float, default=math.inf, help="seconds; what is measured is kept")
    add("--force", action="store_true", help="measure again what is measured")
    add("--root", type=Path, help="CIFAR-10 as image files, train/CLASS and test/CLASS (training)")
    given = parser.parse_args(argv)
    given.quick = given.quick or given.dry
    kinds = FILES.get(given.subject, ["cpu"])
    if given.device not in kinds:
        parser.error(f"{given.subject} is measured on {' and '.join(kinds)} only")
    if given.dry and given.device != "cuda":
        parser.error("--dry needs --device cuda: on a CPU, --quick is enough")
    if given.quick and given.out and given.out.resolve().is_relative_to(RESULTS):
        parser.error(f"--quick and --dry have no figures, and do not write into {RESULTS}")
    if given.root and given.subject != "training":
        parser.error("--root belongs to training")
    if given.subject == "training" and not given.quick:
        if not (given.root and (given.root / "train").is_dir()):
            parser.error(f"training needs --root with train/CLASS and test/CLASS, got {given.root}")
        from benchmarks.training import ROOT

        os.environ[ROOT] = str(given.root.resolve())  # read by the processes that measure
    return given


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["claims"]:
        from benchmarks.claims import run

        return run.main(argv[1:])
    given = parse(argv)
    if given.subject == "readme":
        import_module("benchmarks.readme").main()
    elif given.subject == "report":
        out = given.out or RESULTS
        for subject, names in FILES.items():
            for path in (out / f"{name}.json" for name in names.values()):
                if path.exists():
                    write(subject, path)
        import_module("benchmarks.claims.run").write_pages(out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            return measure(given, given.out or (Path(folder) if given.quick else RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
