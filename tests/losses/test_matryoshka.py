"""A loss on prefixes: the sum written out, for every loss, and what makes no sense is refused."""

import pytest
import torch

from contrastive_kit import InfoNCE, Matryoshka, NTXent, SigLIP, SimilarityDistillation, SupCon

DIMS, WEIGHTS = (3, 10, 7), (0.5, 1.0, 2.0)


def embeddings(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


CALLS = {
    "nt_xent": (NTXent(0.2), [(5, 10), (5, 10), (5, 10)], {}, {"ids": torch.arange(5) // 2}),
    "info_nce": (InfoNCE(0.2), [(5, 10), (5, 10), (4, 10)], {}, {}),
    "per query": (InfoNCE(0.2), [(5, 10), (5, 10)], {"negatives": (5, 4, 10)}, {}),
    "clip": (InfoNCE(0.2, symmetric=True, reduction="none"), [(5, 10), (5, 10)], {}, {}),
    "sup_con": (
        SupCon(0.2), [(5, 10)], {"keys": (4, 10)},
        {"labels": torch.arange(5) % 2, "key_labels": torch.arange(4) % 2},
    ),
    "siglip": (SigLIP(), [(5, 10), (5, 10)], {}, {}),
    "distillation": (
        SimilarityDistillation(0.2), [(5, 10), (6, 10)], {},
        {"teacher_query": torch.randn(5, 2).double(), "teacher_key": torch.randn(6, 2).double()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_it_is_the_weighted_sum_over_prefixes(name):
    loss_fn, shapes, wide, others = CALLS[name]
    positional = [embeddings(*shape) for shape in shapes]
    keywords = {key: embeddings(*shape) for key, shape in wide.items()}
    inputs = [*positional, *keywords.values()]
    expected = 0
    for d, weight in zip(DIMS, WEIGHTS, strict=True):
        cut = {key: x[..., :d] for key, x in keywords.items()}
        expected += weight * loss_fn(*(x[:, :d] for x in positional), **cut, **others)
    actual = Matryoshka(loss_fn, DIMS, WEIGHTS)(*positional, **keywords, **others)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss.sum(), inputs) for loss in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(actual, loss_fn(*positional, **keywords, **others))


def test_one_temperature_is_learned_for_all_widths():
    loss_fn = Matryoshka(NTXent(0.2, learnable_temperature=True), [4, 2])
    assert list(loss_fn.state_dict()) == ["loss_fn.logit_scale"]
    z1, z2 = torch.randn(2, 6, 4).unbind(0)
    loss_fn(z1, z2).backward()
    single = NTXent(0.2, learnable_temperature=True)
    (single(z1, z2) + single(z1[:, :2], z2[:, :2])).backward()
    torch.testing.assert_close(loss_fn.loss_fn.logit_scale.grad, single.logit_scale.grad)


def test_no_negatives_may_be_given_as_none():
    z1, z2 = torch.randn(2, 6, 4).unbind(0)
    loss_fn = Matryoshka(InfoNCE(0.2), [4, 2])
    assert torch.equal(loss_fn(z1, z2, None), loss_fn(z1, z2))
    assert torch.equal(loss_fn(z1, z2, negatives=None), loss_fn(z1, z2))


def test_it_compiles_to_one_graph():
    loss_fn = Matryoshka(NTXent(0.2), [4, 2])
    z1, z2 = torch.randn(2, 6, 4).unbind(0)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z1, z2), loss_fn(z1, z2))


def test_it_shows_widths_and_weights():
    assert "dims=(4, 2)\n" in repr(Matryoshka(NTXent(), [4, 2]))
    assert "dims=(4, 2), weights=(1.0, 0.5)" in repr(Matryoshka(NTXent(), [4, 2], [1, 0.5]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.nn.functional.mse_loss, [4]), TypeError, "loss_fn must be a module"),
        ((NTXent(), []), ValueError, "dims must be different widths"),
        ((NTXent(), [4, 4]), ValueError, "dims must be different widths"),
        ((NTXent(), [4, 0]), ValueError, "dims must be at least 1, got 0"),
        ((NTXent(), [4.0]), TypeError, "dims must be an integer, got 4.0"),
        ((NTXent(), [4], [1, 2]), ValueError, "weights must be 1 numbers"),
        ((NTXent(), [4], [-1]), ValueError, "weights must be 1 numbers of at least 0"),
        ((NTXent(), [4], [float("nan")]), ValueError, "weights must be 1 numbers of at least 0"),
        ((NTXent(), [4], ["1"]), TypeError, "weights must be a number"),
    ],
)
def test_settings_that_make_no_sense(arguments, error, words):
    with pytest.raises(error, match=words):
        Matryoshka(*arguments)


def test_calls_that_make_no_sense():
    z = torch.randn(6, 4)
    with pytest.raises(ValueError, match="dims must be at most the width of the embeddings, 4"):
        Matryoshka(NTXent(), [5])(z, z + 1)
    with pytest.raises(ValueError, match="at most the width of the embeddings, 3"):
        Matryoshka(InfoNCE(), [4])(z, z + 1, negatives=z[:, :3])
    with pytest.raises(ValueError, match="return_stats must be False"):
        Matryoshka(NTXent(), [4])(z, z + 1, return_stats=True)
    with pytest.raises(ValueError, match="teacher_query and teacher_key must be given by keyword"):
        Matryoshka(SimilarityDistillation(), [4])(z, z, z, z)
