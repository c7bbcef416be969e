"""Times, memory and launches of the losses on a GPU: the stage ``loss``."""

import time
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_arms import GPU_SUBJECTS, Setting, gate
from benchmarks.gpu_device import (
    COPY,
    GEMM,
    Call,
    Device,
    breaks_the_device,
    is_out_of_memory,
    matmul_precision,
)
from benchmarks.gpu_store import DeviceBroken, Store
from benchmarks.interleaved import spread, time_survivors
from benchmarks.loss_arms import OURS, Loss, embeddings, forward, forward_backward
from benchmarks.parity import Disagreement, Oracle, oracle, relative_errors
from contrastive_kit import which_backend
from contrastive_kit.functional import info_nce, nt_xent

GRAPH = "CUDA graph"
DIRECTIONS = {"forward": forward, "forward+backward": forward_backward}

# Logits times dimension beyond which the float64 oracle takes longer than everything else. There
# the tiled backend judges in float32, which the oracle has judged at the sizes below.
_LARGEST_ORACLE = 3e12


class Case(NamedTuple):
    """One comparison.

    Attributes:
        subject: of ``GPU_SUBJECTS``.
        n: pairs.
        d: dimension of an embedding.
        precision: of ``PRECISIONS``.
        temperature: τ.
        compiled: whether the arms that compile for each size take part.
        graph: whether CUDA graphs of forward+backward are timed too.
    """

    subject: str
    n: int
    d: int
    precision: str = "bf16"
    temperature: float = 0.1
    compiled: bool = True
    graph: bool = False


def cases(dry: bool) -> list[Case]:
    """What is measured, the cases with a target first, for a stage may end before the last."""
    if dry:
        return [Case("nt_xent", 8, 16), Case("clip", 6, 16, "fp32", compiled=False, graph=True)]
    targets = [
        Case("nt_xent", 8192, 128),
        Case("nt_xent", 256, 128, graph=True),
        Case("nt_xent", 8192, 512),
        Case("nt_xent", 8192, 2048),
        Case("nt_xent", 65536, 128, compiled=False),
        Case("nt_xent", 512, 128, graph=True),
        *(Case("nt_xent", 4096, d) for d in (128, 512, 2048)),
        Case("clip", 8192, 512, temperature=0.07),
        Case("nt_xent", 4096, 128, "fp32"),
    ]
    sizes = [2**power for power in range(8, 17)]
    by_n = [Case("nt_xent", n, 128, compiled=n <= 16384, graph=n <= 1024) for n in sizes]
    by_d = [
        Case("nt_xent", n, d, compiled=n in (1024, 4096), graph=n <= 1024)
        for d in (512, 2048, 64, 256)
        for n in (1024, 4096, 16384, 256)
    ]
    other = [
        # 1 / 0.01 is beyond what exp takes unshifted in float32: more work.
        Case("nt_xent", 4096, 128, temperature=0.01, compiled=False),
        *(Case("nt_xent", n, 128, "tf32", compiled=False) for n in (1024, 4096, 16384)),
        *(Case("nt_xent", n, 128, "fp32", compiled=False) for n in (256, 1024, 16384)),
        Case("nt_xent", 4096, 512, "fp32", compiled=False),
        *(Case("clip", n, 512, temperature=0.07, compiled=n < 4096) for n in (512, 2048, 32768)),
        Case("clip", 2048, 512, "fp32", 0.07, compiled=False),
        *(Case("nt_xent", 65536, d, compiled=False) for d in (64, 256, 512, 2048)),
        *(Case("nt_xent", n, 2048, "fp32", compiled=False) for n in (256, 4096)),
    ]
    return _once([*targets, *by_n, *by_d, *other])


def _once(found: Iterable[Case]) -> list[Case]:
    """The first case of each size: a later one would differ in its extras only."""
    kept: dict[tuple[object, ...], Case] = {}
    for case in found:
        kept.setdefault(case[:5], case)
    return list(kept.values())


def run(store: Store, device: Device) -> None:
    """Measure the cases that are missing.

    Raises:
        OutOfTime: when the next case would not fit; what is measured is kept.
        DeviceBroken: if an arm left the device unusable.
    """
    for case in cases(device.dry):
        if store.has(case._asdict()):
            continue
        store.check_time()
        print(f"{store.left_s():4.0f} s left: {case}", flush=True)
        start = time.monotonic()
        with matmul_precision(case.precision):
            result = measure(case, store, device)
        store.add(case._asdict(), result, time.monotonic() - start)
        device.free()
    store.finish()


def measure(case: Case, store: Store, device: Device) -> dict[str, Any]:
    """Check every arm, then time those that are right, interleaved; the others with the reason."""
    torch.compiler.reset()
    setting = Setting(case.temperature, case.precision, device.device.type)
    z1, z2 = views(case, device)
    result: dict[str, Any] = {"absent": {}, "errors": {}, "extra_mib": {}, "launches": {}}
    result["backend"] = which_backend(z1)._asdict()
    losses = _right_losses(case, setting, (z1, z2), store, device, result)
    rates = device.rate_calls(case.precision)
    result["times"] = {}
    for direction, run_once in DIRECTIONS.items():
        calls = {name: partial(run_once, loss, z1, z2) for name, loss in losses.items()}
        timed = _runs(case, calls, direction, store, result["absent"])
        result["times"][direction] = _times(
            case, direction, timed, rates, store, device, result["absent"]
        )
    if case.graph:
        calls = {name: partial(forward_backward, loss, z1, z2) for name, loss in losses.items()}
        graphs = _graphs(case, calls, (z1, z2), store, device, result["absent"])
        result["times"][GRAPH] = _times(case, GRAPH, graphs, {}, store, device, result["absent"])
    return result


def views(case: Case, device: Device) -> tuple[Tensor, Tensor]:
    """Two views that want gradients, in the dtype in which a projection head leaves them."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    z1, z2 = (z.detach().to(device.device, dtype) for z in embeddings(case.n, case.d))
    return z1.requires_grad_(), z2.requires_grad_()


def _right_losses(
    case: Case,
    setting: Setting,
    z: tuple[Tensor, Tensor],
    store: Store,
    device: Device,
    result: dict[str, Any],
) -> dict[str, Loss]:
    expected: dict[str, Oracle] = {}
    losses: dict[str, Loss] = {}
    try:
        which_backend(z[0], backend="triton")
    except ValueError as reason:
        result["absent"]["backend triton"] = str(reason)
    for name, arm in GPU_SUBJECTS[case.subject].items():
        if arm.compiled and not case.compiled:
            result["absent"][name] = "compiles for every size: left to fewer cases"
        elif arm.largest_n is not None and case.n > arm.largest_n:
            result["absent"][name] = f"memory grows with N³; not run beyond N = {arm.largest_n}"
        elif store.broke(case._asdict(), name):
            result["absent"][name] = "broke the device, crashed or hung in this case"
        else:
            try:
                with store.running(case._asdict(), name):
                    loss = arm.build(setting)
                    if arm.formula not in expected:
                        expected[arm.formula] = _expected(arm.formula, *z, case)
                    errors = relative_errors(loss, *z, expected[arm.formula])
                    result["errors"][name] = dict(zip(("loss", "gradient"), errors, strict=True))
                    budget = gate(arm, setting)
                    if not max(errors) <= budget:
                        raise Disagreement(
                            f"relative errors of loss and gradient are {errors[0]:.1e} and "
                            f"{errors[1]:.1e}, over {budget:.1e}"
                        )
                    call = partial(forward_backward, loss, *z)
                    result["extra_mib"][name] = device.extra_mib(call)
                    result["launches"][name] = device.launches(call)
                    losses[name] = loss
            except DeviceBroken:
                raise
            except Exception as error:  # a peer may fail in any way: its row says how
                result["absent"][name] = reason_of(error)
        device.free()
    return losses


def _expected(formula: str, z1: Tensor, z2: Tensor, case: Case) -> Oracle:
    if (2 * case.n) ** 2 * case.d <= _LARGEST_ORACLE:
        return oracle(formula, z1, z2, case.temperature)
    if formula == "nt_xent_with_self":
        raise Disagreement("no oracle for a loss that counts the anchor itself at this size")
    views = [z.detach().float().requires_grad_() for z in (z1, z2)]
    if formula == "nt_xent":
        loss = nt_xent(*views, temperature=case.temperature, backend="tiled")
    else:
        loss = info_nce(*views, temperature=case.temperature, symmetric=True, backend="tiled")
    grad = torch.stack(torch.autograd.grad(loss, views))
    return Oracle(loss.detach().double(), grad.double())


def reason_of(error: BaseException) -> str:
    """A row of the table that says why there is no figure."""
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"not installed ({error})"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _runs(
    case: Case, calls: dict[str, Call], direction: str, store: Store, absent: dict[str, str]
) -> dict[str, Call]:
    """Those that run in this direction; compiled ones compile here, outside of the timing."""
    kept = {}
    for name, call in calls.items():
        try:
            with store.running(case._asdict(), name):
                call()
            kept[name] = call
        except DeviceBroken:
            raise
        except Exception as error:
            absent[f"{name}, {direction}"] = reason_of(error)
    return kept


def _graphs(
    case: Case,
    calls: dict[str, Any],
    z: tuple[Tensor, Tensor],
    store: Store,
    device: Device,
    absent: dict[str, str],
) -> dict[str, Call]:
    """The replays of those that can be captured, and that follow a change of the embeddings."""
    graphs: dict[str, Call] = {}
    for name, call in calls.items():
        step = f"{name}, {GRAPH}"  # its own mark: what cannot be captured keeps its other times
        if store.broke(case._asdict(), step):
            absent[step] = "broke the device, crashed or hung"
            continue
        try:
            with store.running(case._asdict(), step):
                replay, captured = device.graphed(call)
                with torch.no_grad():
                    z[0].copy_(z[0].flip(0) * 1.5 + 0.1)
                expected = torch.stack(call())
                replay()
                error = (torch.stack(captured) - expected).norm() / expected.norm()
                if not float(error) <= 1e-2:
                    raise Disagreement(f"the replay is off by {float(error):.1e}")
            graphs[name] = replay
        except DeviceBroken:
            raise
        except Exception as error:
            absent[step] = reason_of(error)
    return graphs


def floor_s(case: Case, direction: str, gemm_rate: float, copy_rate: float) -> float:
    """The roofline of a loss that keeps no logits: its products, or its traffic if that is longer.

    The products are those of half a symmetric matrix of logits (of all of it for two matrices of
    embeddings), once forward and once again in the backward, and those with the gradient of the
    logits. The traffic is the embeddings and their gradients. Exponentials are not counted.
    """
    m, forward_only = 2 * case.n, direction == "forward"
    if case.subject == "nt_xent":
        flops = m**2 * case.d * (1 if forward_only else 4)
    else:
        flops = 2 * case.n**2 * case.d * (1 if forward_only else 4)
    size = 2 if case.precision == "bf16" else 4
    n_bytes = m * case.d * size * (1 if forward_only else 3)
    return max(flops / gemm_rate, n_bytes / copy_rate)


def _times(
    case: Case,
    direction: str,
    calls: dict[str, Call],
    rates: dict[str, tuple[Call, float]],
    store: Store,
    device: Device,
    absent: dict[str, str],
) -> dict[str, Any]:
    """Milliseconds, and what follows from ratios within rounds."""
    step = f"timing {direction}"
    if store.broke(case._asdict(), step):
        absent[step] = "broke the device, crashed or hung"
        calls = {}
    if not calls:
        return {"milliseconds": {}, "times_ours": {}, "rounds": 0}

    def failed(name: str, error: BaseException) -> None:
        if breaks_the_device(error):
            raise error
        absent[f"{name}, {direction}"] = reason_of(error)
        device.free()

    with store.running(case._asdict(), step):
        samples = time_survivors(
            {**calls, **{name: call for name, (call, _) in rates.items()}},
            failed,
            budget_s=0.0 if device.dry else 1.5,
            sample_s=0.0 if device.dry else 0.01,
            min_rounds=2 if device.dry else 5,
            seconds=device.seconds,
        )
    calls = {name: call for name, call in calls.items() if name in samples}
    rates = {name: rate for name, rate in rates.items() if name in samples}
    if not calls:
        return {"milliseconds": {}, "times_ours": {}, "rounds": 0}
    result: dict[str, Any] = {
        "rounds": len(samples[next(iter(calls))]),
        "milliseconds": {
            name: spread([1e3 * s for s in samples[name]])._asdict() for name in calls
        },
        "times_ours": {},
    }
    ours = samples.get(OURS)
    if ours is not None:
        result["times_ours"] = {
            name: spread([s / o for s, o in zip(samples[name], ours, strict=True)])._asdict()
            for name in calls
            if name != OURS
        }
    if rates:
        rate = {name: [rates[name][1] / s for s in samples[name]] for name in rates}
        result["rates"] = {name: spread(values)._asdict() for name, values in rate.items()}
    if len(rates) == 2 and ours is not None:
        floors = [
            floor_s(case, direction, g, c) for g, c in zip(rate[GEMM], rate[COPY], strict=True)
        ]
        result["of_roofline"] = spread(
            [floor / o for floor, o in zip(floors, ours, strict=True)]
        )._asdict()
        flops = floor_s(case, direction, 1.0, float("inf"))
        result["of_gemm"] = spread(
            [flops / o / g for o, g in zip(ours, rate[GEMM], strict=True)]
        )._asdict()
    return result
