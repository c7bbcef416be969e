"""SigLIP and its primitive against loops, the reference and float64.

Equations (25) to (27) of docs/nt_xent.md.
"""

import copy
import math
import statistics

import algorithm1
import pytest
import torch
import torch.nn.functional as F
from budgets import VALUE, assert_within, gradient_budget

from contrastive_kit import SigLIP, reference
from contrastive_kit.functional import siglip
from contrastive_kit.ops import BACKENDS, Exclusion, Problem, kept_softplus_sum
from contrastive_kit.ops.registered import registered
from contrastive_kit.ops.tiled import tiles

backends = pytest.mark.parametrize(
    "backend", [name for name, x in BACKENDS.items() if x.softplus_sum is not None]
)
totals = pytest.mark.parametrize(
    "backend", [name for name, x in BACKENDS.items() if x.softplus_total is not None]
)
IDS = torch.tensor([3, 3, -1, 8, 5, 8, 8])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small problems get many tiles, with ragged edges."""
    monkeypatch.setattr(tiles, "CPU_TILE", 16)


def random_pairs(n, d, dtype=torch.float64):
    z1 = torch.randn(n, d, dtype=torch.float64)
    return z1.to(dtype), (z1 + torch.randn(n, d, dtype=torch.float64)).to(dtype)


def wanting(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@backends
@pytest.mark.parametrize("ids", [None, IDS], ids=["", "ids"])
@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.0])
def test_equals_its_loop(bias, ids, backend):
    z1, z2 = random_pairs(7, 5)
    expected = torch.from_numpy(algorithm1.siglip(z1, z2, 0.2, bias, ids))
    call = {"temperature": 0.2, "logit_bias": bias, "ids": ids, "backend": backend}
    each = siglip(z1, z2, reduction="none", **call)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(siglip(z1, z2, reduction="sum", **call), expected.sum())
    torch.testing.assert_close(siglip(z1, z2, **call), expected.mean())
    weights = torch.rand(7, dtype=torch.float64)
    torch.testing.assert_close(
        siglip(z1, z2, sample_weight=weights, **call), reference.weighted_mean(expected, weights)
    )


@backends
@pytest.mark.parametrize("ids", [None, IDS], ids=["", "ids"])
def test_statistics_equal_their_loop(ids, backend):
    inputs = wanting(*random_pairs(7, 5))
    call = {"temperature": 0.2, "ids": ids, "backend": backend, "return_stats": True}
    hits, positives, negatives, entropies = [], [], [], []
    for i, row in enumerate(inputs[0].detach()):
        cosines = [float(F.cosine_similarity(row, other, dim=0)) for other in inputs[1].detach()]
        others = [j for j in range(7) if j != i and (ids is None or ids[i] != ids[j])]
        hits.append(all(cosines[i] > cosines[j] for j in others))
        positives.append(cosines[i])
        negatives += [cosines[j] for j in others]
        p = torch.tensor([cosines[j] / 0.2 for j in [i, *others]], dtype=torch.float64).softmax(0)
        entropies.append(float(-(p * p.log()).sum()))
    for bias in (-10.0, 3.0):
        loss, stats = siglip(*inputs, logit_bias=bias, **call)
        assert loss.requires_grad
        assert not any(figure.requires_grad for figure in stats)
        expected = [statistics.mean(x) for x in (hits, positives, negatives, entropies)]
        torch.testing.assert_close(torch.stack(stats), torch.tensor(expected, dtype=torch.float64))
        assert torch.equal(loss, siglip(*inputs, logit_bias=bias, **call | {"return_stats": False}))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_module_has_statistics_at_its_own_temperature(reduction):
    pairs = random_pairs(7, 5, torch.float32)
    loss_fn = SigLIP(0.2, logit_bias=-3.0, reduction=reduction)
    loss, stats = loss_fn(*pairs, ids=IDS, return_stats=True)
    torch.testing.assert_close(loss, loss_fn(*pairs, ids=IDS))
    expected = siglip(*pairs, temperature=0.2, ids=IDS, return_stats=True)[1]
    torch.testing.assert_close(stats, expected)


def test_one_pair_is_its_own_only_candidate():
    loss, stats = siglip(torch.ones(1, 3), torch.ones(1, 3), return_stats=True)
    torch.testing.assert_close(loss, siglip(torch.ones(1, 3), torch.ones(1, 3)))
    assert stats.accuracy == 1
    assert stats.entropy == 0
    assert stats.negative_similarity.isnan()


@backends
@pytest.mark.parametrize("logit", [18.0, 21.0, 30.0])
def test_float64_where_softplus_is_nearly_linear(logit, backend):
    """Both rows are 1, both keys -1 or 1: the pair, or else the negative, is as wrong as can be."""
    wrong, right = math.log1p(math.exp(-logit)) + logit, math.log1p(math.exp(-logit))
    ones = torch.ones(2, 1, dtype=torch.float64)
    call = {"temperature": 1 / logit, "logit_bias": 0.0, "backend": backend}
    for keys in (ones, -ones):
        torch.testing.assert_close(
            siglip(ones, keys, **call).item(), wrong + right, rtol=1e-15, atol=0
        )


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (3, 1), (63, 60), (65, 128), (252, 100)])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.usefixtures("poisoned_empty")
def test_value_and_every_gradient_at_odd_sizes(temperature, n, d, dtype, backend):
    pair = random_pairs(n, d, dtype)
    scalars = [torch.tensor(math.log(1 / temperature)), torch.tensor(-10.0)]
    exact = wanting(*(x.double() for x in (*pair, *scalars)))
    expected = reference.siglip(exact[0], exact[1], (-exact[2]).exp(), exact[3]).mean()
    expected_grads = torch.autograd.grad(expected, exact)
    inputs = wanting(*pair, *scalars)
    # The temperature is exact: what is tested is not how float32 rounds an exponential.
    logit_scale = inputs[2].double()
    loss = siglip(
        *inputs[:2], temperature=(-logit_scale).exp(), logit_bias=inputs[3], backend=backend
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # A logit of size 1 / temperature brings its rounding into the exponential.
    assert_within(loss, expected, 0.2 / temperature * VALUE[dtype])
    grads = torch.autograd.grad(loss, inputs)
    budget = gradient_budget(dtype, temperature)
    for z, grad, expected_grad in zip(pair, grads[:2], expected_grads[:2], strict=True):
        assert grad.dtype == dtype
        if d > 1:  # with one dimension every cosine is a sign, and there is no gradient
            assert_within(grad, expected_grad, budget)
        else:  # but for the rounding of what a longer row would have
            assert (grad * z).abs().max() < 2e-7 / temperature
    for grad, expected_grad in zip(grads[2:], expected_grads[2:], strict=True):
        assert_within(grad, expected_grad, 2e-5)


def test_gradcheck():
    inputs = wanting(*random_pairs(5, 3), torch.tensor(0.3), torch.tensor(-1.0))
    inputs = wanting(*(x.double() for x in inputs))

    def losses(z1, z2, t, b):
        return siglip(z1, z2, temperature=t, logit_bias=b, reduction="none")

    assert torch.autograd.gradcheck(losses, inputs)


def test_swapping_the_sides_changes_no_sum():
    z1, z2 = random_pairs(70, 5)
    torch.testing.assert_close(siglip(z2, z1), siglip(z1, z2))


def test_one_pair_is_a_binary_cross_entropy():
    z1, z2 = random_pairs(1, 4)
    cosine = torch.nn.functional.cosine_similarity(z1, z2)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        cosine / 0.1 - 10, torch.ones(1, dtype=torch.float64)
    )
    torch.testing.assert_close(siglip(z1, z2), expected)


def test_a_weight_of_zero_takes_a_row_out_but_not_its_column():
    z1, z2 = random_pairs(5, 4)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    each = siglip(z1, z2, logit_bias=-1.0, reduction="none")
    expected = each[[0, 2, 3, 4]].mean()
    torch.testing.assert_close(siglip(z1, z2, logit_bias=-1.0, sample_weight=weights), expected)
    assert siglip(z1, z2, sample_weight=torch.zeros(5)) == 0


@pytest.mark.parametrize("weight", [1e-12, 1e12])
def test_the_weight_of_a_loss_only_scales_its_gradient(weight):
    inputs = wanting(*random_pairs(63, 60, torch.float32))
    expected = torch.autograd.grad(siglip(*inputs), inputs)
    actual = torch.autograd.grad(weight * siglip(*inputs), inputs)
    for got, want in zip(actual, expected, strict=True):
        assert_within(got.double() / weight, want, 1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_embeddings_show_in_the_loss(bad):
    z1, z2 = random_pairs(7, 5)
    z2[3, 1] = bad
    assert siglip(z1, z2).isnan()


def test_zero_rows_have_a_zero_gradient():
    z1, z2 = random_pairs(7, 5)
    z1[3] = 0
    inputs = wanting(z1, z2)
    loss = siglip(*inputs)
    torch.testing.assert_close(loss, reference.siglip(z1, z2, 0.1, -10.0).mean())
    grads = torch.autograd.grad(loss, inputs)
    assert torch.equal(grads[0][3], torch.zeros(5, dtype=torch.float64))
    assert grads[1].isfinite().all()


def test_large_logits_neither_overflow_nor_saturate():
    z1, z2 = torch.eye(4), -torch.eye(4)
    inputs = wanting(z1, z2)
    loss = siglip(*inputs, temperature=0.005, logit_bias=0.0)
    assert loss.item() == pytest.approx(200 + 3 * math.log(2), rel=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, inputs))


def test_double_backward_raises():
    inputs = wanting(*random_pairs(9, 5))
    grad = torch.autograd.grad(siglip(*inputs), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


class TestPrimitive:
    @backends
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 65), (65, 3), (50, 131)])
    @pytest.mark.usefixtures("poisoned_empty")
    def test_equals_the_mask_written_out(self, rows, columns, dtype, backend):
        q, k = torch.randn(rows, 13, dtype=dtype), torch.randn(columns, 13, dtype=dtype)
        row_ids, column_ids = torch.randint(0, 9, (rows,)), torch.randint(0, 9, (columns,))
        grad = torch.randn(rows, dtype=dtype)
        for exclusion in (Exclusion(), Exclusion(7), Exclusion(0, row_ids, column_ids)):
            mask = exclusion.mask(rows, columns, q.device)
            exact = wanting(q.double(), k.double(), torch.tensor(-0.7, dtype=torch.float64))
            logits = exact[0] @ exact[1].T + exact[2]
            expected = torch.logaddexp(logits, torch.zeros_like(logits)).masked_fill(mask, 0).sum(1)
            expected_grads = torch.autograd.grad(expected, exact, grad.double())
            inputs = wanting(q, k, torch.tensor(-0.7, dtype=dtype))
            actual = kept_softplus_sum(*inputs, exclusion=exclusion, backend=backend)
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
            for got, want in zip(
                torch.autograd.grad(actual, inputs, grad), expected_grads, strict=True
            ):
                torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)

    def test_each_input_alone_gets_its_gradient(self):
        tensors = torch.randn(33, 5), torch.randn(50, 5), torch.tensor(-0.5)
        inputs = wanting(*tensors)
        expected = torch.autograd.grad(kept_softplus_sum(*inputs).sum(), inputs)
        for wanted in range(3):
            inputs = [x.clone() for x in tensors]
            inputs[wanted].requires_grad_()
            (grad,) = torch.autograd.grad(kept_softplus_sum(*inputs).sum(), [inputs[wanted]])
            torch.testing.assert_close(grad, expected[wanted])

    @pytest.mark.parametrize("layout", ["contiguous", "transposed"])
    def test_opcheck(self, layout):
        def rows(n):
            x = torch.randn(n, 6)
            return x if layout == "contiguous" else x.T.contiguous().T

        ids = torch.arange(40) // 2
        problem = Problem(rows(40), rows(23), Exclusion(0, ids, ids[:23]))
        shared = (torch.tensor(-1.0), *problem.flat())
        torch.library.opcheck(registered("tiled_softplus_sum"), shared)
        backward = registered("tiled_softplus_sum_backward")
        for needs in ((True, False), (False, True), (True, True)):
            torch.library.opcheck(backward, (torch.randn(40), *shared, *needs))

    def test_opcheck_with_classes_and_a_bias_for_each_row(self):
        labels = torch.arange(40) // 3
        exclusion = Exclusion(0, torch.arange(40), torch.arange(23), labels, labels[:23])
        problem = Problem(torch.randn(40, 6), torch.randn(23, 6), exclusion)
        shared = (torch.randn(40), *problem.flat())
        torch.library.opcheck(registered("tiled_softplus_sum"), shared)
        backward = registered("tiled_softplus_sum_backward")
        torch.library.opcheck(backward, (torch.randn(40), *shared, True, True))

    def test_fake_tensors_on_cuda_have_the_right_shapes_without_a_gpu(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            q, k = torch.empty(6, 3, device="cuda"), torch.empty(9, 3, device="cuda")
            sums = kept_softplus_sum(q, k, -1.0)
        assert sums.shape == (6,)
        assert sums.device.type == "cuda"

    def test_runs_are_identical_bit_for_bit(self):
        q, k = torch.randn(300, 17), torch.randn(200, 17)
        runs = []
        for _ in range(3):
            inputs = wanting(q, k)
            sums = kept_softplus_sum(*inputs, -1.0)
            runs.append((sums, *torch.autograd.grad(sums.sum(), inputs)))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def problems():
    """Of several tiles, with and without ids, rectangular, and empty."""
    ids = torch.arange(1500) // 2
    yield Problem(torch.randn(60, 5), torch.randn(60, 5), Exclusion(60))
    yield Problem(torch.randn(701, 9), torch.randn(1500, 9), Exclusion(0, ids[:701], ids))
    yield Problem(torch.randn(1400, 3), torch.randn(7, 3))
    yield Problem(torch.randn(5, 3), torch.randn(0, 3))


class TestTheTotal:
    """The sum of all sums of softplus, whose gradients come with it."""

    @pytest.mark.parametrize("number", range(4))
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @totals
    def test_equals_the_sums(self, backend, dtype, weighted, number):
        problem = list(problems())[number]
        exact = [problem.q.double(), problem.k.double(), torch.tensor(-2.0).double()]
        exact = [x.requires_grad_() for x in exact]
        weights = torch.rand(len(problem.q), dtype=torch.float64) if weighted else None
        excluded = problem.mask()
        sums = reference.kept_softplus_sum(*exact, excluded)
        expected = (sums if weights is None else sums * weights).sum()
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
        asked = problem._replace(q=inputs[0], k=inputs[1])
        total = BACKENDS[backend].softplus_total(asked, inputs[2], weights)
        budget = 1e-13 if dtype == torch.float64 else 2e-6
        if number == 3:
            assert total == 0
            assert not any(x.any() for x in torch.autograd.grad(3 * total, inputs))
            return
        assert_within(total, expected, budget)
        grads = torch.autograd.grad(3 * total, inputs)
        for ours, theirs in zip(grads, torch.autograd.grad(3 * expected, exact), strict=True):
            assert_within(ours, theirs, budget)

    def test_three_products_make_value_and_gradients(self, monkeypatch):
        """6 · N² · D operations, where the sums of each row take 8."""
        n, d = 1500, 64
        inputs = [torch.randn(n, d, requires_grad=True) for _ in range(2)]
        operations, addmm_ = [], torch.Tensor.addmm_

        def counted(total, a, b, **options):
            operations.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return addmm_(total, a, b, **options)

        monkeypatch.setattr(torch.Tensor, "addmm_", counted)
        for reduction, factor in (("mean", 6), ("sum", 6), ("none", 8)):
            operations.clear()
            loss = siglip(*inputs, reduction=reduction)
            torch.autograd.grad(loss.sum(), inputs)
            assert sum(operations) == factor * n * n * d, reduction
        operations.clear()
        with torch.no_grad():
            siglip(*inputs)
        assert sum(operations) == 2 * n * n * d

    def test_only_what_is_wanted_is_computed(self):
        q, k = torch.randn(40, 6), torch.randn(50, 6)
        bias = torch.tensor(-1.0)
        for wanted in range(3):
            inputs = [q, k, bias]
            inputs[wanted] = inputs[wanted].clone().requires_grad_()
            total = BACKENDS["tiled"].softplus_total(Problem(*inputs[:2]), inputs[2], None)
            expected = kept_softplus_sum(*inputs).sum()
            (ours,) = torch.autograd.grad(total, inputs[wanted])
            torch.testing.assert_close(ours, torch.autograd.grad(expected, inputs[wanted])[0])

    @pytest.mark.parametrize("weighted", [False, True])
    def test_opcheck(self, weighted):
        q, k, bias = torch.randn(40, 6), torch.randn(23, 6), torch.tensor(-2.0)
        weights = torch.rand(40) if weighted else None
        problem = Problem(q, k, Exclusion(30))
        op = registered("tiled_softplus_total")
        for needs in ((False, False, False), (True, True, False), (True, True, True)):
            torch.library.opcheck(op, (bias, weights, *problem.flat(), *needs))

    def test_a_weight_that_learns_has_its_gradient(self):
        z1, z2 = torch.randn(2, 5, 3, dtype=torch.float64).unbind(0)
        weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
        losses = siglip(z1, z2, reduction="none")
        (grad,) = torch.autograd.grad(siglip(z1, z2, sample_weight=weight, reduction="sum"), weight)
        torch.testing.assert_close(grad, losses)

    def test_second_derivatives_are_refused(self):
        z1, z2 = torch.randn(2, 5, 3, requires_grad=True).unbind(0)
        bias = torch.tensor(-1.0, requires_grad=True)
        (grad,) = torch.autograd.grad(siglip(z1, z2, logit_bias=bias), bias, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.grad(grad, bias)

    def test_runs_are_identical_bit_for_bit(self):
        z1, z2 = torch.randn(2, 800, 16, requires_grad=True).unbind(0)

        def step():
            loss = siglip(z1, z2)
            return [loss, *torch.autograd.grad(loss, (z1, z2))]

        assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


class TestModule:
    def test_starts_as_the_paper_does(self):
        loss_fn = SigLIP()
        assert loss_fn.logit_scale.item() == pytest.approx(math.log(10))
        assert loss_fn.logit_bias.item() == -10
        z1, z2 = random_pairs(9, 5)
        torch.testing.assert_close(loss_fn(z1, z2), siglip(z1, z2), rtol=1e-6, atol=0)

    def test_passes_its_options_on(self):
        z1, z2 = random_pairs(7, 5)
        weights = torch.rand(7)
        loss_fn = SigLIP(0.5, -1.0, reduction="sum", backend="reference")
        expected = siglip(
            z1,
            z2,
            temperature=0.5,
            logit_bias=-1.0,
            ids=IDS,
            sample_weight=weights,
            reduction="sum",
        )
        torch.testing.assert_close(
            loss_fn(z1, z2, ids=IDS, sample_weight=weights), expected, rtol=1e-6, atol=0
        )

    def test_scale_and_bias_learn_and_are_saved(self):
        z1, z2 = random_pairs(16, 8, torch.float32)
        loss_fn = SigLIP()
        optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.05)
        losses = []
        for _ in range(20):
            loss = loss_fn(z1, z2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert loss_fn.logit_bias.item() != -10
        restored = SigLIP()
        restored.load_state_dict(loss_fn.state_dict())
        assert torch.equal(restored(z1, z2), loss_fn(z1, z2))
        assert repr(copy.deepcopy(loss_fn)) == repr(loss_fn)

    def test_repr_tells_the_present_values(self):
        shown = "SigLIP(temperature=0.1, logit_bias=-10, reduction='sum')"
        assert repr(SigLIP(reduction="sum")) == shown

    def test_half_precision_modules_keep_their_scalars_in_float32(self):
        loss_fn = SigLIP().half()
        assert loss_fn.temperature.dtype == torch.float32
        assert loss_fn(*random_pairs(5, 3, torch.float16)).dtype == torch.float32
