"""SupCon across two sides against loops, the reference and the published formulas.

Equations (19), (20) and (4) of docs/nt_xent.md, with candidates on another side.
"""

import math

import algorithm1
import pytest
import torch
import torch.nn.functional as F
from budgets import VALUE, assert_within, gradient_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_kit import SupCon, reference
from contrastive_kit.functional import info_nce, sup_con
from contrastive_kit.ops import BACKENDS

backends = pytest.mark.parametrize("backend", list(BACKENDS))
variants = pytest.mark.parametrize("variant", ["out", "in", "pairwise"])
# Labels with one row and several keys, several rows and one key, one and one, several and several;
# and on each side one that the other lacks.
LABELS = torch.tensor([3, 8, 8, -1, 5, 5, 5, 99])
KEY_LABELS = torch.tensor([5, 3, 3, 8, 77, -1, 5, 3, 77])


def random_sides(d=5, n=8, m=9, dtype=torch.float64):
    sides = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    return [x.to(dtype) for x in sides]


def wanting(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def mean_of_matched(losses):
    return losses[~losses.isnan()].mean()


def both_means(query, labels, key, key_labels, temperature, variant):
    forth = reference.sup_con_between(query, labels, key, key_labels, temperature, variant)
    back = reference.sup_con_between(key, key_labels, query, labels, temperature, variant)
    return (mean_of_matched(forth) + mean_of_matched(back)) / 2


@backends
@variants
def test_equals_its_loop(variant, backend):
    query, key = random_sides()
    forth = algorithm1.sup_con_between(query, LABELS, key, KEY_LABELS, 0.2, variant)
    back = algorithm1.sup_con_between(key, KEY_LABELS, query, LABELS, 0.2, variant)
    forth, back = torch.from_numpy(forth), torch.from_numpy(back)
    call = {"labels": LABELS, "keys": key, "key_labels": KEY_LABELS, "temperature": 0.2}
    call |= {"variant": variant, "backend": backend}
    each = sup_con(query, reduction="none", **call)
    torch.testing.assert_close(each, forth[None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sup_con(query, **call), forth.sum() / 7)
    torch.testing.assert_close(sup_con(query, reduction="sum", **call), forth.sum())
    each = sup_con(query, reduction="none", symmetric=True, **call)
    torch.testing.assert_close(each, torch.cat([forth, back]), rtol=1e-12, atol=1e-12)
    mean = sup_con(query, symmetric=True, **call)
    torch.testing.assert_close(mean, (forth.sum() / 7 + back.sum() / 7) / 2)
    torch.testing.assert_close(
        sup_con(query, symmetric=True, reduction="sum", **call), forth.sum() + back.sum()
    )


@backends
@variants
def test_several_views_are_anchors_of_the_same_keys(variant, backend):
    views = torch.randn(3, 8, 5, dtype=torch.float64)
    key = torch.randn(9, 5, dtype=torch.float64)
    call = {"keys": key, "key_labels": KEY_LABELS, "variant": variant, "backend": backend}
    weights = torch.rand(8, dtype=torch.float64)
    for more in ({}, {"symmetric": True}, {"sample_weight": weights}):
        stacked = dict(more)
        if "sample_weight" in more:
            stacked["sample_weight"] = weights.repeat(3)
        expected = sup_con(views.flatten(0, 1), labels=LABELS.repeat(3), **call, **stacked)
        torch.testing.assert_close(sup_con(*views, labels=LABELS, **call, **more), expected)


@backends
@variants
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 3, 3), (63, 65, 60), (40, 252, 17)])
@pytest.mark.usefixtures("poisoned_empty")
def test_value_and_gradient_at_odd_sizes(n, m, d, dtype, symmetric, variant, backend):
    query, key = random_sides(d, n, m, dtype)
    labels, key_labels = torch.arange(n) * 7 % (n // 2 + 1), torch.arange(m) * 5 % (n // 2 + 3)
    exact = wanting(query.double(), key.double())
    if symmetric:
        expected = both_means(exact[0], labels, exact[1], key_labels, 0.1, variant)
    else:
        losses = reference.sup_con_between(exact[0], labels, exact[1], key_labels, 0.1, variant)
        expected = mean_of_matched(losses)
    expected_grads = torch.autograd.grad(expected, exact)
    inputs = wanting(query, key)
    loss = sup_con(
        inputs[0], labels=labels, keys=inputs[1], key_labels=key_labels, variant=variant,
        symmetric=symmetric, backend=backend,
    )  # fmt: skip
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(loss, expected, 2 * VALUE[dtype])
    for grad, expected_grad in zip(torch.autograd.grad(loss, inputs), expected_grads, strict=True):
        assert grad.dtype == dtype
        assert_within(grad, expected_grad, 2 * gradient_budget(dtype, 0.1))


@variants
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradcheck_with_a_learned_temperature(symmetric, variant):
    inputs = wanting(*random_sides(3))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def losses(t, query, key):
        return sup_con(
            query, labels=LABELS, keys=key, key_labels=KEY_LABELS, temperature=t, variant=variant,
            symmetric=symmetric, reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(losses, (temperature, *inputs))


@backends
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_label_for_each_pair_is_info_nce(symmetric, backend):
    query, key = random_sides(5, 9, 9)
    labels, order = torch.randperm(9) - 4, torch.randperm(9)
    expected = info_nce(query, key, temperature=0.1, symmetric=symmetric)
    for variant in ("out", "in", "pairwise"):
        actual = sup_con(
            query, labels=labels, keys=key[order], key_labels=labels[order], symmetric=symmetric,
            variant=variant, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("captions", [1, 3])
def test_a_tiny_loss_keeps_its_digits(symmetric, captions):
    """One positive in a direction is kept out of the tiles, whichever side has it alone."""
    image = torch.randn(32, 60)
    caption = image.repeat_interleave(captions, 0) + 0.1 * torch.randn(32 * captions, 60)
    labels, caption_labels = torch.arange(32), torch.arange(32).repeat_interleave(captions)

    def of_captions(image, caption):
        """The anchors are captions; with ``symmetric`` the images, which have several, too."""
        return sup_con(
            caption, labels=caption_labels, keys=image, key_labels=labels, temperature=0.02,
            symmetric=symmetric, reduction="none",
        ).flatten()[: 32 * captions].mean()  # fmt: skip

    exact = wanting(image.double(), caption.double())
    logits = F.normalize(exact[1], dim=1) @ F.normalize(exact[0], dim=1).T / 0.02
    own = caption_labels[:, None] == labels[None, :]
    positive = logits[own]
    expected = F.softplus(logits.masked_fill(own, -torch.inf).logsumexp(1) - positive).mean()
    assert 1e-16 < expected < 1e-10
    inputs = wanting(image, caption)
    loss = of_captions(*inputs)
    assert abs(loss.item() - expected.item()) <= 1e-3 * expected.item()
    for grad, expected_grad in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact), strict=True
    ):
        assert_within(grad, expected_grad, 1e-4)


def test_is_the_bidirectional_loss_of_unicl():
    """Yang et al., arXiv 2204.03610: soft targets over the captions of the same label, both ways.

    The authors' code normalizes the targets of each row and averages the two cross entropies.
    """
    query, key = random_sides(6, 12, 12)
    labels = torch.arange(12) % 5
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.07
    targets = (labels[:, None] == labels[None, :]).double()
    targets = targets / targets.sum(1, keepdim=True)
    published = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    ours = sup_con(
        query, labels=labels, keys=key, key_labels=labels, temperature=0.07, symmetric=True
    )
    torch.testing.assert_close(ours, published)


@backends
@variants
@pytest.mark.parametrize("symmetric", [False, True])
def test_without_any_positive_the_loss_is_silent(symmetric, variant, backend):
    inputs = wanting(*random_sides())
    for reduction in ("mean", "sum"):
        loss = sup_con(
            inputs[0], labels=LABELS, keys=inputs[1], key_labels=torch.arange(100, 109),
            variant=variant, symmetric=symmetric, reduction=reduction, backend=backend,
        )  # fmt: skip
        assert loss == 0
        for x, grad in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
            assert torch.equal(grad, torch.zeros_like(x))


@variants
@pytest.mark.parametrize("symmetric", [False, True])
def test_keys_of_one_label_alone(symmetric, variant):
    """Nothing but positives: no negatives at all, and still contrasted with each other."""
    query, key = random_sides()
    labels, key_labels = torch.zeros(8, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    inputs = wanting(query, key)
    expected = both_means(inputs[0], labels, inputs[1], key_labels, 0.1, variant)
    if not symmetric:
        expected = reference.sup_con_between(
            inputs[0], labels, inputs[1], key_labels, 0.1, variant
        ).mean()
    expected_grads = torch.autograd.grad(expected, inputs)
    loss = sup_con(
        inputs[0], labels=labels, keys=inputs[1], key_labels=key_labels, variant=variant,
        symmetric=symmetric,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs), expected_grads, rtol=1e-9, atol=1e-11
    )


@backends
@variants
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_key_that_is_the_positive_of_all(symmetric, variant, backend):
    query, key = wanting(*random_sides(5, 4, 1))
    zeros = torch.zeros(4, dtype=torch.int64)
    loss = sup_con(
        query, labels=zeros, keys=key, key_labels=zeros[:1], variant=variant, symmetric=symmetric,
        reduction="none", backend=backend,
    ).flatten()  # fmt: skip
    torch.testing.assert_close(loss[:4], torch.zeros(4, dtype=torch.float64))
    if symmetric:
        back = reference.sup_con_between(key, zeros[:1], query, zeros, 0.1, variant)
        torch.testing.assert_close(loss[4:], back)
    grads = torch.autograd.grad(loss.sum(), (query, key))
    assert all(g.isfinite().all() for g in grads)


@backends
@variants
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_queue_is_a_loss_of_zero_with_a_graph(reduction, symmetric, variant, backend):
    query = torch.randn(3, 4, requires_grad=True)
    temperature = torch.tensor(0.1, requires_grad=True)
    call = {"labels": torch.arange(3), "keys": torch.empty(0, 4), "backend": backend}
    call |= {"key_labels": torch.empty(0, dtype=torch.int64), "temperature": temperature}
    call |= {"variant": variant, "symmetric": symmetric, "reduction": reduction}
    loss, stats = sup_con(query, return_stats=True, **call)
    assert loss.shape == ((1, 3) if reduction == "none" and not symmetric else
                          (3,) if reduction == "none" else ())  # fmt: skip
    assert (loss == 0).all()
    grads = torch.autograd.grad(loss.sum(), (query, temperature))
    assert all((g == 0).all() for g in grads)
    assert stats.accuracy.isnan()
    assert stats.entropy == 0


@variants
def test_nan_shows_in_the_loss(variant):
    query, key = random_sides()
    key[1, 2] = torch.nan
    call = {"labels": LABELS, "key_labels": KEY_LABELS, "variant": variant}
    assert sup_con(query, keys=key, **call).isnan()


@backends
@pytest.mark.parametrize("symmetric", [False, True])
def test_statistics(symmetric, backend):
    query, key = random_sides()
    call = {"labels": LABELS, "keys": key, "key_labels": KEY_LABELS, "temperature": 0.3}
    call |= {"symmetric": symmetric, "backend": backend}
    loss, stats = sup_con(query, return_stats=True, **call)
    torch.testing.assert_close(loss, sup_con(query, **call))
    directions = [(query, LABELS, key, KEY_LABELS)]
    if symmetric:
        directions.append((key, KEY_LABELS, query, LABELS))
    accuracy, positive, negative, entropy = [], [], [], []
    for rows, row_labels, columns, column_labels in directions:
        for z, label in zip(rows, row_labels, strict=True):
            cosines = F.cosine_similarity(z[None], columns)
            same = column_labels == label
            if same.any():
                accuracy.append(bool(cosines[same].max() > cosines[~same].max()))
            positive += cosines[same].tolist()
            negative += cosines[~same].tolist()
            p = (cosines / 0.3).softmax(0)
            entropy.append(float(-(p * p.log()).sum()))
    expected = [torch.tensor(x, dtype=torch.float64).mean()
                for x in (accuracy, positive, negative, entropy)]  # fmt: skip
    assert 0 < stats.accuracy < 1
    torch.testing.assert_close(torch.stack(stats), torch.stack(expected))
    assert not any(figure.requires_grad for figure in stats)


@given(
    seed=st.integers(0, 2**31),
    variant=st.sampled_from(["out", "in", "pairwise"]),
    both=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_random_labels_equal_the_reference(seed, variant, both):
    """Whatever the multiplicities of labels are on both sides."""
    torch.manual_seed(seed)
    n, m = (int(torch.randint(1, 12, ())) for _ in range(2))
    query, key = random_sides(4, n, m)
    labels, key_labels = torch.randint(-3, 6, (n,)), torch.randint(-3, 6, (m,))
    losses = sup_con(
        query, labels=labels, keys=key, key_labels=key_labels, temperature=0.2, variant=variant,
        symmetric=both, reduction="none",
    ).flatten()  # fmt: skip
    expected = reference.sup_con_between(query, labels, key, key_labels, 0.2, variant)
    if both:
        back = reference.sup_con_between(key, key_labels, query, labels, 0.2, variant)
        expected = torch.cat([expected, back])
    torch.testing.assert_close(losses, expected.nan_to_num(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_integers_of_any_kind_name_labels(dtype):
    query, key = random_sides()
    labels, key_labels = LABELS.abs(), KEY_LABELS.abs()
    call = {"keys": key, "symmetric": True}
    expected = sup_con(query, labels=labels, key_labels=key_labels, **call)
    actual = sup_con(query, labels=labels.to(dtype), key_labels=key_labels, **call)
    torch.testing.assert_close(actual, expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"keys": None}, ValueError, "key_labels are the labels of keys"),
            ({"key_labels": None}, ValueError, "keys need key_labels"),
            ({"keys": None, "key_labels": None, "symmetric": True}, ValueError, "needs keys"),
            (
                {"symmetric": True, "sample_weight": torch.ones(8)},
                ValueError,
                "takes no sample_weight",
            ),
            ({"keys": torch.randn(9, 4)}, ValueError, r"keys must have shape \(M, 5\)"),
            ({"keys": torch.randn(5)}, ValueError, r"keys must have shape \(N, D\)"),
            ({"keys": torch.ones(9, 5, dtype=torch.int64)}, TypeError, "keys must hold floating"),
            ({"keys": [1.0]}, TypeError, "keys must be a tensor"),
            ({"keys": torch.randn(9, 5).to_sparse()}, ValueError, "keys must be a dense tensor"),
            ({"key_labels": KEY_LABELS[:8]}, ValueError, r"key_labels must have shape \(9,\)"),
            ({"key_labels": KEY_LABELS.float()}, TypeError, "key_labels must hold integers"),
            ({"symmetric": 1}, TypeError, "symmetric must be True or False"),
        ],
    )
    def test_name_the_argument(self, change, error, message):
        call = {"labels": LABELS, "keys": torch.randn(9, 5), "key_labels": KEY_LABELS} | change
        with pytest.raises(error, match=message):
            sup_con(torch.randn(8, 5), **call)

    def test_a_symmetric_module_needs_keys(self):
        with pytest.raises(ValueError, match="symmetric=True needs keys"):
            SupCon(symmetric=True)(torch.randn(8, 5), labels=LABELS)


class TestModule:
    def test_is_the_function_with_its_options(self):
        query, key = random_sides()
        loss_fn = SupCon(0.2, variant="in", symmetric=True, reduction="sum", backend="tiled")
        expected = sup_con(
            query, labels=LABELS, keys=key, key_labels=KEY_LABELS, temperature=0.2, variant="in",
            symmetric=True, reduction="sum",
        )  # fmt: skip
        actual = loss_fn(query, labels=LABELS, keys=key, key_labels=KEY_LABELS)
        torch.testing.assert_close(actual, expected)
        assert repr(SupCon(symmetric=True)) == "SupCon(temperature=0.1, symmetric=True)"

    def test_a_learnable_temperature_gets_its_gradient(self):
        query, key = random_sides(dtype=torch.float32)
        loss_fn = SupCon(0.2, learnable_temperature=True, symmetric=True)
        loss_fn(query, labels=LABELS, keys=key, key_labels=KEY_LABELS).backward()
        scale = torch.tensor(-math.log(0.2), dtype=torch.float64, requires_grad=True)
        loss = both_means(query.double(), LABELS, key.double(), KEY_LABELS, (-scale).exp(), "out")
        (expected,) = torch.autograd.grad(loss, scale)
        assert_within(loss_fn.logit_scale.grad, expected, 1e-5)
