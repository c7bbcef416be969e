"""What gradient a distributed loss really gives, beside that of one process on the whole batch."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import plan, report
from benchmarks.harness.device import Device
from benchmarks.harness.processes import world
from benchmarks.harness.report import Results
from benchmarks.harness.store import Store
from contrastive_kit import reference
from contrastive_kit.functional import info_nce, nt_xent, siglip

_PER_PROCESS, _IN, _OUT, _TEMPERATURE = 8, 6, 8, 0.2
_BIAS = -2.0
_EXACT = 1e-6

# Takes both views of the own rows, unit rows (n, D), and the inverse temperature.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    processes: int


cases = partial(plan.read, Case, "ddp")


class Arm(NamedTuple):
    """A loss as a user of DDP calls it."""

    subject: str  # which formula it must equal
    name: str  # library and options
    loss: Loss
    whole: bool = True  # a loss over the whole batch, or over that of each process
    learnable: bool = True  # takes the temperature that is learned, or has its own number
    unequal: bool = False  # is also run with batches of different sizes


class Model(nn.Module):
    """An encoder, and the inverse temperature, which DDP averages like every other parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(_IN, 16), nn.Tanh(), nn.Linear(16, _OUT))
        self.log_scale = nn.Parameter(torch.tensor(1 / _TEMPERATURE, dtype=torch.float64).log())

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit rows of both views, and the inverse temperature."""
        z = F.normalize(self.encoder(torch.cat([x, y])), dim=1)
        return *z.chunk(2), self.log_scale.exp()


_OURS: dict[str, Callable[..., Tensor]] = {
    "NT-Xent": lambda a, b, s, **gather: nt_xent(a, b, temperature=1 / s, **gather),
    "CLIP": lambda a, b, s, **gather: info_nce(a, b, temperature=1 / s, symmetric=True, **gather),
    "SigLIP": lambda a, b, s, **gather: siglip(a, b, temperature=1 / s, logit_bias=_BIAS, **gather),
}


def _ours(rank: int, size: int) -> Iterator[Arm]:
    for subject, loss in _OURS.items():
        gathered = partial(loss, gather_distributed=True)
        yield Arm(subject, "contrastive-kit, `gather_distributed=True`", gathered, unequal=True)
        name = "contrastive-kit, default: negatives of the own process only"
        yield Arm(subject, name, loss, whole=False)


def _lightly(rank: int, size: int) -> Iterator[Arm]:
    from lightly.loss import NTXentLoss

    for gather in (True, False):
        loss = NTXentLoss(_TEMPERATURE, gather_distributed=gather)
        name = f"lightly, `gather_distributed={gather}`"
        yield Arm("NT-Xent", name, lambda a, b, s, loss=loss: loss(a, b), gather, learnable=False)


def _metric_learning(rank: int, size: int) -> Iterator[Arm]:
    from pytorch_metric_learning.losses import NTXentLoss
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    labels = torch.arange(_PER_PROCESS).repeat(2) + rank * _PER_PROCESS
    for efficient in (False, True):
        loss = DistributedLossWrapper(NTXentLoss(_TEMPERATURE), efficient=efficient)
        name = f"pytorch-metric-learning, `efficient={efficient}`"
        yield Arm(
            "NT-Xent", name, lambda a, b, s, loss=loss: loss(torch.cat([a, b]), labels),
            learnable=False,
        )  # fmt: skip


def _open_clip(rank: int, size: int) -> Iterator[Arm]:
    from open_clip.loss import ClipLoss, SigLipLoss

    where = {"rank": rank, "world_size": size}
    for local, with_grad in product((False, True), repeat=2):
        default = "" if local or with_grad else " (the default)"
        name = f"open_clip, `local_loss={local}, gather_with_grad={with_grad}`{default}"
        yield Arm("CLIP", name, ClipLoss(local_loss=local, gather_with_grad=with_grad, **where))
    for exchange in ("bidir", "shift", "reduce", "gather"):
        default = " (the default)" if exchange == "bidir" else ""
        name = f"open_clip, `dist_impl={exchange!r}`{default}"
        loss = SigLipLoss(dist_impl=exchange, **where)
        yield Arm("SigLIP", name, lambda a, b, s, loss=loss: loss(a, b, s, _BIAS))


def arms(rank: int, size: int) -> Iterator[Arm]:
    """Ours and those of the installed peers."""
    for library in (_ours, _lightly, _metric_learning, _open_clip):
        with suppress(ImportError):
            yield from library(rank, size)


def truth(subject: str, model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients that one process finds on the whole batch, by the formula."""
    a, b, scale = model(x, y)
    if subject == "NT-Xent":
        loss = reference.nt_xent(torch.stack([a, b]), 1 / scale).mean()
    elif subject == "SigLIP":
        loss = reference.siglip(a, b, 1 / scale, _BIAS).mean()
    else:
        ids = torch.arange(len(a))
        both = [reference.info_nce(*pair, 1 / scale, ids).mean() for pair in ((a, b), (b, a))]
        loss = (both[0] + both[1]) / 2
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def _figures(arm: Arm, rank: int, counts: list[int]) -> dict[str, float | None]:
    """One step of DDP with ``counts`` rows on each process, beside the true gradient.

    What the figures are is said in pages/ddp.md; "temperature" is None if the loss learns none.
    """
    torch.manual_seed(0)
    model = Model().double()
    x = torch.randn(sum(counts), _IN, dtype=torch.float64)
    y = x + 0.5 * torch.randn_like(x)
    value, (true_temperature, *expected) = truth(arm.subject, model, x, y)
    model.log_scale.requires_grad_(arm.learnable)

    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    ddp = DistributedDataParallel(model)
    loss = arm.loss(*ddp(x[mine], y[mine]))
    loss.backward()  # type: ignore[no-untyped-call]
    mean_loss = loss.detach().clone()
    dist.all_reduce(mean_loss)

    gradient, true = (
        torch.cat([g.flatten() for g in gradients])
        for gradients in ([p.grad for p in model.encoder.parameters()], expected)
    )
    temperature = model.log_scale.grad
    return {
        "scale": float(gradient @ true / (true @ true)),
        "cosine": float(F.cosine_similarity(gradient, true, dim=0)),
        "error": float((gradient - true).norm() / true.norm()),
        "temperature": None if temperature is None else float(temperature / true_temperature),
        "value": float(mean_loss / len(counts) / value),
    }


def measure(case: Case, store: Store, device: Device) -> dict[str, Any]:
    """All arms in this number of processes."""
    return {"arms": world(_process, case.processes, case.processes)[0]}


def _process(rank: int, size: int) -> list[dict[str, Any]]:
    warnings.simplefilter("ignore")
    batches = {"": [_PER_PROCESS] * size}
    batches[", batches of different sizes"] = [5 + 3 * rank for rank in range(size)]
    return [
        {"subject": arm.subject, "name": f"{arm.name}{suffix}", "whole": arm.whole}
        | _figures(arm, rank, counts)
        for arm in arms(rank, size)
        for suffix, counts in batches.items()
        if arm.unequal or not suffix
    ]


def markdown(results: Results) -> str:
    """The page; the documentation includes the summary."""
    found = [
        {
            **arm,
            "processes": c["case"]["processes"],
            "exact": arm["error"] <= _EXACT and _off(arm["temperature"]) <= _EXACT,
            "same_direction": arm["cosine"] > 1 - _EXACT,
        }
        for c in results["cases"]
        for arm in c["arms"]
    ]
    order = list(dict.fromkeys(arm["name"] for arm in found))
    found.sort(key=lambda arm: order.index(arm["name"]))
    largest = max((arm["processes"] for arm in found), default=0)
    return report.page("ddp", **results, found=found, largest=largest, subjects=_OURS)


def _off(temperature: float | None) -> float:
    return 0.0 if temperature is None else abs(temperature - 1)
