"""Time of the host in a step on a GPU, measured without one: a driver that launches nothing.

All that Python and torch do for a step is done, tensors of the CPU stand for those of the GPU, and
Triton compiles, binds and launches through a driver whose launches return at once. Results are
not written, so that no figure says anything of a kernel. Torch's own operations compute, on two
images, in a time that is small beside their dispatch. What is not in it: torch's and Triton's calls
of the CUDA driver, some microseconds a launch, of which eager makes most.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import plan, report
from benchmarks.harness.device import Device
from benchmarks.harness.measure import ratios, spread, time_interleaved
from benchmarks.harness.report import Results
from benchmarks.harness.store import Store
from contrastive_kit.functional import info_nce, nt_xent, siglip

_IMAGES, _TEMPERATURE, _BIAS = 2, 0.1, -10.0
_PROCESSORS, _CAPABILITY = 132, 90  # those of an H100
OURS, EAGER = "contrastive-kit", "eager"
# Torch operations that launch nothing.
_QUIET = {
    "alias", "_unsafe_view", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty",
    "permute", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze",
    "view",
}  # fmt: skip


class Case(NamedTuple):
    loss: str  # of _LOSSES
    d: int
    dtype: str
    budget_s: float = 5.0
    threads: int = 1


cases = partial(plan.read, Case, "host")


def _eager_nt_xent(a: Tensor, b: Tensor, reduction: str = "mean") -> Tensor:
    z = F.normalize(torch.cat([a, b]).float(), dim=1)
    logits = (z @ z.T / _TEMPERATURE).masked_fill_(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    target = torch.arange(len(z)).roll(len(a))
    return F.cross_entropy(logits, target, reduction=reduction)


def _eager_clip(a: Tensor, b: Tensor) -> Tensor:
    logits = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T / _TEMPERATURE
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _eager_siglip(a: Tensor, b: Tensor) -> Tensor:
    logits = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T / _TEMPERATURE + _BIAS
    labels = 2 * torch.eye(len(a)) - 1
    return -F.logsigmoid(labels * logits).sum() / len(a)


Loss = Callable[[Tensor, Tensor], Tensor]
# Ours and eager.
_LOSSES: dict[str, tuple[Loss, Loss]] = {
    "NT-Xent": (partial(nt_xent, temperature=_TEMPERATURE, backend="triton"), _eager_nt_xent),
    "NT-Xent, sum": (
        partial(nt_xent, temperature=_TEMPERATURE, reduction="sum", backend="triton"),
        partial(_eager_nt_xent, reduction="sum"),
    ),
    "CLIP": (
        partial(info_nce, temperature=_TEMPERATURE, symmetric=True, backend="triton"),
        _eager_clip,
    ),
    # It has no kernel, and takes the way of any device.
    "SigLIP": (partial(siglip, temperature=_TEMPERATURE, logit_bias=_BIAS), _eager_siglip),
}


class _Driver:
    """A driver of Triton's for a card that is not there; remembers what was launched."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.utils = mock.Mock(spec=["load_binary", "get_device_properties"])
        self.utils.load_binary.return_value = (1, 1, 100, 0, 1024)
        self.utils.get_device_properties.return_value = {
            "max_shared_mem": 232448, "multiprocessor_count": _PROCESSORS,
        }  # fmt: skip

    def launcher_cls(self, source: Any, metadata: object) -> Callable[..., None]:
        name = source.fn.__name__
        return lambda *arguments: self.launched.append(name)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", _CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


# One for the process: kernels keep the launcher of the driver for which they were compiled.
_driver = functools.cache(_Driver)


def _processors(device: torch.device) -> int:
    return _PROCESSORS


@contextmanager
def _card() -> Any:
    """Within, the losses' kernels take tensors of the CPU; yields the driver."""
    from triton.runtime import driver

    from contrastive_kit.ops.triton import device

    card = _driver()
    driver.set_active(card)  # for good: Triton goes back to none where there is none
    with (
        mock.patch.object(device, "_INTERPRETED", True),
        mock.patch.object(device, "processors", _processors),
    ):
        yield card


class _Operations(TorchDispatchMode):
    """Counts torch operations that would launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in _QUIET:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def measure(case: Case, store: Store, device: Device) -> dict[str, Any]:
    """Microseconds of a forward and backward of both arms, their ratio, and our launches."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (_IMAGES, case.d), getattr(torch, case.dtype)
    a, b = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    arms = dict(zip((OURS, EAGER), _LOSSES[case.loss], strict=True))

    def step(loss: Loss) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(a, b), (a, b))

    with _card() as card:
        step(arms[OURS])  # compiles
        card.launched.clear()
        with _Operations() as operations:
            step(arms[OURS])
        kernels = list(card.launched)
        calls = {name: partial(step, loss) for name, loss in arms.items()}
        seconds = time_interleaved(calls, budget_s=case.budget_s)
    return {
        "microseconds": {name: spread([x * 1e6 for x in s]) for name, s in seconds.items()},
        "of_eager": spread(ratios(seconds[OURS], seconds[EAGER])),
        "launches": {"triton": len(kernels), "torch": len(operations.names)},
    }


def markdown(results: Results) -> str:
    """The page."""
    return report.page("host", **results, ours=OURS, eager=EAGER)
