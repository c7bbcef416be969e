"""Which losses are measured at which sizes, how, and the page that says what was found."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import targets
from benchmarks.harness import plan, report
from benchmarks.harness.device import Device, matmul_precision
from benchmarks.harness.measure import Call, ratios, spread
from benchmarks.harness.processes import fresh, peak_of
from benchmarks.harness.report import NONE, Results, percent, times
from benchmarks.harness.store import Store, Trial
from benchmarks.losses import arms
from benchmarks.losses.arms import BOTH, COPY, EAGER, FORWARD, GEMM, GRAPH, OURS, Setting
from benchmarks.losses.oracle import Disagreement, Oracle, check, oracle, relative_errors
from contrastive_kit import which_backend

DIRECTIONS: dict[str, Callable[..., object]] = {FORWARD: arms.forward, BOTH: arms.forward_backward}
_ALLOCATORS = {"default": "default allocator", "tuned": "allocator that keeps freed memory"}

# Logits times dimension beyond which the float64 oracle takes longer than everything else. There
# the tiled backend judges in float32, which the oracle has judged at the sizes below.
_LARGEST_ORACLE = 3e12
# Views as similar as the nearest strangers: losses neither saturate nor vanish at any temperature.
_NOISE = 1.5
_TINY_N = 16


class Case(NamedTuple):
    subject: str  # of SUBJECTS
    n: int  # pairs
    d: int
    precision: str = "bf16"
    temperature: float = 0.1
    directions: tuple[str, ...] = (FORWARD, BOTH)
    budget_s: float = 1.5  # for each direction, about
    allocator: str = "default"  # of the process, see ``Environment``
    compiled: bool = True  # whether the arms that compile for each size take part
    graph: bool = False  # whether CUDA graphs of forward+backward are timed too
    memory: bool = False  # whether a CPU's memory is measured; a GPU's always is


class AccuracyCase(NamedTuple):
    """Errors of the float32 loss and its gradient over some batches."""

    temperature: float
    n: int = 256
    d: int = 128
    seeds: int = 5


def cases(kind: str, quick: bool) -> list[Case | AccuracyCase]:
    accuracy = plan.read(AccuracyCase, "accuracy", "any", quick)
    return [*plan.read(Case, "losses", kind, quick), *accuracy]


def measure(case: Case | AccuracyCase, store: Store, device: Device) -> dict[str, Any]:
    """Check every arm, then time those that are right, interleaved; the others with the reason."""
    if isinstance(case, AccuracyCase):
        return _accuracy(case, device)
    torch.compiler.reset()
    of, trial = Inputs(case, device), Trial(case, store, device)
    timed: dict[str, Any] = {}
    with matmul_precision(case.precision):
        trial.result |= {"backend": which_backend(of.z[0])._asdict(), "errors": of.errors}
        losses = _right_losses(of, trial)
        rates = _rates(case, device)
        for direction in case.directions:
            calls = {n: partial(DIRECTIONS[direction], loss, *of.z) for n, loss in losses.items()}
            timed[direction] = _times(case, direction, calls, rates, trial)
        if case.graph:
            graphs = {
                name: replay
                for name, loss in losses.items()
                if (replay := trial.run(f"{name}, {GRAPH}", partial(_graph, loss, *of.z, device)))
            }
            timed[GRAPH] = _times(case, GRAPH, graphs, {}, trial)
    return trial.outcome(OURS) | {"times": timed}


class Inputs:
    """What the arms of a case are given, what they must compute, and how wrong they were."""

    def __init__(self, case: Case, device: Device) -> None:
        self.case = case
        self.setting = Setting(case.subject, case.temperature, case.precision, device)
        self.z = _on(self.setting, arms.embeddings(case.n, case.d))
        self.expected = cache(partial(_expected, case, self.setting, *self.z))
        self.errors: dict[str, dict[str, float]] = {}

    def right_loss(self, name: str) -> arms.Loss:
        """The loss of an arm that agrees with the oracle.

        Raises:
            Disagreement: if it computes something else.
            ImportError: if it is not installed.
        """
        arm = arms.ARMS[name]
        loss, oracle = arm.build(self.setting), self.expected(arm.formula(self.case.subject))
        self.errors[name] = relative_errors(loss, *self.z, oracle)
        check(self.errors[name], arms.gate(arm, self.setting))
        return loss


def _on(setting: Setting, pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Embeddings on the device of a setting, in its type."""
    device, dtype = setting.device.device, setting.dtype
    return [z.detach().to(device, dtype).requires_grad_() for z in pair]


def left_out(case: Case, arm: arms.Arm, kind: str) -> str | None:
    """Why an arm does not take part in a case."""
    if arm.compiled and not case.compiled:
        return "compiles for every size: left to fewer cases"
    if case.n > (largest := arm.largest_n.get(kind, case.n)):
        return f"memory grows with N³; not run beyond N = {largest}"
    return None


def _right_losses(of: Inputs, trial: Trial) -> dict[str, arms.Loss]:
    case, kind = of.case, trial.device.kind

    def prepare(name: str) -> arms.Loss:
        loss = of.right_loss(name)
        trial.observe(name, partial(arms.forward_backward, loss, *of.z))
        if case.memory:
            trial.result["memory"][name] = fresh(_memory, case, name)
        return loss

    if kind == "cuda":
        try:
            which_backend(of.z[0], backend="triton")
        except ValueError as reason:
            trial.absent["backend triton"] = str(reason)
    losses = {}
    for name, arm in arms.arms_of(case.subject, kind).items():
        if reason := left_out(case, arm, kind):
            trial.absent[name] = reason
        elif (loss := trial.run(name, partial(prepare, name))) is not None:
            losses[name] = loss
    return losses


def _memory(case: Case, name: str) -> dict[str, Any]:
    """Of forward and backward on a CPU, in this process, which should be fresh.

    Before that, the loss runs once on a tiny batch, which pays for libraries and thread pools. A
    compiled loss runs once at the size itself instead, since that call compiles.
    """
    arm = arms.ARMS[name]
    loss = arm.build(Setting(case.subject, case.temperature, case.precision, Device("cpu")))
    arms.forward_backward(loss, *arms.embeddings(case.n if arm.compiled else _TINY_N, case.d))
    return peak_of(partial(arms.forward_backward, loss, *arms.embeddings(case.n, case.d)))


def _expected(case: Case, setting: Setting, z1: Tensor, z2: Tensor, formula: str) -> Oracle:
    if (2 * case.n) ** 2 * case.d <= _LARGEST_ORACLE:
        return oracle(formula, z1, z2, case.temperature)
    if formula != case.subject:
        raise Disagreement("no oracle for a loss that counts the anchor itself at this size")
    views = [z.detach().float().requires_grad_() for z in (z1, z2)]
    loss = arms.ARMS[arms.TILED].build(setting)(*views)
    grad = torch.stack(torch.autograd.grad(loss, views))
    return Oracle(loss.detach().double(), grad.double())


def _graph(loss: arms.Loss, z1: Tensor, z2: Tensor, device: Device) -> Call:
    """The replay of forward and backward, which must follow a change of the embeddings."""
    call = partial(arms.forward_backward, loss, z1, z2)
    replay, captured = device.graphed(call)
    with torch.no_grad():
        z1.copy_(z1.flip(0) * 1.5 + 0.1)
    expected = torch.stack(call())
    replay()
    error = float((torch.stack(captured) - expected).norm() / expected.norm())
    if not error <= 1e-2:
        raise Disagreement(f"the replay is off by {error:.1e}")
    return replay


def _rates(case: Case, device: Device) -> dict[str, tuple[Call, float]]:
    """What the machine can do beside it: what runs, and its flops or bytes."""
    if device.kind == "cuda":
        dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
        side = 64 if device.dry else 8192
        return {GEMM: device.product(side, side, dtype), COPY: device.copy()}
    if case.subject != "nt_xent":
        return {}
    m = 2 * case.n
    logits, square = device.product(m, case.d), device.product(1024, 1024)
    return {arms.GEMM_OF_LOGITS: logits, arms.GEMM_SQUARE: square}


def work(case: Case, direction: str) -> tuple[float, float]:
    """Flops and bytes of a loss that keeps no logits and repeats nothing.

    Half of a symmetric matrix of logits (all of it for two matrices of embeddings), once forward
    and once again in the backward, which then multiplies it from both sides; the embeddings and
    their gradients. SigLIP has no need of the second. Exponentials are not counted.
    """
    pairs = (2 * case.n) ** 2 if case.subject == "nt_xent" else 2 * case.n**2
    n_bytes = 2 * case.n * case.d * (2 if case.precision == "bf16" else 4)
    again = case.subject != "siglip"
    products, passes = (1, 1) if direction == FORWARD else (3 + again, 3)
    return pairs * case.d * products, n_bytes * passes


def _times(
    case: Case,
    direction: str,
    calls: dict[str, Call],
    rates: dict[str, tuple[Call, float]],
    trial: Trial,
) -> dict[str, Any]:
    """Milliseconds, and what follows from ratios within rounds."""
    samples = trial.time(
        f"timing {direction}",
        calls and calls | {name: call for name, (call, _) in rates.items()},
        f"{{}}, {direction}",
        budget_s=case.budget_s,
        sample_s=0.01 if trial.device.kind == "cuda" else 0.02,
    )
    result: dict[str, Any] = {
        "rounds": len(next(iter(samples.values()), [])),
        "milliseconds": {n: spread([1e3 * s for s in found]) for n, found in samples.items()},
        "times_ours": {},
        "fractions": {},
    }
    flops, n_bytes = work(case, direction)
    done = {name: count for name, (_, count) in rates.items() if name in samples}
    if OURS in samples:
        peers = [name for name in calls if name in samples and name != OURS]
        result["times_ours"] = {n: spread(ratios(samples[n], samples[OURS])) for n in peers}
        done |= {OURS: flops} if done else {}
    rate = {name: [count / s for s in samples[name]] for name, count in done.items()}
    result["rates"] = {name: spread([r / 1e9 for r in found]) for name, found in rate.items()}
    if OURS in rate:
        products = [name for name in rate if name not in (OURS, COPY)]
        result["fractions"] = {n: spread(ratios(rate[OURS], rate[n])) for n in products}
        if {GEMM, COPY} <= set(rate):
            # The roofline: the products, or the traffic if that is longer.
            by_round = zip(rate[GEMM], rate[COPY], strict=True)
            floors = [max(flops / gemm, n_bytes / copy) for gemm, copy in by_round]
            result["fractions"][arms.ROOFLINE] = spread(ratios(floors, samples[OURS]))
    return result


def _accuracy(case: AccuracyCase, device: Device) -> dict[str, Any]:
    """The median and the largest relative error over the batches, ours beside eager."""
    setting = Setting("nt_xent", case.temperature, "fp32", device)
    batches = [
        _on(setting, arms.embeddings(case.n, case.d, seed, _NOISE)) for seed in range(case.seeds)
    ]
    expected = [oracle("nt_xent", *z, case.temperature) for z in batches]
    result: dict[str, Any] = {}
    for name in (OURS, EAGER):
        loss = arms.ARMS[name].build(setting)
        errors = [relative_errors(loss, *z, o) for z, o in zip(batches, expected, strict=True)]
        result[name] = {}
        for part in ("loss", "gradient"):
            found = [e[part] for e in errors]
            result[name][part] = {"median": statistics.median(found), "largest": max(found)}
    return result


def markdown(results: Results) -> str:
    cases, dry = report.of_kind(results, "subject"), results["dry"]
    parts = {
        **results,
        "slower": list(_slower(cases)),
        "memory": _by_arm(cases, "memory", report.mib, dry),
        "launches": _by_arm(cases, "launches", report.counts, dry),
        "errors": _by_arm(cases, "errors", lambda e: f"{e['loss']:.0e}, {e['gradient']:.0e}", dry),
        "accuracy": report.of_kind(results, "seeds"),
        "budget": targets.gradient_budget,
        "not_measured": report.not_measured(cases, lambda c: f"{_loss(c['case'])}: ", _sizes),
    }
    if report.on_gpu(results):
        parts["targets"] = list(targets.losses_on_gpu(results))
        parts["times"] = _times_tables(sorted(cases, key=_by_size), True, dry)
        return report.page("losses_gpu", **parts)
    parts |= {"targets": list(targets.losses_on_cpu(results)), "tuned": _tuned(results)}
    parts["times"] = {
        name: _times_tables([c for c in cases if c["case"]["allocator"] == allocator], False, dry)
        for allocator, name in _ALLOCATORS.items()
    }
    return report.page("losses_cpu", **parts)


def _tuned(results: Results) -> list[str]:
    """What is left of the ratios with targets where peers pay for no page faults."""
    sized = targets.nt_xent_cases(results, n=4096, d=128, allocator="tuned")
    return [
        f"{times(ratio)} against {peer}"
        for peer in targets.LOSS_CPU
        for ratio, _ in targets.ratios_of(sized, "times_ours", peer)
    ]


def _times_tables(cases: list[Results], on_gpu: bool, dry: bool) -> str:
    groups = defaultdict(list)
    for c in cases:
        for direction in c["times"]:
            groups[c["case"]["subject"], direction, c["case"]["precision"]].append(c)
    return "\n\n".join(
        f"### {arms.SUBJECTS[subject]}, {direction}{f', {precision}' * on_gpu}\n\n"
        + _group(group, direction, on_gpu, dry)
        for (subject, direction, precision), group in groups.items()
    )


def _group(cases: list[Results], direction: str, on_gpu: bool, dry: bool) -> str:
    timed = [c["times"][direction] for c in cases]
    names = dict.fromkeys(name for t in timed for name in t["milliseconds"])
    rates = dict.fromkeys(name for t in timed for name in t["rates"])
    peers = [name for name in names if name != OURS and name not in rates]
    fractions = dict.fromkeys(name for t in timed for name in t["fractions"])
    rows = []
    for c, t in zip(cases, timed, strict=True):
        size, ms, rate = c["case"], t["milliseconds"], t["rates"]
        row = {"N": size["n"], "D": size["d"], "τ": size["temperature"]}
        row |= {"backend": c["backend"]["name"]} if on_gpu else {}
        row |= {"rounds": t["rounds"], f"{OURS}, ms": _figure(report.interval, ms, OURS)}
        for peer in peers:
            ratio = f": {times(t['times_ours'][peer])}" if peer in t["times_ours"] else ""
            row[peer] = _figure("{median:.3g}".format_map, ms, peer) + ratio
        if OURS in rates:
            row["GFLOP/s"] = _figure("{median:.0f}".format_map, rate, OURS)
        row |= {f"of {name}": _figure(percent, t["fractions"], name) for name in fractions}
        if COPY in rates:
            row[f"{GEMM}, TFLOP/s"] = _figure(_tera, rate, GEMM)
            row[f"{COPY}, TB/s"] = _figure(_tera, rate, COPY)
        rows.append(row)
    return report.records(rows, dry)


def _tera(giga: report.Spread) -> str:
    return f"{giga['median'] / 1e3:.3g}"


def _figure(form: Callable[[Any], str], found: dict[str, Any], name: str) -> str:
    return form(found[name]) if name in found else NONE


def _slower(cases: list[Results]) -> Iterator[str]:
    for c in cases:
        size = c["case"]
        where = f"N = {size['n']}, D = {size['d']}, τ = {size['temperature']}"
        for direction, timed in c["times"].items():
            for peer, ratio in timed["times_ours"].items():
                if ratio["q1"] < 1:
                    verdict = "slower" if ratio["q3"] < 1 else "not faster beyond the spread"
                    yield (
                        f"{verdict} than {peer}: {_loss(size)}, {direction}, {where}, "
                        f"{_ALLOCATORS[size['allocator']]}: {times(ratio)}"
                    )


def _loss(size: Results) -> str:
    precision = "" if size["precision"] == "fp32" else f" {size['precision']}"
    return arms.SUBJECTS[size["subject"]] + precision


def _by_arm(cases: list[Results], key: str, text: Callable[[Any], str], dry: bool) -> str:
    """Of the sizes that have such a figure, without columns that say the same in each row."""
    shown = sorted((c for c in cases if c.get(key)), key=_by_size)
    columns = {
        "loss": [arms.SUBJECTS[c["case"]["subject"]] for c in shown],
        "precision": [c["case"]["precision"] for c in shown],
        "N": [c["case"]["n"] for c in shown],
        "D": [c["case"]["d"] for c in shown],
    }
    kept = {name: cells for name, cells in columns.items() if name == "N" or len(set(cells)) > 1}
    return report.by_arm(shown, key, text, kept, dry)


def _sizes(cases: list[Results]) -> str:
    return "N = " + ", ".join(map(str, sorted({c["case"]["n"] for c in cases})))


def _by_size(c: Results) -> tuple[Any, ...]:
    return tuple(c["case"][name] for name in ("subject", "precision", "d", "n", "temperature"))
