"""Weights, label smoothing and hardness: alone, and next to every other option of the losses.

Equations (13) to (18) of docs/nt_xent.md.
"""

import math

import algorithm1
import pytest
import torch
import torch.nn.functional as F
from budgets import assert_within, gradient_budget
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_kit import InfoNCE, NTXent, reference
from contrastive_kit.functional import info_nce, nt_xent
from contrastive_kit.losses._kept import _sorted_sums, kept_counts, kept_sums
from contrastive_kit.ops import BACKENDS, Exclusion

backends = pytest.mark.parametrize("backend", list(BACKENDS))
OPTIONS = [
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"hardness": 0.7},
    {"positive_prior": 0.1},
    {"positive_prior": 0.1, "hardness": 0.7},
    {"margin": 0.2},
    {"margin": 0.3, "label_smoothing": 0.1},
    {"margin": 0.3, "positive_prior": 0.05, "hardness": 0.4},
    {"false_negative_margin": 0.0},
    {"false_negative_margin": 0.1, "hardness": 0.7, "margin": 0.2},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)
IDS = torch.tensor([3, 3, -1, 8, 5, 8, 8])


def random_views(n_views, n, d, dtype=torch.float64):
    image = torch.randn(n, d, dtype=torch.float64)
    return (image + 0.7 * torch.randn(n_views, n, d, dtype=torch.float64)).to(dtype)


def with_slack(options, dtype):
    """The options with what the docstrings say that ties are given."""
    if "false_negative_margin" not in options:
        return options
    slack = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3}[dtype]
    return options | {"false_negative_margin": options["false_negative_margin"] + slack}


def wanting(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@backends
@options
@pytest.mark.parametrize("n_views", [2, 3])
@pytest.mark.parametrize("ids", [None, IDS], ids=["", "ids"])
def test_nt_xent_equals_its_loops(ids, n_views, options, backend):
    views = random_views(n_views, 7, 5)
    expected = torch.from_numpy(algorithm1.nt_xent(views, 0.2, ids, **options))
    actual = nt_xent(*views, temperature=0.2, ids=ids, reduction="none", backend=backend, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@backends
@pytest.mark.parametrize("n_views", [2, 3])
@pytest.mark.parametrize("prior", [0.0, 0.1])
def test_hardness_and_prior_of_the_decoupled_loss(prior, n_views, backend):
    views = random_views(n_views, 7, 5)
    options = {"hardness": 0.7, "positive_prior": prior}
    expected = torch.from_numpy(algorithm1.nt_xent(views, 0.2, IDS, True, **options))
    actual = nt_xent(
        *views,
        temperature=0.2,
        ids=IDS,
        decoupled=True,
        **options,
        reduction="none",
        backend=backend,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@backends
@options
@pytest.mark.parametrize("ids", [None, IDS], ids=["", "ids"])
def test_info_nce_equals_its_loops(ids, options, backend):
    q, k = random_views(2, 7, 5)
    call = {"temperature": 0.2, "ids": ids, "reduction": "none", "backend": backend, **options}
    rows = torch.from_numpy(algorithm1.info_nce(q, k, 0.2, ids=ids, **options))
    columns = torch.from_numpy(algorithm1.info_nce(k, q, 0.2, ids=ids, **options))
    torch.testing.assert_close(info_nce(q, k, **call), rows, rtol=1e-12, atol=1e-12)
    both = info_nce(q, k, symmetric=True, **call)
    torch.testing.assert_close(both, torch.stack([rows, columns]), rtol=1e-12, atol=1e-12)


@backends
@options
@pytest.mark.parametrize("shape", [(1, 5), (70, 5), (7, 1, 5), (7, 30, 5)])
def test_info_nce_with_negatives_equals_its_loops(shape, options, backend):
    q, k = random_views(2, 7, 5)
    negatives = torch.randn(*shape, dtype=torch.float64)
    expected = torch.from_numpy(algorithm1.info_nce(q, k, 0.2, negatives, **options))
    actual = info_nce(
        q, k, negatives, temperature=0.2, reduction="none", backend=backend, **options
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@backends
@options
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (63, 60), (126, 7)])
@pytest.mark.usefixtures("poisoned_empty")
def test_value_and_gradients_at_odd_sizes(n, d, dtype, options, backend):
    views = random_views(3, n, d, dtype)
    weights = torch.rand(n, dtype=torch.float64)
    inputs = wanting(*views.double())
    expected = reference.weighted_mean(
        reference.nt_xent(torch.stack(inputs), 0.2, **with_slack(options, dtype)), weights
    )
    expected_grads = torch.autograd.grad(expected, inputs)
    inputs = wanting(*views)
    loss = nt_xent(*inputs, temperature=0.2, sample_weight=weights, backend=backend, **options)
    # The dtype is that of the embeddings, whatever that of the weights is.
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(loss, expected, 1e-13 if dtype == torch.float64 else 2e-6)
    for grad, expected_grad in zip(torch.autograd.grad(loss, inputs), expected_grads, strict=True):
        # A difference of sums, as with a prior, is less exact than either.
        factor = 6 if "positive_prior" in options else 3
        assert_within(grad, expected_grad, factor * gradient_budget(dtype, 0.2))


@backends
@options
@pytest.mark.parametrize("shape", [None, (40, 6), (11, 4, 6)])
def test_gradients_of_info_nce(shape, options, backend):
    tensors = [*random_views(2, 11, 6)]
    if shape:
        tensors.append(torch.randn(*shape, dtype=torch.float64))
    inputs = wanting(*tensors)
    if shape:
        expected = reference.info_nce_with_negatives(*inputs, 0.2, **options).mean()
    else:
        ids = torch.arange(11) // 2
        expected = reference.info_nce(*inputs, 0.2, ids, **options).mean()
        expected = expected + reference.info_nce(*inputs[::-1], 0.2, ids, **options).mean()
    expected_grads = torch.autograd.grad(expected, inputs)
    inputs = wanting(*tensors)
    more = {} if shape else {"symmetric": True, "ids": torch.arange(11) // 2}
    loss = info_nce(*inputs, temperature=0.2, backend=backend, **options, **more)
    loss = loss if shape else 2 * loss
    assert_within(loss, expected, 1e-13)
    for grad, expected_grad in zip(torch.autograd.grad(loss, inputs), expected_grads, strict=True):
        assert_within(grad, expected_grad, 1e-12)


@options
def test_gradcheck_with_a_learned_temperature_and_learned_weights(options):
    views = wanting(*random_views(3, 4, 3))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def loss(t, w, *views):
        return nt_xent(*views, temperature=t, sample_weight=w, **options)

    assert torch.autograd.gradcheck(loss, (temperature, weights, *views))


class TestLabelSmoothing:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
    def test_is_that_of_cross_entropy_over_the_candidates(self, smoothing):
        """The same number under the same name: torch's convention."""
        q, k = random_views(2, 9, 5)
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.07
        expected = F.cross_entropy(logits, torch.arange(9), label_smoothing=smoothing)
        actual = info_nce(q, k, temperature=0.07, label_smoothing=smoothing)
        torch.testing.assert_close(actual, expected)

    def test_with_several_positives_is_that_of_cross_entropy_with_probabilities(self):
        views = random_views(3, 6, 5)
        u = F.normalize(views.flatten(0, 1), dim=1)
        itself = torch.eye(18, dtype=torch.bool)
        logits = (u @ u.T / 0.3)[~itself].view(18, 17)
        image = torch.arange(6).repeat(3)
        target = (image[:, None] == image[None, :])[~itself].view(18, 17) / 2
        expected = F.cross_entropy(logits, target.double(), label_smoothing=0.2)
        actual = nt_xent(*views, temperature=0.3, label_smoothing=0.2)
        torch.testing.assert_close(actual, expected)

    def test_of_everything_has_no_preferred_candidate(self):
        """With all of the target spread out, swapping keys of queries changes no total."""
        q, k = random_views(2, 6, 5)
        loss = info_nce(q, k, label_smoothing=1.0, reduction="none")
        swapped = info_nce(q, k.roll(1, 0), label_smoothing=1.0, reduction="none")
        torch.testing.assert_close(loss, swapped)


class TestHardness:
    def test_zero_is_the_plain_loss_bit_for_bit(self):
        views = random_views(2, 9, 5, torch.float32)
        assert torch.equal(nt_xent(*views, hardness=0.0), nt_xent(*views))

    def test_is_the_published_estimator_without_debiasing(self):
        """Robinson et al., arXiv 2010.04592, the pseudo-code of appendix A.2 with τ⁺ = 0."""
        z1, z2 = random_views(2, 8, 5)
        beta, t = 1.3, 0.5
        u = F.normalize(torch.cat([z1, z2]), dim=1)
        keep = ~torch.eye(8, dtype=torch.bool).repeat(2, 2)
        neg = (u @ u.T / t).exp()[keep].view(16, 14)
        pos = (F.normalize(z1, dim=1) * F.normalize(z2, dim=1)).sum(1).div(t).exp().repeat(2)
        reweight = (beta * neg.log()).exp()
        ng = (reweight * neg).sum(1) / reweight.mean(1)
        expected = -(pos / (pos + ng)).log().mean()
        torch.testing.assert_close(nt_xent(z1, z2, temperature=t, hardness=beta), expected)

    def test_in_the_limit_only_the_hardest_negative_counts_n_times(self):
        q, k = random_views(2, 6, 5)
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
        hardest = logits.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).amax(1)
        expected = torch.log1p(5 * (hardest - logits.diagonal()).exp())
        actual = info_nce(q, k, temperature=1.0, hardness=1e4, reduction="none")
        torch.testing.assert_close(actual, expected)

    def test_small_temperatures_stay_finite(self):
        views = wanting(*random_views(2, 9, 5, torch.float32))
        loss = nt_xent(*views, temperature=0.005, hardness=2.0)
        grads = torch.autograd.grad(loss, views)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in grads)
        expected = reference.nt_xent(torch.stack(views).double(), 0.005, hardness=2.0).mean()
        assert_within(loss, expected, 1e-5)


class TestPositivePrior:
    """What the authors published, on whole matrices in probability space."""

    @pytest.mark.parametrize("prior", [0.01, 0.1, 0.4])
    @pytest.mark.parametrize("beta", [0.0, 1.0])
    def test_is_the_debiased_and_the_hard_loss_of_the_authors(self, beta, prior):
        """Chuang et al., arXiv 2007.00224, and Robinson et al., arXiv 2010.04592: their main.py."""
        n, t = 8, 0.5
        inputs = wanting(*random_views(2, n, 5))
        out = F.normalize(torch.cat(inputs), dim=1)
        keep = ~torch.eye(n, dtype=torch.bool).repeat(2, 2)
        neg = (out @ out.T / t).exp()[keep].view(2 * n, -1)
        pos = ((out[:n] * out[n:]).sum(1) / t).exp().repeat(2)
        importance = (beta * neg.log()).exp()
        reweighted = (importance * neg).sum(1) / importance.mean(1)
        n_negatives = 2 * n - 2
        ng = (-prior * n_negatives * pos + reweighted) / (1 - prior)
        clamped = ng < n_negatives * math.exp(-1 / t)
        ng = ng.clamp(min=n_negatives * math.exp(-1 / t))
        expected = -(pos / (pos + ng)).log().mean()
        # Both sides of the clamp have to be there.
        assert 0 < clamped.sum() < 2 * n or prior < 0.4
        actual = nt_xent(*inputs, temperature=t, positive_prior=prior, hardness=beta)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs)
        )

    def test_takes_out_the_positives_that_it_knows_of(self):
        """Half of the negatives are the key itself: what is left is the sum over the others."""
        q, k = random_views(2, 6, 5)
        others = torch.randn(6, 3, 5, dtype=torch.float64)
        spoiled = torch.cat([others, k[:, None].expand(6, 3, 5)], 1)
        loss = info_nce(q, k, spoiled, temperature=0.5, positive_prior=0.5)
        # Of 6 negatives, 3 are counted twice: (sum of 3) / (1 - 0.5).
        expected = info_nce(q, k, torch.cat([others, others], 1), temperature=0.5)
        torch.testing.assert_close(loss, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_at_the_floor_the_gradient_is_that_of_the_positive(self, dtype):
        """All negatives opposite, all positives equal: the estimate is below what there can be."""
        q = torch.eye(4, dtype=dtype)
        inputs = wanting(q, q.clone(), -q[:, None].expand(4, 5, 4))
        loss = info_nce(*inputs, temperature=0.01, positive_prior=0.3, reduction="none")
        expected = torch.full((4,), 5 * math.exp(-200), dtype=torch.float64).to(dtype)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
        grads = torch.autograd.grad(loss.sum(), inputs)
        assert all(g.isfinite().all() for g in grads)
        assert not grads[2].any()

    def test_of_zero_is_the_plain_loss_bit_for_bit(self):
        views = random_views(2, 9, 5, torch.float32)
        assert torch.equal(nt_xent(*views, positive_prior=0.0), nt_xent(*views))


class TestMargin:
    def test_is_that_of_additive_margin_softmax(self):
        """Wang et al., arXiv 1801.05599, equation 6: keys are the weights of classes."""
        q, k = random_views(2, 9, 5)
        cosines = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
        logits = (cosines - 0.35 * torch.eye(9)) / 0.07
        expected = F.cross_entropy(logits, torch.arange(9))
        torch.testing.assert_close(info_nce(q, k, margin=0.35), expected)
        both = (expected + F.cross_entropy(logits.T, torch.arange(9))) / 2
        torch.testing.assert_close(info_nce(q, k, margin=0.35, symmetric=True), both)

    def test_of_several_positives_is_that_of_each(self):
        views = random_views(3, 6, 5)
        u = F.normalize(views.flatten(0, 1), dim=1)
        image = torch.arange(6).repeat(3)
        same = image[:, None] == image[None, :]
        itself = torch.eye(18, dtype=torch.bool)
        logits = ((u @ u.T - 0.2 * same) / 0.3)[~itself].view(18, 17)
        target = same[~itself].view(18, 17).double() / 2
        expected = F.cross_entropy(logits, target)
        torch.testing.assert_close(nt_xent(*views, temperature=0.3, margin=0.2), expected)

    def test_keeps_the_precision_of_a_tiny_loss(self):
        q = torch.eye(4)
        k = q.clone().requires_grad_()
        loss = info_nce(q, k, temperature=0.03, margin=0.1)
        expected = 3 * math.exp(-0.9 / 0.03)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"ids": IDS}, {"return_stats": True}], ids=str)
def test_an_option_that_is_off_costs_nothing(options):
    """The same ops, forward and backward, whether it is said or not."""

    class Ops(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def ops(function, **off):
        views = wanting(*random_views(2, 7, 5))
        with Ops() as seen:
            loss = function(*views, **options, **off)
            (loss[0] if "return_stats" in options else loss).backward()
        return seen.names

    off = {"label_smoothing": 0.0, "hardness": 0.0, "positive_prior": 0.0, "margin": 0.0}
    assert ops(nt_xent, **off) == ops(nt_xent)
    assert "aten.expm1.default" in ops(nt_xent, positive_prior=0.1)
    off |= {"in_batch_negatives": True, "query_negatives": False, "key_negatives": False}
    assert ops(info_nce, **off) == ops(info_nce)
    # One logsumexp, with none of what joins several.
    assert sum("logsumexp" in name for name in ops(info_nce)) <= 3 + ("return_stats" in options)


class TestWeights:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_reductions(self, reduction):
        views, weights = random_views(3, 5, 4), torch.rand(5, dtype=torch.float64)
        each = nt_xent(*views, reduction="none")
        expected = {
            "none": each * weights,
            "sum": (each * weights).sum(),
            "mean": reference.weighted_mean(each, weights),
        }[reduction]
        torch.testing.assert_close(
            nt_xent(*views, sample_weight=weights, reduction=reduction), expected
        )

    def test_both_directions_of_a_pair_have_its_weight(self):
        q, k = random_views(2, 5, 4)
        weights = torch.rand(5, dtype=torch.float64)
        each = info_nce(q, k, symmetric=True, reduction="none")
        expected = reference.weighted_mean(each, weights)
        torch.testing.assert_close(info_nce(q, k, symmetric=True, sample_weight=weights), expected)

    @pytest.mark.parametrize("factor", [1.0, 3.0, 1e-20])
    def test_equal_weights_are_no_weights(self, factor):
        views = random_views(2, 9, 5, torch.float32)
        weights = torch.full((9,), factor)
        torch.testing.assert_close(nt_xent(*views, sample_weight=weights), nt_xent(*views))

    def test_no_weight_at_all_is_a_loss_of_zero(self):
        views = wanting(*random_views(2, 5, 4))
        for reduction in ("mean", "sum"):
            loss = nt_xent(*views, sample_weight=torch.zeros(5), reduction=reduction)
            assert loss == 0
            for grad in torch.autograd.grad(loss, views):
                assert torch.equal(grad, torch.zeros(5, 4, dtype=torch.float64))

    def test_an_image_of_weight_zero_stays_a_negative(self):
        views = random_views(2, 5, 4)
        weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
        expected = nt_xent(*views, reduction="none")[:, :4].mean()
        torch.testing.assert_close(nt_xent(*views, sample_weight=weights), expected)
        assert not torch.isclose(nt_xent(*views[:, :4]), expected)

    def test_integer_weights_repeat_anchors(self):
        q, k = random_views(2, 5, 4)
        queue = torch.randn(9, 4, dtype=torch.float64)
        counts = torch.tensor([1, 2, 0, 3, 1])
        expected = info_nce(q.repeat_interleave(counts, 0), k.repeat_interleave(counts, 0), queue)
        torch.testing.assert_close(info_nce(q, k, queue, sample_weight=counts.double()), expected)


@options
def test_an_anchor_without_negatives_is_silent(options):
    views = wanting(*random_views(2, 4, 3))
    loss = nt_xent(*views, ids=torch.zeros(4, dtype=torch.int64), **options)
    assert loss == 0
    for grad in torch.autograd.grad(loss, views):
        assert torch.equal(grad, torch.zeros(4, 3, dtype=torch.float64))


@options
def test_nan_shows_in_the_loss(options):
    views = random_views(2, 4, 3)
    views[1, 2, 0] = torch.nan
    assert nt_xent(*views, **options).isnan()


@options
def test_statistics_are_of_the_softmax_without_options(options):
    if "false_negative_margin" in options:
        pytest.skip("what is left out is no candidate")
    views, weights = random_views(3, 9, 5), torch.rand(9)
    plain = nt_xent(*views, return_stats=True)[1]
    loss, stats = nt_xent(*views, sample_weight=weights, return_stats=True, **options)
    torch.testing.assert_close(torch.stack(stats), torch.stack(plain))
    torch.testing.assert_close(loss, nt_xent(*views, sample_weight=weights, **options))
    q, k = views[:2]
    for negatives in (None, torch.randn(20, 5), torch.randn(9, 4, 5)):
        plain = info_nce(q, k, negatives, return_stats=True)[1]
        stats = info_nce(q, k, negatives, return_stats=True, **options)[1]
        torch.testing.assert_close(torch.stack(stats), torch.stack(plain))


@options
def test_modules_pass_their_options_on(options):
    views, weights = random_views(2, 9, 5), torch.rand(9)
    ids = torch.arange(9) // 2
    for module, function in ((NTXent, nt_xent), (InfoNCE, info_nce)):
        loss_fn = module(0.2, **options)
        expected = function(*views, temperature=0.2, ids=ids, sample_weight=weights, **options)
        torch.testing.assert_close(loss_fn(*views, ids=ids, sample_weight=weights), expected)
        for name, value in options.items():
            assert f", {name}={value}" in repr(loss_fn)
        assert repr(loss_fn).count("=") == 1 + len(options)


class TestKept:
    """The sums and counts against the mask of the rule, written out."""

    def rules(self):
        rows, columns = torch.tensor([4, 9, 4, -2, 7, 4, 5]), torch.tensor([4, 4, 0, -2, 5, 5, 9])
        yield 7, 7, Exclusion()
        yield 7, 5, Exclusion()
        yield 14, 14, Exclusion(7)
        yield 7, 7, Exclusion(7)
        yield 7, 7, Exclusion(0, rows)
        yield 7, 7, Exclusion(0, rows, columns)
        yield 7, 3, Exclusion(0, rows, columns[:3])
        yield 3, 7, Exclusion(0, rows[:3], torch.full((7,), 11))
        yield 3, 7, Exclusion(0, torch.full((3,), -11), columns)

    def test_equal_the_mask(self):
        for n_rows, n_columns, exclusion in self.rules():
            kept = ~exclusion.mask(n_rows, n_columns, torch.device("cpu"))
            columns = torch.randn(n_columns, 3, dtype=torch.float64)
            counts = kept_counts(n_rows, n_columns, exclusion, torch.device("cpu"))
            assert torch.equal(counts, kept.sum(1))
            actual = kept_sums(n_rows, columns, exclusion)
            torch.testing.assert_close(actual, kept.double() @ columns)

    def test_the_form_for_accelerators_is_the_same(self):
        classes, wanted = torch.tensor([3, 0, 0, 1, 3]), torch.tensor([0, 5, 3])
        columns = torch.randn(5, 3, dtype=torch.float64)
        actual = _sorted_sums(columns.new_zeros(6, 3), classes, columns, wanted)
        expected = (wanted[:, None] == classes[None, :]).double() @ columns
        torch.testing.assert_close(actual, expected)

    def test_gradients(self):
        for n_rows, n_columns, exclusion in self.rules():
            columns = torch.randn(n_columns, 2, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(
                lambda c, n=n_rows, e=exclusion: kept_sums(n, c, e), columns
            )
