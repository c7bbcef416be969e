"""InfoNCE in its four forms against loops and the reference; and where it meets NT-Xent.

Equation numbers are those of docs/nt_xent.md.
"""

import math

import algorithm1
import pytest
import torch
from budgets import VALUE, assert_within, gradient_budget

from contrastive_kit import InfoNCE, reference
from contrastive_kit.functional import info_nce, nt_xent
from contrastive_kit.ops import BACKENDS

backends = pytest.mark.parametrize("backend", list(BACKENDS))


def random_pairs(n, d, dtype=torch.float64):
    query = torch.randn(n, d, dtype=torch.float64)
    return query.to(dtype), (query + torch.randn(n, d, dtype=torch.float64)).to(dtype)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def wanting(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@backends
@pytest.mark.parametrize("with_ids", [False, True])
def test_in_batch_equals_its_loop(with_ids, backend):
    """Equation (9)."""
    q, k = random_pairs(9, 5)
    ids = torch.arange(9) // 2 if with_ids else None
    actual = info_nce(q, k, temperature=0.2, ids=ids, reduction="none", backend=backend)
    expected = torch.from_numpy(algorithm1.info_nce(q, k, 0.2, ids=ids))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@backends
@pytest.mark.parametrize("shape", [(1, 5), (70, 5), (9, 1, 5), (9, 30, 5)])
def test_negatives_equal_their_loop(shape, backend):
    q, k = random_pairs(9, 5)
    negatives = torch.randn(*shape, dtype=torch.float64)
    actual = info_nce(q, k, negatives, temperature=0.2, reduction="none", backend=backend)
    expected = torch.from_numpy(algorithm1.info_nce(q, k, 0.2, negatives))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (63, 60), (65, 128), (252, 100)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.usefixtures("poisoned_empty")
def test_value_and_gradient(symmetric, n, d, dtype, backend):
    pair = random_pairs(n, d, dtype)
    ids = torch.arange(n)
    q, k = wanting(*(x.double() for x in pair))
    expected = reference.info_nce(q, k, 0.1, ids).mean()
    if symmetric:
        expected = (expected + reference.info_nce(k, q, 0.1, ids).mean()) / 2
    expected_grads = gradients(expected, q, k)
    q, k = wanting(*pair)
    loss = info_nce(q, k, temperature=0.1, symmetric=symmetric, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(loss, expected, VALUE[dtype])
    for grad, expected_grad in zip(gradients(loss, q, k), expected_grads, strict=True):
        assert grad.dtype == dtype
        assert_within(grad, expected_grad, gradient_budget(dtype, 0.1))


@backends
@pytest.mark.parametrize("shape", [(40, 7), (11, 4, 7)])
def test_gradients_with_negatives(shape, backend):
    tensors = (*random_pairs(11, 7), torch.randn(*shape, dtype=torch.float64))
    tensors = wanting(*tensors)
    expected = reference.info_nce_with_negatives(*tensors, 0.2).mean()
    expected_grads = gradients(expected, *tensors)
    loss = info_nce(*tensors, temperature=0.2, backend=backend)
    assert_within(loss, expected, 1e-13)
    for grad, expected_grad in zip(gradients(loss, *tensors), expected_grads, strict=True):
        assert_within(grad, expected_grad, 1e-12)


def test_clip_is_the_mean_of_both_cross_entropies():
    """Equation (10), as the published pseudo-code of CLIP computes it, with labels."""
    q, k = random_pairs(17, 6)
    logits = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(k, dim=1).T
    labels = torch.arange(17)
    rows = torch.nn.functional.cross_entropy(logits / 0.07, labels)
    columns = torch.nn.functional.cross_entropy(logits.T / 0.07, labels)
    torch.testing.assert_close(info_nce(q, k, symmetric=True), (rows + columns) / 2)


def test_symmetric_swaps_with_its_arguments():
    q, k = random_pairs(17, 6)
    forward = info_nce(q, k, symmetric=True, reduction="none")
    assert forward.shape == (2, 17)
    torch.testing.assert_close(info_nce(k, q, symmetric=True, reduction="none"), forward.flip(0))
    torch.testing.assert_close(forward[0], info_nce(q, k, reduction="none"))


def test_moco_is_cross_entropy_with_the_positive_first():
    """The published pseudo-code of MoCo: label 0 among 1 + K logits."""
    q, k = random_pairs(13, 6)
    queue = torch.randn(50, 6, dtype=torch.float64)
    q1, k1, queue1 = (torch.nn.functional.normalize(x, dim=1) for x in (q, k, queue))
    logits = torch.cat([(q1 * k1).sum(1, keepdim=True), q1 @ queue1.T], dim=1)
    zeros = torch.zeros(13, dtype=torch.int64)
    expected = torch.nn.functional.cross_entropy(logits / 0.07, zeros)
    torch.testing.assert_close(info_nce(q, k, queue), expected)


def test_nt_xent_is_info_nce_with_the_other_rows_as_negatives():
    """Anchor i of view 1 against its own view-1 companions and the keys of others."""
    n = 8
    z1, z2 = random_pairs(n, 5)
    others = torch.tensor([[j for j in range(n) if j != i] for i in range(n)])
    first = info_nce(
        z1, z2, torch.cat([z1[others], z2[others]], dim=1), temperature=0.5, reduction="none"
    )
    torch.testing.assert_close(first, nt_xent(z1, z2, reduction="none")[0])


def test_shared_negatives_equal_the_same_negatives_per_query():
    q, k = random_pairs(13, 6)
    queue = torch.randn(50, 6, dtype=torch.float64)
    shared, stats = info_nce(q, k, queue, return_stats=True)
    each, stats_each = info_nce(q, k, queue.expand(13, 50, 6), return_stats=True)
    torch.testing.assert_close(shared, each)
    torch.testing.assert_close(torch.stack(stats), torch.stack(stats_each))


@pytest.mark.parametrize("frozen", ["key", "queue"])
def test_what_needs_no_gradient_costs_none(frozen):
    """Products of the backward: one for each matrix that wants a gradient, however many tiles."""
    q, k = wanting(*random_pairs(13, 6))
    queue = wanting(torch.randn(5, 6, dtype=torch.float64))[0]

    def products(key, negatives):
        loss = info_nce(q, key, negatives)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss.backward()
        return sum(event.name == "aten::addmm_" for event in profile.events())

    if frozen == "key":
        assert products(k.detach(), None) <= 1 < products(k, None)
    else:
        assert products(k, queue.detach()) <= 1 < products(k, queue)


def test_a_detached_queue_gets_no_gradient():
    q, k = wanting(*random_pairs(13, 6))
    queue = torch.randn(50, 6, dtype=torch.float64)
    info_nce(q, k, queue).backward()
    assert queue.grad is None
    assert q.grad.abs().sum() > 0


def test_a_single_query_with_negatives_is_fine():
    q, k = random_pairs(1, 4)
    loss = info_nce(q, k, torch.randn(3, 4, dtype=torch.float64))
    assert loss > 0


@pytest.mark.parametrize("wider", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_narrow_query_against_a_wider_queue(dtype, wider):
    q, k = random_pairs(9, 6, dtype)
    queue = torch.randn(20, 6, dtype=wider)
    for negatives in (queue, queue.expand(9, 20, 6)):
        loss = info_nce(q, k, negatives)
        assert loss.dtype == wider
        torch.testing.assert_close(
            loss, info_nce(q.to(wider), k.to(wider), negatives), rtol=1e-6, atol=0
        )


@backends
def test_statistics_of_both_directions(backend):
    q, k = random_pairs(10, 4)
    _, stats = info_nce(q, k, symmetric=True, return_stats=True, backend=backend)
    u, v = (torch.nn.functional.normalize(x, dim=1) for x in (q, k))
    cosines = u @ v.T
    off = ~torch.eye(10, dtype=torch.bool)
    rows, columns = (cosines / 0.07).softmax(1), (cosines / 0.07).softmax(0)
    entropy = [-(p * p.log()).sum() / 10 for p in (rows, columns)]
    right = [(cosines.argmax(d) == torch.arange(10)).double().mean() for d in (0, 1)]
    torch.testing.assert_close(stats.accuracy, sum(right) / 2)
    torch.testing.assert_close(stats.positive_similarity, cosines.diagonal().mean())
    torch.testing.assert_close(stats.negative_similarity, cosines[off].mean())
    torch.testing.assert_close(stats.entropy, sum(entropy) / 2)


def test_gradcheck():
    q, k = wanting(*random_pairs(4, 3))
    negatives = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def clip(t, q, k):
        return info_nce(q, k, temperature=t, symmetric=True, reduction="none")

    def moco(t, q, k, negatives):
        return info_nce(q, k, negatives, temperature=t, reduction="none")

    assert torch.autograd.gradcheck(clip, (temperature, q, k))
    assert torch.autograd.gradcheck(moco, (temperature, q, k, negatives))


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"reduction": "sum"}])
def test_the_module_is_the_function(options):
    q, k = random_pairs(9, 5)
    module = InfoNCE(0.2, **options)
    torch.testing.assert_close(module(q, k), info_nce(q, k, temperature=0.2, **options))
    ids = torch.arange(9) // 2
    expected = info_nce(q, k, temperature=0.2, ids=ids, **options)
    torch.testing.assert_close(module(q, k, ids=ids), expected)


def test_the_module_passes_negatives_on():
    q, k = random_pairs(9, 5)
    queue = torch.randn(20, 5, dtype=torch.float64)
    loss, stats = InfoNCE()(q, k, queue, return_stats=True)
    expected, expected_stats = info_nce(q, k, queue, return_stats=True)
    torch.testing.assert_close((loss, *stats), (expected, *expected_stats))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_temperature_at_its_bound_can_rise_again(dtype):
    """Left beyond the bound, the parameter would get no gradient for the rest of training."""
    loss_fn = InfoNCE(0.01, learnable_temperature=True).to(dtype)
    with torch.no_grad():
        loss_fn.logit_scale += 5
    query, key = torch.eye(5), -torch.eye(5)  # every answer is wrong: less scale is better
    loss_fn(query, key).backward()
    assert loss_fn.logit_scale.item() == pytest.approx(math.log(100), rel=torch.finfo(dtype).eps)
    assert loss_fn.logit_scale.grad > 0
