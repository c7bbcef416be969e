"""Each helper that judges others is shown to reject what is wrong."""

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
