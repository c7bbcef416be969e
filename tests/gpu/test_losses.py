"""What a backend of the losses must hold on a GPU, against the formula in float64."""

import math
from functools import partial

import pytest
import torch

from benchmarks.harness.device import Device, forbid_waiting, matmul_precision
from benchmarks.losses.oracle import oracle
from contrastive_kit import which_backend
from contrastive_kit.functional import info_nce, nt_xent

pytestmark = pytest.mark.gpu

DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
SIZES = [(300, 128), (4097, 128), (65, 100)]
MORE = [(252, 256), (513, 513), (300, 2048), (1000, 384), (129, 4096), (2, 2), (3, 7), (63, 60)]
CASES = [
    (precision, size, temperature)
    for precision in PRECISIONS
    for size in (SIZES + MORE if precision in ("fp32", "bf16") else SIZES)
    for temperature in (0.5, 0.07, 0.002)
    # A few roundings of 500 times themselves average out to nothing.
    if temperature >= 0.05 or min(size) >= 48 or precision == "fp32"
]


@pytest.fixture(params=["triton", "tiled"])
def kernels(request):
    """A backend by name; "backend" would skip Triton where it is not interpreted."""
    return request.param


def refuse(backend, precision, device):
    """Skip with the reason of a backend that takes no such embeddings."""
    with matmul_precision(precision):
        try:
            which_backend(
                torch.zeros(2, 2, device=device, dtype=DTYPES[precision]), backend=backend
            )
        except ValueError as reason:
            pytest.skip(str(reason))


def gradient_budget(precision, temperature, n, d):
    """Relative error that a gradient may have, in the 2-norm."""
    if precision == "fp32":
        return max(2e-6, 2e-7 / temperature)
    if min(n, d) < 48:  # too few entries for their roundings to average out
        return max(4e-3, 2.0**-7 / temperature)
    if precision == "tf32":
        return max(1e-3, 1e-4 / temperature)
    return max(4e-3, 2e-4 / temperature)


def value_budget(precision, temperature, n, d):
    """Relative error that a loss may have."""
    if precision == "fp32":
        return max(1e-6, 2e-7 / temperature)
    return gradient_budget(precision, temperature, n, d)


def views(n, d, device, dtype, noise=1.0):
    image = torch.randn(n, d, device=device)
    pair = (image + noise * torch.randn(n, d, device=device) for _ in range(2))
    return [z.to(dtype).requires_grad_() for z in pair]


def gradients(loss, pair, temperature=0.1):
    """Value and gradients, as large as under loss scaling: half precision must hold them."""
    value = loss(*pair, temperature=temperature) * len(pair[0])
    return [value.detach(), *torch.autograd.grad(value, pair)]


def relative_error(actual, expected):
    """In the 2-norm; what float32 cannot hold counts as zero."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp(min=1e-30))


def errors(actual, expected):
    """Of the value, and of all gradients together."""
    return (
        relative_error(actual[0], expected[0]),
        relative_error(torch.stack(actual[1:]), torch.stack(expected[1:])),
    )


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b), "two runs on the same embeddings differ, or there is a NaN"


def check(loss, backend, precision, size, temperature, device):
    """Value and gradient against the formula, twice the same bits."""
    refuse(backend, precision, device)
    pair = views(*size, device, DTYPES[precision])
    exact = [z.detach().double().requires_grad_() for z in pair]
    expected = gradients(partial(loss, backend="reference"), exact, temperature)
    with matmul_precision(precision):
        actual = gradients(partial(loss, backend=backend), pair, temperature)
        again = gradients(partial(loss, backend=backend), pair, temperature)
    assert_same_bits(actual, again)
    value, gradient = errors(actual, expected)
    budgets = (
        value_budget(precision, temperature, *size),
        gradient_budget(precision, temperature, *size),
    )
    if min(size) < 4:  # two entries can cancel, whoever computes them
        eager = gradients(partial(loss, backend="reference"), pair, temperature)
        budgets = tuple(map(max, budgets, (4 * error for error in errors(eager, expected))))
    assert value <= budgets[0]
    assert gradient <= budgets[1]


clip = partial(info_nce, symmetric=True)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("loss", [nt_xent, clip], ids=["nt_xent", "clip"])
@pytest.mark.parametrize(
    ("precision", "size", "temperature"), CASES, ids=[f"{p}-{s}-{t}" for p, s, t in CASES]
)
def test_value_and_gradient(kernels, loss, precision, size, temperature, device, scale):
    check(loss, kernels, precision, scale(*size), temperature, device)


def three_views(z1, z2, **options):
    return nt_xent(z1, z2, z1.flip(1), **options)


def equal_ids(z1, z2, **options):
    return nt_xent(z1, z2, ids=torch.arange(len(z1), device=z1.device) // 3, **options)


def queue(z1, z2, **options):
    return info_nce(z1, z2, torch.cat([z2.flip(1), z2.roll(1, 1)]).detach(), **options)


def tensor_temperature(z1, z2, *, temperature, **options):
    """The gradient with respect to the temperature goes through the length of the second view."""
    dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
    return nt_xent(
        z1, z2, temperature=temperature * (1 + 0.1 * z2[0, 0].to(dtype).tanh()), **options
    )


def decoupled(z1, z2, *, temperature, **options):
    """Its value crosses zero, where a relative error says nothing: raised by the largest logits."""
    return nt_xent(z1, z2, temperature=temperature, decoupled=True, **options) + 2 / temperature


def long_and_short(z1, z2, **options):
    return nt_xent(z1 * 2**13, z2 * 2**-13, **options)


def strided(z1, z2, **options):
    return nt_xent(z1[:, ::2], z2.T.contiguous().T[:, ::2], **options)


VARIANTS = {
    "three views": three_views,
    "equal ids": equal_ids,
    "decoupled": decoupled,
    "one direction": info_nce,
    "a queue": queue,
    "temperature as a tensor": tensor_temperature,
    "embeddings of length 1e5 and 1e-3": long_and_short,
    "every other column": strided,
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(kernels, variant, precision, device, scale):
    check(VARIANTS[variant], kernels, precision, scale(300, 128), 0.1, device)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tiny_loss_is_not_zero(kernels, precision, device, scale):
    refuse(kernels, precision, device)
    (n,), temperature = scale(256), 0.025
    pair = views(n, 128, device, DTYPES[precision], noise=1e-3)
    expected = oracle("nt_xent", *pair, temperature).loss
    assert 0 < float(expected) < 1e-7
    loss = nt_xent(*pair, temperature=temperature, backend=kernels)
    budget = 1e-3 if precision == "fp32" else 2.0**-7 / temperature
    assert relative_error(loss.detach(), expected) <= budget


def test_identical_rows(kernels, device):
    refuse(kernels, "fp32", device)
    z = torch.ones(65, 100, device=device).requires_grad_()
    loss = nt_xent(z, z, backend=kernels)
    assert float(loss.detach()) == pytest.approx(math.log(2 * 65 - 1), rel=1e-6)


def test_nan_propagates(kernels, device):
    refuse(kernels, "fp32", device)
    z1, z2 = views(130, 64, device, torch.float32)
    with torch.no_grad():
        z1[3, 5] = torch.nan
    assert nt_xent(z1, z2, backend=kernels).isnan()


def test_autocast_changes_nothing(kernels, device):
    refuse(kernels, "fp32", device)
    pair, loss = views(130, 64, device, torch.float32), partial(nt_xent, backend=kernels)
    expected = gradients(loss, pair)
    with torch.autocast(device.type, torch.bfloat16):
        assert_same_bits(gradients(loss, pair), expected)


def test_compiled_is_the_same(kernels, cuda):
    refuse(kernels, "fp32", cuda)
    torch.compiler.reset()
    pair = views(130, 64, cuda, torch.float32)

    # The sum of squares is the compiler's own; a graph break raises.
    def total(z1, z2):
        return nt_xent(z1, z2, temperature=0.1, backend=kernels) + (z1 * z1).sum()

    expected = torch.stack(torch.autograd.grad(total(*pair), pair))
    compiled = torch.compile(total, fullgraph=True)
    actual = torch.stack(torch.autograd.grad(compiled(*pair), pair))
    assert relative_error(actual, expected) <= 1e-5


def test_another_stream_while_the_default_one_is_busy(kernels, cuda):
    refuse(kernels, "bf16", cuda)
    pair, loss = views(1000, 128, cuda, torch.bfloat16), partial(nt_xent, backend=kernels)
    expected = gradients(loss, pair)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    noise = torch.randn(4096, 4096, device=cuda)
    for _ in range(10):
        noise = noise @ noise / 64
    with torch.cuda.stream(stream):
        actual = gradients(loss, pair)
    torch.cuda.synchronize()
    assert_same_bits(actual, expected)


def test_waits_for_nothing(kernels, cuda):
    refuse(kernels, "bf16", cuda)
    pair, loss = views(1000, 128, cuda, torch.bfloat16), partial(nt_xent, backend=kernels)
    gradients(loss, pair)
    torch.cuda.synchronize()
    with forbid_waiting():
        gradients(loss, pair)


def test_a_cuda_graph_follows_its_inputs(kernels, cuda):
    refuse(kernels, "bf16", cuda)
    pair = views(300, 128, cuda, torch.bfloat16)
    call = partial(gradients, partial(nt_xent, backend=kernels), pair)
    replay, captured = Device("cuda").graphed(call)
    with torch.no_grad():
        for z in pair:
            z.copy_(torch.randn_like(z))
    replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, call())


def test_rows_beyond_2_to_the_31_elements(kernels, cuda):
    """Embeddings inside a matrix so large that offsets need 64 bits."""
    refuse(kernels, "bf16", cuda)
    n, d, width = 1100, 128, 2**21
    wide = torch.empty(n, width, device=cuda, dtype=torch.bfloat16)
    far = []
    for start in (0, width - d):
        wide[:, start : start + d] = torch.randn(n, d, device=cuda)
        far.append(wide[:, start : start + d].detach().requires_grad_())
    near = [z.detach().clone().requires_grad_() for z in far]
    loss = partial(nt_xent, backend=kernels)
    assert_same_bits(gradients(loss, far), gradients(loss, near))


def test_65536_pairs_take_less_than_a_gibibyte(kernels, cuda):
    refuse(kernels, "bf16", cuda)
    pair = views(65536, 128, cuda, torch.bfloat16)
    call = partial(gradients, partial(nt_xent, backend=kernels), pair)
    assert Device("cuda").extra_mib(call) <= 1024
