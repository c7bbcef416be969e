"""The claims of the SimCLR paper (arXiv 2002.05709) at a size that fits.

    python -m benchmarks.reproduce                                     # photos, on a CPU
    python -m benchmarks.reproduce augment temperature --minutes 20    # some sections
    python -m benchmarks.reproduce --scale cifar-subset --root FOLDER  # CIFAR-10 as files, CPU
    python -m benchmarks.reproduce --scale cifar --root FOLDER         # the same in full, GPU
    python -m benchmarks.reproduce --report                            # only the report

Sections: baselines, augment, head, batch, temperature, encoder. Each is a list of runs of
``examples/train``; ``--list`` prints their command lines. Finished runs are kept in ``--out``
and not repeated; one that ``--minutes`` or Ctrl-C interrupted goes on from where it was. From
whatever is finished ``reproduction_*.json``, ``.md`` and ``.png`` are written into ``--results``.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks._reproduce_report import heat_map, markdown, summary
from benchmarks._reproduce_sections import (
    SCALES,
    Label,
    Run,
    Scale,
    Section,
    count,
    runs,
    sections,
)

NAMES = ("baselines", "augment", "head", "batch", "temperature", "encoder")
VERSIONS = ("device", "threads", "python", "torch", "torchvision", "kornia", "contrastive_kit")


def load_example() -> None:
    """Import examples/train, which then reads the photographs once and not in every run."""
    folder = str(machine.REPOSITORY / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.import_module("train.run")


class Worker:
    """What a process that trains one run after the other knows of the command."""

    stopping: Any = None  # an event: start nothing more

    @classmethod
    def start(cls, threads: int, stopping: Any) -> None:
        """Import once, which costs as much as a short run."""
        import torch

        cls.stopping = stopping
        torch.set_num_threads(threads)
        load_example()


def train(arguments: Sequence[str], folder: Path, deadline: float | None) -> str | None:
    """Train, or go on training, into `folder`; returns what went wrong, None if nothing did."""
    if Worker.stopping is not None and Worker.stopping.is_set():
        return None
    example = sys.modules["train.run"]
    folder.mkdir(parents=True, exist_ok=True)
    session = ["--resume", str(folder)] if (folder / "checkpoint.pt").exists() else None
    command = [*(session or [*arguments, "--out", str(folder)]), "--no-pictures"]
    if deadline is not None:
        left = (deadline - time.time()) / 60
        if left <= 0:
            return None
        command = [*command, "--minutes", f"{left:.3f}"]
    started = time.perf_counter()
    with (folder / "log.txt").open("a") as log:
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                scores = example.main(command)
        except (Exception, SystemExit) as error:
            log.write(f"{type(error).__name__}: {error}\n")
            return str(error) or type(error).__name__
        finally:
            spent = seconds_of(folder) + time.perf_counter() - started
            (folder / "seconds.txt").write_text(f"{spent:.1f}\n")
    if scores is not None:  # nothing to resume any more
        for name in ("checkpoint.pt", "encoder.pt"):
            (folder / name).unlink(missing_ok=True)
    return None


def seconds_of(folder: Path) -> float:
    """How long a run has taken, over all sessions that had the time to say so."""
    path = folder / "seconds.txt"
    return float(path.read_text() or 0) if path.exists() else 0.0


def pass_on(*_: object) -> None:
    """End like Ctrl-C, which reaches the workers too, when only this process is told to end."""
    for child in multiprocessing.active_children():
        child.terminate()
    raise KeyboardInterrupt


def train_all(
    wanted: Sequence[Run], out: Path, extra: Sequence[str], *, jobs: int, threads: int,
    deadline: float | None,
) -> dict[str, str]:  # fmt: skip
    """Train what is not finished; returns what failed, by run, and why."""
    waiting = [run for run in wanted if not (out / run.key / "results.json").exists()]
    print(f"{len(wanted) - len(waiting)} of {len(wanted)} runs are finished", flush=True)
    if not waiting:
        return {}
    failed: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    stopping = context.Event()
    workers = min(jobs, len(waiting))
    with ProcessPoolExecutor(workers, context, Worker.start, (threads, stopping)) as pool:
        futures: dict[Future[str | None], Run] = {
            pool.submit(train, [*run.arguments(), *extra], out / run.key, deadline): run
            for run in waiting
        }
        done = len(wanted) - len(waiting)
        try:
            for future in as_completed(futures):
                run = futures[future]
                reason = future.result()
                line = shlex.join(run.arguments())
                if reason is not None:
                    failed[line] = reason
                    print(f"failed: {line}: {reason}", flush=True)
                elif (out / run.key / "results.json").exists():
                    done += 1
                    print(f"{done} of {len(wanted)}: {line}", flush=True)
        except KeyboardInterrupt:
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            print("interrupted; what is finished is kept", flush=True)
        except BrokenProcessPool:
            failed["all that were left"] = "a worker process died (out of memory?)"
            print("a worker process died; what is finished is kept", flush=True)
    return failed


def read_scores(
    scale: Scale, section: Section, seeds: int, out: Path
) -> dict[Label, list[dict[str, float]]]:
    """The accuracies of each place of a table, over its finished seeds."""
    scores: dict[Label, list[dict[str, float]]] = {}
    for cell in section.cells:
        trained = "supervised" if cell.changes.get("supervised") else "SimCLR"
        for feature in section.features:
            key = {"h": trained, "z": f"{trained}, z"}.get(feature, feature)
            for seed in range(seeds):
                path = out / scale.run(cell.changes, seed).key / "results.json"
                if path.exists():
                    row = json.loads(path.read_text())[key]
                    scores.setdefault((*cell.label, feature), []).append(row)
    return scores


def collect(
    scale: Scale, out: Path, *, command: str, seeds: int | None, failed: dict[str, str]
) -> dict[str, Any]:
    """Everything that the report says."""
    everything = sections(scale)
    planned = runs(scale, everything, seeds)
    finished = [run for run in planned if (out / run.key / "results.json").exists()]
    about: list[dict[str, Any]] = []
    commits: list[str] = []
    for run in finished:
        of_run = json.loads((out / run.key / "config.json").read_text())["about"]
        chosen = {name: of_run[name] for name in VERSIONS}
        commit = str(of_run["commit"] or "unknown")
        if of_run["uncommitted_changes"]:
            commit += " with uncommitted changes"
        about += [chosen] if chosen not in about else []
        commits += [commit] if commit not in commits else []
    return {
        "scale": scale.name,
        "title": scale.title,
        "command": command,
        "machine": machine.describe(),
        "about": about,
        "commits": commits,
        "base": shlex.join(Run(scale.base).arguments()),
        "planned": len(planned),
        "finished": len(finished),
        "failed": failed,
        "seconds": sum(seconds_of(out / run.key) for run in finished),
        "sections": [
            summary(s, count(s, seeds), read_scores(scale, s, count(s, seeds), out))
            for s in everything
        ],
        "runs": [shlex.join(run.arguments()) for run in finished],
    }


def write_report(found: dict[str, Any], scale: Scale, folder: Path) -> Path:
    """The three files; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{scale.file}.md"
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    path.write_text(markdown(found, f"{scale.file}.png"))
    augment = next(s for s in found["sections"] if s["name"] == "augment")
    if augment["places"]:
        heat_map(augment, scale.title, path.with_suffix(".png"))
    return path


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="which to train [all]")
    parser.add_argument("--scale", choices=SCALES, default="photos")
    parser.add_argument("--root", type=Path, help="cifar scales: has train/ and test/")
    parser.add_argument("--out", type=Path, help="kept runs [runs/reproduce/SCALE]")
    parser.add_argument("--results", type=Path, help="for the report [benchmarks/results]")
    parser.add_argument("--seeds", type=int, help="in place of each section's own number")
    parser.add_argument("--minutes", type=positive, help="stop training after that, to go on later")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--threads", type=int, help="of each run [cores / jobs]")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--list", action="store_true", help="print the command lines of the runs")
    given = parser.parse_args(argv)
    unknown = sorted(set(given.sections) - set(NAMES))
    if unknown:
        parser.error(f"SECTION must be one of {', '.join(NAMES)}; got {', '.join(unknown)}")
    for name in ("seeds", "jobs", "threads"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    needs = SCALES[given.scale].needs_root
    if needs and given.root is None and not (given.report or given.list):
        parser.error(f"--scale {given.scale} needs --root, a folder with train/ and test/")
    if not needs and given.root is not None:
        parser.error(f"--root has no meaning with --scale {given.scale}")
    return given


def main(argv: Sequence[str] | None = None) -> None:
    given = parse(argv)
    deadline = None if given.minutes is None else time.time() + 60 * given.minutes
    scale = SCALES[given.scale]
    out = given.out or machine.REPOSITORY / "runs" / "reproduce" / scale.name
    chosen = [s for s in sections(scale) if not given.sections or s.name in given.sections]
    wanted = runs(scale, chosen, given.seeds)
    extra = ["--root", str(given.root.resolve())] if given.root else []
    if given.list:
        for run in wanted:
            print("examples/train", shlex.join([*run.arguments(), *extra]))
        return
    failed: dict[str, str] = {}
    if not given.report:
        threads = given.threads or max(1, (os.cpu_count() or 1) // given.jobs)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        signal.signal(signal.SIGTERM, pass_on)
        failed = train_all(wanted, out, extra, jobs=given.jobs, threads=threads, deadline=deadline)
    command = "python -m benchmarks.reproduce"
    if scale.name != "photos":
        command += f" --scale {scale.name} --root FOLDER"
    found = collect(scale, out, command=command, seeds=given.seeds, failed=failed)
    path = write_report(found, scale, given.results or machine.REPOSITORY / "benchmarks/results")
    print(f"{found['finished']} of {found['planned']} runs are finished; the report is {path}")


if __name__ == "__main__":
    main()
