"""``false_negative_margin``: candidates more similar than the positive left out, equation (17)."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from contrastive_kit import InfoNCE, reference
from contrastive_kit.functional import info_nce, nt_xent
from contrastive_kit.ops import Exclusion, kept_logsumexp

cpu_backends = pytest.mark.parametrize("backend", ["tiled", "reference"])


def random_views(n_views, n, d, dtype=torch.float64):
    image = torch.randn(n, d, dtype=torch.float64)
    return (image + 0.9 * torch.randn(n_views, n, d, dtype=torch.float64)).to(dtype)


def gist_embed(query, key, negatives, temperature):
    """GISTEmbed, arXiv 2402.16829, section 3, guided by the model itself, as its code writes it."""

    def similarity(a, b):
        return F.cosine_similarity(a[:, None], b[None], dim=-1)

    ap, aa, pp = similarity(query, key), similarity(query, query), similarity(key, key)
    an = similarity(query, negatives)
    guide = ap.diagonal().view(-1, 1)
    # The code leaves out what is above; an anchor itself has similarity 1, but for rounding.
    ap, aa, pp, an = (x.masked_fill(x > guide, -torch.inf) for x in (ap, aa, pp, an))
    for x in (aa, pp):
        x.fill_diagonal_(-torch.inf)
    scores = torch.cat([ap, aa, pp, an], dim=1) / temperature
    return F.cross_entropy(scores, torch.arange(len(query)))


@cpu_backends
def test_of_zero_is_gist_embed_guided_by_the_model(backend):
    q, k, h = random_views(3, 23, 6)
    expected = gist_embed(q, k, h, 0.1)
    call = {"in_batch_negatives": True, "query_negatives": True, "key_negatives": True}
    call |= {"temperature": 0.1, "backend": backend}
    actual = info_nce(q, k, h, false_negative_margin=0.0, **call)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert abs(info_nce(q, k, h, **call) - expected) > 0.1


def qwen3(query, key, negatives, temperature):
    """Qwen3 Embedding, arXiv 2506.05176, section 3: its denominator and its mask."""
    q, d, h = (F.normalize(x, dim=-1) for x in (query, key, negatives))
    losses = []
    for i in range(len(q)):
        positive = q[i] @ d[i]
        terms = [q[i] @ x for x in h[i]]
        for j in range(len(q)):
            if j != i:
                terms += [q[i] @ q[j], d[i] @ d[j], q[i] @ d[j]]
        kept = [s for s in terms if s <= positive + 0.1]
        total = torch.stack([positive, *kept]).div(temperature).logsumexp(0)
        losses.append(total - positive / temperature)
    return torch.stack(losses).mean()


@cpu_backends
def test_of_a_tenth_is_that_of_qwen3_embedding(backend):
    q, k = random_views(2, 9, 5)
    hard = q[:, None] + 1.5 * torch.randn(9, 4, 5, dtype=torch.float64)
    call = {"in_batch_negatives": True, "query_negatives": True, "key_negatives": True}
    call |= {"temperature": 0.1, "backend": backend}
    actual = info_nce(q, k, hard, false_negative_margin=0.1, **call)
    torch.testing.assert_close(actual, qwen3(q, k, hard, 0.1), rtol=1e-12, atol=0)
    assert abs(info_nce(q, k, hard, **call) - actual) > 0.01


@cpu_backends
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_across_tiles_with_gradients(margin, backend):
    """More rows than a tile has: directions of one tile keep different entries."""
    views = random_views(2, 701, 5)
    for loss, oracle in (
        (nt_xent, _nt_xent_of_reference),
        (partial(info_nce, symmetric=True), _clip_of_reference),
    ):
        ours, theirs = (views.clone().requires_grad_() for _ in range(2))
        call = {"temperature": 0.2, "false_negative_margin": margin}
        actual, expected = loss(*ours, backend=backend, **call), oracle(theirs, **call)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        (grad,) = torch.autograd.grad(actual, ours)
        (expected_grad,) = torch.autograd.grad(expected, theirs)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-14)


def _nt_xent_of_reference(views, **options):
    return reference.nt_xent(views, **options).mean()


def _clip_of_reference(views, **options):
    q, k = views
    ids = torch.arange(len(q))
    sides = [reference.info_nce(a, b, ids=ids, **options) for a, b in ((q, k), (k, q))]
    return torch.stack(sides).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_stay(dtype):
    """A duplicate of the positive is as similar, however its cosine is rounded."""
    q, k = random_views(2, 33, 100, dtype)
    q, k = torch.cat([q, q]), torch.cat([k, k])
    kept = info_nce(q, k, false_negative_margin=0.0, temperature=0.01, reduction="none")
    assert (kept >= 0.6931).all()


def test_there_is_more_slack_where_float32_may_be_rounded():
    """Products of TensorFloat-32 tell the cosine of a duplicate apart from that of the positive."""
    angles = torch.tensor([0.5, 0.5 - 1e-3, 2.0, 2.5])
    q = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    k = torch.stack([angles.cos(), angles.sin()], dim=1)
    call = {"false_negative_margin": 0.0, "temperature": 0.1, "reduction": "none"}
    before = torch.get_float32_matmul_precision()
    assert info_nce(q, k, **call)[0] < 0.01  # the second is nearer by 5e-4, and left out
    try:
        torch.set_float32_matmul_precision("high")
        assert info_nce(q, k, **call)[0] > 0.6
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_largest_margin_leaves_all_in():
    views = random_views(2, 9, 3)
    torch.testing.assert_close(
        nt_xent(*views, false_negative_margin=2.0), nt_xent(*views), rtol=1e-12, atol=0
    )


def test_an_anchor_whose_candidates_are_all_left_out_is_silent():
    q = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    k = torch.tensor([[-1.0, 0.0], [0.6, 0.8]])
    losses = info_nce(q, k, false_negative_margin=0.0, reduction="none")
    assert losses[0] == 0
    assert losses[1] > 0
    (grad,) = torch.autograd.grad(losses[0], q)
    assert (grad == 0).all()


def test_the_decision_is_constant_for_a_learned_temperature():
    q, k = random_views(2, 7, 4)
    loss_fn = InfoNCE(0.2, learnable_temperature=True, false_negative_margin=0.05).double()
    scale = loss_fn.logit_scale
    (grad,) = torch.autograd.grad(loss_fn(q, k), scale)
    s = scale.detach().requires_grad_()
    expected = reference.info_nce(q, k, (-s).exp(), torch.arange(7), false_negative_margin=0.05)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.mean(), s)[0])


@cpu_backends
def test_statistics_are_of_what_is_kept(backend):
    q, k = random_views(2, 15, 4)
    call = {"false_negative_margin": 0.0, "backend": backend, "return_stats": True}
    _, stats = info_nce(q, k, symmetric=True, **call)
    cosines = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
    kept = []
    for x in (cosines, cosines.T):
        others = x[~torch.eye(15, dtype=torch.bool)].view(15, 14)
        kept.append(others[others <= x.diagonal()[:, None]])
    # No candidate that is kept is more similar than the positive.
    assert stats.accuracy == 1
    torch.testing.assert_close(stats.negative_similarity, torch.cat(kept).mean())


@pytest.mark.parametrize("other", [{"label_smoothing": 0.1}, {"positive_prior": 0.1}], ids=str)
def test_is_refused_beside_options_it_has_no_meaning_with(other):
    views = random_views(2, 4, 3)
    for loss in (nt_xent, info_nce):
        with pytest.raises(ValueError, match=f"{next(iter(other))} and false_negative_margin"):
            loss(*views, false_negative_margin=0.0, **other)


@pytest.mark.parametrize("margin", [-0.1, 2.1, float("nan")])
def test_out_of_range(margin):
    with pytest.raises(ValueError, match="false_negative_margin must be between 0 and 2"):
        InfoNCE(false_negative_margin=margin)


@cpu_backends
def test_the_primitive_leaves_out_what_is_above_the_limits(backend):
    q, k = torch.randn(5, 3), torch.randn(4, 3)
    limits = torch.randn(9)
    lse, stats = kept_logsumexp(
        q, k, both=True, statistics=True, limits=limits, backend=backend, exclusion=Exclusion()
    )
    s = q @ k.T
    rows, columns = s <= limits[:5, None], limits[5:, None] >= s.T
    kept = torch.cat([rows.sum(1), columns.sum(1)])
    assert torch.equal(stats.kept.long(), kept)
    expected = [x.masked_fill(~keep, -torch.inf) for x, keep in ((s, rows), (s.T, columns))]
    torch.testing.assert_close(lse, torch.cat([x.logsumexp(1) for x in expected]))


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        (torch.zeros(4), ValueError, r"limits must have shape \(5,\)"),
        (torch.zeros(5, dtype=torch.long), TypeError, "limits must be a floating point tensor"),
        (torch.zeros(5, requires_grad=True), ValueError, "limits must be constant"),
    ],
)
def test_limits_are_checked(limits, error, message):
    with pytest.raises(error, match=message):
        kept_logsumexp(torch.zeros(5, 2), limits=limits)
