"""The primitive, every backend, against a float64 logsumexp with the mask written out.

Equations (2), (5) and (8) of docs/nt_xent.md.
"""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from budgets import VALUE, assert_within, gradient_budget
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_kit.functional import siglip, sup_con
from contrastive_kit.ops import (
    BACKENDS,
    Backend,
    Exclusion,
    LogitStatistics,
    Problem,
    backends,
    kept_logsumexp,
    kept_softplus_sum,
    which_backend,
)
from contrastive_kit.ops.registered import registered
from contrastive_kit.ops.tiled import tiles

every_backend = pytest.mark.parametrize("backend", list(BACKENDS))
# What computes in the dtype of its rows; tests/ops/test_triton.py has the other.
exact_backends = pytest.mark.parametrize("backend", [x for x in BACKENDS if x != "triton"])
SMALL_LOGITS, LARGE_LOGITS = 1.0, 12.0  # largest products about 30 and 4000: both tiled paths


@pytest.fixture(autouse=True)
def refused(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if (parameters.get("backend"), parameters.get("dtype")) == ("triton", torch.float64):
        pytest.skip("backend 'triton' refuses float64")


def widest(backend):
    return torch.float32 if backend == "triton" else torch.float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """Tiles far below the defaults, so that small problems have many, with ragged edges."""
    if "full_tiles" not in request.keywords:
        monkeypatch.setattr(tiles, "CPU_TILE", 16)
        # Three tiles in float32 and one in float64: some are saved, and some computed again.
        monkeypatch.setattr(tiles, "CPU_SAVED_BYTES", 3 * 16 * 32 * 4)


def oracle(q, k, mask, both, grad):
    """Logsumexp and gradients in float64 from the definition."""
    q = q.detach().double().requires_grad_()
    k = q if k is None else k.detach().double().requires_grad_()
    logits = (q @ k.T).masked_fill(mask, -torch.inf)
    lse = logits.logsumexp(1)
    if both:
        lse = torch.cat([lse, logits.logsumexp(0)])
    inputs = [q] if k is q else [q, k]
    return lse, torch.autograd.grad((lse * grad.double()).sum(), inputs)


def statistics_oracle(q, k, mask, dim):
    logits = q.double() @ (q if k is None else k).double().T
    kept = ~mask
    softmax = logits.masked_fill(mask, -torch.inf).softmax(dim)
    return LogitStatistics(
        logsumexp=logits.masked_fill(mask, -torch.inf).logsumexp(dim),
        maximum=logits.masked_fill(mask, -torch.inf).amax(dim),
        expected=(softmax * logits).sum(dim),
        total=(kept * logits).sum(dim),
        kept=kept.sum(dim).double(),
    )


def events(run):
    """How often each operation of torch is run, as its profiler sees it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return Counter(event.name for event in profile.events())


def with_kept_bytes(run):
    """The result of ``run``, and the bytes that autograd keeps for its backward."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (sizes.append(x.numel() * x.element_size()), x)[1], lambda x: x
    ):
        return run(), sum(sizes)


def run(q, k, exclusion, both, grad, backend):
    inputs = [q.clone().requires_grad_()] + ([] if k is None else [k.clone().requires_grad_()])
    lse, _ = kept_logsumexp(
        inputs[0],
        inputs[1] if len(inputs) > 1 else None,
        exclusion=exclusion,
        both=both,
        backend=backend,
    )
    return lse, torch.autograd.grad(lse, inputs, grad)


def check(q, k, exclusion, both, backend, dtype, logit_size):
    n_columns = len(q) if k is None else len(k)
    mask = exclusion.mask(len(q), n_columns, q.device)
    length = len(q) + (n_columns if both else 0)
    grad = torch.randn(length, dtype=torch.float64).to(q.dtype)
    expected_lse, expected_grads = oracle(q, k, mask, both, grad)
    lse, grads = run(q, k, exclusion, both, grad, backend)
    assert_within(lse, expected_lse, VALUE[dtype])
    budget = gradient_budget(dtype, 1.0 if logit_size == SMALL_LOGITS else 1e-3)
    for actual, expected in zip(grads, expected_grads, strict=True):
        assert actual.dtype == q.dtype
        assert_within(actual, expected, budget)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit_size", [SMALL_LOGITS, LARGE_LOGITS])
@pytest.mark.parametrize("n", [2, 3, 63, 65, 126])
@pytest.mark.parametrize("d", [1, 7, 60])
@pytest.mark.usefixtures("poisoned_empty")
def test_self_similarity(n, d, logit_size, dtype, backend):
    q = torch.randn(2 * n, d, dtype=dtype) * logit_size / d**0.25
    check(q, None, Exclusion(n), False, backend, dtype, logit_size)


@every_backend
@pytest.mark.parametrize("logit_size", [SMALL_LOGITS, LARGE_LOGITS])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 65), (65, 3), (63, 63), (50, 131)])
@pytest.mark.usefixtures("poisoned_empty")
def test_two_matrices(rows, columns, both, logit_size, backend):
    q = torch.randn(rows, 13) * logit_size / 2
    k = torch.randn(columns, 13) * logit_size / 2
    for exclusion in (Exclusion(), Exclusion(max(rows, columns))):
        check(q, k, exclusion, both, backend, torch.float32, logit_size)


@every_backend
@pytest.mark.parametrize("logit_size", [SMALL_LOGITS, LARGE_LOGITS])
def test_equal_ids_are_excluded(logit_size, backend):
    ids = torch.randint(0, 9, (61,))
    dtype = widest(backend)
    q = torch.randn(61, 8, dtype=dtype) * logit_size
    check(q, None, Exclusion(61, ids), False, backend, dtype, logit_size)
    k, key_ids = torch.randn(30, 8, dtype=dtype), torch.randint(0, 9, (30,))
    check(q, k, Exclusion(0, ids, key_ids), True, backend, dtype, logit_size)


@exact_backends
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("logit_size", [SMALL_LOGITS, LARGE_LOGITS])
def test_the_logsumexp_over_a_class_equals_that_of_its_mask(logit_size, symmetric, backend):
    """Of its own class, and not of the same id."""
    n = 61
    q = torch.randn(n, 5, dtype=torch.float64) * logit_size
    k = q if symmetric else torch.randn(n, 5, dtype=torch.float64)
    row_class = torch.randint(0, 9, (n,))
    column_class = row_class if symmetric else torch.randint(0, 9, (n,))
    row_id = torch.randperm(n)
    column_id = row_id if symmetric else torch.randperm(n)
    kept = row_class[:, None] == column_class[None, :]
    kept &= row_id[:, None] != column_id[None, :]
    inputs = [x.clone().requires_grad_() for x in ([q] if symmetric else [q, k])]
    logits = inputs[0] @ inputs[-1].T
    expected = logits.masked_fill(~kept, -torch.inf).logsumexp(1)
    some = kept.any(1)
    expected_grads = torch.autograd.grad(expected[some].sum(), inputs)
    columns = (None, None) if symmetric else (column_id, column_class)
    rule = Exclusion(0, row_id, columns[0], row_class, columns[1])
    actual, _ = kept_logsumexp(*inputs, exclusion=rule, backend=backend)
    assert (actual[~some] == -torch.inf).all()
    torch.testing.assert_close(actual[some], expected[some])
    torch.testing.assert_close(
        torch.autograd.grad(actual[some].sum(), inputs), expected_grads, rtol=1e-9, atol=1e-12
    )


@pytest.mark.full_tiles
@pytest.mark.parametrize("logit_size", [SMALL_LOGITS, LARGE_LOGITS])
def test_more_than_one_tile_of_the_default_size(logit_size):
    q = torch.randn(2 * 1251, 8, dtype=torch.float64) * logit_size / 2
    check(q, None, Exclusion(1251), False, "tiled", torch.float64, logit_size)


@every_backend
@pytest.mark.parametrize("logit_size", [SMALL_LOGITS, LARGE_LOGITS])
@pytest.mark.parametrize("two_matrices", [False, True])
def test_statistics(two_matrices, logit_size, backend):
    q = torch.randn(70, 9, dtype=widest(backend)) * logit_size
    k = torch.randn(53, 9, dtype=widest(backend)) if two_matrices else None
    ids = torch.arange(70) // 2
    exclusion = Exclusion(0, ids, ids[:53] if two_matrices else None)
    mask = exclusion.mask(70, 53 if two_matrices else 70, q.device)
    lse, actual = kept_logsumexp(
        q, k, exclusion=exclusion, both=two_matrices, statistics=True, backend=backend
    )
    plain, none = kept_logsumexp(q, k, exclusion=exclusion, both=two_matrices, backend=backend)
    assert none is None
    torch.testing.assert_close(lse, plain)
    parts = [statistics_oracle(q, k, mask, 1)]
    if two_matrices:
        parts.append(statistics_oracle(q, k, mask, 0))
    for name, figures in zip(LogitStatistics._fields, zip(*parts, strict=True), strict=True):
        figure, wanted = getattr(actual, name), torch.cat(figures)
        if q.dtype == torch.float64:
            torch.testing.assert_close(figure, wanted)
        else:  # sums of logits of thousands
            assert_within(figure, wanted, VALUE[q.dtype])


@every_backend
@pytest.mark.parametrize("logit_size", [SMALL_LOGITS, LARGE_LOGITS])
def test_a_row_that_keeps_nothing(logit_size, backend):
    """Ids leave row 0 without a column: logsumexp -inf, no gradient, and no trace in others."""
    q = (torch.randn(20, 6) * logit_size).requires_grad_()
    k = torch.randn(5, 6, requires_grad=True)
    row_ids = torch.tensor([7, *range(10, 29)])
    exclusion = Exclusion(0, row_ids, torch.full((5,), 7))
    lse, stats = kept_logsumexp(q, k, exclusion=exclusion, statistics=True, backend=backend)
    assert lse[0] == -torch.inf
    assert stats.kept[0] == stats.expected[0] == stats.total[0] == 0
    assert stats.maximum[0] == -torch.inf
    dq, dk = torch.autograd.grad(lse.masked_fill(lse == -torch.inf, 0).sum(), [q, k])
    assert torch.equal(dq[0], torch.zeros(6))
    rest = Exclusion(0, row_ids[1:], torch.full((5,), 7))
    expected, grads = oracle(q[1:], k, rest.mask(19, 5, q.device), False, torch.ones(19))
    assert_within(lse[1:], expected, 1e-6)
    assert_within(dq[1:], grads[0], gradient_budget(torch.float32, 1e-2))
    assert_within(dk, grads[1], gradient_budget(torch.float32, 1e-2))


@every_backend
def test_a_single_row(backend):
    q = torch.randn(1, 4, requires_grad=True)
    lse, _ = kept_logsumexp(q, exclusion=Exclusion(1), backend=backend)
    assert lse.tolist() == [-torch.inf]
    assert torch.autograd.grad(lse, q, torch.zeros(1))[0].tolist() == [[0.0] * 4]
    lse, _ = kept_logsumexp(q, q.detach(), backend=backend)
    torch.testing.assert_close(lse, q.square().sum(1))


@every_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_reaches_the_result(bad, backend):
    q = torch.randn(40, 4)
    q[17, 2] = bad
    lse, _ = kept_logsumexp(q, exclusion=Exclusion(20), backend=backend)
    assert not lse[17].isfinite()
    assert not lse.isfinite().all()


@exact_backends
def test_a_row_of_nan_leaves_the_range_of_other_rows_alone(backend):
    """Lengths tell whether exp may overflow, and NaN tells nothing: logits here exceed 88."""
    q, k = torch.randn(35, 6) * 20, torch.randn(19, 6) * 20
    expected = (q.double() @ k.double().T).logsumexp(1)
    assert expected.max() > 500
    q[17, 2] = torch.nan
    lse, _ = kept_logsumexp(q, k, backend=backend)
    others = torch.arange(35) != 17
    assert lse[17].isnan()
    assert_within(lse[others], expected[others], VALUE[torch.float32])


@every_backend
def test_each_input_alone_gets_its_gradient(backend):
    q, k = torch.randn(33, 5), torch.randn(50, 5)
    weights = torch.randn(83)
    both = run(q, k, Exclusion(), True, weights, backend)[1]
    for wanted in (0, 1):
        inputs = [q.clone(), k.clone()]
        inputs[wanted].requires_grad_()
        lse, _ = kept_logsumexp(*inputs, both=True, backend=backend)
        (grad,) = torch.autograd.grad(lse, [inputs[wanted]], weights)
        torch.testing.assert_close(grad, both[wanted])


@exact_backends
def test_gradcheck(backend):
    q, k = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (7, 20))

    def symmetric(q):
        return kept_logsumexp(
            q.repeat(6, 1) * torch.arange(42.0)[:, None] / 9,
            exclusion=Exclusion(7),
            backend=backend,
        )[0]

    def directed(q, k):
        return kept_logsumexp(q, k, exclusion=Exclusion(20), both=True, backend=backend)[0]

    assert torch.autograd.gradcheck(symmetric, (q,))
    assert torch.autograd.gradcheck(directed, (q, k))


def test_backward_runs_twice_and_a_second_derivative_raises():
    q = torch.randn(20, 3, requires_grad=True)
    lse, _ = kept_logsumexp(q, exclusion=Exclusion(10), backend="tiled")
    grad = torch.linspace(-1, 2, 20)
    first = torch.autograd.grad(lse, q, grad, retain_graph=True)[0]
    second = torch.autograd.grad(lse, q, grad, retain_graph=True)[0]
    assert torch.equal(first, second)
    (differentiable,) = torch.autograd.grad(lse, q, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        differentiable.sum().backward()


@every_backend
def test_inputs_are_not_written_to_and_any_stride_will_do(backend):
    base = torch.randn(9, 2 * 30)
    q = base.T[::2]
    assert not q.is_contiguous()
    before = base.clone()
    expected = run(q.contiguous(), None, Exclusion(15), False, torch.ones(30), backend)
    actual = run(q, None, Exclusion(15), False, torch.ones(30), backend)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(base, before)


def test_runs_are_identical_bit_for_bit():
    q = torch.randn(300, 17)
    runs = [run(q, None, Exclusion(150), False, torch.ones(300), "tiled") for _ in range(3)]
    for lse, (grad,) in runs[1:]:
        assert torch.equal(lse, runs[0][0])
        assert torch.equal(grad, runs[0][1][0])


@pytest.mark.parametrize("tile", [8, 9, 16])
@pytest.mark.parametrize("two_matrices", [False, True])
@pytest.mark.parametrize("logit_size", [SMALL_LOGITS, LARGE_LOGITS])
def test_any_size_of_tile(logit_size, two_matrices, tile, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    q = (torch.randn(70, 6, dtype=torch.float64) * logit_size**0.5).requires_grad_()
    k = torch.randn(45, 6, dtype=torch.float64).requires_grad_() if two_matrices else None
    inputs = [q] if k is None else [q, k]
    lse, _ = kept_logsumexp(q, k, exclusion=Exclusion(35), both=two_matrices, backend="tiled")
    grad = torch.randn_like(lse)
    mask = Exclusion(35).mask(70, 45 if two_matrices else 70, q.device)
    expected, expected_grads = oracle(q, k, mask, two_matrices, grad)
    torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)
    for actual, exact in zip(torch.autograd.grad(lse, inputs, grad), expected_grads, strict=True):
        assert_within(actual, exact, gradient_budget(torch.float64, 1e-3))


@pytest.mark.parametrize("two_matrices", [False, True])
@pytest.mark.parametrize("logit_size", [SMALL_LOGITS, LARGE_LOGITS])
def test_saved_tiles_change_nothing(logit_size, two_matrices, monkeypatch):
    """Bit for bit the same with all, some or none of the tiles saved, and in a second backward."""
    q = (torch.randn(70, 6) * logit_size**0.5).requires_grad_()
    k = torch.randn(45, 6).requires_grad_() if two_matrices else None
    inputs = [q] if k is None else [q, k]
    tile_bytes = 16 * (16 + tiles.PADDING) * 4
    results, kept = [], []
    for n_saved in (0, 1, 4, 100):
        monkeypatch.setattr(tiles, "CPU_SAVED_BYTES", n_saved * tile_bytes)
        lse, n_bytes = with_kept_bytes(
            lambda: kept_logsumexp(
                q, k, exclusion=Exclusion(35), both=two_matrices, backend="tiled"
            )[0]
        )
        kept.append(n_bytes)
        assert kept[-1] - kept[0] == min(n_saved, 15) * tile_bytes
        grad = torch.linspace(-1, 2, len(lse))
        for _ in range(2):
            results.append([lse, *torch.autograd.grad(lse, inputs, grad, retain_graph=True)])
    for actual, expected in zip(results[1:], [results[0]] * 7, strict=True):
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", ["one matrix", "rows", "columns"])
def test_saved_tiles_are_not_computed_again(wanted):
    q = torch.randn(70, 6, requires_grad=wanted != "columns")
    k = None if wanted == "one matrix" else torch.randn(45, 6, requires_grad=wanted == "columns")

    def forward():
        return kept_logsumexp(q, k, exclusion=Exclusion(35), backend="tiled")[0].sum()

    loss = forward()
    assert 1 <= events(forward)["aten::exp2_"] <= 15  # tiles of 16
    assert 1 <= events(loss.backward)["aten::exp2_"] <= 12  # small_tiles saves three of the 15


def test_no_tiles_are_saved_where_no_gradient_is_wanted():
    """Nor room for any is made: what ops return, beside what has the length of the result."""

    class Returned(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            if "logsumexp" in func.name():
                sizes.append(max(x.numel() for x in results))
            return results

    sizes = []
    q = torch.randn(70, 6, requires_grad=True)
    with Returned():
        kept_logsumexp(q.detach(), backend="tiled")
        with torch.no_grad():
            kept_logsumexp(q, backend="tiled")
        kept_logsumexp(q, backend="tiled")
    assert sizes[:2] == [70, 70]
    assert sizes[2] > 70


@pytest.mark.full_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [None, 5003])
def test_saved_tiles_fit_into_their_bytes(columns, dtype):
    """The 32 MiB that the documentation promises stay from the forward to the backward."""
    with FakeTensorMode():
        q = torch.empty(9001, 1, dtype=dtype, requires_grad=True)
        k = None if columns is None else torch.empty(columns, 1, dtype=dtype)
        _, n_bytes = with_kept_bytes(lambda: kept_logsumexp(q, k, backend="tiled")[0])
    inputs_and_results = (3 * 9001 + (columns or 0)) * q.element_size()
    assert 2**24 < n_bytes - inputs_and_results <= 2**25


@pytest.mark.parametrize("bound", [10.0, torch.inf])
def test_no_columns(bound):
    q = torch.randn(3, 4, requires_grad=True)
    lse, _ = kept_logsumexp(q, torch.empty(0, 4), bound=bound)
    assert torch.equal(lse, torch.full((3,), -torch.inf))
    assert not torch.autograd.grad(lse, q, torch.ones(3))[0].any()


@pytest.mark.parametrize("bound", [30.0, 60.0, 1e9, torch.inf])  # base 2, base e, measured
def test_a_known_bound_changes_the_path_not_the_result(bound):
    q = F.normalize(torch.randn(40, 5), dim=1) * 30**0.5
    q.requires_grad_()
    lse, _ = kept_logsumexp(q, exclusion=Exclusion(20), bound=bound)
    (grad,) = torch.autograd.grad(lse.sum(), q)
    exact_q = q.detach().double().requires_grad_()
    exact, _ = kept_logsumexp(exact_q, exclusion=Exclusion(20), backend="reference")
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_q)
    torch.testing.assert_close(lse.double(), exact, rtol=2e-7, atol=0)
    assert (grad - exact_grad).norm() <= 2e-6 * exact_grad.norm()


@exact_backends
@pytest.mark.parametrize(
    ("dtype", "logit"),
    [(torch.float32, x) for x in (31.0, 33.0, 68.0, 70.0, 84.0, 88.5, 95.0, 110.0)]
    + [(torch.float64, x) for x in (68.0, 590.0, 605.0, 705.0, 715.0, 760.0)],
)
def test_equal_logits_of_any_size(logit, dtype, backend):
    """Where exp, or a sum of exps over a tile, would leave the range: logit + log 699."""
    q = torch.tensor([1.0, 2.0, 2.0], dtype=dtype).div(3).repeat(700, 1) * logit**0.5
    for k, value in ((None, logit), (-q, -logit)):
        inputs = [q.clone().requires_grad_()]
        lse, _ = kept_logsumexp(inputs[0], k, exclusion=Exclusion(700), backend=backend)
        expected = torch.full((700,), value + math.log(699), dtype=torch.float64)
        assert_within(lse, expected, VALUE[dtype])
        (grad,) = torch.autograd.grad(lse.sum(), inputs)
        budget = gradient_budget(dtype, 1 / logit)
        assert_within(grad, (2 if k is None else 1) * (q if k is None else k).double(), budget)


@exact_backends
@pytest.mark.parametrize("lengths", [(0.05, 30.0), (30.0, 0.05), (0.5, 300.0)])
def test_matrices_of_different_lengths(lengths, backend):
    """Neither alone tells how large a logit is."""
    q, k = (
        F.normalize(torch.randn(n, 5), dim=1) * x for n, x in ((35, lengths[0]), (50, lengths[1]))
    )
    check(q, k, Exclusion(50), True, backend, torch.float32, LARGE_LOGITS)


@pytest.mark.parametrize(
    ("length", "bound", "shifted"),
    [(7.0, torch.inf, False), (7.0, 1e9, False), (9.0, torch.inf, True), (9.0, 60.0, False)],
)
def test_short_rows_spare_the_running_maximum(length, bound, shifted):
    """Squares of 49 and 81 around the bound of 69; no logit of the latter is above 60."""
    q = (torch.eye(35) * length).requires_grad_()

    def forward():
        return kept_logsumexp(q, exclusion=Exclusion(35), bound=bound, backend="tiled")[0]

    lse = forward()
    assert (events(forward)["aten::logaddexp"] > 0) == shifted
    assert (events(lse.sum().backward)["aten::addcmul_"] > 0) == shifted
    torch.testing.assert_close(lse, torch.full((35,), 34.0).log())


@pytest.mark.parametrize("logit_size", [SMALL_LOGITS, LARGE_LOGITS])
@pytest.mark.parametrize("two_matrices", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck(statistics, layout, two_matrices, logit_size, monkeypatch):
    # The edges of saved tiles are never written, nor read: to compare them they need a value.
    empty_tiles = tiles.empty_tiles
    monkeypatch.setattr(tiles, "empty_tiles", lambda *args: empty_tiles(*args).zero_())

    def rows(n):
        x = torch.randn(n, 6) * logit_size
        return x if layout == "contiguous" else x.T.contiguous().T

    q, k = rows(40), rows(23) if two_matrices else None
    ids = torch.arange(40) // 2
    exclusion = Exclusion(0, ids, ids[:23] if two_matrices else None)
    check_op("tiled", Problem(q, k, exclusion, two_matrices, statistics=statistics), 3)


@pytest.mark.parametrize("two_matrices", [False, True])
def test_opcheck_of_limits(two_matrices, monkeypatch):
    empty_tiles = tiles.empty_tiles
    monkeypatch.setattr(tiles, "empty_tiles", lambda *args: empty_tiles(*args).zero_())
    q, k = torch.randn(40, 6), torch.randn(23, 6) if two_matrices else None
    limits = torch.randn(63 if two_matrices else 40)
    problem = Problem(q, k, both=two_matrices, limits=limits)
    check_op("tiled", problem, 3)


@pytest.mark.parametrize("symmetric", [False, True])
def test_opcheck_of_classes(symmetric, monkeypatch):
    empty_tiles = tiles.empty_tiles
    monkeypatch.setattr(tiles, "empty_tiles", lambda *args: empty_tiles(*args).zero_())
    ids, classes = torch.arange(40), torch.arange(40) % 7
    columns = (None, None) if symmetric else (ids[:23], classes[:23])
    exclusion = Exclusion(0, ids, columns[0], classes, columns[1])
    q, k = torch.randn(40, 6), None if symmetric else torch.randn(23, 6)
    check_op("tiled", Problem(q, k, exclusion), 3)


def check_op(backend, problem, n_saved):
    """The two ops of a backend do what their schemas and fakes say."""
    forward = registered(f"{backend}_logsumexp")
    backward = registered(f"{backend}_logsumexp_backward")
    save_tiles = not problem.statistics
    arguments = (*problem.flat(), save_tiles)
    torch.library.opcheck(forward, arguments)
    lse, lse_lo, _, saved_tiles = forward(*arguments)
    assert len(saved_tiles) == (n_saved if save_tiles else 0)
    saved = (torch.randn_like(lse), lse, lse_lo, saved_tiles)
    for needs in ((True, False), (True, True)):
        torch.library.opcheck(backward, (*saved, *problem.flat(), *needs))


@exact_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_computed_in_float32(dtype, backend):
    q = torch.randn(30, 8).to(dtype)
    lse, (grad,) = run(q, None, Exclusion(15), False, torch.ones(30), backend)
    assert lse.dtype == torch.float32
    assert grad.dtype == dtype
    mask = Exclusion(15).mask(30, 30, q.device)
    expected, (expected_grad,) = oracle(q, None, mask, False, torch.ones(30))
    assert_within(lse, expected, 1e-6)
    assert_within(grad, expected_grad, gradient_budget(dtype, 1.0))


@every_backend
def test_autocast_does_not_reach_the_logits(backend):
    q = torch.randn(60, 33, requires_grad=True)
    outside = kept_logsumexp(q, exclusion=Exclusion(30), backend=backend)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = kept_logsumexp(q, exclusion=Exclusion(30), backend=backend)[0]
        if backend != "reference":  # whose backward is autograd's own, and follows autocast
            (grad,) = torch.autograd.grad(inside.sum(), q)
            assert torch.equal(grad, torch.autograd.grad(outside.sum(), q)[0])
    assert torch.equal(inside, outside)


def test_fake_tensors_on_cuda_have_the_right_shapes_without_a_gpu():
    with FakeTensorMode():
        q, k = torch.empty(6, 3, device="cuda"), torch.empty(9, 3, device="cuda")
        lse, stats = kept_logsumexp(q, k, both=True, statistics=True)
    assert lse.shape == (15,)
    assert lse.device.type == "cuda"
    assert stats.maximum.shape == (15,)


class TestDispatch:
    def refusing(self, monkeypatch):
        only_double = Backend(
            lambda problem: (
                None if problem.q.dtype == torch.float64 else "it only computes float64"
            ),
            BACKENDS["reference"].logsumexp,
        )
        others = {name: BACKENDS[name] for name in ("tiled", "reference")}
        monkeypatch.setattr(backends, "BACKENDS", {"picky": only_double, **others})

    def test_auto_takes_the_first_that_does_not_refuse_and_says_why(self, monkeypatch):
        self.refusing(monkeypatch)
        assert which_backend(torch.ones(2, 2, dtype=torch.float64)) == ("picky", {})
        choice = which_backend(torch.ones(2, 2))
        assert choice == ("tiled", {"picky": "it only computes float64"})

    def test_a_named_backend_that_refuses_raises_with_its_reason(self, monkeypatch):
        self.refusing(monkeypatch)
        with pytest.raises(ValueError, match="'picky' cannot run here: it only computes float64"):
            kept_logsumexp(torch.ones(2, 2), backend="picky")

    def test_an_unknown_backend_is_named_with_the_known_ones(self):
        with pytest.raises(ValueError, match="'auto', 'triton', 'tiled', 'reference', got 'cuda'"):
            which_backend(torch.ones(2, 2), backend="cuda")

    def test_nothing_falls_back_after_a_failure(self, monkeypatch):
        def broken(*args):
            raise RuntimeError("launch failed")

        failing = Backend(lambda problem: None, broken)
        monkeypatch.setattr(backends, "BACKENDS", {"failing": failing, **BACKENDS})
        with pytest.raises(RuntimeError, match="launch failed"):
            kept_logsumexp(torch.ones(2, 2))

    def test_a_backend_without_a_primitive_refuses_it_by_name(self, monkeypatch):
        self.refusing(monkeypatch)
        q, labels = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) // 2
        rule = Exclusion(6, row_classes=labels)
        for run, missing in (
            (lambda name: kept_softplus_sum(q, q, backend=name), "softplus_sum"),
            (lambda name: siglip(q, q, backend=name), "softplus_sum"),
            (lambda name: kept_logsumexp(q, exclusion=rule, backend=name), "same_class_logsumexp"),
            (
                lambda name: sup_con(q, labels=labels, variant="in", backend=name),
                "same_class_logsumexp",
            ),
            (
                lambda name: sup_con(q, labels=labels, variant="pairwise", backend=name),
                "same_class_softplus_sum",
            ),
        ):
            with pytest.raises(ValueError, match=f"'picky' cannot run here: it has no {missing}"):
                run("picky")
            run("auto")
