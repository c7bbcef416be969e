"""The queue against a plain list, and what training does with it."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_kit import InfoNCE, NegativeQueue, SupCon
from contrastive_kit.functional import info_nce, sup_con


def normalized(x):
    return F.normalize(x.double(), dim=1)


def assert_holds(queue, expected):
    """Exactly these rows, oldest first, to the rounding of the queue."""
    actual = queue.negatives()
    assert len(queue) == len(actual) == len(expected)
    if len(expected):
        torch.testing.assert_close(actual.double(), torch.stack(expected), rtol=0, atol=1e-7)


@given(
    size=st.integers(1, 12),
    steps=st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_it_is_a_list_of_the_last_keys_seen_in_training(size, steps):
    queue = NegativeQueue(3, size)
    expected = []
    for n, training in steps:
        keys = torch.randn(n, 3)
        before = queue.train(training)(keys)
        torch.testing.assert_close(
            before.double(), torch.stack(expected) if expected else torch.empty(0, 3).double(),
            rtol=0, atol=1e-7,
        )  # fmt: skip
        if training:
            expected = [*expected, *normalized(keys)][-size:]
        assert_holds(queue, expected)


def test_the_comparison_can_fail():
    queue = NegativeQueue(3, 4)
    keys = torch.randn(2, 3)
    queue(keys)
    for wrong in (keys, normalized(keys).flip(0), normalized(keys)[:1]):
        with pytest.raises(AssertionError):
            assert_holds(queue, list(wrong.double()))


def test_what_it_returns_neither_changes_later_nor_carries_a_gradient():
    queue = NegativeQueue(4, 6)
    keys = torch.randn(6, 4, requires_grad=True)
    queue(keys)
    held = queue(keys)
    copied = held.clone()
    queue(torch.randn(5, 4))
    held_again = queue.negatives()
    queue.negatives().zero_()
    assert not held.requires_grad
    assert torch.equal(held, copied)
    assert torch.equal(queue.negatives(), held_again)


def test_updating_between_forward_and_backward_leaves_the_gradient_alone():
    """The queue of the first step must not be overwritten under the loss that still needs it."""
    queue = NegativeQueue(4, 5)
    queue(torch.randn(5, 4))
    query, key = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (expected,) = torch.autograd.grad(info_nce(query, key, queue.negatives().clone()), query)
    loss = info_nce(query, key, queue(key))
    queue(torch.randn(5, 4))
    assert torch.equal(torch.autograd.grad(loss, query)[0], expected)


def test_no_key_is_a_negative_of_its_own_query():
    """Found in the queue, the own key would bring the loss up to log 2 or more."""
    queue = NegativeQueue(8, 16)
    queue(-torch.eye(8))
    loss = info_nce(torch.eye(8), torch.eye(8), queue(torch.eye(8)), temperature=0.05)
    assert loss < 1e-6


def test_the_first_batch_has_no_negatives_and_no_gradient_but_a_graph():
    query = torch.randn(3, 4, requires_grad=True)
    loss_fn = InfoNCE(learnable_temperature=True)
    for options in ({}, {"return_stats": True}):
        loss = loss_fn(query, torch.randn(3, 4), NegativeQueue(4, 5)(query), **options)
        loss = loss[0] if options else loss
        assert loss == 0
        gradients = torch.autograd.grad(loss, [query, loss_fn.logit_scale])
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_key_that_is_not_finite_is_not_taken_in(bad):
    queue = NegativeQueue(3, 4)
    first = torch.randn(3, 3)
    first[1, 2] = bad
    queue(first)
    expected = list(normalized(first))
    expected[1] = torch.zeros(3, dtype=torch.float64)
    assert_holds(queue, expected)
    queue(torch.randn(3, 3))
    second = torch.randn(3, 3)
    second[0, 0] = bad
    old = queue.negatives()
    queue(second)
    # The queue wraps: the bad key should have gone where the oldest was.
    assert_holds(queue, [old.double()[3], old.double()[0], *normalized(second)[1:]])


def test_extreme_keys_are_stored_as_unit_rows():
    queue = NegativeQueue(3, 4)
    keys = torch.tensor([[1e30, 0, 0], [0, 1e-30, 0], [3e38, 3e38, 0], [0, 0, 0]])
    queue(keys)
    torch.testing.assert_close(queue.negatives().norm(dim=1), torch.tensor([1.0, 1, 1, 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_keys_and_of_the_queue(dtype):
    keys = torch.randn(4, 6).to(dtype)
    queue = NegativeQueue(6, 9)
    queue(keys)
    assert queue.negatives().dtype == torch.float32
    torch.testing.assert_close(queue.negatives(), normalized(keys).float(), rtol=0, atol=1e-6)
    queue = NegativeQueue(6, 9).to(dtype)
    queue(keys.float())
    assert queue.negatives().dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        queue.negatives().double(), normalized(keys.float()), rtol=rounding, atol=rounding
    )


def test_autocast_does_not_round_the_rows():
    queue = NegativeQueue(6, 9)
    keys = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        queue(keys)
    torch.testing.assert_close(queue.negatives(), normalized(keys).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("taken", [0, 3, 5, 12])
def test_state_dict_restores_rows_and_place(taken):
    queue = NegativeQueue(3, 5)
    if taken:
        queue(torch.randn(taken, 3))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    restored = NegativeQueue(3, 5)
    restored.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(queue)
    keys = torch.randn(4, 3)
    for x in (queue, restored, copied):
        x(keys)
    assert torch.equal(restored.negatives(), queue.negatives())
    assert torch.equal(copied.negatives(), queue.negatives())
    assert len(restored) == len(copied) == len(queue) == min(5, taken + 4)


def test_a_state_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for rows"):
        NegativeQueue(3, 5).load_state_dict(NegativeQueue(3, 6).state_dict())


def test_under_compile_it_is_the_same():
    queue, compiled_queue = NegativeQueue(4, 10), NegativeQueue(4, 10)
    step = torch.compile(
        lambda q, k, queue: info_nce(q, k, queue(k), temperature=0.2), backend="aot_eager"
    )
    for n in (3, 4, 4, 4, 5):
        query, key = torch.randn(n, 4, requires_grad=True), torch.randn(n, 4)
        eager = info_nce(query, key, queue(key), temperature=0.2)
        compiled = step(query, key, compiled_queue)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(
            torch.autograd.grad(compiled, query), torch.autograd.grad(eager, query)
        )
        assert torch.equal(queue.negatives(), compiled_queue.negatives())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0, "size": 4}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 4, "size": -1}, ValueError, "size must be at least 1, got -1"),
        ({"dim": 4, "size": 4.0}, TypeError, "size must be an integer, got 4.0"),
        ({"dim": True, "size": 4}, TypeError, "dim must be an integer, got True"),
        (
            {"dim": 4, "size": 4, "process_group": "world"},
            ValueError,
            "process_group is used only with gather_distributed=True",
        ),
    ],
)
def test_construction_checks(options, error, message):
    with pytest.raises(error, match=message):
        NegativeQueue(**options)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (torch.randn(2, 5), ValueError, r"keys must have shape \(n, 4\), got \(2, 5\)"),
        (torch.randn(4), ValueError, r"keys must have shape \(N, D\), got \(4,\)"),
        (torch.zeros(0, 5), ValueError, "keys must have no empty dimension"),
        (torch.zeros(0, 4, dtype=torch.int64), TypeError, "keys must hold floating point"),
        (torch.ones(2, 4, dtype=torch.int64), TypeError, "keys must hold floating point"),
        (torch.empty(2, 4, device="meta"), ValueError, "keys must be on the device of the queue"),
        ([[1.0] * 4], TypeError, "keys must be a tensor"),
    ],
)
def test_bad_keys_are_refused_and_change_nothing(keys, error, message):
    queue = NegativeQueue(4, 3)
    queue(torch.randn(2, 4))
    before = queue.negatives()
    for training in (True, False):
        with pytest.raises(error, match=message):
            queue.train(training)(keys)
    assert torch.equal(queue.negatives(), before)


def test_gathering_without_a_process_group_says_what_to_do(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    queue = NegativeQueue(4, 3, gather_distributed=True)
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2.*init_process_group"):
        queue(torch.randn(2, 4))
    assert len(queue) == 0
    assert queue.eval()(torch.randn(2, 4)).shape == (0, 4)


def test_one_process_gathers_its_own_keys(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    gathering, plain = NegativeQueue(4, 3, gather_distributed=True), NegativeQueue(4, 3)
    for queue in (gathering, plain):
        queue(torch.arange(8.0).view(2, 4))
    assert torch.equal(gathering.negatives(), plain.negatives())
    assert len(gathering) == 2


def test_a_queue_filled_at_random_is_full_of_directions_of_the_generator():
    first, again, other = (NegativeQueue(7, 50) for _ in range(3))
    for queue, seed in ((first, 1), (again, 1), (other, 2)):
        queue.fill_at_random(torch.Generator().manual_seed(seed))
    rows = first(torch.ones(2, 7))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(50))
    assert len(rows.unique(dim=0)) == 50
    assert rows.mean(0).norm() < 0.5  # one direction would have 1
    assert torch.equal(rows, again.negatives())
    assert not torch.equal(rows, other.negatives())
    # Keys of training take the places of the oldest.
    assert torch.equal(first.negatives()[:48], rows[2:])
    torch.testing.assert_close(first.negatives()[48:], torch.full((2, 7), 7**-0.5))


def test_the_first_loss_with_a_random_queue_is_that_of_many_negatives():
    queue = NegativeQueue(16, 1000)
    queue.fill_at_random(torch.Generator().manual_seed(0))
    z = torch.randn(8, 16)
    loss = InfoNCE(temperature=0.5)(z, z, negatives=queue(z))
    assert loss > 3


def test_random_directions_have_the_label_of_no_key():
    queue = NegativeQueue(4, 3, labels=True)
    queue(torch.randn(2, 4), torch.tensor([0, 1]))
    queue.fill_at_random(torch.Generator().manual_seed(0))
    assert queue.labels().tolist() == [torch.iinfo(torch.int64).min] * 3


def test_a_queue_is_filled_from_a_generator_alone():
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got int"):
        NegativeQueue(4, 3).fill_at_random(0)


def test_repr_shows_the_options():
    assert repr(NegativeQueue(4, 3)) == "NegativeQueue(dim=4, size=3, gather_distributed=False)"


@pytest.mark.parametrize("broken", ["another size", "no rows"])
def test_a_refused_state_changes_nothing(broken):
    queue, other = NegativeQueue(3, 5), NegativeQueue(3, 6)
    queue(torch.randn(2, 3))
    other(torch.randn(4, 3))
    before, state = queue.negatives(), other.state_dict()
    if broken == "no rows":
        del state["rows"]
    with pytest.raises(RuntimeError, match="rows"):
        queue.load_state_dict(state)
    assert torch.equal(queue.negatives(), before)


def test_the_state_does_not_follow_the_default_device():
    queue = NegativeQueue(4, 6)
    queue(torch.randn(3, 4))
    with torch.device("meta"):
        state = queue.state_dict()
    restored = NegativeQueue(4, 6)
    restored.load_state_dict(state)
    assert torch.equal(restored.negatives(), queue.negatives())


def test_an_empty_queue_is_a_queue():
    """``queue(key) if queue else None`` must fill it."""
    queue = NegativeQueue(4, 3)
    assert len(queue) == 0
    assert queue


@pytest.mark.parametrize("held", [0, 2, 5])
def test_no_keys_change_nothing(held):
    queue = NegativeQueue(4, 3)
    if held:
        queue(torch.randn(held, 4))
    before = queue.negatives()
    for keys in (torch.empty(0, 4), torch.empty(0, 4, dtype=torch.float16)):
        assert torch.equal(queue(keys), before)
    assert torch.equal(queue.negatives(), before)
    queue(torch.eye(4))
    assert_holds(queue, list(torch.eye(4).double()[1:]))


def test_sizes_may_be_numbers_of_numpy():
    assert repr(NegativeQueue(np.int64(4), np.uint8(3))) == repr(NegativeQueue(4, 3))


class TestBothViewsHaveQueriesAndKeys:
    """MoCo in both directions. The lines of docs/choosing_a_loss.md."""

    def views(self):
        query1, query2 = torch.randn(2, 8, 16, dtype=torch.float64)
        return query1, query2, query1 + 0.1, query2 - 0.1

    def test_one_call_a_step_serves_both_losses(self):
        queue, loss_fn = NegativeQueue(16, 32), InfoNCE()
        held = torch.randn(20, 16)
        queue(held)
        query1, query2, key1, key2 = self.views()
        negatives = queue(torch.cat([key1, key2]))
        loss = loss_fn(query1, key2, negatives) + loss_fn(query2, key1, negatives)
        expected = info_nce(query1, key2, held) + info_nce(query2, key1, held)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert len(queue) == 32

    def test_keys_beside_the_queue_are_refused_where_that_can_be_seen(self):
        query, _, key, queue = self.views()
        for negatives in (torch.cat([key, queue]), torch.cat([queue, key]), key, key.clone()):
            with pytest.raises(ValueError, match="negatives must not hold the keys of the same"):
                info_nce(query, key, negatives)
        narrow = key.float()
        with pytest.raises(ValueError, match="negatives must not hold the keys"):
            info_nce(query, narrow.double(), torch.cat([narrow, queue.float()]))

    def test_a_collapsed_encoder_is_not_refused(self):
        ones = torch.ones(4, 3)
        assert info_nce(ones, ones, torch.ones(6, 3)).isfinite()

    def test_other_keys_and_a_queue(self):
        query, _, key, queue = self.views()
        n = len(key)
        others = key[(torch.arange(n)[:, None] + torch.arange(1, n)) % n]
        negatives = torch.cat([others, queue.expand(n, -1, -1)], 1)
        u, k, q = (F.normalize(x, dim=1) / 0.07**0.5 for x in (query, key, queue))
        logits = torch.cat([u @ k.T, u @ q.T], 1)
        expected = F.cross_entropy(logits, torch.arange(n))
        torch.testing.assert_close(info_nce(query, key, negatives), expected)


class TestLabels:
    """A queue with labels is the memory of XBM: keys and key_labels of SupCon."""

    @given(
        size=st.integers(1, 12),
        steps=st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=12),
    )
    @settings(max_examples=60, deadline=None)
    def test_they_stay_with_their_keys(self, size, steps):
        queue = NegativeQueue(2, size, labels=True)
        expected = torch.empty(0, dtype=torch.int64)
        for n, training in steps:
            # The direction of a key tells its label.
            labels = torch.randint(-50, 50, (n,), dtype=torch.int32)
            angle = labels / 20
            rows, held = queue.train(training)(torch.stack([angle.cos(), angle.sin()], 1), labels)
            assert torch.equal(held, expected)
            assert held.dtype == torch.int64
            angle = held / 20
            torch.testing.assert_close(rows, torch.stack([angle.cos(), angle.sin()], 1))
            if training:
                expected = torch.cat([expected, labels.long()])[-size:]
            assert torch.equal(queue.labels(), expected)

    def test_a_key_that_is_not_finite_leaves_its_place_the_label_it_had(self):
        queue = NegativeQueue(2, 2, labels=True)
        bad = torch.tensor([[torch.nan, 1.0]])
        queue(bad, torch.tensor([5]))
        assert queue.labels().item() not in range(-(2**40), 2**40)  # nobody's label
        queue(torch.ones(2, 2), torch.tensor([7, 8]))
        queue(bad, torch.tensor([9]))
        assert queue.labels().tolist() == [8, 7]  # it should have gone where the oldest was

    def test_what_is_held_are_keys_of_sup_con(self):
        queue, loss_fn = NegativeQueue(4, 6, labels=True), SupCon(0.2)
        z = torch.randn(3, 4, requires_grad=True)
        labels = torch.tensor([1, 2, 9])
        keys, key_labels = queue(z, labels)
        loss = loss_fn(z, labels=labels, keys=keys, key_labels=key_labels)
        assert loss == 0  # an empty queue
        assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros(3, 4))
        held, held_labels = torch.randn(5, 4), torch.tensor([1, 1, 2, 3, 4])
        queue(held, held_labels)
        keys, key_labels = queue(z, labels)
        expected = sup_con(
            z,
            labels=labels,
            keys=torch.cat([z[2:].detach(), held]),
            key_labels=torch.cat([labels[2:], held_labels]),
            temperature=0.2,
        )
        actual = loss_fn(z, labels=labels, keys=keys, key_labels=key_labels)
        torch.testing.assert_close(actual, expected)

    def test_state_dict_restores_them(self):
        queue = NegativeQueue(3, 5, labels=True)
        queue(torch.randn(7, 3), torch.arange(7))
        restored = NegativeQueue(3, 5, labels=True)
        restored.load_state_dict(queue.state_dict())
        for x in (queue, restored):
            assert x.labels().tolist() == [2, 3, 4, 5, 6]
            x(torch.ones(1, 3), torch.tensor([70]))
            assert x.labels().tolist() == [3, 4, 5, 6, 70]

    def test_a_state_without_labels_is_refused_and_changes_nothing(self):
        queue, other = NegativeQueue(3, 5, labels=True), NegativeQueue(3, 5)
        queue(torch.randn(2, 3), torch.arange(2))
        other(torch.randn(4, 3))
        before = queue.negatives()
        with pytest.raises(RuntimeError, match="row_labels"):
            queue.load_state_dict(other.state_dict())
        assert torch.equal(queue.negatives(), before)
        assert queue.labels().tolist() == [0, 1]

    def test_dtype_of_the_module_leaves_labels_alone(self):
        queue = NegativeQueue(3, 5, labels=True).half()
        queue(torch.randn(2, 3), torch.tensor([2**40, -1]))
        assert queue.labels().tolist() == [2**40, -1]

    def test_under_compile_it_is_the_same(self):
        queue, compiled_queue = (NegativeQueue(4, 10, labels=True) for _ in range(2))

        def step(z, labels, queue):
            keys, key_labels = queue(z, labels)
            return sup_con(z, labels=labels, keys=keys, key_labels=key_labels)

        compiled_step = torch.compile(step, backend="aot_eager")
        for n in (3, 4, 4):
            z, labels = torch.randn(n, 4), torch.arange(n) % 2
            eager = step(z, labels, queue)
            torch.testing.assert_close(compiled_step(z, labels, compiled_queue), eager)
        assert torch.equal(queue.labels(), compiled_queue.labels())

    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            (None, ValueError, "labels must be given to a queue"),
            (torch.arange(3), ValueError, r"labels must have shape \(2,\)"),
            (torch.rand(2), TypeError, "labels must hold integers"),
        ],
    )
    def test_bad_labels_are_refused_and_change_nothing(self, labels, error, message):
        queue = NegativeQueue(4, 3, labels=True)
        with pytest.raises(error, match=message):
            queue(torch.randn(2, 4), labels)
        assert len(queue) == 0

    def test_a_queue_without_labels_takes_none(self):
        queue = NegativeQueue(4, 3)
        with pytest.raises(ValueError, match="labels are held only by"):
            queue(torch.randn(2, 4), torch.arange(2))
        with pytest.raises(ValueError, match="labels are held only by"):
            queue.labels()
        with pytest.raises(TypeError, match="labels must be True or False"):
            NegativeQueue(4, 3, labels=1)
        assert len(queue) == 0

    def test_repr_shows_them(self):
        shown = "NegativeQueue(dim=4, size=3, gather_distributed=False, labels=True)"
        assert repr(NegativeQueue(4, 3, labels=True)) == shown
