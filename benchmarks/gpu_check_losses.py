"""What a backend of the losses must hold on the device, against the formula in float64."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_device import Device, matmul_precision
from benchmarks.parity import oracle
from contrastive_kit import which_backend
from contrastive_kit.functional import info_nce, nt_xent

BACKENDS = ("triton", "tiled")

_DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


class Outcome(NamedTuple):
    """The largest error of a check and what it may be."""

    error: float
    budget: float


Check = Callable[[], Outcome]


def gradient_budget(precision: str, temperature: float, n: int, d: int) -> float:
    """Relative error that a gradient may have, in the 2-norm."""
    if precision == "fp32":
        return max(2e-6, 2e-7 / temperature)
    if min(n, d) < 48:  # too few entries for their roundings to average out
        return max(4e-3, 2.0**-7 / temperature)
    if precision == "tf32":
        return max(1e-3, 1e-4 / temperature)
    return max(4e-3, 2e-4 / temperature)


def value_budget(precision: str, temperature: float, n: int, d: int) -> float:
    """Relative error that a loss may have."""
    if precision == "fp32":
        return max(1e-6, 2e-7 / temperature)
    return gradient_budget(precision, temperature, n, d)


def checks(device: Device) -> Iterator[tuple[str, Check]]:
    """Name and check of everything, for each backend; one that refuses yields its reason."""
    for backend in BACKENDS:
        reasons = [refusal(backend, precision, device) for precision in _DTYPES]
        if all(reasons):
            yield f"{backend}: everything", partial(_refused, str(reasons[0]))
            continue
        for name, check in _backend_checks(backend, device):
            yield f"{backend}: {name}", check


def refusal(backend: str, precision: str, device: Device) -> str:
    """Why a backend does not take embeddings of this precision; empty if it does."""
    with matmul_precision(precision):
        try:
            which_backend(
                torch.zeros(2, 2, device=device.device, dtype=_DTYPES[precision]), backend=backend
            )
        except ValueError as reason:
            return str(reason)
    return ""


def _refused(reason: str) -> Outcome:
    raise ValueError(reason)


def _backend_checks(backend: str, device: Device) -> Iterator[tuple[str, Check]]:
    sizes = [(300, 128), (4097, 128), (65, 100), (252, 256), (513, 513), (300, 2048)]
    odd = [(1000, 384), (129, 4096), (2, 2), (3, 7), (63, 60)]
    temperatures = (0.5, 0.07, 0.002)
    if device.dry:
        sizes, odd, temperatures = [(37, 19)], [(3, 7)], (0.07,)
    loss = partial(_nt_xent, backend=backend)
    clip = partial(_clip, backend=backend)
    for precision in _DTYPES:
        shapes = [*sizes, *odd] if precision in ("bf16", "fp32") else sizes[:3]
        for (n, d), t in itertools.product(shapes, temperatures):
            # A few roundings of 500 times themselves average out to nothing.
            if t >= 0.05 or min(n, d) >= 48 or precision == "fp32":
                for subject, f in (("NT-Xent", loss), ("CLIP", clip)):
                    check = partial(_against_float64, f, precision, t, (n, d), device)
                    yield f"{subject} N={n} D={d} τ={t} {precision}", check
    variants: dict[str, Callable[..., Tensor]] = {
        "three views": partial(_three_views, backend=backend),
        "equal ids": partial(_equal_ids, backend=backend),
        "decoupled": partial(_nt_xent, backend=backend, decoupled=True),
        "one direction": partial(_clip, backend=backend, symmetric=False),
        "a queue": partial(_queue, backend=backend),
        "temperature as a tensor": partial(_tensor_temperature, backend=backend),
        "embeddings of length 1e5 and 1e-3": partial(_long_and_short, backend=backend),
        "every other column": partial(_strided, backend=backend),
    }
    for name, f in variants.items():
        for precision in ("fp32", "bf16"):
            check = partial(_against_float64, f, precision, 0.1, sizes[0], device)
            yield f"{name} {precision}", check
    for precision in ("fp32", "bf16"):
        yield f"loss of 1e-12 {precision}", partial(_tiny_loss, backend, precision, device)
    yield "identical rows: log(2N - 1)", partial(_identical_rows, backend, device)
    yield "NaN propagates", partial(_nan_propagates, backend, device)
    yield "the same under autocast", partial(_same_under_autocast, backend, device)
    if not device.dry:
        yield "the same under torch.compile", partial(_same_compiled, backend)
        yield "the same on another stream", partial(_same_on_a_stream, backend)
        yield "waits for nothing", partial(_waits_for_nothing, backend)
        yield "CUDA graph follows its inputs", partial(_graph_follows, backend, device)
        yield "rows beyond 2³¹ elements", partial(_far_rows, backend)
        yield "N = 65,536: MiB beyond the inputs", partial(_large_batch, backend, device)


@contextmanager
def poisoned(device: Device) -> Iterator[None]:
    """Memory that nobody has written is NaN: what torch allocates, and what it has cached."""
    originals = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.requires_grad:
                tensor.fill_(torch.nan)
            return tensor

        return call

    freed = [torch.full((size,), torch.nan, device=device.device) for size in (2**12, 2**20)]
    del freed
    with (
        mock.patch.object(torch, "empty", fill(originals[0])),
        mock.patch.object(torch, "empty_like", fill(originals[1])),
        mock.patch.object(torch.Tensor, "new_empty", fill(originals[2])),
    ):
        yield


def _views(n: int, d: int, device: Device, dtype: torch.dtype, noise: float = 1.0) -> list[Tensor]:
    """Fresh random views, another at each call."""
    image = torch.randn(n, d, device=device.device)
    views = (image + noise * torch.randn(n, d, device=device.device) for _ in range(2))
    return [z.to(dtype).requires_grad_() for z in views]


def _gradients(
    loss: Callable[..., Tensor], views: list[Tensor], temperature: float
) -> list[Tensor]:
    """Value and gradients, as large as under loss scaling: half precision must hold them."""
    value = loss(*views, temperature=temperature) * len(views[0])
    return [value.detach(), *torch.autograd.grad(value, views)]


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm; what float32 cannot hold counts as zero."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp(min=1e-30))


def _against_float64(
    loss: Callable[..., Tensor],
    precision: str,
    temperature: float,
    size: tuple[int, int],
    device: Device,
) -> Outcome:
    """Value and gradient against the formula, twice the same, on poisoned memory.

    The error is the larger of the two, in units of its budget.
    """
    views = _views(*size, device, _DTYPES[precision])
    exact = [z.detach().double().requires_grad_() for z in views]
    expected = _gradients(partial(loss, backend="reference"), exact, temperature)
    with matmul_precision(precision), poisoned(device):
        actual = _gradients(loss, views, temperature)
        again = _gradients(loss, views, temperature)
    _same_twice(actual, again)
    value = _error(actual[0], expected[0]) / value_budget(precision, temperature, *size)
    gradient = _error(torch.stack(actual[1:]), torch.stack(expected[1:]))
    return Outcome(max(value, gradient / gradient_budget(precision, temperature, *size)), 1.0)


def _same_twice(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        if not torch.equal(a, b):
            raise AssertionError("two runs on the same embeddings differ, or there is a NaN")


def _nt_xent(
    z1: Tensor, z2: Tensor, *, temperature: float, backend: str, decoupled: bool = False
) -> Tensor:
    return nt_xent(z1, z2, temperature=temperature, backend=backend, decoupled=decoupled)


def _clip(
    z1: Tensor, z2: Tensor, *, temperature: float, backend: str, symmetric: bool = True
) -> Tensor:
    return info_nce(z1, z2, temperature=temperature, backend=backend, symmetric=symmetric)


def _three_views(z1: Tensor, z2: Tensor, *, temperature: float, backend: str) -> Tensor:
    return nt_xent(z1, z2, z1.flip(1), temperature=temperature, backend=backend)


def _equal_ids(z1: Tensor, z2: Tensor, *, temperature: float, backend: str) -> Tensor:
    ids = torch.arange(len(z1), device=z1.device) // 3
    return nt_xent(z1, z2, ids=ids, temperature=temperature, backend=backend)


def _queue(z1: Tensor, z2: Tensor, *, temperature: float, backend: str) -> Tensor:
    queue = torch.cat([z2.flip(1), z2.roll(1, 1)]).detach()
    return info_nce(z1, z2, queue, temperature=temperature, backend=backend)


def _tensor_temperature(z1: Tensor, z2: Tensor, *, temperature: float, backend: str) -> Tensor:
    """The gradient with respect to the temperature goes through the length of the second view."""
    dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
    learnt = temperature * (1 + 0.1 * z2[0, 0].to(dtype).tanh())
    return nt_xent(z1, z2, temperature=learnt, backend=backend)


def _long_and_short(z1: Tensor, z2: Tensor, *, temperature: float, backend: str) -> Tensor:
    return nt_xent(z1 * 2**13, z2 * 2**-13, temperature=temperature, backend=backend)


def _strided(z1: Tensor, z2: Tensor, *, temperature: float, backend: str) -> Tensor:
    return nt_xent(
        z1[:, ::2], z2.T.contiguous().T[:, ::2], temperature=temperature, backend=backend
    )


def _tiny_loss(backend: str, precision: str, device: Device) -> Outcome:
    """Views that nearly agree: eager float32 returns exactly 0."""
    views = _views(37 if device.dry else 256, 128, device, _DTYPES[precision], noise=1e-3)
    temperature = 0.025
    expected = oracle("nt_xent", *views, temperature)
    if not 0 < float(expected.loss) < 1e-7:
        raise AssertionError(f"the loss is {float(expected.loss):.1e}, and not tiny")
    with poisoned(device):
        loss = nt_xent(*views, temperature=temperature, backend=backend)
    budget = 1e-3 if precision == "fp32" else 2.0**-7 / temperature
    return Outcome(_error(loss.detach(), expected.loss), budget)


def _identical_rows(backend: str, device: Device) -> Outcome:
    z = torch.ones(65, 100, device=device.device).requires_grad_()
    loss = nt_xent(z, z, backend=backend)
    expected = torch.tensor(2.0 * 65 - 1, dtype=torch.float64).log()
    return Outcome(_error(loss.detach().cpu(), expected), 1e-6)


def _nan_propagates(backend: str, device: Device) -> Outcome:
    views = _views(130, 64, device, torch.float32)
    with torch.no_grad():
        views[0][3, 5] = torch.nan
    loss = nt_xent(*views, backend=backend)
    return Outcome(0.0 if bool(loss.isnan()) else 1.0, 0.5)


def _both(backend: str, views: list[Tensor]) -> list[Tensor]:
    return _gradients(partial(_nt_xent, backend=backend), views, 0.1)


def _bits_differ(first: list[Tensor], second: list[Tensor]) -> Outcome:
    """The number of tensors that are not the same bit for bit."""
    different = sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return Outcome(float(different), 0.0)


def _same_under_autocast(backend: str, device: Device) -> Outcome:
    views = _views(130, 64, device, torch.float32)
    expected = _both(backend, views)
    with torch.autocast(device.device.type, torch.bfloat16):
        return _bits_differ(_both(backend, views), expected)


def _same_compiled(backend: str) -> Outcome:
    torch.compiler.reset()
    views = _views(130, 64, Device(dry=False), torch.float32)

    # The sum of squares is the compiler's own; a graph break raises.
    def total(z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(z1, z2, temperature=0.1, backend=backend) + (z1 * z1).sum()

    compiled = torch.compile(total, fullgraph=True)
    expected = torch.stack(torch.autograd.grad(total(*views), views))
    actual = torch.stack(torch.autograd.grad(compiled(*views), views))
    return Outcome(_error(actual, expected), 1e-5)


def _same_on_a_stream(backend: str) -> Outcome:
    """On a stream of its own, while the default stream is kept busy with other memory."""
    views = _views(1000, 128, Device(dry=False), torch.bfloat16)
    expected = _both(backend, views)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    noise = torch.randn(4096, 4096, device="cuda")
    for _ in range(10):
        noise = noise @ noise / 64
    with torch.cuda.stream(stream):
        actual = _both(backend, views)
    torch.cuda.synchronize()
    return _bits_differ(actual, expected)


def _waits_for_nothing(backend: str) -> Outcome:
    views = _views(1000, 128, Device(dry=False), torch.bfloat16)
    _both(backend, views)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _both(backend, views)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Outcome(0.0, 0.0)


def _graph_follows(backend: str, device: Device) -> Outcome:
    views = _views(300, 128, device, torch.bfloat16)
    replay, captured = device.graphed(partial(_both, backend, views))
    with torch.no_grad():
        for z in views:
            z.copy_(torch.randn_like(z))
    replay()
    torch.cuda.synchronize()
    return _bits_differ(captured, _both(backend, views))


def _far_rows(backend: str) -> Outcome:
    """Embeddings inside a matrix of more than 2³¹ elements, so that offsets need 64 bits."""
    n, d, width = 1100, 128, 2**21
    wide = torch.empty(n, width, device="cuda", dtype=torch.bfloat16)
    views = []
    for start in (0, width - d):
        wide[:, start : start + d] = torch.randn(n, d, device="cuda")
        views.append(wide[:, start : start + d].detach().requires_grad_())
    near = [z.detach().clone().requires_grad_() for z in views]
    return _bits_differ(_both(backend, views), _both(backend, near))


def _large_batch(backend: str, device: Device) -> Outcome:
    views = _views(65536, 128, device, torch.bfloat16)
    extra = device.extra_mib(partial(_both, backend, views))
    return Outcome(extra or 0.0, 1024.0)
