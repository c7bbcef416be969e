"""NT-Xent against loops, against the reference, and against what must hold whatever the oracle.

Equation numbers are those of docs/nt_xent.md.
"""

import math

import algorithm1
import numpy as np
import pytest
import torch
from budgets import VALUE, assert_within, gradient_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_kit import NTXent, reference
from contrastive_kit.functional import nt_xent
from contrastive_kit.ops import BACKENDS

backends = pytest.mark.parametrize("backend", list(BACKENDS))


def random_views(n_views, n, d, dtype=torch.float64):
    """Views of an image resemble each other, as after some training."""
    image = torch.randn(n, d, dtype=torch.float64)
    return (image + 0.7 * torch.randn(n_views, n, d, dtype=torch.float64)).to(dtype)


def loss_and_gradients(formula, views, **options):
    views = [v.detach().clone().requires_grad_() for v in views]
    loss = formula(*views, **options)
    return loss.detach(), torch.stack(torch.autograd.grad(loss, views))


def oracle(*views, temperature, decoupled=False, ids=None):
    formula = reference.decoupled_nt_xent if decoupled else reference.nt_xent
    return formula(torch.stack([v.double() for v in views]), temperature, ids).mean()


@backends
@pytest.mark.parametrize("n_views", [2, 3, 4])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_equals_the_loops_of_algorithm_1(n_views, with_ids, decoupled, backend):
    """Equations (1) and (12)."""
    views = random_views(n_views, 7, 5)
    ids = torch.tensor([3, 3, -1, 8, 5, 8, 8]) if with_ids else None
    expected = algorithm1.nt_xent(views, 0.2, ids, decoupled)
    actual = nt_xent(
        *views, temperature=0.2, ids=ids, decoupled=decoupled, reduction="none", backend=backend
    )
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-12, atol=1e-13)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "d"), [(2, 3), (3, 7), (63, 60), (65, 128), (252, 100), (31, 384), (5, 513)]
)
@pytest.mark.usefixtures("poisoned_empty")
def test_value_and_gradient_at_odd_sizes(n, d, dtype, backend):
    """Equations (4), (5) and (7) against autograd through (1)."""
    views = random_views(2, n, d, dtype)
    expected, expected_grad = loss_and_gradients(oracle, views.double(), temperature=0.1)
    loss, grad = loss_and_gradients(nt_xent, views, temperature=0.1, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert_within(loss, expected, VALUE[dtype])
    assert_within(grad, expected_grad, gradient_budget(dtype, 0.1))


@backends
@pytest.mark.parametrize("n_views", [3, 5])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
def test_gradient_of_more_views(with_ids, decoupled, n_views, backend):
    views = random_views(n_views, 19, 6)
    ids = torch.arange(19) // 3 if with_ids else None
    options = {"temperature": 0.3, "decoupled": decoupled, "ids": ids}
    expected, expected_grad = loss_and_gradients(oracle, views, **options)
    loss, grad = loss_and_gradients(nt_xent, views, backend=backend, **options)
    assert_within(loss, expected, 1e-12)
    assert_within(grad, expected_grad, 1e-12)


def test_one_dimension_leaves_only_signs():
    """With D = 1 every cosine is 1 or -1: counted by hand, and no gradient."""
    z1, z2 = torch.tensor([[2.0], [-3.0]]), torch.tensor([[0.5], [-7.0]])
    z1.requires_grad_()
    loss = nt_xent(z1, z2, temperature=1.0)
    torch.testing.assert_close(loss, torch.tensor(1 + 2 * torch.e**-2).log())
    assert torch.autograd.grad(loss, z1)[0].abs().max() < 1e-7


@backends
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.005])
def test_identical_rows_give_log_2n_minus_1(temperature, backend):
    z = torch.full((12, 5), 3.0, requires_grad=True)
    loss = nt_xent(z, z, temperature=temperature, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(23.0).log())
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-6


class TestSymmetry:
    """Properties that no choice of oracle can hide."""

    @given(seed=st.integers(0, 2**31), n=st.integers(2, 20), d=st.integers(1, 12))
    @settings(max_examples=30, deadline=None)
    def test_swapping_the_views_swaps_the_gradients(self, seed, n, d):
        torch.manual_seed(seed)
        z1, z2 = random_views(2, n, d)
        loss, (g1, g2) = loss_and_gradients(nt_xent, (z1, z2))
        swapped, (s2, s1) = loss_and_gradients(nt_xent, (z2, z1))
        torch.testing.assert_close(swapped, loss)
        torch.testing.assert_close(s1, g1)
        torch.testing.assert_close(s2, g2)

    @given(seed=st.integers(0, 2**31), n=st.integers(2, 20))
    @settings(max_examples=30, deadline=None)
    def test_permuting_the_batch_permutes_losses_and_gradients(self, seed, n):
        torch.manual_seed(seed)
        views, order = random_views(2, n, 6), torch.randperm(n)
        loss = nt_xent(*views, reduction="none")
        permuted = nt_xent(*views[:, order], reduction="none")
        torch.testing.assert_close(permuted, loss[:, order])
        grad = loss_and_gradients(nt_xent, views)[1]
        torch.testing.assert_close(loss_and_gradients(nt_xent, views[:, order])[1], grad[:, order])

    @given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
    @settings(max_examples=30, deadline=None)
    def test_the_length_of_a_row_does_not_matter(self, seed, scale):
        torch.manual_seed(seed)
        views = random_views(2, 9, 5)
        loss, grad = loss_and_gradients(nt_xent, views)
        scaled = views.clone()
        scaled[0, 4] *= scale
        scaled_loss, scaled_grad = loss_and_gradients(nt_xent, scaled)
        torch.testing.assert_close(scaled_loss, loss)
        torch.testing.assert_close(scaled_grad[0, 4] * scale, grad[0, 4])

    @given(seed=st.integers(0, 2**31), temperature=st.floats(0.01, 2.0))
    @settings(max_examples=30, deadline=None)
    def test_the_gradient_is_orthogonal_to_its_row(self, seed, temperature):
        """The second half of equation (7)."""
        torch.manual_seed(seed)
        views = random_views(2, 9, 5)
        grad = loss_and_gradients(nt_xent, views, temperature=temperature)[1]
        lengths = grad.norm(dim=-1) * views.norm(dim=-1)
        assert ((grad * views).sum(-1).abs() <= 1e-12 * lengths + 1e-300).all()


def test_gradcheck_with_a_learned_temperature():
    views = [v.requires_grad_() for v in random_views(3, 4, 3)]
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def losses(t, *views):
        return nt_xent(*views, temperature=t, reduction="none")

    assert torch.autograd.gradcheck(losses, (temperature, *views))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_the_gradient_of_the_temperature(tau, dtype, backend):
    """Equation (6)."""
    views = random_views(2, 40, 17, dtype)
    temperature = torch.tensor(tau, requires_grad=True)
    (grad,) = torch.autograd.grad(
        nt_xent(*views, temperature=temperature, backend=backend), temperature
    )
    exact = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(oracle(*views, temperature=exact), exact)
    assert_within(grad, expected, 1e-5)


def test_reductions_agree():
    views = random_views(3, 5, 4)
    each = nt_xent(*views, reduction="none")
    assert each.shape == (3, 5)
    torch.testing.assert_close(nt_xent(*views), each.mean())
    torch.testing.assert_close(nt_xent(*views, reduction="sum"), each.sum())


@backends
def test_an_anchor_without_negatives_is_silent(backend):
    views = random_views(2, 4, 3)
    everything = torch.zeros(4, dtype=torch.int64)
    for decoupled in (False, True):
        loss, grad = loss_and_gradients(
            nt_xent, views, ids=everything, decoupled=decoupled, backend=backend
        )
        assert loss == 0
        assert torch.equal(grad, torch.zeros_like(views))


@backends
def test_zero_rows_count_as_cosine_zero(backend):
    views = random_views(2, 5, 3)
    views[0, 2] = 0
    expected, expected_grad = loss_and_gradients(oracle, views, temperature=0.5)
    loss, grad = loss_and_gradients(nt_xent, views, backend=backend)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(grad[0, 2], torch.zeros(3, dtype=torch.float64))
    others = torch.ones(2, 5, dtype=torch.bool)
    others[0, 2] = False
    torch.testing.assert_close(grad[others], expected_grad[others])


@backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_embeddings_show_in_the_loss(bad, backend):
    views = random_views(2, 5, 3, torch.float32)
    views[1, 0, 1] = bad
    assert nt_xent(*views, backend=backend).isnan()


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_lengths_at_the_ends_of_the_range(length):
    views = random_views(2, 9, 5, torch.float32)
    torch.testing.assert_close(nt_xent(*(views * length)), nt_xent(*views))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_each_view_alone_gets_its_gradient(wanted):
    views = random_views(2, 9, 5)
    expected = loss_and_gradients(nt_xent, views)[1]
    inputs = [v.clone().requires_grad_(w) for v, w in zip(views, wanted, strict=True)]
    nt_xent(*inputs).backward()
    for got, want, grad in zip(inputs, wanted, expected, strict=True):
        if want:
            torch.testing.assert_close(got.grad, grad)
        else:
            assert got.grad is None


def test_backward_twice_with_another_gradient_scales():
    views = [v.requires_grad_() for v in random_views(2, 9, 5)]
    loss = nt_xent(*views)
    once = torch.autograd.grad(loss, views, torch.tensor(1.0).double(), retain_graph=True)
    thrice = torch.autograd.grad(loss, views, torch.tensor(3.0).double())
    torch.testing.assert_close(thrice, tuple(3 * g for g in once))


@pytest.mark.parametrize("decoupled", [False, True])
def test_double_backward_raises(decoupled):
    views = [v.requires_grad_() for v in random_views(2, 9, 5)]
    grad = torch.autograd.grad(nt_xent(*views, decoupled=decoupled), views[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


def test_inputs_are_not_written_to_and_any_stride_will_do():
    base = torch.randn(6, 2, 9)
    z1, z2 = base.permute(1, 2, 0)
    before = base.clone()
    assert not z1.is_contiguous()
    loss, grad = loss_and_gradients(nt_xent, (z1, z2))
    expected, expected_grad = loss_and_gradients(nt_xent, (z1.contiguous(), z2.contiguous()))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert torch.equal(base, before)


def test_views_of_mixed_precision_are_computed_in_the_widest():
    z1, z2 = random_views(2, 9, 5)
    expected = nt_xent(z1.bfloat16().double(), z2)
    torch.testing.assert_close(nt_xent(z1.bfloat16(), z2), expected)


@backends
@pytest.mark.parametrize("n_views", [2, 3])
def test_statistics(n_views, backend):
    views, tau = random_views(n_views, 12, 6), 0.3
    loss, stats = nt_xent(*views, temperature=tau, return_stats=True, backend=backend)
    torch.testing.assert_close(loss, nt_xent(*views, temperature=tau))
    u = torch.nn.functional.normalize(views.flatten(0, 1), dim=1)
    accuracy, positive, negative, entropy = [], [], [], []
    for i in range(len(u)):
        cosines = {j: float(u[i] @ u[j]) for j in range(len(u)) if j != i}
        mine = [c for j, c in cosines.items() if j % 12 == i % 12]
        others = [c for j, c in cosines.items() if j % 12 != i % 12]
        p = (torch.tensor(list(cosines.values())) / tau).softmax(0)
        accuracy.append(max(mine) > max(others))
        positive += mine
        negative += others
        entropy.append(-(p * p.log()).sum())
    expected = [torch.tensor(x, dtype=torch.float64).mean() for x in (accuracy, positive, negative)]
    assert 0 < stats.accuracy < 1
    torch.testing.assert_close(torch.stack(stats[:3]), torch.stack(expected))
    torch.testing.assert_close(
        stats.entropy, torch.stack(entropy).mean().double(), rtol=1e-6, atol=0
    )
    assert not any(figure.requires_grad for figure in stats)


def test_statistics_leave_out_what_ids_leave_out():
    views = random_views(2, 6, 4)
    stats = nt_xent(*views, ids=torch.zeros(6, dtype=torch.int64), return_stats=True)[1]
    assert stats.accuracy == 1
    assert stats.negative_similarity.isnan()
    assert stats.entropy.abs() < 1e-12


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_statistics_are_scalars_of_one_dtype_for_any_temperature_tensor(dtype, shape):
    views = random_views(2, 6, 4, torch.float32)
    temperature = torch.full(shape, 0.5, dtype=dtype)
    loss, stats = nt_xent(*views, temperature=temperature, return_stats=True)
    expected = nt_xent(*views, temperature=0.5, return_stats=True)
    torch.testing.assert_close(
        torch.stack([loss, *stats]), torch.stack([expected[0], *expected[1]])
    )


def test_an_anchor_without_negatives_does_not_hide_nan():
    views = random_views(2, 4, 3)
    views[0, 1, 1] = torch.nan
    assert nt_xent(*views, ids=torch.zeros(4, dtype=torch.int64)).isnan()


@pytest.mark.parametrize("weight", [1e-12, 1e12])
def test_the_weight_of_a_loss_only_scales_its_gradient(weight):
    image = torch.randn(1, 60)
    views = (image + 0.3 * torch.randn(2, 63, 60)).unbind(0)
    options = {"temperature": 0.0146, "decoupled": True}
    expected = loss_and_gradients(nt_xent, views, **options)[1]
    actual = loss_and_gradients(lambda *v: weight * nt_xent(*v, **options), views)[1]
    assert_within(actual.double() / weight, expected, 1e-6)


class TestModule:
    def test_is_the_function_with_its_options(self):
        views = random_views(2, 9, 5)
        ids = torch.arange(9) // 2
        module = NTXent(0.2, decoupled=True, reduction="sum", backend="reference")
        expected = nt_xent(*views, temperature=0.2, decoupled=True, reduction="sum", ids=ids)
        torch.testing.assert_close(module(*views, ids=ids), expected)
        torch.testing.assert_close(module(*views, ids=ids, return_stats=True)[0], expected)

    def test_repr_tells_the_options(self):
        assert repr(NTXent(0.2, learnable_temperature=True)) == (
            "NTXent(temperature=0.2, learnable_temperature=True)"
        )

    def test_a_fixed_temperature_is_no_state(self):
        assert not NTXent().state_dict()

    def test_a_fixed_temperature_can_be_scheduled(self):
        views = random_views(2, 9, 8, torch.float64)
        loss_fn = NTXent(0.5)
        for temperature in (0.2, np.float32(0.1)):
            loss_fn.temperature = temperature
            expected = nt_xent(*views, temperature=float(temperature))
            torch.testing.assert_close(loss_fn(*views), expected)
        assert repr(loss_fn) == "NTXent(temperature=0.1)"

    @pytest.mark.parametrize(
        ("value", "error"),
        [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("0.1", TypeError),
         (torch.tensor(0.1), TypeError)],
    )  # fmt: skip
    def test_a_temperature_that_is_none_leaves_the_old_one(self, value, error):
        loss_fn = NTXent(0.5)
        with pytest.raises(error, match="temperature must be"):
            loss_fn.temperature = value
        assert loss_fn.temperature == 0.5

    def test_a_learned_temperature_cannot_be_set(self):
        loss_fn = NTXent(0.5, learnable_temperature=True)
        with pytest.raises(AttributeError, match="temperature is learned, and cannot be set"):
            loss_fn.temperature = 0.1
        assert float(loss_fn.temperature.detach()) == pytest.approx(0.5)

    def test_a_learnable_temperature_is_saved_and_learned(self):
        views = random_views(2, 16, 8, torch.float32)
        loss_fn = NTXent(0.5, learnable_temperature=True)
        optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.1)
        losses = []
        for _ in range(20):
            loss = loss_fn(*views)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        restored = NTXent(0.1, learnable_temperature=True)
        restored.load_state_dict(loss_fn.state_dict())
        assert torch.equal(restored.temperature, loss_fn.temperature)

    def test_reading_the_temperature_writes_nothing(self):
        loss_fn = NTXent(0.011, learnable_temperature=True)
        with torch.no_grad():
            loss_fn.logit_scale += 5
        before = loss_fn.logit_scale.item()
        repr(loss_fn)
        assert loss_fn.temperature.item() == pytest.approx(0.01)
        assert loss_fn.logit_scale.item() == before
        loss_fn(*random_views(2, 4, 3))
        assert loss_fn.logit_scale.item() == pytest.approx(math.log(100))

    def test_double_precision_modules_learn_in_double(self):
        loss_fn = NTXent(0.3, learnable_temperature=True).double()
        assert loss_fn.temperature.dtype == torch.float64
        views = random_views(2, 4, 3)
        expected = nt_xent(*views, temperature=loss_fn.logit_scale.detach().neg().exp())
        torch.testing.assert_close(loss_fn(*views).detach(), expected, rtol=1e-14, atol=0)

    def test_half_precision_modules_keep_their_temperature_in_float32(self):
        loss_fn = NTXent(0.3, learnable_temperature=True).half()
        assert loss_fn.temperature.dtype == torch.float32
        assert loss_fn(*random_views(2, 5, 3, torch.float16)).dtype == torch.float32
