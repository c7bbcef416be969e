"""The claims of the SimCLR paper (arXiv 2002.05709) at a size that fits.

    python -m benchmarks claims                                     # photos, on a CPU
    python -m benchmarks claims augment temperature --minutes 20    # some sections
    python -m benchmarks claims --scale cifar-subset --root FOLDER  # CIFAR-10 as files, CPU
    python -m benchmarks claims --scale cifar --root FOLDER         # the same in full, GPU
    python -m benchmarks claims --report                            # only the report

Sections: baselines, augment, head, batch, loss, temperature, encoder. Each is a list of trainings;
``--list`` prints their command lines. Finished runs are kept, with what they found, in
``reproduction_*.json`` of ``--results``, and not repeated; one that ``--minutes`` or Ctrl-C
interrupted goes on from where it was, in ``--out``. From whatever is finished the ``.md`` and the
``.png`` beside it are made.
"""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import trainer
from benchmarks.claims.plan import NAMES, SCALES, Label, Run, Scale, Section, runs, sections
from benchmarks.claims.report import heat_map, markdown, summary
from benchmarks.harness import machine
from benchmarks.harness.report import commit

VERSIONS = ("device", "threads", "python", "torch", "torchvision", "kornia", "contrastive_kit")


class Trainings:
    """Trainings in processes of their own, which end together: at the deadline, or when told."""

    def __init__(self, threads: int, deadline: float | None, device: str | None = None) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._deadline = math.inf if deadline is None else deadline
        self._options = ["--no-pictures", *(["--device", device] if device else [])]
        self._running: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def train(self, arguments: Sequence[str], folder: Path) -> str | None:
        """Train, or go on training, into ``folder``; returns what went wrong, None if nothing."""
        left = (self._deadline - time.time()) / 60
        if self.stopping.is_set() or left <= 0:
            return None
        begun = (folder / "checkpoint.pt").exists()
        options = ["--resume", str(folder)] if begun else [*arguments, "--out", str(folder)]
        options += [*self._options, *(["--minutes", f"{left:.3f}"] if left < math.inf else [])]
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with (folder / "log.txt").open("ab") as log:
            output = {"stdout": log, "stderr": subprocess.STDOUT, "env": self._environment}
            process = subprocess.Popen(trainer.command(*options), **output)
            self._running.add(process)
            status = process.wait()
            self._running.discard(process)
        spent = seconds_of(folder) + time.perf_counter() - started
        (folder / "seconds.txt").write_text(f"{spent:.1f}\n")
        if (folder / "results.json").exists():  # nothing to resume any more
            for name in ("checkpoint.pt", "encoder.pt"):
                (folder / name).unlink(missing_ok=True)
        elif status and not self.stopping.is_set():
            return [f"exit status {status}", *(folder / "log.txt").read_text().splitlines()][-1]
        return None

    def stop(self, *_: object) -> None:
        """Start no more, and let those that run save what they have."""
        self.stopping.set()
        for process in list(self._running):
            process.terminate()

    def train_all(
        self, wanted: Sequence[Run], out: Path, extra: Sequence[str], jobs: int
    ) -> dict[str, str]:
        """Train what is not finished; returns what failed, by run, and why."""
        left = [run for run in wanted if not finished(out, run)]
        done = len(wanted) - len(left)
        print(f"{done} of {len(wanted)} runs are finished", flush=True)
        failed: dict[str, str] = {}
        with ThreadPoolExecutor(jobs) as pool:
            futures = {
                pool.submit(self.train, [*run.arguments(), *extra], out / run.key): run
                for run in left
            }
            try:
                for future in as_completed(futures):
                    run, reason = futures[future], future.result()
                    line = shlex.join(run.arguments())
                    if reason is not None:
                        failed[line] = reason
                        print(f"failed: {line}: {reason}", flush=True)
                    elif finished(out, run):
                        done += 1
                        print(f"{done} of {len(wanted)}: {line}", flush=True)
            except KeyboardInterrupt:
                self.stop()
        if self.stopping.is_set():
            print("interrupted; what is finished is kept", flush=True)
        return failed


def finished(out: Path, run: Run) -> bool:
    return (out / run.key / "results.json").exists()


def seconds_of(folder: Path) -> float:
    """How long a run has taken, over all sessions that had the time to say so."""
    path = folder / "seconds.txt"
    return float(path.read_text() or 0) if path.exists() else 0.0


def read_kept(path: Path) -> dict[str, Any]:
    """What earlier sessions have finished, by the key of the run, from the results file."""
    return json.loads(path.read_text())["kept"] if path.exists() else {}


def read_finished(out: Path, run: Run) -> dict[str, Any]:
    """What a finished run found, and how."""
    results = json.loads((out / run.key / "results.json").read_text())
    about = json.loads((out / run.key / "config.json").read_text())["about"]
    return {
        "arguments": shlex.join(run.arguments()),
        "scores": {name: row for name, row in results.items() if "linear" in row},
        "seconds": seconds_of(out / run.key),
        "about": {name: about[name] for name in VERSIONS},
        "commit": commit(about),
    }


def read_scores(
    scale: Scale, section: Section, seeds: int, kept: dict[str, Any]
) -> dict[Label, list[dict[str, float]]]:
    """The accuracies of each place of a table, over its finished seeds."""
    scores: dict[Label, list[dict[str, float]]] = {}
    for cell, feature in product(section.cells, section.features):
        trained = "supervised" if cell.changes.get("supervised") else "SimCLR"
        name = {"h": trained, "z": f"{trained}, z"}.get(feature, feature)
        for run in (scale.run(cell.changes, seed) for seed in range(seeds)):
            if run.key in kept:
                row = kept[run.key]["scores"][name]
                scores.setdefault((*cell.label, feature), []).append(row)
    return scores


def collect(
    scale: Scale, out: Path, seeds: int | None, failed: dict[str, str], before: dict[str, Any]
) -> dict[str, Any]:
    everything = sections(scale)
    planned = runs(scale, everything, seeds)
    kept = {run.key: before[run.key] for run in planned if run.key in before}
    kept |= {run.key: read_finished(out, run) for run in planned if finished(out, run)}
    about: list[dict[str, Any]] = []
    for record in kept.values():
        about += [record["about"]] if record["about"] not in about else []
    return {
        "scale": scale.name,
        "title": scale.title,
        "machine": machine.describe(),
        "about": about,
        "commits": list(dict.fromkeys(record["commit"] for record in kept.values())),
        "base": shlex.join(Run(scale.base).arguments()),
        "planned": len(planned),
        "finished": len(kept),
        "failed": failed,
        "seconds": sum(record["seconds"] for record in kept.values()),
        "sections": [
            summary(s, seeds or s.seeds, read_scores(scale, s, seeds or s.seeds, kept))
            for s in everything
        ],
        "kept": kept,
    }


def write_report(found: dict[str, Any], folder: Path) -> Path:
    """The three files; returns the path of the page."""
    scale = SCALES[found["scale"]]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{scale.file}.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_pages(folder)
    augment = next(s for s in found["sections"] if s["name"] == "augment")
    if augment["places"]:
        heat_map(augment, scale.title, path.with_suffix(".png"))
    return path.with_suffix(".md")


def write_pages(folder: Path) -> None:
    """The pages of all scales that have results."""
    for path in (folder / f"{scale.file}.json" for scale in SCALES.values()):
        if path.exists():
            path.with_suffix(".md").write_text(
                markdown(json.loads(path.read_text()), f"{path.stem}.png")
            )


def positive(kind: type) -> Callable[[str], Any]:

    def convert(text: str) -> Any:
        if not kind(text) > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return kind(text)

    return convert


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help="which to train [all]")
    add("--scale", choices=SCALES, default="photos")
    add("--root", type=Path, help="cifar scales: has train/ and test/")
    add("--device", help="of the trainer [cuda if there is one]")
    add("--quick", action="store_true", help="the baselines in one epoch, not kept")
    add("--out", type=Path, help="for the runs [runs/reproduce/SCALE]")
    add(
        "--results",
        type=Path,
        default=machine.RESULTS,
        help="for the report, and for what is finished [benchmarks/results]",
    )
    add("--seeds", type=positive(int), help="in place of each section's own number")
    add("--minutes", type=positive(float), help="stop training after that, to go on later")
    add("--jobs", type=positive(int), default=1, help="runs at a time [1]")
    add("--threads", type=positive(int), help="of each run [cores / jobs]")
    add("--report", action="store_true", help="train nothing")
    add("--list", action="store_true", help="print the command lines of the runs")
    given = parser.parse_args(argv)
    unknown = sorted(set(given.sections) - set(NAMES))
    if unknown:
        parser.error(f"SECTION must be one of {', '.join(NAMES)}; got {', '.join(unknown)}")
    needs = SCALES[given.scale].needs_root
    if needs and given.root is None and not (given.report or given.list):
        parser.error(f"--scale {given.scale} needs --root, a folder with train/ and test/")
    if not needs and given.root is not None:
        parser.error(f"--root has no meaning with --scale {given.scale}")
    return given


def main(argv: Sequence[str]) -> int:
    given = parse(argv)
    scale = SCALES[given.scale]
    extra = ["--root", str(given.root.resolve())] if given.root else []
    out = given.out or machine.REPOSITORY / "runs" / "reproduce" / scale.name
    with tempfile.TemporaryDirectory() as folder:
        if given.quick:
            given.sections, given.seeds = ["baselines"], 1
            extra += ["--epochs", "1"]
            out = given.results = Path(folder)
        chosen = [s for s in sections(scale) if not given.sections or s.name in given.sections]
        wanted = runs(scale, chosen, given.seeds)
        if given.list:
            for run in wanted:
                print(trainer.TRAINER, shlex.join([*run.arguments(), *extra]))
            return 0
        kept = read_kept(given.results / f"{scale.file}.json")
        left = [run for run in wanted if run.key not in kept]
        failed = {} if given.report else _train(given, left, out, extra)
        found = collect(scale, out, given.seeds, failed, kept)
        path = write_report(found, given.results)
    print(f"{found['finished']} of {found['planned']} runs are finished; the report is {path}")
    return int(bool(failed))


def _train(
    given: argparse.Namespace, wanted: Sequence[Run], out: Path, extra: Sequence[str]
) -> dict[str, str]:
    deadline = given.minutes and time.time() + 60 * given.minutes
    threads = given.threads or max(1, (os.cpu_count() or 1) // given.jobs)
    trainings = Trainings(threads, deadline, given.device)
    before = signal.signal(signal.SIGTERM, trainings.stop)
    failed = trainings.train_all(wanted, out, extra, given.jobs)
    signal.signal(signal.SIGTERM, before)
    return failed
