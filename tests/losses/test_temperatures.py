"""A temperature of each anchor: entry i is that of the loss at the one temperature of anchor i."""

import pytest
import torch
from budgets import VALUE, assert_within, gradient_budget

from contrastive_kit import InfoNCE
from contrastive_kit.functional import info_nce, nt_xent, siglip

N, D = 9, 5
IDS = torch.arange(N) // 2


def embeddings(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def temperatures(dtype=torch.float64):
    return torch.linspace(0.05, 1.5, N, dtype=dtype).requires_grad_()


OPTIONS = {
    "one way": {},
    "clip": {"symmetric": True},
    "clip, ids": {"symmetric": True, "ids": IDS},
    "sides": {"query_negatives": True, "key_negatives": True},
    "clip, sides": {"query_negatives": True, "key_negatives": True, "symmetric": True},
    "queue": {"negatives": (7, D)},
    "queue and batch, clip": {"negatives": (7, D), "in_batch_negatives": True, "symmetric": True},
    "per query": {"negatives": (N, 3, D)},
    "per query and batch": {"negatives": (N, 3, D), "in_batch_negatives": True, "ids": IDS},
    "smoothed": {"label_smoothing": 0.2, "symmetric": True},
    "hard": {"hardness": 0.7, "symmetric": True},
    "debiased": {"positive_prior": 0.1, "symmetric": True},
    "hard, debiased": {"hardness": 0.7, "positive_prior": 0.1},
    "margin": {"margin": 0.3, "symmetric": True},
    "without false": {"false_negative_margin": 0.1, "symmetric": True},
    "without false, queue": {"false_negative_margin": 0.1, "negatives": (7, D)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_each_entry_is_that_of_its_temperature(name, backend):
    options = dict(OPTIONS[name])
    inputs = [embeddings(N, D), embeddings(N, D)]
    if "negatives" in options:
        inputs.append(embeddings(*options.pop("negatives")))
    taus = temperatures()
    options |= {"reduction": "none", "backend": backend}
    actual = info_nce(*inputs, temperature=taus, **options)
    expected = torch.stack(
        [info_nce(*inputs, temperature=tau, **options)[..., i] for i, tau in enumerate(taus)], -1
    )
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    weights = torch.rand_like(expected)
    grads = [
        torch.autograd.grad((weights * losses).sum(), [*inputs, taus])
        for losses in (actual, expected)
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert_within(ours, theirs, 1e-10)
    assert not torch.allclose(actual, info_nce(*inputs, temperature=0.3, **options))


@pytest.mark.parametrize("ids", [None, IDS])
def test_siglip(ids):
    z1, z2, taus, bias = embeddings(N, D), embeddings(N, D), temperatures(), embeddings()
    actual = siglip(z1, z2, temperature=taus, logit_bias=bias, ids=ids, reduction="none")
    expected = torch.stack(
        [
            siglip(z1, z2, temperature=tau, logit_bias=bias, ids=ids, reduction="none")[i]
            for i, tau in enumerate(taus)
        ]
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    inputs = (z1, z2, taus, bias)
    for ours, theirs in zip(
        *(torch.autograd.grad(x.mean(), inputs) for x in (actual, expected)), strict=True
    ):
        assert_within(ours, theirs, 1e-11)


@pytest.mark.parametrize("symmetric", [False, True])
def test_statistics(symmetric):
    query, key, taus = embeddings(N, D).detach(), embeddings(N, D).detach(), temperatures().detach()
    found = info_nce(query, key, temperature=taus, symmetric=symmetric, return_stats=True)[1]
    cosines = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).T
    p = torch.cat(
        [(c / taus[:, None]).softmax(1) for c in ([cosines, cosines.T] if symmetric else [cosines])]
    )
    itself = torch.arange(N).repeat(1 + symmetric)
    off_diagonal = ~torch.eye(N, dtype=torch.bool)
    torch.testing.assert_close(found.entropy, torch.special.entr(p).sum(1).mean())
    torch.testing.assert_close(found.accuracy, (p.argmax(1) == itself).double().mean())
    torch.testing.assert_close(found.positive_similarity, cosines.diagonal().mean())
    torch.testing.assert_close(found.negative_similarity, cosines[off_diagonal].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    inputs = [embeddings(N, 40, dtype=dtype), embeddings(N, 40, dtype=dtype)]
    taus = temperatures(torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (*inputs, taus)]
    loss = info_nce(*inputs, temperature=taus, symmetric=True)
    expected = info_nce(*exact[:2], temperature=exact[2], symmetric=True)
    assert_within(loss, expected, 10 * VALUE[dtype])
    ours = torch.autograd.grad(loss, (*inputs, taus))
    theirs = torch.autograd.grad(expected, exact)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_within(a, b, 3 * gradient_budget(torch.float32 if i == 2 else dtype, 0.05))


def test_it_compiles_in_one_graph():
    inputs = [embeddings(N, D), embeddings(N, D), temperatures()]

    def loss_fn(query, key, taus):
        return info_nce(query, key, temperature=taus, symmetric=True)

    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    losses = loss_fn(*inputs), compiled(*inputs)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(x, inputs) for x in losses))


def test_equal_temperatures_are_one():
    query, key = embeddings(N, D), embeddings(N, D)
    many = info_nce(query, key, temperature=torch.full((N,), 0.2).double(), symmetric=True)
    torch.testing.assert_close(many, info_nce(query, key, temperature=0.2, symmetric=True))
    one = torch.tensor([0.2], dtype=torch.float64)
    torch.testing.assert_close(many, info_nce(query, key, temperature=one, symmetric=True))


def test_the_module_takes_them_where_it_learns_none():
    query, key, taus = embeddings(N, D), embeddings(N, D), temperatures()
    loss_fn = InfoNCE(symmetric=True)
    assert torch.equal(
        loss_fn(query, key, temperature=taus),
        info_nce(query, key, temperature=taus, symmetric=True),
    )
    assert not torch.allclose(loss_fn(query, key), loss_fn(query, key, temperature=taus))
    with pytest.raises(ValueError, match="temperature must be None where the module learns"):
        InfoNCE(learnable_temperature=True)(query, key, temperature=taus)


def test_wrong_temperatures():
    z, taus = embeddings(N, D), temperatures().detach()
    each = r"of one for each anchor, \(N,\), got torch.float64 of shape"
    for wrong in (taus[:-1], taus[:, None], taus.expand(2, N)):
        with pytest.raises(ValueError, match=each):
            info_nce(z, z + 1, temperature=wrong)
        with pytest.raises(ValueError, match=each):
            siglip(z, z + 1, temperature=wrong)
    with pytest.raises(ValueError, match="one value, got"):
        siglip(z, z + 1, temperature=taus, labels=IDS)
    with pytest.raises(ValueError, match="one value, got"):
        nt_xent(z, z + 1, temperature=taus)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        info_nce(z, z + 1, temperature=torch.ones(N, dtype=torch.int64))
    assert info_nce(z, z + 1, temperature=torch.zeros(N).double()).isnan()
