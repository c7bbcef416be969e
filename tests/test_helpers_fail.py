"""Each helper that judges others is shown to reject what is wrong."""

from pathlib import Path

import algorithm1
import numpy as np
import pytest
import torch
from budgets import assert_within, gradient_budget

from contrastive_kit import reference


def right_and_wrong():
    torch.manual_seed(0)
    right = torch.randn(5, 7, dtype=torch.float64)
    nan = right.clone()
    nan[2, 3] = torch.nan
    yield "nan", right, nan
    yield "sign", right, -right
    yield "one percent", right, right * 1.01
    yield "shape", right, right[None]
    yield "swapped rows", right, right.flip(0)


@pytest.mark.parametrize(
    ("expected", "wrong"), [pytest.param(r, w, id=name) for name, r, w in right_and_wrong()]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assert_within_rejects(expected, wrong, dtype):
    assert_within(expected, expected, gradient_budget(dtype, 0.1))
    with pytest.raises(AssertionError):
        assert_within(wrong, expected, gradient_budget(dtype, 0.1))


def test_assert_within_rejects_an_empty_proof():
    with pytest.raises(AssertionError, match="proves nothing"):
        assert_within(torch.zeros(3), torch.zeros(3), 1.0)


def without_self_mask(views, temperature):
    u = torch.nn.functional.normalize(views.flatten(0, 1), dim=1)
    logits = u @ u.T / temperature
    return torch.nn.functional.cross_entropy(
        logits, torch.arange(len(u)).roll(views.shape[1]), reduction="none"
    ).view(views.shape[:2])


def one_view_only(views, temperature):
    loss = reference.nt_xent(views, temperature)
    return torch.stack([loss[0], loss[0]])


def swapped_pairs(views, temperature):
    return reference.nt_xent(torch.stack([views[0], views[1].roll(1, 0)]), temperature)


@pytest.mark.parametrize("wrong", [without_self_mask, one_view_only, swapped_pairs])
def test_the_loop_oracle_tells_wrong_formulas(wrong):
    views = torch.randn(2, 6, 5, dtype=torch.float64)
    oracle = algorithm1.nt_xent(views, 0.5)
    np.testing.assert_allclose(reference.nt_xent(views, 0.5), oracle, rtol=1e-12)
    assert not np.allclose(wrong(views, 0.5), oracle, rtol=1e-3)


def with_itself(views, labels, temperature):
    u = torch.nn.functional.normalize(views.flatten(0, 1), dim=1)
    label = labels.repeat(len(views))
    log_p = (u @ u.T / temperature).log_softmax(1)
    positive = (label[:, None] == label[None, :]).double()
    return (-(log_p * positive).sum(1) / positive.sum(1)).view(views.shape[:2])


def other_variant(views, labels, temperature):
    return reference.sup_con(views, labels, temperature, "in")


def other_labels(views, labels, temperature):
    return reference.sup_con(views, labels.roll(1), temperature)


@pytest.mark.parametrize("wrong", [with_itself, other_variant, other_labels])
def test_the_loop_of_sup_con_tells_wrong_formulas(wrong):
    views, labels = torch.randn(2, 6, 5, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 2])
    oracle = algorithm1.sup_con(views, labels, 0.5)
    np.testing.assert_allclose(reference.sup_con(views, labels, 0.5), oracle, rtol=1e-12)
    assert not np.allclose(wrong(views, labels, 0.5), oracle, rtol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: reference.siglip(a, b, 0.5, 1.0),
        lambda a, b: reference.siglip(a, b.roll(1, 0), 0.5, -1.0),
        lambda a, b: reference.siglip(b, a, 0.5, -1.0),
        lambda a, b: reference.siglip(a, b, 0.5, -1.0) / len(a),
    ],
    ids=["sign of the bias", "other pairs", "columns for rows", "mean over candidates"],
)
def test_the_loop_of_siglip_tells_wrong_formulas(wrong):
    z1, z2 = torch.randn(2, 6, 5, dtype=torch.float64)
    oracle = algorithm1.siglip(z1, z2, 0.5, -1.0)
    np.testing.assert_allclose(reference.siglip(z1, z2, 0.5, -1.0), oracle, rtol=1e-12)
    assert not np.allclose(wrong(z1, z2), oracle, rtol=1e-3)


@pytest.mark.parametrize("option", [{"label_smoothing": 0.1}, {"hardness": 0.5}], ids=str)
def test_the_loops_tell_a_forgotten_option(option):
    views = torch.randn(2, 6, 5, dtype=torch.float64)
    oracle = algorithm1.nt_xent(views, 0.5, **option)
    np.testing.assert_allclose(reference.nt_xent(views, 0.5, **option), oracle, rtol=1e-12)
    assert not np.allclose(reference.nt_xent(views, 0.5), oracle, rtol=1e-3)


def test_a_folder_called_gpu_skips_no_test(request):
    """Folders are keywords of the tests inside: of a checkout in one, no test ran."""

    class Item:
        path, keywords = Path("gpu/tests/test_losses.py"), {"gpu", "indexes_fakes"}
        callspec = None
        skipped = False

        def get_closest_marker(self, name):
            return None

        def add_marker(self, marker):
            self.skipped = True

    here = str(Path(__file__).with_name("conftest.py"))
    item = Item()
    request.config.pluginmanager.get_plugin(here).pytest_collection_modifyitems([item])
    assert not item.skipped
