"""The projection head against the formulas, counted parameters and its documented errors."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_kit import ProjectionHead


def parameter_count(head):
    return sum(p.numel() for p in head.parameters())


def expected_count(i, h, o, layers, batch_norm):
    """Weights, then scales and shifts of BN (no shift in the last), or the hidden biases."""
    if layers == 0:
        return 0
    widths = [i, *[h] * (layers - 1), o]
    weights = sum(a * b for a, b in pairwise(widths))
    return weights + (2 * h * (layers - 1) + o if batch_norm else h * (layers - 1))


@settings(max_examples=40, deadline=None)
@given(
    i=st.integers(1, 9),
    h=st.integers(1, 9),
    o=st.integers(1, 9),
    layers=st.integers(1, 3),
    batch_norm=st.booleans(),
)
def test_shape_and_parameter_count(i, h, o, layers, batch_norm):
    hidden = h if layers > 1 else None
    head = ProjectionHead(i, hidden, o, layers=layers, batch_norm=batch_norm)
    assert head(torch.randn(5, i)).shape == (5, o)
    assert parameter_count(head) == expected_count(i, h, o, layers, batch_norm)


def test_defaults_are_simclr_v1():
    head = ProjectionHead(512)
    assert (head.in_dim, head.out_dim) == (512, 128)
    assert parameter_count(head) == 512 * 512 + 2 * 512 + 512 * 128 + 128


def test_no_layer_returns_its_input():
    head = ProjectionHead(7, out_dim=7, layers=0)
    h = torch.randn(3, 7)
    assert torch.equal(head(h), h)
    assert parameter_count(head) == 0


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_formula(layers, batch_norm):
    """Every layer by hand, with parameters that are not those of the initialization."""
    head = ProjectionHead(6, None if layers == 1 else 5, 4, layers=layers, batch_norm=batch_norm)
    head.double()
    with torch.no_grad():
        for p in head.parameters():
            p.normal_()
    x = h = torch.randn(11, 6, dtype=torch.float64)
    linears = [m for m in head.net if isinstance(m, torch.nn.Linear)]
    norms = [m for m in head.net if isinstance(m, torch.nn.BatchNorm1d)]
    assert len(linears) == layers
    assert len(norms) == (layers if batch_norm else 0)
    for i, linear in enumerate(linears):
        last = i == layers - 1
        assert (linear.bias is None) == (batch_norm or last)
        x = x @ linear.weight.T
        if batch_norm:
            assert (norms[i].bias is None) == last
            x = (x - x.mean(0)) / (x.var(0, correction=0) + norms[i].eps).sqrt() * norms[i].weight
        x = x + (0 if last else norms[i].bias if batch_norm else linear.bias)
        x = x if last else x.clamp(min=0)
    torch.testing.assert_close(head(h), x, rtol=1e-10, atol=1e-10)


def test_hidden_width_defaults_to_the_input():
    head = ProjectionHead(6, out_dim=4, layers=3)
    assert [m.weight.shape for m in head.net if isinstance(m, torch.nn.Linear)] == [
        (6, 6), (6, 6), (4, 6),
    ]  # fmt: skip


def test_last_batch_norm_without_shift_survives_state_dict_and_sync_conversion():
    head = ProjectionHead(6, out_dim=4)
    assert "net.4.bias" not in head.state_dict()
    other = ProjectionHead(6, out_dim=4)
    h = torch.randn(9, 6)
    head(h)
    other.load_state_dict(head.state_dict())
    assert torch.equal(head.eval()(h), other.eval()(h))
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert converted.state_dict().keys() == other.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((8,), {"layers": 4}, ValueError, "layers must be from 0 to 3, got 4"),
        ((8,), {"layers": -1}, ValueError, "layers must be from 0 to 3, got -1"),
        ((8,), {"layers": True}, TypeError, "layers must be an integer"),
        ((8,), {"layers": 2.0}, TypeError, "layers must be an integer"),
        ((8,), {"layers": 0}, ValueError, r"out_dim must equal in_dim \(8\).*got 128"),
        ((8, 16), {"layers": 0, "out_dim": 8}, ValueError, "hidden_dim must be None"),
        ((8, 16), {"layers": 1}, ValueError, "hidden_dim must be None.*got 16"),
        ((0,), {}, ValueError, "in_dim must be at least 1, got 0"),
        ((8, 0), {}, ValueError, "hidden_dim must be at least 1, got 0"),
        ((8,), {"out_dim": -2}, ValueError, "out_dim must be at least 1, got -2"),
        ((8.0,), {}, TypeError, "in_dim must be an integer, got 8.0"),
        ((8,), {"batch_norm": "no"}, TypeError, "batch_norm must be True or False, got 'no'"),
    ],
)
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ProjectionHead(*arguments, **options)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("shape", [(8,), (2, 7), (2, 8, 1, 1)])
def test_wrong_input(layers, shape):
    head = ProjectionHead(8, out_dim=8, layers=layers)
    with pytest.raises(ValueError, match=r"h must have shape \(N, 8\), got"):
        head(torch.randn(shape))


def test_sizes_may_be_numbers_of_numpy():
    sizes = {"in_dim": 5, "hidden_dim": 7, "out_dim": 3, "layers": 2}
    head = ProjectionHead(**{name: np.int64(size) for name, size in sizes.items()})
    assert repr(head) == repr(ProjectionHead(**sizes))
    with pytest.raises(TypeError, match="out_dim must be an integer, got np"):
        ProjectionHead(5, out_dim=np.float64(3.0))
