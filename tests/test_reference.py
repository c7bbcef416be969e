"""The reference page against loops over scalars and against closed forms."""

import algorithm1
import numpy as np
import pytest
import torch

from contrastive_kit import reference


@pytest.mark.parametrize("n_views", [2, 3, 4])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 7), (9, 5)])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_nt_xent_is_algorithm_1(n_views, n, d, with_ids, decoupled):
    views = torch.randn(n_views, n, d, dtype=torch.float64)
    ids = torch.arange(n) // 2 if with_ids else None
    formula = reference.decoupled_nt_xent if decoupled else reference.nt_xent
    expected = algorithm1.nt_xent(views, 0.3, ids, decoupled)
    np.testing.assert_allclose(formula(views, 0.3, ids), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("with_ids", [False, True])
def test_info_nce_is_its_loop(with_ids):
    q, k = torch.randn(2, 7, 5, dtype=torch.float64)
    ids = torch.arange(7) // 2 if with_ids else torch.arange(7)
    expected = algorithm1.info_nce(q, k, 0.2, ids=ids)
    np.testing.assert_allclose(reference.info_nce(q, k, 0.2, ids), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(11, 5), (7, 3, 5)])
def test_info_nce_with_negatives_is_its_loop(shape):
    q, k = torch.randn(2, 7, 5, dtype=torch.float64)
    negatives = torch.randn(*shape, dtype=torch.float64)
    expected = algorithm1.info_nce(q, k, 0.2, negatives)
    actual = reference.info_nce_with_negatives(q, k, negatives, 0.2)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_identical_rows_have_a_closed_form():
    views = torch.ones(2, 10, 3, dtype=torch.float64)
    expected = torch.full((2, 10), 19.0, dtype=torch.float64).log()
    torch.testing.assert_close(reference.nt_xent(views, 0.1), expected)
    torch.testing.assert_close(reference.decoupled_nt_xent(views, 0.1), (expected.exp() - 1).log())


def test_the_loops_know_orthogonal_pairs():
    """Two images on two axes: each anchor meets its twin at cosine 1 and both others at 0."""
    views = np.stack([np.eye(2), np.eye(2)])
    expected = np.log(np.exp(2.0) + 2.0) - 2.0
    np.testing.assert_allclose(algorithm1.nt_xent(views, 0.5), expected, rtol=1e-14)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"hardness": 0.7}])
@pytest.mark.parametrize("with_ids", [False, True])
def test_options_are_those_of_the_loops(with_ids, options):
    views = torch.randn(3, 7, 5, dtype=torch.float64)
    ids = torch.tensor([3, 3, -1, 8, 5, 8, 8]) if with_ids else None
    expected = algorithm1.nt_xent(views, 0.3, ids, **options)
    np.testing.assert_allclose(reference.nt_xent(views, 0.3, ids, **options), expected, rtol=1e-12)
    q, k, negatives = views[0], views[1], torch.randn(11, 5, dtype=torch.float64)
    expected = algorithm1.info_nce(q, k, 0.3, ids=ids, **options)
    ids = torch.arange(7) if ids is None else ids
    np.testing.assert_allclose(reference.info_nce(q, k, 0.3, ids, **options), expected, rtol=1e-12)
    expected = algorithm1.info_nce(q, k, 0.3, negatives, **options)
    actual = reference.info_nce_with_negatives(q, k, negatives, 0.3, **options)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_decoupled_hardness_is_that_of_the_loops():
    views = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = algorithm1.nt_xent(views, 0.3, None, True, hardness=1.5)
    actual = reference.decoupled_nt_xent(views, 0.3, hardness=1.5)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_sup_con_is_its_loop(n_views, variant):
    views = torch.randn(n_views, 8, 5, dtype=torch.float64)
    labels = torch.tensor([3, 3, -1, 8, 5, 8, 8, 5])
    expected = algorithm1.sup_con(views, labels, 0.3, variant)
    actual = reference.sup_con(views, labels, 0.3, variant)
    alone = expected == 0
    assert alone.any() == (n_views == 1)
    assert actual[torch.from_numpy(alone)].isnan().all()
    np.testing.assert_allclose(actual[torch.from_numpy(~alone)], expected[~alone], rtol=1e-12)


@pytest.mark.parametrize("with_ids", [False, True])
def test_siglip_is_its_loop(with_ids):
    z1, z2 = torch.randn(2, 7, 5, dtype=torch.float64)
    ids = torch.tensor([3, 3, -1, 8, 5, 8, 8]) if with_ids else None
    expected = algorithm1.siglip(z1, z2, 0.3, -1.5, ids)
    np.testing.assert_allclose(reference.siglip(z1, z2, 0.3, -1.5, ids), expected, rtol=1e-12)


@pytest.mark.parametrize("variant", ["out", "in", "pairwise"])
def test_sup_con_between_two_sides_is_its_loop(variant):
    query, key = torch.randn(6, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    labels, key_labels = torch.tensor([4, 4, 0, 1, 2, 9]), torch.tensor([4, 4, 4, 0, 1, 7, 7, 2])
    expected = algorithm1.sup_con_between(query, labels, key, key_labels, 0.3, variant)
    actual = reference.sup_con_between(query, labels, key, key_labels, 0.3, variant)
    assert actual.isnan().tolist() == [False] * 5 + [True]
    np.testing.assert_allclose(actual.nan_to_num(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n_views", [1, 2])
def test_sup_con_of_multi_hot_is_its_loop(n_views):
    views = torch.randn(n_views, 6, 5, dtype=torch.float64)
    labels = (torch.rand(6, 4) < 0.5).double() * torch.rand(4).double()
    expected = algorithm1.sup_con_of_multi_hot(views, labels, 0.3)
    actual = reference.sup_con_of_multi_hot(views, labels, 0.3).nan_to_num()
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("balance", [False, True])
def test_siglip_with_labels_is_its_loop(balance):
    z1, z2 = torch.randn(6, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    labels, z2_labels = torch.tensor([4, 4, 0, 1, 2, 9]), torch.tensor([4, 4, 4, 0, 1, 7, 7, 2])
    expected = algorithm1.siglip_with_labels(z1, labels, z2, z2_labels, 0.3, -1.0, balance)
    actual = reference.siglip_with_labels(
        z1, labels, z2, z2_labels, 0.3, -1.0, balance_positives=balance
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_similarity_distillation_is_its_loop():
    query, key = torch.randn(6, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    taught, taught_key = torch.randn(6, 3).double(), torch.randn(8, 3).double()
    expected = algorithm1.similarity_distillation(query, key, taught, taught_key, 0.3, 0.1)
    actual = reference.similarity_distillation(query, key, taught, taught_key, 0.3, 0.1)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
