"""SogCLR: loops and the authors' estimator for values and gradients, and what it remembers."""

from itertools import combinations

import algorithm1
import pytest
import torch
import torch.nn.functional as F
from budgets import VALUE, assert_within, gradient_budget, relative_error

from contrastive_kit import NTXent, SogCLR, reference

TAU = 0.2


def embeddings(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def normalizers(loss_fn):
    """What is remembered, as a dict from the number of an image."""
    return {i: float(x) for i, x in enumerate(loss_fn.log_normalizer.double().exp()) if x > 0}


BATCHES = [[4, 0, 2, 7, 1], [2, 3, 4, 5, 0], [0, 0, 6, 2, 2], [9, 9, 9, 9, 9]]


@pytest.mark.parametrize("n_views", [2, 3])
@pytest.mark.parametrize("gamma", [0.1, 0.9, 1.0])
def test_steps_are_those_of_the_loops(n_views, gamma):
    loss_fn, seen = SogCLR(10, TAU, gamma=gamma, reduction="none").double(), {}
    for batch in BATCHES:
        views, index = embeddings(n_views, 5, 3), torch.tensor(batch)
        expected, seen = algorithm1.sog_clr(views.detach(), TAU, index, seen, gamma)
        actual = loss_fn(*views, index=index)
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-12, atol=1e-13)
        assert normalizers(loss_fn) == pytest.approx(seen, rel=1e-12)
    assert set(seen) == {0, 1, 2, 3, 4, 5, 6, 7}  # image 9 has never had a negative


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("n_views", [2, 3])
def test_gradients_are_those_of_the_formula(n_views, backend):
    loss_fn = SogCLR(10, TAU, gamma=0.3, reduction="sum", backend=backend).double()
    before = torch.zeros(10, dtype=torch.float64)
    for batch in BATCHES[:3]:
        views, index = embeddings(n_views, 5, 3), torch.tensor(batch)
        losses, after = reference.sog_clr(views, TAU, index, before[index], 0.3)
        actual = loss_fn(*views, index=index)
        torch.testing.assert_close(actual, losses.sum(), rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(x, views)[0] for x in (actual, losses.sum())]
        assert_within(*grads, 1e-12)
        for i in set(batch):
            before[i] = after[index == i].amax()
        torch.testing.assert_close(loss_fn.log_normalizer.exp(), before)


def authors_gradient(z1, z2, u, gamma):
    """The estimator of the authors' code: weights that are constants, times the cosines."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    n = len(z1)
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    loss = 0
    for a, b in ((z1, z2), (z2, z1)):
        cosines = torch.cat([a @ b.T, a @ a.T], 1)
        kept = torch.cat([off_diagonal, off_diagonal], 1)
        terms = (cosines / TAU).exp() * kept
        own = (1 - gamma) * u + gamma * terms.sum(1) / (2 * (n - 1))
        weights = (terms / own[:, None]).detach()
        loss += ((weights * cosines).sum(1) / (2 * (n - 1)) - (a * b).sum(1)).mean()
    return loss


@pytest.mark.parametrize("gamma", [0.2, 0.9])
def test_the_gradient_is_that_of_the_authors(gamma):
    """They multiply the mean over the 2N anchors by 2τ."""
    loss_fn, views, index = (
        SogCLR(9, TAU, gamma=gamma).double(),
        embeddings(2, 6, 4),
        torch.arange(6),
    )
    u = torch.rand(6, dtype=torch.float64) + 0.5
    loss_fn.log_normalizer[:6] = u.log()
    ours = torch.autograd.grad(loss_fn(*views, index=index), views)[0]
    theirs = torch.autograd.grad(authors_gradient(*views, u, gamma), views)[0]
    assert_within(2 * TAU * ours, theirs, 1e-12)


def test_without_memory_it_is_the_decoupled_loss():
    views, index = embeddings(2, 7, 4), torch.tensor([5, 3, 8, 0, 1, 2, 9])
    ours = SogCLR(10, TAU, gamma=1.0)(*views, index=index)
    decoupled = NTXent(TAU, decoupled=True)(*views)
    torch.testing.assert_close(ours, decoupled - torch.tensor(12.0).double().log())
    grads = [torch.autograd.grad(loss, views)[0] for loss in (ours, decoupled)]
    assert_within(*grads, 1e-12)


@pytest.mark.parametrize("batch", [2, 3])
def test_batches_of_any_size_have_the_gradient_of_the_whole_data_set(batch):
    """The claim of the paper: once the normalizers are right, the mean over all batches is too."""
    n, z = 7, embeddings(2, 7, 3)
    whole = SogCLR(n, TAU, gamma=1.0).double()
    whole(*z, index=torch.arange(n))
    loss_fn = SogCLR(n, TAU, gamma=1e-13).double().eval()
    loss_fn.load_state_dict(whole.state_dict())
    decoupled = NTXent(TAU, decoupled=True)
    batches = [torch.tensor(b) for b in combinations(range(n), batch)]
    ours, theirs = (
        torch.autograd.grad(sum(call(b) for b in batches) / len(batches), z)[0]
        for call in (
            lambda b: loss_fn(*z[:, b], index=b),
            lambda b: decoupled(*z[:, b]),
        )
    )
    one_u = reference.sog_clr(z, TAU, torch.arange(n), whole.log_normalizer.exp(), 1e-13)[0].mean()
    expected = torch.autograd.grad(one_u, z)[0]
    assert_within(ours, expected, 1e-9)
    assert relative_error(theirs, expected) > 0.05


def test_the_normalizers_become_those_of_the_whole_data_set():
    n, z = 40, torch.randn(2, 40, 3, dtype=torch.float64)
    whole, loss_fn = SogCLR(n, 0.5, gamma=1.0).double(), SogCLR(n, 0.5, gamma=0.03).double()
    whole(*z, index=torch.arange(n))
    for _ in range(150):
        for index in torch.randperm(n).split(5):
            loss_fn(*z[:, index], index=index)
    difference = loss_fn.log_normalizer - whole.log_normalizer
    assert difference.abs().mean() < 0.05
    one = SogCLR(n, 0.5, gamma=1.0).double()
    for index in torch.randperm(n).split(5):
        one(*z[:, index], index=index)
    assert (one.log_normalizer - whole.log_normalizer).abs().mean() > 0.1


def test_evaluation_reads_and_does_not_write():
    loss_fn, views = SogCLR(6, TAU, gamma=0.5), embeddings(2, 6, 3)
    loss_fn(*views, index=torch.arange(6))
    before = loss_fn.log_normalizer.clone()
    other = embeddings(2, 6, 3)
    loss_fn.eval()
    value = loss_fn(*other, index=torch.arange(6))
    assert torch.equal(loss_fn.log_normalizer, before)
    fresh = SogCLR(6, TAU, gamma=0.5).eval()(*other, index=torch.arange(6))
    assert not torch.allclose(value, fresh)
    loss_fn.train()
    torch.testing.assert_close(loss_fn(*other, index=torch.arange(6)), value)
    assert not torch.equal(loss_fn.log_normalizer, before)


def test_what_is_not_finite_is_not_remembered():
    loss_fn, index = SogCLR(4, TAU), torch.arange(4)
    loss_fn(*embeddings(2, 4, 3), index=index)
    before = loss_fn.log_normalizer.clone()
    broken = torch.full((2, 4, 3), torch.nan)
    assert loss_fn(*broken, index=index).isnan()
    assert torch.equal(loss_fn.log_normalizer, before)


def test_a_run_goes_on_from_its_state():
    torch.manual_seed(3)
    steps = [(embeddings(2, 4, 3), torch.randperm(8)[:4]) for _ in range(4)]
    whole, first, second = (SogCLR(8, TAU, gamma=0.4) for _ in range(3))
    expected = [whole(*views, index=index) for views, index in steps]
    actual = [first(*views, index=index) for views, index in steps[:2]]
    second.load_state_dict(first.state_dict())
    actual += [second(*views, index=index) for views, index in steps[2:]]
    assert torch.equal(torch.stack(actual), torch.stack(expected))
    with pytest.raises(RuntimeError, match="size mismatch for log_normalizer"):
        second.load_state_dict(SogCLR(9).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_precision_and_no_overflow(dtype, temperature):
    """At 0.01 a mean of exponentials reaches e^100, which float32 does not hold."""
    loss_fn, exact = (SogCLR(40, temperature, gamma=0.5) for _ in range(2))
    exact.double()
    for _ in range(2):
        views, index = embeddings(2, 33, 20, dtype=dtype), torch.randperm(40)[:33]
        views.data[:, 5] = views.data[:, 6]
        double = views.detach().double().requires_grad_()
        actual, expected = loss_fn(*views, index=index), exact(*double, index=index)
        assert actual.dtype == torch.float32
        assert_within(actual, expected, 30 * VALUE[dtype])
        grads = torch.autograd.grad(actual, views)[0], torch.autograd.grad(expected, double)[0]
        assert_within(*grads, 3 * gradient_budget(dtype, temperature))


def test_statistics_are_those_of_nt_xent():
    views, index = embeddings(2, 9, 4), torch.arange(9)
    ours = SogCLR(9, TAU)(*views, index=index, return_stats=True)[1]
    torch.testing.assert_close(ours, NTXent(TAU)(*views, return_stats=True)[1])


def test_it_compiles_in_one_graph():
    eager, compiled = (SogCLR(8, TAU, gamma=0.4) for _ in range(2))
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for batch in ([1, 5, 3], [3, 2, 5]):
        views, index = embeddings(2, 3, 4, dtype=torch.float32), torch.tensor(batch)
        losses = eager(*views, index=index), call(*views, index=index)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(x, views)[0] for x in losses))
        torch.testing.assert_close(compiled.log_normalizer, eager.log_normalizer)


def test_it_says_what_it_is():
    assert repr(SogCLR(10)) == "SogCLR(temperature=0.1, num_images=10, gamma=0.9)"
    loss_fn = SogCLR(10, 0.3, gamma=0.5, reduction="sum")
    assert repr(loss_fn) == "SogCLR(temperature=0.3, num_images=10, gamma=0.5, reduction='sum')"
    loss_fn.temperature = 0.2
    assert "temperature=0.2" in repr(loss_fn)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_images": 0}, ValueError, "num_images must be at least 1"),
        ({"num_images": 2.0}, TypeError, "num_images must be an integer"),
        ({"gamma": 0}, ValueError, "gamma must be above 0 and at most 1, got 0"),
        ({"gamma": 1.1}, ValueError, "gamma must be above 0"),
        ({"gamma": "1"}, TypeError, "gamma must be a number"),
        ({"temperature": 0}, ValueError, "temperature must be"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        SogCLR(**{"num_images": 5, **options})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index": torch.tensor([0, 1, 5])}, ValueError, r"num_images - 1 \(4\), got 0 to 5"),
        ({"index": torch.tensor([0, -1, 2])}, ValueError, "index must be from 0"),
        ({"index": torch.tensor([0, 1])}, ValueError, r"index must have shape \(3,\)"),
        ({"index": torch.rand(3)}, TypeError, "index must hold integers"),
        ({"index": [0, 1, 2]}, TypeError, "index must be an integer tensor"),
        ({"z2": torch.randn(2, 4)}, ValueError, "z2 must have the shape of z1"),
        ({"z1": torch.randn(3)}, ValueError, "z1 must have shape"),
        ({"z1": None}, TypeError, "z1 must be a tensor"),
        ({"return_stats": 1}, TypeError, "return_stats must be"),
    ],
)
def test_wrong_input_changes_nothing(change, error, message):
    loss_fn = SogCLR(5)
    arguments = {"z1": torch.randn(3, 4), "z2": torch.randn(3, 4), "index": torch.arange(3)}
    with pytest.raises(error, match=message):
        loss_fn(**{**arguments, **change})
    assert (loss_fn.log_normalizer == -torch.inf).all()


def test_one_image_has_no_negatives():
    with pytest.raises(ValueError, match="at least 2 rows"):
        SogCLR(5)(torch.randn(1, 4), torch.randn(1, 4), index=torch.tensor([0]))
