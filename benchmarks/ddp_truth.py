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
from contrastive_kit.functional import info_nce, nt_xent
from contrastive_kit.reference import info_nce as reference_info_nce
from contrastive_kit.reference import nt_xent as reference_nt_xent

RESULT = Path(__file__).parent / "results" / "ddp_truth.md"
SIZES = (2, 3, 4)
_PER_PROCESS, _IN, _OUT, _TEMPERATURE = 8, 6, 8, 0.2
_EXACT = 1e-6

# Takes both views of the own rows, unit rows (n, D), and the inverse temperature.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Arm(NamedTuple):
    """A loss as a user of DDP calls it.

    Attributes:
        subject: which formula it must equal.
        name: library and options.
        loss: the call.
        learnable: whether it takes the temperature that is learned; else it has its own number.
        unequal: whether it is also run with batches of different sizes.
    """

    subject: str
    name: str
    loss: Loss
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
    from open_clip.loss import ClipLoss

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


def truth(subject: str, model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients that one process finds on the whole batch, by the formula."""
    a, b, scale = model(x, y)
    if subject == "NT-Xent":
        loss = reference_nt_xent(torch.stack([a, b]), 1 / scale).mean()
    else:
        ids = torch.arange(len(a))
        both = [reference_info_nce(*pair, 1 / scale, ids).mean() for pair in ((a, b), (b, a))]
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


def run(size: int) -> list[tuple[str, str, Measured]]:
    """All arms in ``size`` processes: subject, name and figures of each."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_process, args=(rank, size, f"file://{folder}/store", queue))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        results: list[tuple[str, str, Measured]] = queue.get()
        for process in processes:
            process.join()
    return results


def _process(rank: int, size: int, meeting_point: str, queue: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=size)
    results = []
    for arm in arms(rank, size):
        results.append((arm.subject, arm.name, measure(arm, rank, [_PER_PROCESS] * size)))
        if arm.unequal:
            name = f"{arm.name}, batches of different sizes"
            results.append((arm.subject, name, measure(arm, rank, unequal_counts(size))))
    if rank == 0:
        queue.put(results)
    dist.destroy_process_group()


def markdown(results: dict[int, list[tuple[str, str, Measured]]], machine: dict[str, Any]) -> str:
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
    for subject in dict.fromkeys(subject for rows in results.values() for subject, _, _ in rows):
        names = [name for s, name, _ in results[sizes[0]] if s == subject]
        rows = []
        for name in names:
            for size in sizes:
                (figures,) = (m for s, n, m in results[size] if (s, n) == (subject, name))
                rows.append(_row(name, size, figures))
        header = ["loss and options", "processes", "scale", "cosine", "error", "d τ", "loss", ""]
        sections.append(f"## {subject}\n\n{table(header, rows)}")
    return "\n\n".join(sections) + "\n"


def _row(name: str, size: int, m: Measured) -> list[object]:
    has_temperature = m.temperature == m.temperature
    exact = m.error <= _EXACT and not (has_temperature and abs(m.temperature - 1) > _EXACT)
    return [
        name,
        size,
        f"{m.scale:.4f}",
        f"{m.cosine:.4f}",
        f"{m.error:.1e}",
        f"{m.temperature:.4f}" if has_temperature else "",
        f"{m.value:.4f}",
        "exact" if exact else "**not exact**",
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
