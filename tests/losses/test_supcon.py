"""SupCon against loops, the reference and the published formula; and where it meets NT-Xent.

Equations (19), (20) and (21) of docs/nt_xent.md.
"""

import math

import algorithm1
import pytest
import torch
import torch.nn.functional as F
from budgets import VALUE, assert_within, gradient_budget, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_kit import SupCon, reference
from contrastive_kit.functional import nt_xent, sup_con
from contrastive_kit.ops import BACKENDS

backends = pytest.mark.parametrize("backend", list(BACKENDS))
any_variant = st.sampled_from(["out", "in", "pairwise"])
variants = pytest.mark.parametrize("variant", ["out", "in", "pairwise"])
LABELS = torch.tensor([3, 3, -1, 8, 5, 8, 8])  # two images are alone with their label


def random_views(n_views, n, d, dtype=torch.float64):
    image = torch.randn(n, d, dtype=torch.float64)
    return (image + 0.7 * torch.randn(n_views, n, d, dtype=torch.float64)).to(dtype)


def wanting(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@backends
@variants
@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_equals_its_loop(n_views, variant, backend):
    views = random_views(n_views, 7, 5)
    expected = torch.from_numpy(algorithm1.sup_con(views, LABELS, 0.2, variant))
    call = {"labels": LABELS, "temperature": 0.2, "variant": variant, "backend": backend}
    each = sup_con(*views, reduction="none", **call)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sup_con(*views, reduction="sum", **call), expected.sum())
    # With one view, the two anchors without positives are not part of the mean.
    count = 5 if n_views == 1 else 7 * n_views
    torch.testing.assert_close(sup_con(*views, **call), expected.sum() / count)


@backends
@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (3, 7), (63, 60), (65, 128), (252, 17)])
@pytest.mark.usefixtures("poisoned_empty")
def test_value_and_gradient_at_odd_sizes(n, d, dtype, variant, backend):
    views = random_views(2, n, d, dtype)
    labels = torch.arange(n).roll(1) % max(2, n // 4)
    inputs = wanting(*views.double())
    expected = reference.sup_con(torch.stack(inputs), labels, 0.1, variant).mean()
    expected_grads = torch.autograd.grad(expected, inputs)
    inputs = wanting(*views)
    loss = sup_con(*inputs, labels=labels, variant=variant, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(loss, expected, 2 * VALUE[dtype])
    for grad, expected_grad in zip(torch.autograd.grad(loss, inputs), expected_grads, strict=True):
        assert grad.dtype == dtype
        assert_within(grad, expected_grad, 2 * gradient_budget(dtype, 0.1))


@backends
@variants
@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_gradients_with_labels_that_occur_once(n_views, variant, backend):
    views = random_views(n_views, 7, 5)
    inputs = wanting(*views)
    each = reference.sup_con(torch.stack(inputs), LABELS, 0.2, variant)
    weights = torch.rand(7, dtype=torch.float64)
    has_positive = ~each.isnan()
    alone = has_positive.logical_not()
    assert alone.any() == (n_views == 1)
    shares = weights.expand_as(each)[has_positive]
    expected_grads = torch.autograd.grad((each[has_positive] * shares).sum() / shares.sum(), inputs)
    inputs = wanting(*views)
    loss = sup_con(
        *inputs,
        labels=LABELS,
        temperature=0.2,
        variant=variant,
        sample_weight=weights,
        backend=backend,
    )
    for grad, expected_grad in zip(torch.autograd.grad(loss, inputs), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@variants
def test_gradcheck_with_a_learned_temperature(variant):
    views = wanting(*random_views(2, 5, 3))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def losses(t, *views):
        return sup_con(*views, labels=LABELS[:5], temperature=t, variant=variant, reduction="none")

    assert torch.autograd.gradcheck(losses, (temperature, *views))


@backends
@pytest.mark.parametrize("n_views", [2, 3])
def test_a_label_for_each_image_is_nt_xent(n_views, backend):
    views = random_views(n_views, 9, 5)
    labels = torch.randperm(9) - 4
    expected = nt_xent(*views, temperature=0.1)
    torch.testing.assert_close(sup_con(*views, labels=labels, backend=backend), expected)


@pytest.mark.parametrize("n_views", [1, 2])
def test_all_variants_coincide_at_one_positive(n_views):
    """T14 of our notes on other libraries: three meanings with several positives, one with one."""
    views = random_views(n_views, 8, 5)
    labels = torch.arange(8) // (3 - n_views)
    out = sup_con(*views, labels=labels, reduction="none")
    for variant in ("in", "pairwise"):
        other = sup_con(*views, labels=labels, variant=variant, reduction="none")
        torch.testing.assert_close(out, other)
    fewer = sup_con(*views, labels=labels // 2, reduction="none")
    fewer_inside = sup_con(*views, labels=labels // 2, variant="in", reduction="none")
    assert (fewer > fewer_inside + 1e-6).all()  # Jensen
    fewer_pairwise = sup_con(*views, labels=labels // 2, variant="pairwise", reduction="none")
    assert (fewer > fewer_pairwise + 1e-6).all()  # a smaller denominator


def test_views_are_images_of_the_same_label():
    """Stacking the views and repeating the labels is the same loss of one view."""
    views = random_views(3, 7, 5)
    expected = sup_con(*views, labels=LABELS)
    torch.testing.assert_close(sup_con(views.flatten(0, 1), labels=LABELS.repeat(3)), expected)
    inside = sup_con(*views, labels=LABELS, variant="in")
    stacked = sup_con(views.flatten(0, 1), labels=LABELS.repeat(3), variant="in")
    torch.testing.assert_close(stacked, inside)


def test_is_the_published_formula_of_the_authors_code():
    """SupContrast: temperature over base temperature in front, features normalized by the caller.

    With its defaults, 0.07 and 0.07, the factor is 1.
    """
    temperature, base_temperature = 0.1, 0.07
    views = random_views(2, 9, 5)
    labels = torch.arange(9) // 3
    features = F.normalize(views, dim=2).transpose(0, 1)  # [batch, views, dim]
    contrast = torch.cat(torch.unbind(features, dim=1))
    mask = (labels[:, None] == labels[None, :]).double().repeat(2, 2)
    others = 1 - torch.eye(18, dtype=torch.float64)
    logits = contrast @ contrast.T / temperature
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    mean_log_prob = (mask * others * log_prob).sum(1) / (mask * others).sum(1)
    published = -(temperature / base_temperature) * mean_log_prob.mean()
    ours = sup_con(*views, labels=labels, temperature=temperature)
    torch.testing.assert_close(published, temperature / base_temperature * ours)


def test_pairwise_is_the_published_formula_of_sincere():
    """Feeney and Hughes, equation 6: mean over positives, then over anchors, of classes unequal."""
    z, labels, t = torch.randn(11, 5, dtype=torch.float64), torch.arange(11) % 5 // 2, 0.07
    u = F.normalize(z, dim=1)
    logits = u @ u.T / t
    same = labels[:, None] == labels[None, :]
    assert len(same.sum(1).unique()) > 1
    negatives = logits.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    positive = same & ~torch.eye(11, dtype=torch.bool)
    pairs = torch.stack([logits, negatives.expand(-1, 11)]).logsumexp(0) - logits
    published = ((pairs * positive).sum(1) / positive.sum(1)).mean()
    ours = sup_con(z, labels=labels, temperature=t, variant="pairwise")
    torch.testing.assert_close(ours, published)


@backends
@variants
def test_anchors_without_positives_are_silent(variant, backend):
    (view,) = wanting(random_views(1, 5, 4)[0])
    for reduction in ("mean", "sum"):
        loss = sup_con(
            view, labels=torch.arange(5), variant=variant, reduction=reduction, backend=backend
        )
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, view)[0], torch.zeros_like(view))


@backends
@variants
def test_a_batch_of_one_label_has_no_negatives_but_is_defined(variant, backend):
    views = random_views(2, 5, 4)
    labels = torch.full((5,), 7)
    inputs = wanting(*views)
    expected = reference.sup_con(torch.stack(inputs), labels, 0.1, variant).mean()
    expected_grads = torch.autograd.grad(expected, inputs)
    inputs = wanting(*views)
    loss = sup_con(*inputs, labels=labels, variant=variant, backend=backend)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-11)


def test_a_loss_of_1e_minus_12_keeps_its_digits_where_an_image_is_alone():
    image = torch.randn(1, 32, 60)
    views = image + 0.1 * torch.randn(2, 32, 60)
    labels = torch.arange(32)
    exact = wanting(*views.double())
    expected = nt_xent(*exact, temperature=0.02)
    assert 1e-16 < expected < 1e-10
    for variant in ("out", "in", "pairwise"):
        inputs = wanting(*views)
        loss = sup_con(*inputs, labels=labels, temperature=0.02, variant=variant)
        assert abs(loss.item() - expected.item()) <= 1e-3 * expected.item()
        grads = torch.stack(torch.autograd.grad(loss, inputs))
        expected_grads = torch.stack(torch.autograd.grad(expected, exact, retain_graph=True))
        assert relative_error(grads, expected_grads) <= gradient_budget(torch.float32, 0.02)


@pytest.mark.parametrize("temperature", [0.01, 0.005])
@variants
def test_the_worst_pairs_keep_their_gradient(variant, temperature):
    """The only positive is opposed: the loss is about 2 / temperature and must not saturate."""
    z = torch.cat([torch.eye(4), -torch.eye(4)]) + 1e-3
    labels = torch.arange(4).repeat(2)
    (exact,) = wanting(z.double())
    expected = reference.sup_con(exact[None], labels, temperature, variant).mean()
    (expected_grad,) = torch.autograd.grad(expected, exact)
    (view,) = wanting(z)
    loss = sup_con(view, labels=labels, temperature=temperature, variant=variant)
    assert loss > 0.9 / temperature
    assert_within(loss, expected, 1e-6)
    assert_within(torch.autograd.grad(loss, view)[0], expected_grad, 1e-4)


@variants
def test_nan_shows_in_the_loss(variant):
    views = random_views(2, 7, 3)
    views[1, 2, 0] = torch.nan
    assert sup_con(*views, labels=LABELS, variant=variant).isnan()


@variants
def test_zero_rows_count_as_cosine_zero(variant):
    views = random_views(2, 7, 3)
    views[0, 2] = 0
    inputs = wanting(*views)
    loss = sup_con(*inputs, labels=LABELS, variant=variant)
    expected = reference.sup_con(views, LABELS, 0.1, variant).mean()
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, inputs)
    assert torch.equal(grads[0][2], torch.zeros(3, dtype=torch.float64))
    assert all(g.isfinite().all() for g in grads)


@backends
@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_statistics(n_views, backend):
    views, tau = random_views(n_views, 7, 5), 0.3
    call = {"labels": LABELS, "temperature": tau, "backend": backend}
    loss, stats = sup_con(*views, return_stats=True, **call)
    torch.testing.assert_close(loss, sup_con(*views, **call))
    u, label = F.normalize(views.flatten(0, 1), dim=1), LABELS.repeat(n_views)
    accuracy, positive, negative, entropy = [], [], [], []
    for i in range(len(u)):
        cosines = {j: float(u[i] @ u[j]) for j in range(len(u)) if j != i}
        mine = [c for j, c in cosines.items() if label[j] == label[i]]
        others = [c for j, c in cosines.items() if label[j] != label[i]]
        p = (torch.tensor(list(cosines.values()), dtype=torch.float64) / tau).softmax(0)
        if mine:
            accuracy.append(max(mine) > max(others))
        positive += mine
        negative += others
        entropy.append(-(p * p.log()).sum())
    expected = [torch.tensor(x, dtype=torch.float64).mean() for x in (accuracy, positive, negative)]
    assert 0 < stats.accuracy < 1
    torch.testing.assert_close(
        torch.stack(stats), torch.stack([*expected, torch.stack(entropy).mean()])
    )
    assert not any(figure.requires_grad for figure in stats)


def test_statistics_of_a_label_for_each_image_are_those_of_nt_xent():
    views = random_views(3, 9, 5, torch.float32)
    tau = torch.tensor([0.3])
    expected = nt_xent(*views, temperature=tau, return_stats=True)[1]
    for variant in ("out", "in", "pairwise"):
        actual = sup_con(
            *views, labels=torch.arange(9), temperature=tau, variant=variant, return_stats=True
        )[1]
        torch.testing.assert_close(torch.stack(actual), torch.stack(expected))


class TestSymmetry:
    """Properties that no choice of oracle can hide."""

    @given(
        seed=st.integers(0, 2**31),
        n=st.integers(2, 20),
        variant=any_variant,
    )
    @settings(max_examples=30, deadline=None)
    def test_permuting_the_batch_permutes_the_losses(self, seed, n, variant):
        torch.manual_seed(seed)
        views, labels, order = random_views(2, n, 6), torch.randint(0, 4, (n,)), torch.randperm(n)
        loss = sup_con(*views, labels=labels, variant=variant, reduction="none")
        permuted = sup_con(
            *views[:, order], labels=labels[order], variant=variant, reduction="none"
        )
        torch.testing.assert_close(permuted, loss[:, order])

    @given(seed=st.integers(0, 2**31), variant=any_variant)
    @settings(max_examples=30, deadline=None)
    def test_names_of_labels_do_not_matter(self, seed, variant):
        torch.manual_seed(seed)
        views, labels = random_views(2, 12, 6), torch.randint(0, 5, (12,))
        names = torch.randint(-(2**40), 2**40, (5,)).unique()
        assert len(names) == 5
        loss = sup_con(*views, labels=labels, variant=variant)
        renamed = sup_con(*views, labels=names[torch.randperm(5)][labels], variant=variant)
        torch.testing.assert_close(renamed, loss)

    @given(seed=st.integers(0, 2**31), variant=any_variant)
    @settings(max_examples=30, deadline=None)
    def test_the_gradient_is_orthogonal_to_its_row(self, seed, variant):
        torch.manual_seed(seed)
        (views,) = wanting(random_views(2, 9, 5))
        labels = torch.randint(0, 4, (9,))
        (grad,) = torch.autograd.grad(sup_con(*views, labels=labels, variant=variant), views)
        lengths = grad.norm(dim=-1) * views.norm(dim=-1)
        assert ((grad * views).sum(-1).abs() <= 1e-12 * lengths + 1e-300).all()


class TestModule:
    @variants
    def test_is_the_function_with_its_options(self, variant):
        views, weights = random_views(2, 7, 5), torch.rand(7)
        loss_fn = SupCon(0.2, variant=variant, reduction="sum", backend="reference")
        expected = sup_con(
            *views,
            labels=LABELS,
            temperature=0.2,
            variant=variant,
            sample_weight=weights,
            reduction="sum",
        )
        torch.testing.assert_close(loss_fn(*views, labels=LABELS, sample_weight=weights), expected)
        loss, stats = loss_fn(*views, labels=LABELS, sample_weight=weights, return_stats=True)
        torch.testing.assert_close(loss, expected)
        assert 0 <= stats.accuracy <= 1

    def test_repr_tells_the_options(self):
        assert repr(SupCon(0.2, variant="in")) == ("SupCon(temperature=0.2, variant='in')")

    def test_a_learnable_temperature_gets_its_gradient(self):
        views = random_views(2, 7, 5, torch.float32)
        loss_fn = SupCon(0.2, learnable_temperature=True)
        loss_fn(*views, labels=LABELS).backward()
        logit_scale = loss_fn.logit_scale.detach().double().requires_grad_()
        loss = reference.sup_con(views.double(), LABELS, (-logit_scale).exp()).mean()
        (expected,) = torch.autograd.grad(loss, logit_scale)
        assert_within(loss_fn.logit_scale.grad, expected, 1e-5)

    def test_a_temperature_at_its_bound_can_rise_again(self):
        """Left beyond the bound, the parameter would get no gradient for the rest of training."""
        loss_fn = SupCon(0.01, learnable_temperature=True)
        with torch.no_grad():
            loss_fn.logit_scale += 5
        # Positives are opposed: less scale is better.
        loss_fn(torch.eye(5), -torch.eye(5), labels=torch.arange(5)).backward()
        assert loss_fn.logit_scale.item() == pytest.approx(math.log(100))
        assert loss_fn.logit_scale.grad > 0
