"""Metrics against numpy loops and known spectra, and the conventions of contrastive accuracy."""

import math

import numpy as np
import pytest
import torch
from budgets import assert_within
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_kit.functional import info_nce, nt_xent
from contrastive_kit.metrics import (
    alignment,
    effective_rank,
    feature_std,
    lidar,
    rankme,
    uniformity,
)


def unit(z):
    z = np.asarray(z, dtype=np.float64)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def alignment_loop(z1, z2, alpha):
    pairs = zip(unit(z1), unit(z2), strict=True)
    return np.mean([math.sqrt(math.fsum((u - v) ** 2)) ** alpha for u, v in pairs])


def uniformity_loop(z, t):
    u = unit(z)
    n = len(u)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    potentials = [math.exp(-t * math.fsum((u[i] - u[j]) ** 2)) for i, j in pairs]
    return math.log(math.fsum(potentials) / len(pairs))


def with_spectrum(sigma, n, seed=0):
    """A matrix (n, len(sigma)) whose singular values are ``sigma``."""
    generator = torch.Generator().manual_seed(seed)
    d = len(sigma)
    left, _ = torch.linalg.qr(torch.randn(n, d, dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    return left * torch.tensor(sigma, dtype=torch.float64) @ right


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 30),
    d=st.integers(1, 17),
    alpha=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    t=st.sampled_from([0.1, 1.0, 2.0, 20.0]),
    seed=st.integers(0, 99),
)
def test_values_are_those_of_the_loops(n, d, alpha, t, seed):
    z1, z2 = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed)).double()
    z1 = z1 * torch.logspace(-3, 3, n, dtype=torch.float64)[:, None]
    options = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(
        alignment(z1, z2, alpha=alpha), alignment_loop(z1, z2, alpha), **options
    )
    np.testing.assert_allclose(uniformity(z1, t=t), uniformity_loop(z1, t), **options)
    np.testing.assert_allclose(
        feature_std(z1), unit(z1).std(axis=0).mean() * math.sqrt(d), **options
    )
    sigma = np.linalg.svd(z1.numpy(), compute_uv=False)
    p = sigma[sigma > 0] / sigma.sum()
    np.testing.assert_allclose(effective_rank(z1), math.exp(-math.fsum(p * np.log(p))), **options)


@pytest.mark.parametrize("n", [63, 252, 1301])
def test_uniformity_beyond_one_tile_and_its_gradient(n):
    z = torch.randn(n, 60, dtype=torch.float64, requires_grad=True)
    u = torch.nn.functional.normalize(z, dim=1)
    expected = torch.pdist(u).square().mul(-2).exp().mean().log()
    value = uniformity(z)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert_within(
        torch.autograd.grad(value, z)[0], torch.autograd.grad(expected, z)[0], budget=1e-11
    )


def test_other_gradients():
    views = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for metric in (alignment, lambda a, b: feature_std(a), lambda a, b: effective_rank(b)):
        assert torch.autograd.gradcheck(metric, views)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    z1, z2 = torch.randn(2, 65, 33).to(dtype)
    for metric in (
        alignment,
        lambda a, b: uniformity(a),
        lambda a, b: feature_std(a),
        lambda a, b: effective_rank(a),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            value = metric(z1, z2)
        torch.testing.assert_close(
            value.double(), metric(z1.double(), z2.double()), rtol=2e-6, atol=0
        )
    assert alignment(z1, z2).dtype == uniformity(z1).dtype == feature_std(z1).dtype == torch.float32
    assert effective_rank(z1).dtype == torch.float64


def test_alignment_is_told_by_the_statistics_of_the_loss():
    z1, z2 = torch.randn(2, 9, 5, dtype=torch.float64)
    similarity = nt_xent(z1, z2, return_stats=True)[1].positive_similarity
    torch.testing.assert_close(alignment(z1, z2), 2 - 2 * similarity)


def test_alignment_of_nearly_equal_views_keeps_its_digits():
    z = torch.randn(50, 16, dtype=torch.float64)
    direction = torch.randn(50, 16, dtype=torch.float64)
    near = z + 1e-9 * direction
    assert float(alignment(z, near)) == pytest.approx(alignment_loop(z, near, 2.0), rel=1e-5)
    assert 0 < float(alignment(z, near)) < 1e-16
    assert float(alignment(z, z)) == 0


@pytest.mark.parametrize("n", [2, 3, 9])
def test_uniformity_at_its_bounds(n):
    """The corners of a simplex are as far apart as n points can be."""
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    assert float(uniformity(simplex, t=3.0)) == pytest.approx(-6 * n / (n - 1), rel=1e-12)
    assert float(uniformity(torch.ones(n, 4, dtype=torch.float64))) == pytest.approx(0, abs=1e-14)


def test_uniformity_of_the_backends():
    z = torch.randn(65, 7, dtype=torch.float64)
    torch.testing.assert_close(
        uniformity(z, backend="tiled"), uniformity(z, backend="reference"), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("k", [1, 3, 8])
def test_effective_rank_of_k_equal_directions_is_k(k):
    z = with_spectrum([2.5] * k + [0.0] * (8 - k), n=40)
    assert float(effective_rank(z)) == pytest.approx(k, rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 2.0**-500, 2.0**500])
def test_effective_rank_of_a_known_spectrum(scale):
    sigma = [8.0, 4.0, 2.0, 2.0]  # shares 1/2, 1/4, 1/8, 1/8: an entropy of 7/4 bits
    assert float(effective_rank(with_spectrum(sigma, n=30) * scale)) == pytest.approx(2**1.75)


@pytest.mark.parametrize("epsilon", [1e-7, 1e-3])
def test_rankme_is_the_formula_of_its_paper(epsilon):
    z = torch.randn(50, 64).cumsum(1)  # 50 singular values, some of them small
    sigma = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = sigma / np.abs(sigma).sum() + epsilon
    expected = math.exp(-(p * np.log(p)).sum())
    assert float(rankme(z, epsilon=epsilon)) == pytest.approx(expected, rel=1e-12)
    if epsilon < 1e-6:
        assert float(effective_rank(z)) == pytest.approx(expected, rel=1e-4)


def lidar_loop(views, delta, epsilon):
    """The matrix of the paper, written out with inverse square roots and outer products."""
    n_views, n, d = views.shape
    means = views.mean(0)
    between, within = np.zeros((d, d)), delta * np.eye(d)
    for i in range(n):
        centered = means[i] - means.mean(0)
        between += np.outer(centered, centered) / n
        for v in range(n_views):
            centered = views[v, i] - means[i]
            within += np.outer(centered, centered) / (n * n_views)
    values, vectors = np.linalg.eigh(within)
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.linalg.eigvalsh(whiten @ between @ whiten)
    # The paper sums over all D; shares of 0 add what p log p is at epsilon.
    p = np.sort(np.abs(spectrum))[::-1][: min(n, d)] / np.abs(spectrum).sum() + epsilon
    return math.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize(("n_views", "n", "d"), [(2, 40, 7), (5, 9, 3), (3, 6, 11)])
@pytest.mark.parametrize("delta", [1e-4, 0.5])
def test_lidar_is_the_matrix_of_its_paper(n_views, n, d, delta):
    images = torch.randn(n, d, dtype=torch.float64) * torch.logspace(0, -2, d)
    views = images + 0.3 * torch.randn(n_views, n, d, dtype=torch.float64)
    expected = lidar_loop(views.numpy(), delta, 1e-7)
    assert float(lidar(views, delta=delta)) == pytest.approx(expected, rel=1e-8)


def test_lidar_leaves_out_directions_in_which_views_differ():
    """Sixteen directions tell images apart, sixteen others only one view from another."""
    images, noise = torch.randn(2000, 16), torch.randn(4, 2000, 16)
    views = torch.cat([images.expand(4, -1, -1) + 0.1 * torch.randn(4, 2000, 16), noise], dim=2)
    assert float(effective_rank(views.flatten(0, 1))) > 30
    assert float(lidar(views)) < 18


def test_ranks_of_half_precision_and_their_edges():
    views = torch.randn(3, 20, 6)
    for metric in (lidar, lambda x: rankme(x[0])):
        assert metric(views).dtype == torch.float64
        torch.testing.assert_close(metric(views.bfloat16()), metric(views.bfloat16().double()))
        assert metric(torch.zeros(2, 4, 3)).isnan()
        assert metric(torch.full((2, 4, 3), torch.inf)).isnan()
    double = views.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lidar(x, delta=0.1), double)
    assert torch.autograd.gradcheck(lambda x: rankme(x[0], epsilon=0.01), double)


def test_collapse_shows():
    spread = torch.randn(2000, 32)
    line = torch.randn(2000, 1) * torch.randn(32)
    point = torch.ones(2000, 32) + 1e-4 * torch.randn(2000, 32)
    assert float(feature_std(spread)) == pytest.approx(1, abs=0.01)
    assert float(effective_rank(spread)) > 31
    assert float(effective_rank(line)) == pytest.approx(1, abs=0.01)
    assert float(feature_std(point)) < 1e-3
    assert float(uniformity(point)) == pytest.approx(0, abs=1e-5)
    assert float(uniformity(spread)) < -3.5


def test_edges():
    assert effective_rank(torch.zeros(4, 3)).isnan()
    assert effective_rank(torch.full((4, 3), torch.inf)).isnan()
    assert uniformity(torch.tensor([[1.0, 0.0], [torch.nan, 1.0], [0.0, 1.0]])).isnan()
    assert float(effective_rank(torch.randn(1, 5))) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: alignment(z, z[1:]), ValueError, "z2 must have the shape of z1"),
        (lambda z: alignment(z, z.long()), TypeError, "z2 must hold floating point"),
        (lambda z: alignment(z, z, alpha=0), ValueError, "alpha must be a finite number above 0"),
        (lambda z: alignment(z, z, alpha="2"), TypeError, "alpha must be a number"),
        (lambda z: uniformity(z[:1]), ValueError, "z must have at least 2 rows"),
        (lambda z: uniformity(z, t=math.nan), ValueError, "t must be a finite number above 0"),
        (lambda z: uniformity(z, backend="gpu"), ValueError, "backend must be one of"),
        (lambda z: effective_rank(z[0]), ValueError, r"z must have shape \(N, D\)"),
        (lambda z: rankme(z, epsilon=0), ValueError, "epsilon must be a finite number above 0"),
        (lambda z: rankme(z[0]), ValueError, r"z must have shape \(N, D\)"),
        (lidar, ValueError, r"views must have shape \(V, N, D\)"),
        (lambda z: lidar(z[None]), ValueError, "views must be of at least 2 images and 2 views"),
        (lambda z: lidar(z[:, None]), ValueError, "views must be of at least 2 images"),
        (lambda z: lidar(z.long()[None]), TypeError, "views must hold floating point"),
        (lambda z: lidar(None), TypeError, "views must be a"),
        (lambda z: lidar(z.expand(2, 5, 3), delta=0), ValueError, "delta must be a finite number"),
        (lambda z: feature_std(z[:, :0]), ValueError, "z must have no empty dimension"),
        (lambda z: feature_std(z[:1]), ValueError, "z must have at least 2 rows"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(5, 3))


class TestConventionsOfOthers:
    """What ContrastiveStats says about the accuracies and entropies that other codes print."""

    temperature = 0.3

    def views(self):
        z1 = torch.randn(40, 6, dtype=torch.float64)
        return z1, z1 + 0.8 * torch.randn(40, 6, dtype=torch.float64)

    def softmax_figures(self, logits, targets):
        logits = np.asarray(logits)
        accuracy = np.mean(logits.argmax(1) == targets)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return accuracy, -np.mean((p * np.log(p + 1e-8)).sum(1))

    def test_google_research_has_the_candidates_of_info_nce(self):
        z1, z2 = self.views()
        logits_ab = unit(z1) @ unit(z2).T / self.temperature
        accuracy, entropy = self.softmax_figures(logits_ab, np.arange(40))
        stats = info_nce(z1, z2, temperature=self.temperature, return_stats=True)[1]
        assert float(stats.accuracy) == pytest.approx(accuracy)
        assert float(stats.entropy) == pytest.approx(entropy, abs=1e-5)
        ours = nt_xent(z1, z2, temperature=self.temperature, return_stats=True)[1]
        assert ours.accuracy < stats.accuracy
        assert ours.entropy > stats.entropy

    def test_sthalles_has_the_candidates_of_nt_xent(self):
        z1, z2 = self.views()
        u = np.concatenate([unit(z1), unit(z2)])
        similarity = u @ u.T / self.temperature
        rows = []
        for i in range(80):
            positive = (i + 40) % 80
            others = [j for j in range(80) if j not in (i, positive)]
            rows.append(similarity[i, [positive, *others]])
        accuracy, entropy = self.softmax_figures(rows, 0)
        stats = nt_xent(z1, z2, temperature=self.temperature, return_stats=True)[1]
        assert 0.2 < accuracy < 0.9
        assert float(stats.accuracy) == pytest.approx(accuracy)
        assert float(stats.entropy) == pytest.approx(entropy, abs=1e-5)

    def test_a_tie_is_a_miss(self):
        stats = nt_xent(torch.ones(5, 3), torch.ones(5, 3), return_stats=True)[1]
        assert stats.accuracy == 0
        assert float(stats.entropy) == pytest.approx(math.log(9))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alignment_has_a_gradient_where_views_coincide(alpha):
    z1 = torch.randn(4, 3, dtype=torch.float64)
    z2 = torch.cat([z1[:2], torch.randn(2, 3, dtype=torch.float64)])
    together, apart = z1.clone().requires_grad_(), z1[2:].clone().requires_grad_()
    alignment(together, z2, alpha=alpha).backward()
    alignment(apart, z2[2:], alpha=alpha).backward()
    assert torch.equal(together.grad[:2], torch.zeros(2, 3, dtype=torch.float64))
    assert_within(together.grad[2:], apart.grad / 2, 1e-12)
    assert alignment(z1 * torch.nan, z2, alpha=alpha).isnan()


def test_effective_rank_has_a_gradient_where_directions_are_missing():
    z = torch.zeros(4, 5, dtype=torch.float64)
    z[:3, :3] = torch.randn(3, 3, dtype=torch.float64)
    whole, part = z.clone().requires_grad_(), z[:3, :3].clone().requires_grad_()
    effective_rank(whole).backward()
    effective_rank(part).backward()
    assert_within(whole.grad[:3, :3], part.grad, 1e-10)
    assert whole.grad.isfinite().all()
