"""SupCon with several labels of an image, whose products weigh the positives: equation (23)."""

import algorithm1
import pytest
import torch
from budgets import VALUE, assert_within, gradient_budget

from contrastive_kit import SupCon, reference
from contrastive_kit.functional import nt_xent, sup_con
from contrastive_kit.ops import BACKENDS

backends = pytest.mark.parametrize("backend", list(BACKENDS))
views_of = pytest.mark.parametrize("n_views", [1, 2, 3])
# An image without labels, one whose label no other has, and one with all that others have.
LABELS = torch.tensor(
    [[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 1, 0]]
)
WEIGHTED = LABELS * torch.tensor([0.3, 1.0, 2.0, 0.1], dtype=torch.float64)
label_kinds = pytest.mark.parametrize(
    "labels", [LABELS, LABELS.bool(), WEIGHTED], ids=["integers", "booleans", "weights"]
)


def random_views(n_views, n, d, dtype=torch.float64):
    image = torch.randn(n, d, dtype=torch.float64)
    return (image + 0.7 * torch.randn(n_views, n, d, dtype=torch.float64)).to(dtype)


def wanting(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@backends
@label_kinds
@views_of
def test_equals_its_loop(n_views, labels, backend):
    views = random_views(n_views, 6, 5)
    expected = torch.from_numpy(algorithm1.sup_con_of_multi_hot(views, labels, 0.2))
    call = {"labels": labels, "temperature": 0.2, "backend": backend}
    each = sup_con(*views, reduction="none", **call)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sup_con(*views, reduction="sum", **call), expected.sum())
    # Without labels, or alone with one in a single view, an anchor is not part of the mean.
    counted = torch.tensor([1, 1, 0, n_views > 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(sup_con(*views, **call), expected.sum() / counted.sum() / n_views)
    weights = torch.rand(6, dtype=torch.float64)
    mean = (expected * weights).sum() / (weights * counted).sum() / n_views
    torch.testing.assert_close(sup_con(*views, sample_weight=weights, **call), mean)
    np_expected = reference.sup_con_of_multi_hot(views, labels, 0.2).nan_to_num()
    torch.testing.assert_close(np_expected, expected)


@backends
@views_of
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(3, 7), (63, 60), (65, 128)])
@pytest.mark.usefixtures("poisoned_empty")
def test_value_and_gradient_at_odd_sizes(n, d, dtype, n_views, backend):
    views = random_views(n_views, n, d, dtype)
    labels = (torch.rand(n, 9) < 0.4).float()
    labels[:, 0] = 1
    exact = wanting(views.double())
    expected = reference.sup_con_of_multi_hot(exact[0], labels, 0.1).mean()
    (expected_grad,) = torch.autograd.grad(expected, exact)
    inputs = wanting(*views)
    loss = sup_con(*inputs, labels=labels, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(loss, expected, 2 * VALUE[dtype])
    for grad, expected_of in zip(torch.autograd.grad(loss, inputs), expected_grad, strict=True):
        assert grad.dtype == dtype
        assert_within(grad, expected_of, 2 * gradient_budget(dtype, 0.1))


@views_of
def test_gradcheck_with_a_learned_temperature(n_views):
    views = wanting(*random_views(n_views, 6, 3))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def losses(t, *views):
        return sup_con(*views, labels=WEIGHTED, temperature=t, reduction="none")

    assert torch.autograd.gradcheck(losses, (temperature, *views))


@backends
@views_of
def test_one_label_of_an_image_is_the_loss_of_integers(n_views, backend):
    views, labels = random_views(n_views, 7, 5), torch.tensor([3, 3, 0, 1, 2, 1, 1])
    expected = sup_con(*views, labels=labels)
    one_hot = torch.nn.functional.one_hot(labels, 9)
    torch.testing.assert_close(sup_con(*views, labels=one_hot, backend=backend), expected)


def test_scaled_by_frequency_an_anchor_averages_over_its_labels():
    """Columns over the root of the other bearers: the mean of a SupCon for each label."""
    view, labels = random_views(1, 9, 5)[0], torch.ones(9, 3)
    labels[:4, 0] = labels[2:5, 1] = labels[6:, 2] = 0
    scaled = labels.double() / (labels.double().sum(0) - 1).sqrt()
    logits = torch.nn.functional.normalize(view, dim=1)
    logits = (logits @ logits.T / 0.1).fill_diagonal_(-torch.inf)
    log_p = logits.log_softmax(1)
    expected = []
    for i in range(9):
        of_labels = []
        for c in labels[i].nonzero().flatten():
            positives = [j for j in range(9) if j != i and labels[j, c]]
            of_labels.append(-log_p[i, positives].mean())
        expected.append(torch.stack(of_labels).mean())
    actual = sup_con(view, labels=scaled, reduction="none")[0]
    torch.testing.assert_close(actual, torch.stack(expected))


def test_a_tiny_loss_keeps_its_digits_where_no_label_is_shared():
    image = torch.randn(1, 32, 60)
    views = image + 0.1 * torch.randn(2, 32, 60)
    exact, inputs = wanting(*views.double()), wanting(*views)
    expected = nt_xent(*exact, temperature=0.02)
    assert 1e-16 < expected < 1e-10
    loss = sup_con(*inputs, labels=0.3 * torch.eye(32), temperature=0.02)
    assert abs(loss.item() - expected.item()) <= 1e-3 * expected.item()
    for grad, expected_grad in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact), strict=True
    ):
        assert_within(grad, expected_grad, gradient_budget(torch.float32, 0.02))


@views_of
def test_without_any_label_the_loss_is_silent(n_views):
    views = wanting(*random_views(n_views, 5, 4))
    for reduction in ("mean", "sum"):
        loss = sup_con(*views, labels=torch.zeros(5, 3), reduction=reduction)
        assert loss == 0
        for grad in torch.autograd.grad(loss, views):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_the_module_passes_them_on():
    views = random_views(2, 6, 5)
    expected = sup_con(*views, labels=LABELS, temperature=0.2)
    torch.testing.assert_close(SupCon(0.2)(*views, labels=LABELS), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": LABELS[:4]}, ValueError, r"labels must have shape \(6,\), or \(6, C\)"),
        ({"labels": LABELS[:, :0]}, ValueError, r"labels must have shape \(6,\), or \(6, C\)"),
        ({"labels": LABELS.to(torch.complex64)}, TypeError, "labels must hold real numbers"),
        ({"labels": LABELS.to_sparse()}, ValueError, "labels must be a dense tensor"),
        ({"variant": "in"}, ValueError, "weigh a mean of log-probabilities"),
        ({"variant": "pairwise"}, ValueError, "weigh a mean of log-probabilities"),
        ({"return_stats": True}, ValueError, "return_stats=True needs labels"),
        (
            {"keys": torch.randn(3, 5), "key_labels": torch.arange(3)},
            ValueError,
            "are of one side",
        ),
    ],
)
def test_errors_say_what_does_not_go_together(change, error, message):
    with pytest.raises(error, match=message):
        sup_con(torch.randn(6, 5), **({"labels": LABELS} | change))
