"""What the public primitives refuse, whichever backend is asked: argument, expected, came."""

import re

import numpy as np
import pytest
import torch

from contrastive_kit.ops import BACKENDS, Exclusion, kept_logsumexp, kept_softplus_sum
from contrastive_kit.ops import scaled_unit_rows as unit_rows

Q, K = torch.randn(6, 3), torch.randn(4, 3)
IDS = torch.arange(6)
# Not called "backend": what is checked is checked before one that needs a GPU is asked.
every_choice = pytest.mark.parametrize("name", ["auto", *BACKENDS])


def by(**rule):
    return {"exclusion": Exclusion(**rule)}


MATRICES = [
    ((Q.int(), K), TypeError, "q must hold real floating point rows, got torch.int32"),
    ((Q.to(torch.complex64), K), TypeError, "q must hold real .* got torch.complex64"),
    ((Q, K.to(torch.complex64)), TypeError, "k must hold real .* got torch.complex64"),
    (([[1.0]], K), TypeError, "q must be a tensor of shape (rows, D), got list"),
    ((Q[0], K), ValueError, "q must have shape (rows, D), D ≥ 1, got (3,)"),
    ((Q[:, :0], K[:, :0]), ValueError, "q must have shape (rows, D), D ≥ 1, got (6, 0)"),
    ((Q, K[:, :2]), ValueError, "k must have shape (C, 3) to match q, got (4, 2)"),
    ((Q, K.to("meta")), ValueError, "k must be on the device of q, cpu, got meta"),
]
RULES = [
    (by(period=-1), ValueError, "period must be at least 0, .* got -1"),
    (by(period=2.0), TypeError, "period must be an integer, got 2.0"),
    (by(period=True), TypeError, "period must be an integer, got True"),
    ({"exclusion": 6}, TypeError, "exclusion must be an Exclusion, got int"),
    (by(row_ids=IDS[:5], column_ids=IDS[:4]), ValueError, "row_ids must have shape (6,).*got (5,)"),
    (by(row_ids=IDS, column_ids=IDS), ValueError, "column_ids must have shape (4,).*got (6,)"),
    (by(row_ids=IDS), ValueError, "column_ids must be given for k of shape (4, 3)"),
    (by(column_ids=IDS[:4]), ValueError, "column_ids need row_ids to be compared with, got None"),
    (by(row_ids=IDS.float(), column_ids=IDS[:4]), TypeError, "row_ids must hold integers.*float32"),
    (by(row_ids=IDS, column_ids=[0] * 4), TypeError, "column_ids must be an integer tensor"),
    (by(row_ids=IDS.to("meta"), column_ids=IDS[:4]), ValueError, "row_ids must be on the device"),
    (by(row_classes=IDS[:2]), ValueError, "row_classes must have shape (6,).*got (2,)"),
    (by(column_classes=IDS[:4]), ValueError, "column_classes need row_classes"),
    (by(row_classes=IDS), ValueError, "column_classes must be given for k of shape (4, 3)"),
]
OPTIONS = [
    ({"bound": -1.0}, ValueError, "bound must be at least 0, got -1.0"),
    ({"bound": float("nan")}, ValueError, "bound must be at least 0, got nan"),
    ({"bound": "2"}, TypeError, "bound must be a number, got '2'"),
    ({"both": 1}, TypeError, "both must be True or False, got 1"),
    ({"statistics": None}, TypeError, "statistics must be True or False, got None"),
    ({"mma_dtype": torch.float64}, ValueError, "mma_dtype must be None or one of .*float64"),
]


def expect(error, message):
    """Parentheses of shapes are meant as they stand."""
    return pytest.raises(error, match=re.sub(r"([()])", r"\\\1", message))


@every_choice
@pytest.mark.parametrize(("matrices", "error", "message"), MATRICES)
def test_matrices(matrices, error, message, name):
    for primitive in (kept_logsumexp, kept_softplus_sum):
        with expect(error, message):
            primitive(*matrices, backend=name)


@every_choice
@pytest.mark.parametrize(("rule", "error", "message"), RULES)
def test_rules(rule, error, message, name):
    for primitive in (kept_logsumexp, kept_softplus_sum):
        with expect(error, message):
            primitive(Q, K, **rule, backend=name)


@every_choice
@pytest.mark.parametrize(("options", "error", "message"), OPTIONS)
def test_options(options, error, message, name):
    with expect(error, message):
        kept_logsumexp(Q, K, **options, backend=name)


@every_choice
def test_without_columns(name):
    with expect(ValueError, "both=True needs k: columns that are the rows have their results"):
        kept_logsumexp(Q, both=True, backend=name)
    for what in ("ids", "classes"):
        rule = Exclusion(**{f"row_{what}": IDS, f"column_{what}": IDS})
        with expect(ValueError, f"column_{what} need k: without it columns have"):
            kept_logsumexp(Q, exclusion=rule, backend=name)
    with expect(TypeError, "k must be a tensor of shape (C, D), got NoneType"):
        kept_softplus_sum(Q, None, backend=name)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        ("1", TypeError, "bias must be a number or a tensor, got '1'"),
        (torch.tensor(1), TypeError, "bias must be a floating point tensor, got torch.int64"),
        (torch.zeros(2), ValueError, "bias must be a tensor of one value, got shape (2,)"),
        (torch.zeros(1, device="meta"), ValueError, "bias must be on the device of q, cpu"),
    ],
)
def test_bias(bias, error, message):
    with expect(error, message):
        kept_softplus_sum(Q, K, bias)


@pytest.mark.parametrize(
    ("views", "temperature", "error", "message"),
    [
        ((Q,), -0.5, ValueError, "temperature must be a finite number above 0, got -0.5"),
        ((Q,), 0, ValueError, "temperature must be a finite number above 0, got 0"),
        ((Q,), "1", TypeError, "temperature must be a number, got '1'"),
        ((Q,), torch.ones(2), ValueError, "temperature must be .* one value.* (2,)"),
        ((), 1.0, ValueError, "views must be one or more tensors, got none"),
        (Q, 1.0, TypeError, "views must be a tuple of tensors, got Tensor"),
        ((Q, [1.0]), 1.0, TypeError, "views[1] must be a tensor, got list"),
        ((Q, Q.int()), 1.0, TypeError, "views[1] must hold real .* got torch.int32"),
        ((Q + 0j,), 1.0, TypeError, "views[0] must hold real .* got torch.complex64"),
        ((Q, K), 1.0, ValueError, "views[1] must have the shape of views[0], (6, 3), got (4, 3)"),
        ((Q.sum(),), 1.0, ValueError, "views[0] must have shape (..., D), got ()"),
        ((Q, Q.to("meta")), 1.0, ValueError, "views[1] must be on the device of views[0]"),
    ],
)
def test_unit_rows(views, temperature, error, message):
    with expect(error, message.replace("[", r"\[").replace("]", r"\]")):
        unit_rows(views, temperature)


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
def test_what_is_fine(backend):
    """Empty matrices, NumPy's integers, ids of any signed integer dtype, the ids of equal sides."""
    expected = kept_logsumexp(Q, Q + 1, exclusion=Exclusion(6), backend=backend)[0]
    for rule in (
        Exclusion(np.int64(6)),
        Exclusion(row_ids=IDS),
        Exclusion(row_ids=IDS.to(torch.int8), column_ids=IDS),
    ):
        actual = kept_logsumexp(Q, Q + 1, exclusion=rule, bound=np.float32(1e9), backend=backend)[0]
        torch.testing.assert_close(actual, expected)
    assert kept_logsumexp(Q[:0], K, backend=backend)[0].shape == (0,)
