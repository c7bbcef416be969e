"""A learnable temperature far from where it should be: one bad step must not end the training."""

import copy
import math

import pytest
import torch

from contrastive_kit import InfoNCE, NTXent, SigLIP, SupCon, reference

LABELS = torch.arange(7) // 2
LOSSES = {
    "NTXent": (NTXent, {"learnable_temperature": True}, {}),
    "InfoNCE": (InfoNCE, {"learnable_temperature": True, "symmetric": True}, {}),
    "SupCon": (SupCon, {"learnable_temperature": True}, {"labels": LABELS}),
    "SigLIP": (SigLIP, {}, {}),
}
FAR_DOWN = [-20.0, -88.0, -89.0, -100.0, -1e4, -math.inf]
FAR_UP = [20.0, 88.0, 89.0, 100.0, 1e4, math.inf]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def made(name, logit_scale=None, dtype=torch.float32, **more):
    module, options, inputs = LOSSES[name]
    loss_fn = module(0.1, **options, **more).to(dtype)
    if logit_scale is not None:
        with torch.no_grad():
            loss_fn.logit_scale.fill_(logit_scale)
    return loss_fn, inputs


def step(loss_fn, inputs):
    """The loss, the gradient of the embeddings, and that of the parameter."""
    z1, z2 = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))
    z1.requires_grad_()
    loss = loss_fn(z1, z2, **inputs)
    return (loss, *torch.autograd.grad(loss, [z1, loss_fn.logit_scale]))


def largest_scale(name):
    return 1000.0 if name == "SigLIP" else 100.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("logit_scale", FAR_DOWN + FAR_UP)
def test_far_out_it_is_that_at_the_bound(name, logit_scale, dtype):
    bound = -math.log(100) if logit_scale < 0 else math.log(largest_scale(name))
    actual = step(*made(name, logit_scale, dtype))
    expected = step(*made(name, bound, dtype))
    for x, y in zip(actual, expected, strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, y)
    # From there it learns: a gradient of 0 would keep it for ever.
    assert actual[2] != 0


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("logit_scale", [-1e4, 1e4])
def test_a_call_brings_the_parameter_back(name, logit_scale):
    loss_fn, inputs = made(name, logit_scale)
    low, high = 1 / largest_scale(name), 100.0
    assert loss_fn.temperature.item() == pytest.approx(high if logit_scale < 0 else low)
    assert loss_fn.logit_scale.item() == logit_scale  # reading writes nothing
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.1)
    before = copy.deepcopy(loss_fn.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        z1, z2 = torch.randn(2, 7, 5)
        loss_fn(z1, z2, **inputs).backward()
        optimizer.step()
    assert all(x.isfinite() for x in loss_fn.parameters())
    assert not torch.equal(loss_fn.logit_scale, before["logit_scale"])
    assert -5 < loss_fn.logit_scale < 7


@pytest.mark.parametrize("temperature", [100.0, 10.0, 0.01])
def test_within_its_bounds_value_and_gradient_are_those_of_the_formula(temperature):
    z1, z2 = torch.randn(2, 7, 5, dtype=torch.float64)
    loss_fn = NTXent(temperature, learnable_temperature=True).double()
    loss = loss_fn(z1, z2)
    logit_scale = loss_fn.logit_scale.detach().clone().requires_grad_()
    expected = reference.nt_xent(torch.stack([z1, z2]), (-logit_scale).exp()).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, loss_fn.logit_scale), torch.autograd.grad(expected, logit_scale)
    )


@pytest.mark.parametrize("name", list(LOSSES))
def test_nan_is_not_hidden(name):
    assert step(*made(name, math.nan))[0].isnan()


class TestMaxScale:
    def test_it_bounds_the_scale(self):
        loss_fn, inputs = made("SigLIP", 10.0, max_scale=100)
        expected, _ = made("SigLIP", math.log(100))
        assert torch.equal(step(loss_fn, inputs)[0], step(expected, inputs)[0])
        assert loss_fn.logit_scale.item() == pytest.approx(math.log(100))

    def test_the_default_leaves_published_scales_alone(self):
        """They end near a scale of 100, above the bound of CLIP."""
        loss_fn, inputs = made("SigLIP", math.log(120))
        step(loss_fn, inputs)
        assert loss_fn.logit_scale.item() == pytest.approx(math.log(120), rel=1e-6)

    def test_it_is_shown_where_it_is_not_the_default(self):
        assert "max_scale" not in repr(SigLIP())
        assert "logit_bias=-10, max_scale=100, reduction" in repr(SigLIP(max_scale=100))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"max_scale": 0}, ValueError, r"max_scale must be from 0.01 to 8388608, got 0"),
            ({"max_scale": 1e9}, ValueError, r"max_scale must be from .* got 1000000000"),
            ({"max_scale": math.nan}, ValueError, r"max_scale must be from .* got nan"),
            ({"max_scale": "100"}, TypeError, "max_scale must be a number, got '100'"),
            ({"max_scale": 5}, ValueError, r"temperature must be at least 1 / max_scale, 0.2, "),
            ({"temperature": 101}, ValueError, r"temperature .* at most 100.0, got 101"),
        ],
    )
    def test_what_is_out_of_range_is_refused(self, options, error, message):
        with pytest.raises(error, match=message):
            SigLIP(**options)


@pytest.mark.parametrize("module", [NTXent, InfoNCE, SupCon])
def test_a_temperature_that_the_first_call_would_bring_down_is_refused(module):
    with pytest.raises(ValueError, match=r"at most 100\.0 if it is learnable, got 101"):
        module(101, learnable_temperature=True)
    assert module(101).temperature == 101
