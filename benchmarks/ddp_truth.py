"""What gradient a distributed loss really gives, beside that of one process on the whole batch.

``python -m benchmarks.ddp_truth`` writes ``results/ddp_truth.md``; ``--sizes 2 3`` runs fewer.
"""

import argparse
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import describe
from benchmarks.markdown import table
from contrastive_kit import reference
from contrastive_kit.functional import info_nce, nt_xent, siglip

RESULT = Path(__file__).parent / "results" / "ddp_truth.md"
SIZES = (2, 3, 4)
_PER_PROCESS, _IN, _OUT, _TEMPERATURE = 8, 6, 8, 0.2
_BIAS = -2.0
_EXACT = 1e-6

# Takes both views of the own rows, unit rows (n, D), and the inverse temperature.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Arm(NamedTuple):
    """A loss as a user of DDP calls it.

    Attributes:
        subject: which formula it must equal.
        name: library and options.
        loss: the call.
        whole: whether it is a loss over the whole batch, or over that of each process.
        learnable: whether it takes the temperature that is learned; else it has its own number.
        unequal: whether it is also run with batches of different sizes.
    """

    subject: str
    name: str
    loss: Loss
    whole: bool = True
    learnable: bool = False
    unequal: bool = False


class Measured(NamedTuple):
    """The gradient of all parameters after DDP's mean, beside the true one.

    Attributes:
        scale: its projection on the true gradient, as a multiple of that.
        cosine: of the angle between them.
        error: the length of their difference, relative to the true one.
        temperature: gradient of the inverse temperature as a multiple of the true one; NaN if the
            loss has none.
        value: mean loss over processes as a multiple of the true one.
    """

    scale: float
    cosine: float
    error: float
    temperature: float
    value: float


class Result(NamedTuple):
    """What an arm gave; ``whole`` if it is a loss over the whole batch."""

    subject: str
    name: str
    whole: bool
    figures: Measured


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


def arms(rank: int, size: int) -> Iterator[Arm]:
    """Ours and those of the installed peers."""
    yield Arm(
        "NT-Xent",
        "contrastive-kit, `gather_distributed=True`",
        lambda a, b, s: nt_xent(a, b, temperature=1 / s, gather_distributed=True),
        learnable=True,
        unequal=True,
    )
    yield Arm(
        "NT-Xent",
        "contrastive-kit, default: negatives of the own process only",
        lambda a, b, s: nt_xent(a, b, temperature=1 / s),
        whole=False,
        learnable=True,
    )
    yield Arm(
        "CLIP",
        "contrastive-kit, `gather_distributed=True`",
        lambda a, b, s: info_nce(a, b, temperature=1 / s, symmetric=True, gather_distributed=True),
        learnable=True,
        unequal=True,
    )
    yield Arm(
        "CLIP",
        "contrastive-kit, default: negatives of the own process only",
        lambda a, b, s: info_nce(a, b, temperature=1 / s, symmetric=True),
        whole=False,
        learnable=True,
    )
    yield Arm(
        "SigLIP",
        "contrastive-kit, `gather_distributed=True`",
        lambda a, b, s: siglip(a, b, temperature=1 / s, logit_bias=_BIAS, gather_distributed=True),
        learnable=True,
        unequal=True,
    )
    yield Arm(
        "SigLIP",
        "contrastive-kit, default: negatives of the own process only",
        lambda a, b, s: siglip(a, b, temperature=1 / s, logit_bias=_BIAS),
        whole=False,
        learnable=True,
    )
    for peer in (_lightly, _metric_learning, _open_clip):
        try:
            yield from peer(rank, size)
        except ImportError:
            continue


def _lightly(rank: int, size: int) -> Iterator[Arm]:
    from lightly.loss import NTXentLoss

    for gather in (True, False):
        loss = NTXentLoss(_TEMPERATURE, gather_distributed=gather)
        yield Arm(
            "NT-Xent",
            f"lightly, `gather_distributed={gather}`",
            lambda a, b, s, loss=loss: loss(a, b),  # type: ignore[misc]
            whole=gather,
        )


def _metric_learning(rank: int, size: int) -> Iterator[Arm]:
    from pytorch_metric_learning.losses import NTXentLoss
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    labels = torch.arange(_PER_PROCESS).repeat(2) + rank * _PER_PROCESS
    for efficient in (False, True):
        loss = DistributedLossWrapper(NTXentLoss(_TEMPERATURE), efficient=efficient)
        yield Arm(
            "NT-Xent",
            f"pytorch-metric-learning, `efficient={efficient}`",
            lambda a, b, s, loss=loss: loss(torch.cat([a, b]), labels),  # type: ignore[misc]
        )


def _open_clip(rank: int, size: int) -> Iterator[Arm]:
    from open_clip.loss import ClipLoss, SigLipLoss

    for local_loss in (False, True):
        for with_grad in (False, True):
            loss = ClipLoss(
                local_loss=local_loss, gather_with_grad=with_grad, rank=rank, world_size=size
            )
            default = " (the default)" if not (local_loss or with_grad) else ""
            yield Arm(
                "CLIP",
                f"open_clip, `local_loss={local_loss}, gather_with_grad={with_grad}`{default}",
                lambda a, b, s, loss=loss: loss(a, b, s),  # type: ignore[misc]
                learnable=True,
            )
    for exchange in ("bidir", "shift", "reduce", "gather"):
        sigmoid_loss = SigLipLoss(rank=rank, world_size=size, dist_impl=exchange)
        default = " (the default)" if exchange == "bidir" else ""
        yield Arm(
            "SigLIP",
            f"open_clip, `dist_impl={exchange!r}`{default}",
            lambda a, b, s, loss=sigmoid_loss: loss(a, b, s, _BIAS),  # type: ignore[misc]
            learnable=True,
        )


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


def measure(arm: Arm, rank: int, counts: list[int]) -> Measured:
    """Run one step of DDP with ``counts`` rows on each process."""
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
    return Measured(
        scale=float(gradient @ true / (true @ true)),
        cosine=float(F.cosine_similarity(gradient, true, dim=0)),
        error=float((gradient - true).norm() / true.norm()),
        temperature=torch.nan if temperature is None else float(temperature / true_temperature),
        value=float(mean_loss / len(counts) / value),
    )


def unequal_counts(size: int) -> list[int]:
    """Batches of 5, 8, 11, ... rows."""
    return [5 + 3 * rank for rank in range(size)]


def run(size: int) -> list[Result]:
    """All arms in ``size`` processes."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_process, args=(rank, size, f"file://{folder}/store", queue))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        results: list[Result] = queue.get()
        for process in processes:
            process.join()
    return results


def _process(rank: int, size: int, meeting_point: str, queue: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=size)
    results = []
    for arm in arms(rank, size):
        figures = measure(arm, rank, [_PER_PROCESS] * size)
        results.append(Result(arm.subject, arm.name, arm.whole, figures))
        if arm.unequal:
            name = f"{arm.name}, batches of different sizes"
            figures = measure(arm, rank, unequal_counts(size))
            results.append(Result(arm.subject, name, arm.whole, figures))
    if rank == 0:
        queue.put(results)
    dist.destroy_process_group()


def markdown(results: dict[int, list[Result]], machine: dict[str, Any]) -> str:
    """The report."""
    sizes = list(results)
    packages = ", ".join(
        f"{name} {version or 'not installed'}" for name, version in machine["packages"].items()
    )
    commit = (machine["commit"] or "unknown") + (
        " with uncommitted changes" if machine["uncommitted_changes"] else ""
    )
    unequal = {size: ", ".join(map(str, unequal_counts(size))) for size in sizes}
    sections = [
        "# The gradient under DDP, beside that of one process",
        "Written by `python -m benchmarks.ddp_truth`. The gradient of all weights of a small "
        "network after one step of `DistributedDataParallel` (gloo, float64), against the gradient "
        "of the formula on the concatenated batch in one process. **scale** is its projection on "
        "the true gradient as a multiple of that, **cosine** that of the angle between them, "
        "**error** the length of the difference, relative. **d τ** is the gradient of a learnable "
        "temperature, **loss** the mean over processes of the loss that the call returned, both as "
        f"multiples of the true one. A row is *exact* if error is at most {_EXACT:.0e}, and |d τ "
        "- 1| where there is one. Without gathering the negatives are those of the own process: "
        "another loss, that of a smaller batch, not a mistake.",
        f"- Date {machine['date']}, commit {commit}\n- Python {machine['python']}, {packages}\n"
        f"- {_PER_PROCESS} images a process, temperature {_TEMPERATURE}; batches of different "
        "sizes: " + "; ".join(f"{counts} images" for counts in unequal.values()),
    ]
    sections.append(_summary(results[sizes[-1]], sizes[-1]))
    for subject in dict.fromkeys(r.subject for r in results[sizes[0]]):
        names = [r.name for r in results[sizes[0]] if r.subject == subject]
        rows = [
            _row(name, size, r.figures)
            for name in names
            for size in sizes
            for r in results[size]
            if (r.subject, r.name) == (subject, name)
        ]
        header = ["loss and options", "processes", "scale", "cosine", "error", "d τ", "loss", ""]
        sections.append(f"## {subject}\n\n{table(header, rows)}")
    return "\n\n".join(sections) + "\n"


def _summary(results: list[Result], size: int) -> str:
    """The losses over the whole batch in the largest number of processes, for the documentation."""
    header = ["formula", "loss and options", f"gradient after DDP's mean, {size} processes"]
    rows = [(r.subject, r.name, _verdict(r.figures)) for r in results if r.whole]
    rows.sort(key=lambda row: row[0])
    return f"<!-- summary start -->\n\n{table(header, rows)}\n\n<!-- summary end -->"


def _verdict(m: Measured) -> str:
    if _is_exact(m):
        return "exact"
    if m.cosine > 1 - _EXACT:
        return f"{m.scale:.3g} times the true one"
    return (
        f"another direction (cosine {m.cosine:.3f}), {m.scale:.3g} times as long along the true one"
    )


def _is_exact(m: Measured) -> bool:
    return m.error <= _EXACT and not abs(m.temperature - 1) > _EXACT


def _row(name: str, size: int, m: Measured) -> list[object]:
    has_temperature = m.temperature == m.temperature
    return [
        name,
        size,
        f"{m.scale:.4f}",
        f"{m.cosine:.4f}",
        f"{m.error:.1e}",
        f"{m.temperature:.4f}" if has_temperature else "",
        f"{m.value:.4f}",
        "exact" if _is_exact(m) else "**not exact**",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    machine = describe()
    report = markdown({size: run(size) for size in options.sizes}, machine)
    options.out.write_text(report)
    print(report)


if __name__ == "__main__":
    main()
