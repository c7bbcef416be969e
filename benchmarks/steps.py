"""What a large batch costs on a CPU: a training step, plain, cached and gathered, and every loss.

Memory comes from fresh processes, one for each figure; times of one process from interleaved rounds
of one process. The documentation shows the tables.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import plan, report
from benchmarks.harness.device import Device
from benchmarks.harness.measure import ratios, spread, time_interleaved
from benchmarks.harness.processes import fresh, peak_of, world
from benchmarks.harness.report import Results, table
from benchmarks.harness.store import Store
from benchmarks.losses.arms import embeddings
from benchmarks.losses.oracle import Disagreement
from contrastive_kit import GradCache, NTXent, ProjectionHead
from contrastive_kit.functional import info_nce, nt_xent, siglip, sup_con

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "NT-Xent": nt_xent,
    "NT-Xent, hardness = 1": partial(nt_xent, hardness=1.0),
    "InfoNCE": info_nce,
    "InfoNCE, symmetric (CLIP)": partial(info_nce, symmetric=True),
    "SupCon": lambda z1, z2: sup_con(z1, z2, labels=_classes(z1)),
    "SupCon, variant = in": lambda z1, z2: sup_con(z1, z2, labels=_classes(z1), variant="in"),
    "SigLIP": siglip,
}


class Case(NamedTuple):
    figure: str  # "parity", "step" (of each arm) or "loss"
    n: int  # images, each of which has two views
    loss: str = ""  # of LOSSES
    chunks: tuple[int, ...] = ()  # of GradCache
    rounds: int = 0  # of timing; memory is measured in any case


cases = partial(plan.read, Case, "steps")


def measure(case: Case, store: Store, device: Device) -> dict[str, Any]:
    """The figures of a case.

    Raises:
        Disagreement: if the cached gradient is wrong.
    """
    if case.figure == "parity":
        return {"parity": _parity(case.n, case.chunks[0])}
    if case.figure == "loss":
        found: dict[str, Any] = fresh(_loss_memory, case.loss, case.n)
        return found
    timed = fresh(_step_times, case) if case.rounds else {}
    arms = []
    for chunk in (None, *case.chunks):
        extra_mib = fresh(_step_memory, case.n, chunk)
        arm = {"arm": _label(chunk), "extra_mib": extra_mib, "seconds": None}
        arms.append(arm | timed.get(_label(chunk), {}))
    for chunk in (None, case.chunks[-1]):
        name = "gathered over 2 processes" + ("" if chunk is None else f", {_label(chunk)}")
        first, second = world(_gathered, 2, case.n, chunk, case.rounds)
        peak = max(first["extra_mib"], second["extra_mib"])
        arms.append({"arm": name} | first | {"extra_mib": peak})
    return {"arms": arms}


def _label(chunk_size: int | None) -> str:
    return "plain" if chunk_size is None else f"GradCache, chunk_size={chunk_size}"


def _classes(z: Tensor) -> Tensor:
    return torch.arange(len(z)) % 10


def _encoder() -> nn.Module:
    from torchvision.ops import Conv2dNormActivation

    torch.manual_seed(0)
    sizes = [(3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 256, 1)]
    layers = [Conv2dNormActivation(channels, out, 3, stride) for channels, out, stride in sizes]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), ProjectionHead(256))


def _views(n: int, rank: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 3, 32, 32, generator=generator) for _ in range(2)]


def _step(
    encoder: nn.Module, views: list[Tensor], chunk_size: int | None, gather: bool = False
) -> Callable[[], None]:
    """One forward and backward; the gradients of the step before are dropped first."""
    loss_fn = NTXent(gather_distributed=gather)
    encode = None if chunk_size is None else GradCache(encoder, chunk_size=chunk_size)

    def step() -> None:
        encoder.zero_grad()
        z = encoder(torch.cat(views)).chunk(2) if encode is None else encode.views(*views)
        loss_fn(*z).backward()

    return step


def _peak(
    encoder: nn.Module, views: list[Tensor], chunk_size: int | None, gather: bool = False
) -> tuple[float, Callable[[], None]]:
    """Extra memory of the first step; a step of a few images pays for libraries before it."""
    _step(encoder, [view[:4] for view in views], chunk_size and 2, gather)()
    encoder.zero_grad()
    step = _step(encoder, views, chunk_size, gather)
    return peak_of(step)["extra_mib"], step


def _step_memory(n: int, chunk_size: int | None) -> float:
    return _peak(_encoder(), _views(n), chunk_size)[0]


def _loss_memory(name: str, n: int, d: int = 128) -> dict[str, Any]:
    def step(z1: Tensor, z2: Tensor) -> None:
        LOSSES[name](z1, z2).backward()

    step(*embeddings(16, d))
    return peak_of(partial(step, *embeddings(n, d)))


def _step_times(case: Case) -> dict[str, Any]:
    """Seconds of a step, every arm once in each round, and ratios to the plain step."""
    # One thread, as each gathered process has on two cores; and threads that wait for each other
    # would time whatever else the machine does.
    torch.set_num_threads(1)
    views = _views(case.n)
    arms = {_label(chunk): _step(_encoder(), views, chunk) for chunk in (None, *case.chunks)}
    samples = time_interleaved(arms, budget_s=0, min_rounds=case.rounds, max_rounds=case.rounds)
    plain = samples[_label(None)]
    return {
        name: {"seconds": spread(values), "ratio": spread(ratios(values, plain))}
        for name, values in samples.items()
    }


def _gathered(rank: int, n: int, chunk_size: int | None, rounds: int) -> dict[str, Any]:
    """One of two processes with half the batch each: peak of the first step, then times."""
    encoder = DistributedDataParallel(_encoder())
    extra_mib, step = _peak(encoder, _views(n // 2, rank), chunk_size, gather=True)
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return {"extra_mib": extra_mib, "seconds": spread(seconds) if rounds else None}


def _parity(n: int, chunk_size: int) -> float:
    """Relative difference of the cached gradient, batch norm frozen."""
    grads = []
    for chunk in (None, chunk_size):
        encoder = _encoder().eval()
        _step(encoder, _views(n), chunk)()
        grads.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]).double())
    error = float((grads[1] - grads[0]).norm() / grads[0].norm())
    if not error < 1e-4:
        raise Disagreement(f"the cached gradient is off by {error:.3g}")
    return error


def markdown(results: Results) -> str:
    """The page; the documentation includes the parts between the comments."""
    # Others at work make times those of the scheduler.
    loads = results["machine"]["load_average"], results["load_average_after"] or 0
    losses = _losses([c for c in results["cases"] if c["case"]["figure"] == "loss"])
    busy = max(loads) > results["machine"]["cores"]
    return report.page("steps", **results, busy=busy, losses=losses)


def _losses(cases: list[Results]) -> str:
    sizes = sorted({c["case"]["n"] for c in cases})
    extra = {(c["case"]["loss"], c["case"]["n"]): c["extra_mib"] for c in cases}
    extra |= {("*one matrix of N × N logits*", n): n * n * 4 / 2**20 for n in sizes}
    rows = []
    for name in dict.fromkeys(name for name, _ in extra):
        found = [extra.get((name, n), float("nan")) for n in sizes]
        rows.append([name, *(f"{x:.0f}" for x in found), f"{found[-1] / found[-2]:.2f}"])
    return table(["loss", *(f"N = {n}" for n in sizes), "last doubling"], rows)
