"""SigLIP with several matches of a row, told by labels: equations (28) and (29)."""

import algorithm1
import pytest
import torch
import torch.nn.functional as F
from budgets import VALUE, assert_within, gradient_budget

from contrastive_kit import SigLIP, reference
from contrastive_kit.functional import siglip
from contrastive_kit.ops import BACKENDS

backends = pytest.mark.parametrize(
    "backend", [name for name, b in BACKENDS.items() if b.same_class_softplus_sum is not None]
)
balancing = pytest.mark.parametrize("balance", [False, True])
# One and several on either side, and on each side a label that the other lacks.
LABELS = torch.tensor([3, 8, 8, -1, 5, 5, 5, 99])
Z2_LABELS = torch.tensor([5, 3, 3, 8, 77, -1, 5, 3, 77])


def random_sides(d=5, n=8, m=9, dtype=torch.float64):
    sides = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    return [x.to(dtype) for x in sides]


def wanting(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@backends
@balancing
def test_equals_its_loop(balance, backend):
    z1, z2 = random_sides()
    expected = torch.from_numpy(
        algorithm1.siglip_with_labels(z1, LABELS, z2, Z2_LABELS, 0.2, -2.0, balance)
    )
    call = {"labels": LABELS, "z2_labels": Z2_LABELS, "temperature": 0.2, "logit_bias": -2.0}
    call |= {"balance_positives": balance, "backend": backend}
    each = siglip(z1, z2, reduction="none", **call)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(siglip(z1, z2, **call), expected.mean())
    torch.testing.assert_close(siglip(z1, z2, reduction="sum", **call), expected.sum())
    weights = torch.rand(8, dtype=torch.float64)
    weighted = reference.weighted_mean(expected, weights)
    torch.testing.assert_close(siglip(z1, z2, sample_weight=weights, **call), weighted)


@backends
@balancing
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 3, 3), (63, 65, 60), (40, 252, 17)])
@pytest.mark.usefixtures("poisoned_empty")
def test_value_and_every_gradient_at_odd_sizes(n, m, d, dtype, balance, backend):
    z1, z2 = random_sides(d, n, m, dtype)
    labels, z2_labels = torch.arange(n) * 7 % (n // 2 + 1), torch.arange(m) * 5 % (n // 2 + 3)
    scalars = torch.tensor(0.1, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    exact = wanting(z1.double(), z2.double(), *scalars)
    expected = reference.siglip_with_labels(
        exact[0], labels, exact[1], z2_labels, *exact[2:], balance_positives=balance
    ).mean()
    expected_grads = torch.autograd.grad(expected, exact)
    inputs = wanting(z1, z2, *scalars)
    loss = siglip(
        *inputs[:2],
        labels=labels,
        z2_labels=z2_labels,
        temperature=inputs[2],
        logit_bias=inputs[3],
        balance_positives=balance,
        backend=backend,
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(loss, expected, 2 * VALUE[dtype])
    grads = torch.autograd.grad(loss, inputs)
    for got, want in zip(grads[:2], expected_grads[:2], strict=True):
        assert got.dtype == dtype
        assert_within(got, want, gradient_budget(dtype, 0.1))
    for got, want in zip(grads[2:], expected_grads[2:], strict=True):
        assert_within(got, want, 1e-12 if dtype == torch.float64 else 2e-5)


@balancing
def test_gradcheck(balance):
    scalars = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    inputs = wanting(*random_sides(3), *scalars)

    def losses(z1, z2, t, b):
        return siglip(
            z1,
            z2,
            temperature=t,
            logit_bias=b,
            labels=LABELS,
            z2_labels=Z2_LABELS,
            balance_positives=balance,
            reduction="none",
        )

    assert torch.autograd.gradcheck(losses, inputs)


@backends
@balancing
def test_a_label_for_each_pair_is_the_plain_loss(balance, backend):
    z1, z2 = random_sides(5, 9, 9)
    labels, order = torch.randperm(9) - 4, torch.randperm(9)
    expected = siglip(z1, z2, logit_bias=-3.0)
    call = {"logit_bias": -3.0, "balance_positives": balance, "backend": backend}
    torch.testing.assert_close(siglip(z1, z2, labels=labels, **call), expected)
    shuffled = siglip(z1, z2[order], labels=labels, z2_labels=labels[order], **call)
    torch.testing.assert_close(shuffled, expected)


@balancing
def test_swapping_the_sides_changes_no_sum(balance):
    z1, z2 = random_sides()
    call = {"reduction": "sum", "balance_positives": balance, "logit_bias": -3.0}
    forth = siglip(z1, z2, labels=LABELS, z2_labels=Z2_LABELS, **call)
    back = siglip(z2, z1, labels=Z2_LABELS, z2_labels=LABELS, **call)
    torch.testing.assert_close(forth, back)


def test_balanced_is_the_published_objective_of_siglip_plus():
    """siglip-kernel 0.1.2: Σ v BCE / (N·M), v = (1/k + 1/k')/2 of a match and 1 of the others."""
    z1, z2 = random_sides()
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T * scale + bias
    y = (LABELS[:, None] == Z2_LABELS).double()
    k, k_other = y.sum(1, keepdim=True).clamp(min=1), y.sum(0, keepdim=True).clamp(min=1)
    v = torch.where(y > 0, 0.5 / k + 0.5 / k_other, 1.0)
    bce = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    published = (v * bce).sum() / (8 * 9)
    ours = siglip(
        z1, z2, labels=LABELS, z2_labels=Z2_LABELS, temperature=0.1, balance_positives=True
    )
    torch.testing.assert_close(published, ours / 9)


@balancing
def test_a_row_without_a_match_has_only_negatives(balance):
    z1, z2 = random_sides()
    each = siglip(
        z1,
        z2,
        labels=LABELS,
        z2_labels=Z2_LABELS,
        logit_bias=-1.0,
        reduction="none",
        balance_positives=balance,
    )
    logits = F.cosine_similarity(z1[-1:], z2) / 0.1 - 1
    torch.testing.assert_close(each[-1], torch.log1p(logits.exp()).sum())


def test_nan_shows_in_the_loss():
    z1, z2 = random_sides()
    z2[3, 1] = torch.nan
    assert siglip(z1, z2, labels=LABELS, z2_labels=Z2_LABELS).isnan()


def test_statistics():
    z1, z2 = random_sides()
    call = {"labels": LABELS, "z2_labels": Z2_LABELS, "temperature": 0.3}
    loss, stats = siglip(z1, z2, return_stats=True, **call)
    assert torch.equal(loss, siglip(z1, z2, **call))
    cosines = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T
    match = LABELS[:, None] == Z2_LABELS
    nearest = match[torch.arange(8), cosines.argmax(1)]
    p = (cosines / 0.3).softmax(1)
    expected = [
        nearest[match.any(1)].double().mean(),
        cosines[match].mean(),
        cosines[~match].mean(),
        -(p * p.log()).sum(1).mean(),
    ]
    assert 0 < stats.accuracy < 1
    torch.testing.assert_close(torch.stack(stats), torch.stack(expected))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": None}, ValueError, "z2_labels need labels of z1"),
        ({"labels": None, "z2_labels": None, "z2": torch.randn(8, 5), "balance_positives": True},
         ValueError, "balance_positives=True needs labels"),
        ({"z2_labels": None}, ValueError, r"z2 must have the shape of z1, \(8, 5\)"),
        ({"ids": LABELS}, ValueError, "ids cannot be combined with labels"),
        ({"labels": LABELS[:3]}, ValueError, r"labels must have shape \(8,\)"),
        ({"labels": LABELS.float()}, TypeError, "labels must hold integers"),
        ({"z2_labels": LABELS}, ValueError, r"z2_labels must have shape \(9,\)"),
        ({"z2": torch.randn(9, 4)}, ValueError, r"z2 must have shape \(M, 5\) to match z1"),
        ({"balance_positives": 1}, TypeError, "balance_positives must be True or False"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    call = {"z2": torch.randn(9, 5), "labels": LABELS, "z2_labels": Z2_LABELS} | change
    with pytest.raises(error, match=message):
        siglip(torch.randn(8, 5), **call)


class TestModule:
    @balancing
    def test_is_the_function_with_its_options(self, balance):
        z1, z2 = random_sides()
        loss_fn = SigLIP(0.5, -1.0, balance_positives=balance, reduction="sum")
        expected = siglip(
            z1,
            z2,
            labels=LABELS,
            z2_labels=Z2_LABELS,
            temperature=0.5,
            logit_bias=-1.0,
            balance_positives=balance,
            reduction="sum",
        )
        actual = loss_fn(z1, z2, labels=LABELS, z2_labels=Z2_LABELS)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)

    def test_a_module_that_balances_needs_labels(self):
        with pytest.raises(ValueError, match="balance_positives=True needs labels"):
            SigLIP(balance_positives=True)(*random_sides(5, 8, 8))

    def test_repr_tells_the_option(self):
        shown = "SigLIP(temperature=0.1, logit_bias=-10, balance_positives=True)"
        assert repr(SigLIP(balance_positives=True)) == shown
