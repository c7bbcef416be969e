"""Similarity distillation against loops, the reference and the published formula: equation (30)."""

import algorithm1
import pytest
import torch
import torch.nn.functional as F
from budgets import VALUE, assert_within, gradient_budget

from contrastive_kit import SimilarityDistillation, reference
from contrastive_kit.functional import similarity_distillation
from contrastive_kit.ops import BACKENDS

backends = pytest.mark.parametrize("backend", list(BACKENDS))
symmetries = pytest.mark.parametrize("symmetric", [False, True])


def sides(n=7, m=9, d=5, e=3, dtype=torch.float64):
    """Query and key of the student, and of a teacher that sees them a little as it does."""
    shapes = [(n, d), (m, d), (n, e), (m, e)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def wanting(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def mean_of_both(query, key, teacher_query, teacher_key, temperature, teacher_temperature):
    forth = reference.similarity_distillation(
        query, key, teacher_query, teacher_key, temperature, teacher_temperature
    )
    back = reference.similarity_distillation(
        key, query, teacher_key, teacher_query, temperature, teacher_temperature
    )
    return (forth.mean() + back.mean()) / 2


@backends
def test_equals_its_loop(backend):
    query, key, teacher_query, teacher_key = pairs = sides()
    forth = torch.from_numpy(algorithm1.similarity_distillation(*pairs, 0.2, 0.1))
    back = torch.from_numpy(
        algorithm1.similarity_distillation(key, query, teacher_key, teacher_query, 0.2, 0.1)
    )
    call = {"temperature": 0.2, "teacher_temperature": 0.1, "backend": backend}
    for reduction, expected, both in (
        ("none", forth, torch.cat([forth, back])),
        ("sum", forth.sum(), forth.sum() + back.sum()),
        ("mean", forth.mean(), (forth.mean() + back.mean()) / 2),
    ):
        actual = similarity_distillation(*pairs, reduction=reduction, **call)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        actual = similarity_distillation(*pairs, reduction=reduction, symmetric=True, **call)
        torch.testing.assert_close(actual, both, rtol=1e-12, atol=1e-12)
    weights = torch.rand(7, dtype=torch.float64)
    actual = similarity_distillation(*pairs, sample_weight=weights, **call)
    torch.testing.assert_close(actual, reference.weighted_mean(forth, weights))


@backends
@symmetries
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m", "d", "e"), [(1, 3, 3, 8), (63, 65, 60, 7), (40, 252, 17, 128)])
@pytest.mark.usefixtures("poisoned_empty")
def test_value_and_gradient_at_odd_sizes(n, m, d, e, dtype, symmetric, backend):
    pairs = sides(n, m, d, e, dtype)
    exact, taught = wanting(*(x.double() for x in pairs[:2])), [x.double() for x in pairs[2:]]
    formula = mean_of_both if symmetric else reference.similarity_distillation
    expected = formula(*exact, *taught, 0.1, 0.05).mean()
    expected_grads = torch.autograd.grad(expected, exact)
    inputs = wanting(*pairs[:2])
    loss = similarity_distillation(
        *inputs, *pairs[2:], teacher_temperature=0.05, symmetric=symmetric, backend=backend
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(loss, expected, 2 * VALUE[dtype])
    for grad, expected_grad in zip(torch.autograd.grad(loss, inputs), expected_grads, strict=True):
        assert grad.dtype == dtype
        # The weights of the teacher carry the rounding of its own logits.
        assert_within(grad, expected_grad, 2 * gradient_budget(dtype, 0.05))


@symmetries
def test_gradcheck_with_a_learned_temperature(symmetric):
    query, key, *taught = sides(4, 5, 3, 2)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def losses(t, query, key):
        return similarity_distillation(
            query, key, *taught, temperature=t, symmetric=symmetric, reduction="none"
        )

    assert torch.autograd.gradcheck(losses, (temperature, *wanting(query, key)))


def test_is_the_published_loss_of_ressl_and_seed():
    """-Σ softmax(teacher) · log_softmax(student) over one queue of the teacher's keys."""
    student, teacher, queue = (torch.randn(n, 6, dtype=torch.float64) for n in (5, 5, 11))
    s, t, k = (F.normalize(x, dim=1) for x in (student, teacher, queue))
    target = (t @ k.T / 0.04).softmax(1)
    published = -(target * (s @ k.T / 0.1).log_softmax(1)).sum(1).mean()
    ours = similarity_distillation(
        student, queue, teacher, temperature=0.1, teacher_temperature=0.04
    )
    torch.testing.assert_close(ours, published)


def test_a_student_that_is_its_teacher_has_the_entropy_for_loss_and_no_gradient():
    pairs = sides(7, 9, 5, 5)
    query, key = wanting(*pairs[:2])
    loss = similarity_distillation(
        query, key, query, key, temperature=0.2, teacher_temperature=0.2, symmetric=True
    )
    p = F.normalize(query.detach(), dim=1) @ F.normalize(key.detach(), dim=1).T / 0.2
    entropy = [torch.distributions.Categorical(logits=x).entropy().mean() for x in (p, p.T)]
    torch.testing.assert_close(loss, sum(entropy) / 2)
    for grad in torch.autograd.grad(loss, (query, key)):
        assert grad.abs().max() < 1e-14


def test_the_teacher_gets_no_gradient():
    pairs = wanting(*sides())
    similarity_distillation(*pairs, symmetric=True).backward()
    assert [x.grad is None for x in pairs] == [False, False, True, True]


@symmetries
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_queue_is_a_loss_of_zero_with_a_graph(reduction, symmetric):
    query, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    loss = similarity_distillation(
        query, torch.empty(0, 4), teacher, reduction=reduction, symmetric=symmetric
    )
    assert loss.shape == ((3,) if reduction == "none" else ())
    assert (loss == 0).all()
    assert torch.equal(torch.autograd.grad(loss.sum(), query)[0], torch.zeros(3, 4))


@pytest.mark.parametrize("where", range(4))
def test_nan_shows_in_the_loss(where):
    pairs = sides()
    pairs[where][1, 0] = torch.nan
    assert similarity_distillation(*pairs).isnan()


def test_one_candidate_leaves_nothing_to_learn():
    query, key, *taught = sides(4, 1)
    inputs = wanting(query, key)
    loss = similarity_distillation(*inputs, *taught)
    torch.testing.assert_close(loss, torch.zeros((), dtype=torch.float64))
    for grad in torch.autograd.grad(loss, inputs):
        assert grad.abs().max() < 1e-14


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher_key": None}, ValueError, "teacher_key must be given where teacher_query has"),
        ({"teacher_key": torch.randn(8, 3)}, ValueError, "teacher_key must have the 9 rows of key"),
        ({"teacher_key": torch.randn(9, 4)}, ValueError, r"teacher_key must have shape \(M, 3\)"),
        ({"teacher_query": torch.randn(6, 3)}, ValueError, "teacher_query must have the 7 rows"),
        ({"key": torch.randn(9, 4)}, ValueError, r"key must have shape \(M, 5\)"),
        ({"key": [1.0]}, TypeError, "key must be a tensor"),
        ({"query": torch.ones(7, 5, dtype=torch.int64)}, TypeError, "query must hold floating"),
        ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be a finite number"),
        ({"teacher_temperature": 1e-9}, ValueError, "teacher_temperature must be at least"),
        ({"teacher_temperature": torch.tensor(0.1)}, TypeError, "teacher_temperature must be a nu"),
        ({"symmetric": True, "sample_weight": torch.ones(7)}, ValueError, "takes no sample_weight"),
        ({"sample_weight": torch.ones(6)}, ValueError, r"sample_weight must have shape \(7,\)"),
        ({"symmetric": "no"}, TypeError, "symmetric must be True or False"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    names = ("query", "key", "teacher_query", "teacher_key")
    call = dict(zip(names, sides(dtype=torch.float32), strict=True)) | change
    with pytest.raises(error, match=message):
        similarity_distillation(**call)


class TestModule:
    @symmetries
    def test_is_the_function_with_its_options(self, symmetric):
        pairs = sides()
        loss_fn = SimilarityDistillation(0.2, 0.1, symmetric=symmetric, reduction="sum")
        expected = similarity_distillation(
            *pairs, temperature=0.2, teacher_temperature=0.1, symmetric=symmetric, reduction="sum"
        )
        torch.testing.assert_close(loss_fn(*pairs), expected)

    def test_a_schedule_may_set_the_temperature_of_the_teacher(self):
        pairs, loss_fn = sides(), SimilarityDistillation()
        loss_fn.teacher_temperature = 0.07
        expected = similarity_distillation(*pairs, teacher_temperature=0.07)
        torch.testing.assert_close(loss_fn(*pairs), expected)
        loss_fn.teacher_temperature = -1.0
        with pytest.raises(ValueError, match="teacher_temperature must be a finite number above 0"):
            loss_fn(*pairs)

    def test_repr_tells_the_options(self):
        shown = "SimilarityDistillation(temperature=0.1, teacher_temperature=0.07)"
        assert repr(SimilarityDistillation(teacher_temperature=0.07)) == shown

    def test_a_learnable_temperature_gets_its_gradient(self):
        pairs = sides(dtype=torch.float32)
        loss_fn = SimilarityDistillation(0.2, learnable_temperature=True)
        loss_fn(*pairs).backward()
        scale = loss_fn.logit_scale.detach().double().requires_grad_()
        exact = [x.double() for x in pairs]
        loss = reference.similarity_distillation(*exact, (-scale).exp(), 0.04).mean()
        (expected,) = torch.autograd.grad(loss, scale)
        assert_within(loss_fn.logit_scale.grad, expected, 1e-5)

    def test_a_student_learns_the_relations_of_its_teacher(self):
        teacher = torch.randn(32, 3)
        student = torch.nn.Parameter(torch.randn(32, 8))
        loss_fn = SimilarityDistillation(0.5, 0.5, symmetric=True)
        optimizer = torch.optim.Adam([student], lr=0.05)
        losses = []
        for _ in range(60):
            loss = loss_fn(student, student, teacher, teacher)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        p = F.normalize(teacher, dim=1) @ F.normalize(teacher, dim=1).T / 0.5
        entropy = torch.distributions.Categorical(logits=p).entropy().mean()
        assert losses[-1] - entropy < 0.1 * (losses[0] - entropy)
