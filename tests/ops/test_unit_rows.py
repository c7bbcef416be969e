"""Normalized and scaled rows: exact, safe at the ends of the range, right gradients."""

import pytest
import torch
import torch.nn.functional as F
from budgets import assert_within
from hypothesis import given
from hypothesis import strategies as st

from contrastive_kit.ops import scaled_unit_rows, unit_rows


@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (63, 60), (5, 3, 4)])
@pytest.mark.parametrize("temperature", [0.07, torch.tensor(0.5, dtype=torch.float64)])
def test_equals_normalize_and_divide(shape, temperature):
    views = tuple(torch.randn(3, *shape, dtype=torch.float64).unbind(0))
    expected = F.normalize(torch.stack(views), dim=-1) / temperature**0.5
    assert_within(scaled_unit_rows(views, temperature), expected, 1e-15)


def test_gradcheck():
    views = tuple(torch.randn(2, 4, 3, dtype=torch.float64).unbind(0))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    inputs = [v.requires_grad_() for v in views]
    assert torch.autograd.gradcheck(lambda t, *z: scaled_unit_rows(z, t), (temperature, *inputs))


@pytest.mark.parametrize("shape", [(3, 7, 10), (2, 3, 4, 10), (1, 1, 100)])
def test_piece_by_piece_is_the_same_bit_for_bit(shape, monkeypatch):
    z = torch.randn(shape, requires_grad=True)
    temperature = torch.tensor(0.3, requires_grad=True)
    grad = torch.randn(shape)

    def run():
        rows = scaled_unit_rows(z.unbind(0), temperature)
        return [rows, *torch.autograd.grad(rows, (z, temperature), grad)]

    whole = run()
    monkeypatch.setattr(unit_rows, "_CPU_PIECE", 45)  # four rows of ten
    for actual, expected in zip(run(), whole, strict=True):
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected)


def test_a_large_batch_needs_no_copy_in_double_precision():
    """Which would be twice its size: what is allocated at a time is pieces and the results."""
    z = torch.randn(1, 2**14, 128)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        scaled_unit_rows((z[0],), 0.1)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 1.1 * z.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", ["tiny", 0, "huge"])
def test_no_length_under_or_overflows(dtype, exponent):
    direction = torch.tensor([[1.0, -2.0, 2.0]], dtype=dtype) / 4
    info = torch.finfo(dtype)
    scale = {"tiny": info.tiny * 4, 0: 1.0, "huge": info.max / 2}[exponent]
    rows = scaled_unit_rows((direction * scale,), 1.0)[0]
    torch.testing.assert_close(rows, direction / 0.75, rtol=info.eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_numbers_have_a_direction(dtype):
    largest = torch.finfo(dtype).max
    z = torch.tensor([[largest, 0.0, -largest], [0.0, -largest, 0.0]], dtype=dtype)
    rows = scaled_unit_rows((z.requires_grad_(),), 1.0)[0]
    expected = torch.tensor([[0.5**0.5, 0.0, -(0.5**0.5)], [0.0, -1.0, 0.0]], dtype=torch.float64)
    assert_within(rows, expected, torch.finfo(rows.dtype).eps)
    assert torch.autograd.grad(rows.sum(), z)[0].isfinite().all()


def test_a_scale_that_rounds_to_zero_has_no_gradient():
    z = torch.randn(3, 4, requires_grad=True)
    rows = scaled_unit_rows((z,), 1e95)
    assert torch.equal(rows, torch.zeros(1, 3, 4))
    assert torch.equal(torch.autograd.grad(rows.sum(), z)[0], torch.zeros(3, 4))


@given(exponent=st.integers(-60, 60))
def test_a_power_of_two_changes_nothing(exponent):
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scaled_unit_rows((z * 2.0**exponent,), 0.1), scaled_unit_rows((z,), 0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_row_stays_zero_without_gradient(dtype):
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=dtype, requires_grad=True)
    rows = scaled_unit_rows((z,), 0.1)
    (grad,) = torch.autograd.grad(rows.sum(), z)
    assert torch.equal(rows[0, 0], torch.zeros(2, dtype=rows.dtype))
    assert torch.equal(grad[0], torch.zeros(2, dtype=dtype))
    assert grad[1].abs().sum() > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_stays_in_its_row(bad):
    z = torch.ones(2, 3)
    z[0, 1] = bad
    rows = scaled_unit_rows((z,), 1.0)[0]
    assert rows[0].isnan().any()
    assert rows[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    z = (torch.randn(7, 60) * 300).to(dtype)
    rows = scaled_unit_rows((z, z), 0.1)
    assert rows.dtype == torch.float32
    assert_within(rows, scaled_unit_rows((z.double(), z.double()), 0.1), 1e-7)


def test_the_gradient_is_orthogonal_to_the_row_even_when_it_is_tiny():
    z = torch.randn(64, 128)
    nearby = scaled_unit_rows((z + 1e-3 * torch.randn_like(z),), 1.0)[0]
    z.requires_grad_()
    (grad,) = torch.autograd.grad((scaled_unit_rows((z,), 1.0)[0] * nearby).sum(), z)
    exact = z.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((F.normalize(exact, dim=1) * nearby.double()).sum(), exact)
    assert_within(grad, expected, 1e-4)
    radial = (grad * z.detach()).sum(1) / z.detach().norm(dim=1) / nearby.norm(dim=1)
    assert radial.abs().max() < 1e-7
