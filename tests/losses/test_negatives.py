"""Negatives from several places at once: the batch, the same side, the caller. Equation (11).

With the formulas of sentence-transformers, GTE and Qwen3 written out as they were published.
"""

from functools import partial

import algorithm1
import pytest
import torch
import torch.nn.functional as F
from budgets import VALUE, assert_within, gradient_budget

from contrastive_kit import InfoNCE, NegativeQueue, reference
from contrastive_kit.functional import info_nce, nt_xent
from contrastive_kit.ops import BACKENDS

backends = pytest.mark.parametrize("backend", list(BACKENDS))
options_of_the_softmax = pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "margin": 0.2},
        {"hardness": 0.7},
        {"positive_prior": 0.1, "margin": 0.1},
        {"false_negative_margin": 0.1},
    ],
    ids=str,
)
IDS = torch.tensor([3, 3, -1, 8, 5, 8, 8])
SHAPES = {"shared": (11, 5), "per query": (7, 3, 5)}
SAME_SIDE = [
    {},
    {"query_negatives": True},
    {"key_negatives": True},
    {"query_negatives": True, "key_negatives": True},
]


def random_pairs(n, d, dtype=torch.float64):
    query = torch.randn(n, d, dtype=torch.float64)
    return query.to(dtype), (query + torch.randn(n, d, dtype=torch.float64)).to(dtype)


def wanting(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def negatives_and_ids(name):
    shape = SHAPES[name]
    return torch.randn(*shape, dtype=torch.float64), torch.randint(-1, 9, shape[:-1])


@backends
@options_of_the_softmax
@pytest.mark.parametrize("same_side", SAME_SIDE, ids=str)
@pytest.mark.parametrize("negatives", [None, *SHAPES])
@pytest.mark.parametrize("with_ids", [False, True])
def test_one_direction_equals_its_loop(with_ids, negatives, same_side, options, backend):
    q, k = random_pairs(7, 5)
    more, ids, negative_ids = None, None, None
    if negatives is not None:
        more, negative_ids = negatives_and_ids(negatives)
    if with_ids:
        ids = IDS
    else:
        negative_ids = None
    call = {"ids": ids, "negative_ids": negative_ids, **same_side, **options}
    expected = algorithm1.info_nce(q, k, 0.2, more, in_batch=True, **call)
    actual = info_nce(
        q, k, more, temperature=0.2, in_batch_negatives=True, reduction="none", backend=backend,
        **call,
    )  # fmt: skip
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@backends
@options_of_the_softmax
@pytest.mark.parametrize("same_side", SAME_SIDE, ids=str)
@pytest.mark.parametrize("negatives", [None, *SHAPES])
def test_both_directions_equal_their_loops(negatives, same_side, options, backend):
    """The negatives of the caller join the queries, those of a side its own direction."""
    q, k = random_pairs(7, 5)
    more, negative_ids = (None, None) if negatives is None else negatives_and_ids(negatives)
    rows = algorithm1.info_nce(
        q, k, 0.2, more, ids=IDS, negative_ids=negative_ids, in_batch=True,
        query_negatives="query_negatives" in same_side, **options,
    )  # fmt: skip
    columns = algorithm1.info_nce(
        k, q, 0.2, ids=IDS, query_negatives="key_negatives" in same_side, **options
    )
    actual = info_nce(
        q, k, more, temperature=0.2, symmetric=True, ids=IDS, negative_ids=negative_ids,
        in_batch_negatives=True, reduction="none", backend=backend, **same_side, **options,
    )  # fmt: skip
    expected = torch.stack([torch.from_numpy(rows), torch.from_numpy(columns)])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("negatives", list(SHAPES))
def test_ids_with_the_negatives_of_the_caller_alone(negatives):
    q, k = random_pairs(7, 5)
    more, negative_ids = negatives_and_ids(negatives)
    call = {"ids": IDS, "negative_ids": negative_ids}
    expected = torch.from_numpy(algorithm1.info_nce(q, k, 0.2, more, **call))
    actual = info_nce(q, k, more, temperature=0.2, reduction="none", **call)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("negatives", ["shared", "per query"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.usefixtures("poisoned_empty")
def test_value_and_gradients_at_odd_sizes(symmetric, negatives, dtype, backend):
    shape = {"shared": (70, 60), "per query": (65, 3, 60)}[negatives]
    tensors = [*random_pairs(65, 60, dtype), torch.randn(*shape, dtype=torch.float64).to(dtype)]
    ids = torch.arange(65) // 2
    call = {"query_negatives": True, "key_negatives": True}
    q, k, more = exact = wanting(*(x.double() for x in tensors))
    if symmetric:
        expected = reference.info_nce(q, k, 0.1, ids, negatives=more, query_negatives=True).sum()
        back = reference.info_nce(k, q, 0.1, ids, query_negatives=True)
        expected = expected + back.sum()
    else:
        expected = reference.info_nce(q, k, 0.1, ids, negatives=more, **call).sum()
    expected_grads = torch.autograd.grad(expected, exact)
    inputs = wanting(*tensors)
    loss = info_nce(
        *inputs, temperature=0.1, ids=ids, symmetric=symmetric, in_batch_negatives=True,
        reduction="sum",
        backend=backend, **call,
    )  # fmt: skip
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(loss, expected, VALUE[dtype])
    for grad, expected_grad in zip(torch.autograd.grad(loss, inputs), expected_grads, strict=True):
        assert grad.dtype == dtype
        assert_within(grad, expected_grad, 2 * gradient_budget(dtype, 0.1))


@pytest.mark.parametrize("negatives", list(SHAPES))
def test_gradcheck(negatives):
    more, negative_ids = negatives_and_ids(negatives)
    inputs = wanting(torch.tensor(0.4).double(), *random_pairs(7, 5), more)

    def loss(t, q, k, more):
        return info_nce(
            q, k, more, temperature=t, symmetric=True, ids=IDS, negative_ids=negative_ids,
            in_batch_negatives=True, query_negatives=True, key_negatives=True, reduction="none",
            hardness=0.3,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, inputs)


class TestPublishedFormulas:
    """Each as its authors wrote it, on whole matrices."""

    @staticmethod
    def cosines(a, b):
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T

    @staticmethod
    def assert_same(ours, theirs, inputs):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
        for a, b in zip(
            torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)

    def test_multiple_negatives_ranking_loss(self):
        """sentence-transformers: scale·cos of each anchor with all positives, then all negatives.

        Cross entropy with the number of the anchor as its class; scale 20.
        """
        q, k = random_pairs(9, 6)
        inputs = q, k, *hard = wanting(q, k, *torch.randn(2, 9, 6, dtype=torch.float64))
        candidates = torch.cat([k, *hard])
        expected = F.cross_entropy(20.0 * self.cosines(q, candidates), torch.arange(9))
        ours = info_nce(q, k, torch.cat(hard), temperature=0.05, in_batch_negatives=True)
        self.assert_same(ours, expected, inputs)

    @pytest.mark.slow
    @pytest.mark.parametrize("n_hard", [0, 1, 2])
    def test_the_package_sentence_transformers(self, n_hard):
        losses = pytest.importorskip(
            "sentence_transformers.sentence_transformer.losses",
            reason="sentence-transformers is not installed",
        )
        columns = wanting(*torch.randn(2 + n_hard, 9, 6, dtype=torch.float64))
        q, k, *hard = columns
        given = {"negatives": torch.cat(hard)} if hard else {}
        ours = info_nce(q, k, temperature=0.05, in_batch_negatives=True, **given)
        theirs = losses.MultipleNegativesRankingLoss(model=None)
        self.assert_same(ours, theirs.compute_loss_from_embeddings(columns, None), columns)
        if hard:
            return
        qwen = losses.MultipleNegativesRankingLoss(
            model=None, directions=("query_to_doc", "query_to_query", "doc_to_doc")
        )
        ours = info_nce(q, k, temperature=0.05, query_negatives=True, key_negatives=True)
        self.assert_same(ours, qwen.compute_loss_from_embeddings(columns, None), columns)
        gte = losses.MultipleNegativesRankingLoss(
            model=None,
            directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
        )
        ours = self.gte(q, k, 0.05)
        self.assert_same(ours, gte.compute_loss_from_embeddings(columns, None), columns)

    @staticmethod
    def gte(q, k, temperature):
        """The line that docs/choosing_a_loss.md gives."""
        directions = info_nce(
            q, k, temperature=temperature, symmetric=True, query_negatives=True,
            key_negatives=True, reduction="none",
        )  # fmt: skip
        return torch.logaddexp(*directions).mean()

    def test_gte(self):
        """Li et al., arXiv 2308.03281: one partition function of four sums."""
        q, k = inputs = wanting(*random_pairs(9, 6))
        off = ~torch.eye(9, dtype=torch.bool)
        to_keys, queries, keys = (
            (self.cosines(a, b) / 0.05).exp() for a, b in ((q, k), (q, q), (k, k))
        )
        z = to_keys.sum(1) + (queries * off).sum(1) + to_keys.sum(0) + (keys * off).sum(1)
        expected = -(to_keys.diagonal() / z).log().mean()
        self.assert_same(self.gte(q, k, 0.05), expected, inputs)

    @pytest.mark.parametrize("shape", list(SHAPES))
    def test_qwen3(self, shape):
        """Zhang et al., arXiv 2506.05176, section 3, without the factor for false negatives."""
        more, _ = negatives_and_ids(shape)
        q, k, more = inputs = wanting(*random_pairs(7, 5), more)
        off = ~torch.eye(7, dtype=torch.bool)
        to_keys, queries, keys = (
            (self.cosines(a, b) / 0.05).exp() for a, b in ((q, k), (q, q), (k, k))
        )
        hard = (F.normalize(q, dim=1)[:, None] * F.normalize(more, dim=-1)).sum(2).div(0.05).exp()
        z = to_keys.sum(1) + hard.sum(1) + (queries * off).sum(1) + (keys * off).sum(1)
        expected = -(to_keys.diagonal() / z).log().mean()
        ours = info_nce(
            q, k, more, temperature=0.05, in_batch_negatives=True, query_negatives=True,
            key_negatives=True,
        )  # fmt: skip
        self.assert_same(ours, expected, inputs)

    def test_neg_clip(self):
        """Yuksekgonul et al., arXiv 2210.01936: hard texts are columns of images alone."""
        q, k = random_pairs(7, 5)
        q, k, hard = inputs = wanting(q, k, torch.randn(7, 5, dtype=torch.float64))
        labels = torch.arange(7)
        images = F.cross_entropy(self.cosines(q, torch.cat([k, hard])) / 0.07, labels)
        texts = F.cross_entropy(self.cosines(k, q) / 0.07, labels)
        ours = info_nce(q, k, hard, symmetric=True, in_batch_negatives=True)
        self.assert_same(ours, (images + texts) / 2, inputs)


def test_with_all_of_the_batch_it_is_nt_xent():
    q, k = random_pairs(9, 5)
    everything = {"symmetric": True, "query_negatives": True, "key_negatives": True}
    for options in ({}, {"ids": torch.arange(9) // 2}, {"hardness": 0.4}, {"label_smoothing": 0.2}):
        ours, stats = info_nce(
            q, k, temperature=0.5, reduction="none", return_stats=True, **everything, **options
        )
        expected, expected_stats = nt_xent(q, k, reduction="none", return_stats=True, **options)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.stack(stats), torch.stack(expected_stats))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_reductions(reduction):
    q, k = random_pairs(7, 5)
    more, weights = torch.randn(4, 5, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    call = partial(info_nce, q, k, more, in_batch_negatives=True, symmetric=True)
    each = call(reduction="none")
    assert each.shape == (2, 7)
    expected = {
        "none": each * weights,
        "sum": (each * weights).sum(),
        "mean": reference.weighted_mean(each, weights),
    }[reduction]
    torch.testing.assert_close(call(reduction=reduction, sample_weight=weights), expected)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_statistics_are_over_all_candidates(shape):
    q, k = random_pairs(7, 5)
    more, negative_ids = negatives_and_ids(shape)
    ids = torch.arange(7)
    _, stats = info_nce(
        q, k, more, temperature=0.3, in_batch_negatives=True, query_negatives=True, ids=ids,
        negative_ids=negative_ids, return_stats=True,
    )  # fmt: skip
    u, v, w = (F.normalize(x, dim=-1) for x in (q, k, more))
    off = ~torch.eye(7, dtype=torch.bool)
    others = [(u @ v.T).masked_fill(~off, -torch.inf), (u @ u.T).masked_fill(~off, -torch.inf)]
    others.append((u[:, None] * w).sum(2).masked_fill(ids[:, None] == negative_ids, -torch.inf))
    negative = torch.cat(others, 1)
    positive = (u * v).sum(1)
    p = (torch.cat([positive[:, None], negative], 1) / 0.3).softmax(1)
    torch.testing.assert_close(stats.accuracy, (positive > negative.amax(1)).double().mean())
    torch.testing.assert_close(stats.positive_similarity, positive.mean())
    torch.testing.assert_close(stats.negative_similarity, negative[negative != -torch.inf].mean())
    torch.testing.assert_close(stats.entropy, -torch.special.xlogy(p, p).sum(1).mean())


class TestEdges:
    def test_a_query_that_ids_leave_nothing(self):
        """Left out in the batch and among the negatives: loss 0, gradient 0, no NaN."""
        q, k = random_pairs(4, 3)
        same = torch.zeros(4, dtype=torch.int64)
        for more in (torch.randn(5, 3), torch.randn(4, 5, 3)):
            inputs = wanting(q, k, more.double())
            loss, stats = info_nce(
                *inputs, in_batch_negatives=True, query_negatives=True, symmetric=True, ids=same,
                negative_ids=torch.zeros(more.shape[:-1], dtype=torch.int64), return_stats=True,
            )  # fmt: skip
            assert loss == 0
            assert stats.accuracy == 1
            for grad in torch.autograd.grad(loss, inputs):
                assert torch.equal(grad, torch.zeros_like(grad))

    def test_an_empty_queue_adds_nothing(self):
        q, k = wanting(*random_pairs(7, 5))
        queue = NegativeQueue(5, 30).double()
        for symmetric in (False, True):
            plain = info_nce(q, k, symmetric=symmetric)
            empty = info_nce(q, k, queue.negatives(), symmetric=symmetric, in_batch_negatives=True)
            torch.testing.assert_close(empty, plain, rtol=1e-14, atol=0)

    def test_one_pair_with_negatives(self):
        q, k = random_pairs(1, 4)
        more = torch.randn(3, 4, dtype=torch.float64)
        both = info_nce(q, k, more, in_batch_negatives=True)
        torch.testing.assert_close(both, info_nce(q, k, more))

    def test_a_wider_dtype_of_the_negatives_is_that_of_the_loss(self):
        q, k = random_pairs(7, 5, torch.float32)
        more = torch.randn(4, 5, dtype=torch.float64)
        loss = info_nce(q, k, more, in_batch_negatives=True, symmetric=True)
        assert loss.dtype == torch.float64
        exact = info_nce(q.double(), k.double(), more, in_batch_negatives=True, symmetric=True)
        torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("place", ["key", "negatives"])
    def test_nan_shows_in_the_loss(self, place):
        q, k = random_pairs(4, 3)
        more = torch.randn(5, 3, dtype=torch.float64)
        (k if place == "key" else more)[2, 0] = torch.nan
        assert info_nce(q, k, more, in_batch_negatives=True).isnan()


Z = torch.randn(4, 3)
MORE = torch.randn(5, 3)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((Z, Z), {"in_batch_negatives": False}, ValueError, "False needs negatives, or there are"),
        ((Z, Z), {"in_batch_negatives": 1}, TypeError, "in_batch_negatives must be True or False"),
        ((Z, Z), {"query_negatives": "no"}, TypeError, "query_negatives must be True or False"),
        ((Z, Z), {"key_negatives": None}, TypeError, "key_negatives must be True or False"),
        ((Z, Z), {"negative_ids": torch.arange(4)}, ValueError, "of negatives, which are None"),
        (
            (Z, Z, MORE),
            {"query_negatives": True},
            ValueError,
            "query_negatives=True takes .* in_batch_negatives=True",
        ),
        (
            (Z, Z, MORE),
            {"key_negatives": True, "in_batch_negatives": False},
            ValueError,
            "key_negatives=True takes negatives from the batch, which .*False leaves out",
        ),
        (
            (Z, Z, MORE),
            {"symmetric": True, "in_batch_negatives": False},
            ValueError,
            "symmetric=True with negatives needs in_batch_negatives=True",
        ),
        (
            (Z, Z, MORE),
            {"negative_ids": torch.arange(5), "in_batch_negatives": True},
            ValueError,
            "negative_ids are compared with ids, which are None",
        ),
        (
            (Z, Z, MORE),
            {"ids": torch.arange(4), "negative_ids": torch.arange(4)},
            ValueError,
            r"negative_ids must have shape \(5,\), one id for each row of negatives, got \(4,\)",
        ),
        (
            (Z, Z, MORE.expand(4, 5, 3)),
            {"ids": torch.arange(4), "negative_ids": torch.arange(5)},
            ValueError,
            r"negative_ids must have shape \(4, 5\)",
        ),
        (
            (Z, Z, MORE),
            {"ids": torch.arange(4), "negative_ids": torch.ones(5)},
            TypeError,
            "negative_ids must hold integers, got torch.float32",
        ),
        (
            (Z, Z, torch.cat([Z, MORE])),
            {"in_batch_negatives": True},
            ValueError,
            "negatives must not hold the keys of the same call",
        ),
    ],
)
def test_errors(args, options, error, message):
    with pytest.raises(error, match=message):
        info_nce(*args, **options)


def test_the_module_has_the_options_and_passes_the_ids_on():
    q, k = random_pairs(7, 5)
    more, negative_ids = negatives_and_ids("shared")
    options = {"in_batch_negatives": True, "query_negatives": True, "key_negatives": True}
    loss_fn = InfoNCE(0.2, **options)
    call = {"ids": IDS, "negative_ids": negative_ids}
    torch.testing.assert_close(
        loss_fn(q, k, more, **call), info_nce(q, k, more, temperature=0.2, **options, **call)
    )
    assert "in_batch_negatives=True, query_negatives=True, key_negatives=True" in repr(loss_fn)
    with pytest.raises(ValueError, match="which in_batch_negatives=False leaves out"):
        InfoNCE(in_batch_negatives=False, query_negatives=True)
