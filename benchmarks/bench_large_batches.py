"""What a large batch costs on a CPU: ``python -m benchmarks.bench_large_batches``.

One training step of an encoder with NT-Xent: as it is, through ``GradCache``, and gathered over two
processes; and every loss by itself, at growing batch sizes. Memory comes from fresh processes, one
for each figure; times of one process from interleaved rounds of one process.

Writes ``large_batches_cpu.json`` and ``large_batches_cpu.md``; the page on large batches shows the
tables of the latter.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import machine, memory
from benchmarks.interleaved import spread, time_interleaved
from benchmarks.loss_arms import embeddings
from benchmarks.markdown import interval, table, times
from contrastive_kit import GradCache, NTXent, ProjectionHead
from contrastive_kit.functional import info_nce, nt_xent, siglip, sup_con

RESULTS = machine.REPOSITORY / "benchmarks" / "results"
ENCODER = "Four 3 × 3 convolutions with batch norm, of 32 to 256 channels, and a projection head"


class Sizes(NamedTuple):
    """Numbers of images, each of which has two views."""

    step: tuple[int, ...]
    timed: tuple[int, ...]
    chunks: tuple[int, ...]
    loss: tuple[int, ...]
    rounds: int


FULL = Sizes(
    step=(128, 512, 2048),
    timed=(128, 512),
    chunks=(128, 32),
    loss=(2048, 4096, 8192),
    rounds=3,
)
QUICK = Sizes(step=(32, 64), timed=(32,), chunks=(16,), loss=(512, 1024), rounds=2)

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "NT-Xent": nt_xent,
    "NT-Xent, hardness = 1": partial(nt_xent, hardness=1.0),
    "InfoNCE": info_nce,
    "InfoNCE, symmetric (CLIP)": partial(info_nce, symmetric=True),
    "SupCon": lambda z1, z2: sup_con(z1, z2, labels=torch.arange(len(z1)) % 10),
    "SupCon, variant = in": lambda z1, z2: sup_con(
        z1, z2, labels=torch.arange(len(z1)) % 10, variant="in"
    ),
    "SigLIP": siglip,
}


def build_encoder() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, out, stride in [(3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 256, 1)]:
        layers += [
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), ProjectionHead(256))


def two_views(n: int, rank: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 3, 32, 32, generator=generator) for _ in range(2)]


def make_step(
    encoder: nn.Module, loss_fn: nn.Module, views: list[Tensor], chunk_size: int | None
) -> Callable[[], None]:
    """One forward and backward; the gradients of the step before are dropped first."""
    encode = None if chunk_size is None else GradCache(encoder, chunk_size=chunk_size)

    def step() -> None:
        encoder.zero_grad()
        z = encoder(torch.cat(views)).chunk(2) if encode is None else encode.views(*views)
        loss_fn(*z).backward()

    return step


def peak_of(step: Callable[[], None]) -> dict[str, float]:
    """Extra MiB of one call, and its seconds; the process should be fresh."""
    gc.collect()
    memory._return_free_memory()
    memory._reset_peak()
    before = memory._status_mib("VmRSS")
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return {"extra_mib": memory._status_mib("VmHWM") - before, "seconds": seconds}


def step_memory(n: int, chunk_size: int | None) -> dict[str, float]:
    """Peak of one step in this process; a step of a few images first pays for libraries."""
    encoder = build_encoder()
    make_step(encoder, NTXent(), two_views(4), None if chunk_size is None else 2)()
    encoder.zero_grad()
    return peak_of(make_step(encoder, NTXent(), two_views(n), chunk_size))


def loss_memory(name: str, n: int, d: int = 128) -> dict[str, float]:
    def step(z1: Tensor, z2: Tensor) -> None:
        LOSSES[name](z1, z2).backward()

    step(*embeddings(16, d))
    return peak_of(partial(step, *embeddings(n, d)))


def step_times(n: int, chunks: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Seconds of a step, every arm once in each round, and ratios to the plain step."""
    # One thread, as each gathered process has on two cores; and threads that wait for each other
    # would time whatever else the machine does.
    torch.set_num_threads(1)
    views = two_views(n)
    arms = {
        label(chunk): make_step(build_encoder(), NTXent(), views, chunk)
        for chunk in (None, *chunks)
        if chunk is None or chunk < n
    }
    samples = time_interleaved(arms, budget_s=0, min_rounds=rounds, max_rounds=rounds)
    plain = samples[label(None)]
    return {
        name: {
            "seconds": spread(values)._asdict(),
            "ratio": spread([a / b for a, b in zip(values, plain, strict=True)])._asdict(),
        }
        for name, values in samples.items()
    }


def gathered(rank: int, store: str, n: int, chunk_size: int | None, rounds: int) -> dict[str, Any]:
    """One of two processes with half the batch each: peak of the first step, then times."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    encoder = DistributedDataParallel(build_encoder())
    loss_fn = NTXent(gather_distributed=True)
    make_step(encoder, loss_fn, two_views(4, rank), None if chunk_size is None else 2)()
    encoder.zero_grad()
    step = make_step(encoder, loss_fn, two_views(n // 2, rank), chunk_size)
    result: dict[str, Any] = peak_of(step)
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    return result | {"seconds": spread(seconds)._asdict() if rounds else None}


def parity(n: int = 48, chunk_size: int = 10) -> float:
    """Relative difference of the cached gradient, batch norm frozen: right before fast."""
    grads = []
    for chunk in (None, chunk_size):
        encoder = build_encoder().eval()
        make_step(encoder, NTXent(), two_views(n), chunk)()
        grads.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]).double())
    error = float((grads[1] - grads[0]).norm() / grads[0].norm())
    assert error < 1e-4, f"the cached gradient is off by {error:.3g}"
    return error


def label(chunk_size: int | None) -> str:
    return "plain" if chunk_size is None else f"GradCache, chunk_size={chunk_size}"


def _child(*arguments: object) -> dict[str, Any]:
    """What this file prints when run with these arguments in a process of its own."""
    print(*arguments, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.bench_large_batches", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=machine.REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _pair(n: int, chunk_size: int | None, rounds: int) -> dict[str, Any]:
    """Both processes of ``gathered``: the larger peak, and the times of the first."""
    print("gathered", n, chunk_size, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.bench_large_batches", "gathered"]
                + [str(x) for x in (rank, f"{folder}/store", n, chunk_size or 0, rounds)],
                cwd=machine.REPOSITORY,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a process of the gathered step failed")
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    return results[0] | {"extra_mib": max(result["extra_mib"] for result in results)}


def run(sizes: Sizes) -> dict[str, Any]:
    start = time.monotonic()
    results: dict[str, Any] = {"machine": machine.describe(), "parity": parity()}
    # A list: the order of the figures is that of the report.
    steps = []
    for n in sizes.step:
        chunks = [chunk for chunk in sizes.chunks if chunk < n]
        rounds = sizes.rounds if n in sizes.timed else 0
        timed = _child("times", n, rounds, *chunks) if rounds else {}
        for chunk in (None, *chunks):
            measured = _child("step", n, chunk or 0)
            steps.append(
                {"n": n, "arm": label(chunk), "extra_mib": measured["extra_mib"]}
                | timed.get(label(chunk), {"seconds": None})
            )
        for chunk in (None, sizes.chunks[-1]):
            name = "gathered over 2 processes" + ("" if chunk is None else f", {label(chunk)}")
            steps.append({"n": n, "arm": name} | _pair(n, chunk, rounds))
    results["steps"] = steps
    results["losses"] = [
        {"loss": name, "n": n} | _child("loss", name, n) for name in LOSSES for n in sizes.loss
    ]
    results["seconds"] = time.monotonic() - start
    results["load_average_after"] = round(os.getloadavg()[0], 2)
    return results


def markdown(results: dict[str, Any]) -> str:
    about = results["machine"]
    packages = ", ".join(
        f"{name} {about['packages'][name]}" for name in ("contrastive-kit", "torch")
    )
    commit = f"{about['commit']}{' with uncommitted changes' * about['uncommitted_changes']}"
    return (
        "\n\n".join(
            [
                "# What a large batch costs on a CPU",
                "Written by `python -m benchmarks.bench_large_batches`.",
                f"- {about['date']}, commit {commit}\n"
                f"- {about['processor']}, {about['cores']} cores, {about['threads']} threads a "
                f"process, Python {about['python']}, {packages}\n"
                f"- Load average before {about['load_average']}, after "
                f"{results['load_average_after']}; {results['seconds'] / 60:.0f} minutes in all\n"
                f"- With batch norm frozen, the cached gradient differs from the plain one by "
                f"{results['parity']:.1e}",
                "<!-- steps start -->",
                _steps(results["steps"], busy=_busy(results)),
                "<!-- steps end -->",
                "<!-- losses start -->",
                _losses(results["losses"]),
                "<!-- losses end -->",
            ]
        )
        + "\n"
    )


def _busy(results: dict[str, Any]) -> str:
    """Why times are left out, or nothing: others at work make them those of the scheduler."""
    loads = (results["machine"]["load_average"], results["load_average_after"])
    if max(loads) <= results["machine"]["cores"]:
        return ""
    return (
        f"**The machine was busy (load {loads[0]} before, {loads[1]} after, on "
        f"{results['machine']['cores']} cores): times are left out, memory does not depend on it.**"
    )


def _steps(steps: list[dict[str, Any]], busy: str) -> str:
    rows = [
        (
            step["n"],
            step["arm"],
            f"{step['extra_mib']:.0f}",
            interval(step["seconds"]) if step["seconds"] and not busy else "–",
            times(step["ratio"]) if "ratio" in step and not busy else "–",
        )
        for step in steps
    ]
    return "\n\n".join(
        [
            f"One step, forward and backward, with NT-Xent. {ENCODER}; N images, two float32 views "
            "of 32 × 32 each. Memory is the peak of the resident set during the first step over "
            "its size just before (the views are there, the gradients are not), in a process of "
            "its own; gathered, the larger of the two processes. Seconds are medians with "
            "quartiles, the ratios within rounds of one process. Gathered processes hold N / 2 "
            "images each and share the cores of this machine: on processors of their own they "
            "share the time too. One thread a process.",
            *([busy] if busy else []),
            table(["N", "step", "memory, MiB per process", "seconds", "time over plain"], rows),
        ]
    )


def _losses(losses: list[dict[str, Any]]) -> str:
    sizes = sorted({loss["n"] for loss in losses})
    extra = {(loss["loss"], loss["n"]): loss["extra_mib"] for loss in losses}
    rows = [
        (
            name,
            *(f"{extra[name, n]:.0f}" for n in sizes),
            f"{extra[name, sizes[-1]] / extra[name, sizes[-2]]:.2f}",
        )
        for name in dict.fromkeys(loss["loss"] for loss in losses)
    ]
    rows.append(
        ("*one matrix of N × N logits*", *(f"{n * n * 4 / 2**20:.0f}" for n in sizes), "4.00")
    )
    return "\n\n".join(
        [
            "Extra memory in MiB of a loss alone, forward and backward, for two float32 views of N "
            "images in 128 dimensions: peak over the size just before, each in a process of its "
            "own. Linear is a last column of 2.",
            table(["loss", *(f"N = {n}" for n in sizes), "last doubling"], rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What a large batch costs on a CPU.")
    parser.add_argument("--quick", action="store_true", help="a few small sizes, printed only")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results)")
    parser.add_argument("--report", type=Path, help="measure nothing, report on this JSON file")
    arguments = parser.parse_args()
    if arguments.report is None:
        results = run(QUICK if arguments.quick else FULL)
    else:
        results = json.loads(arguments.report.read_text())
    report = markdown(results)
    print(report)
    out = arguments.out or (None if arguments.quick else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "large_batches_cpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "large_batches_cpu.md").write_text(report)


def child(kind: str, *arguments: str) -> dict[str, Any]:
    """One figure in this process."""
    if kind == "step":
        n, chunk = map(int, arguments)
        return step_memory(n, chunk or None)
    if kind == "loss":
        return loss_memory(arguments[0], int(arguments[1]))
    if kind == "times":
        n, rounds, *chunks = map(int, arguments)
        return step_times(n, tuple(chunks), rounds)
    rank, store, *numbers = arguments
    n, chunk, rounds = map(int, numbers)
    return gathered(int(rank), store, n, chunk or None, rounds)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in ("step", "loss", "times", "gathered"):
        print(json.dumps(child(*sys.argv[1:])))
    else:
        main()
