"""Feature extraction, the kNN classifier and the linear probe; scikit-learn is the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from contrastive_kit.evaluation import (
    _fit,
    extract_features,
    knn_accuracy,
    linear_probe,
    retrieval,
)


def gaussian_classes(n, d, classes, *, seed, spread=1.0, dtype=torch.float64):
    """Overlapping classes, so that accuracies are far from 0 and 1; labels are not 0, 1, 2."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (n,), generator=generator)
    x = spread * centers[labels] + torch.randn(n, d, generator=generator)
    return x.to(dtype), labels * 7 - 3


def sklearn_knn(train, labels, test, k, temperature):
    def weights(distances):
        return np.exp((1 - distances) / temperature)

    model = KNeighborsClassifier(k, metric="cosine", weights=weights, algorithm="brute")
    return model.fit(train.numpy(), labels.numpy()).predict(test.numpy())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    m=st.integers(1, 40),
    d=st.integers(2, 9),
    classes=st.integers(1, 6),
    chunk_size=st.integers(1, 50),
    temperature=st.sampled_from([0.05, 0.1, 1.0]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_knn_is_sklearns(n, m, d, classes, chunk_size, temperature, seed, data):
    k = data.draw(st.integers(1, n))
    x, y = gaussian_classes(n, d, classes, seed=seed)
    q, t = gaussian_classes(m, d, classes, seed=seed + 1000)
    result = knn_accuracy(x, y, q, t, k=k, temperature=temperature, chunk_size=chunk_size)
    predicted = sklearn_knn(x, y, q, k, temperature)
    assert result == (pytest.approx((predicted == t.numpy()).mean()), k, temperature)


def test_knn_closed_form():
    """Two far neighbors against one near one: the temperature decides who wins."""
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([5, 2, 2])
    angle = torch.tensor(0.6)
    query = torch.stack([angle.cos(), angle.sin()])[None]
    margin = (angle.cos() - angle.sin()).item()
    tie = margin / np.log(2)
    for temperature, winner in [(tie * 0.99, 5), (tie * 1.01, 2)]:
        for label, expected in [(winner, 1.0), (7 - winner, 0.0)]:
            target = torch.tensor([label])
            result = knn_accuracy(train, labels, query, target, k=3, temperature=temperature)
            assert result.accuracy == expected


def test_knn_does_not_depend_on_lengths_chunks_or_dtype():
    x, y = gaussian_classes(300, 8, 5, seed=0, dtype=torch.float32)
    q, t = gaussian_classes(101, 8, 5, seed=1, dtype=torch.float32)
    expected = knn_accuracy(x, y, q, t, k=10)
    assert 0.3 < expected.accuracy < 0.97
    scaled = x * torch.rand(300, 1).add(0.1), q * 1e3
    assert knn_accuracy(scaled[0], y, scaled[1], t, k=10, chunk_size=7) == expected
    half, half_query = x.bfloat16(), q.bfloat16()
    assert knn_accuracy(half, y, half_query, t, k=10) == knn_accuracy(
        half.float(), y, half_query.float(), t, k=10
    )


def test_knn_small_temperature_neither_overflows_nor_underflows():
    x, y = gaussian_classes(100, 8, 5, seed=0, dtype=torch.float32)
    q, t = gaussian_classes(50, 8, 5, seed=1, dtype=torch.float32)
    sharp = knn_accuracy(x, y, q, t, k=30, temperature=1e-4).accuracy
    assert sharp == knn_accuracy(x, y, q, t, k=1).accuracy


def test_knn_cannot_find_a_class_that_training_lacks():
    x = torch.eye(3)
    result = knn_accuracy(x, torch.tensor([0, 1, 2]), x, torch.tensor([0, 1, 9]), k=1)
    assert result.accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_probe_weights_are_sklearns(l2):
    x, y = gaussian_classes(200, 6, 5, seed=0, spread=0.5)
    targets = torch.unique(y, return_inverse=True)[1]
    fitted = _fit(x, targets, 5, l2, max_iter=1000)
    oracle = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-12, max_iter=10_000)
    oracle.fit(x.numpy(), y.numpy())
    torch.testing.assert_close(fitted.weight, torch.from_numpy(oracle.coef_), rtol=1e-4, atol=1e-5)
    bias = torch.from_numpy(oracle.intercept_ - oracle.intercept_.mean())
    torch.testing.assert_close(fitted.bias - fitted.bias.mean(), bias, rtol=1e-4, atol=1e-5)


def test_probe_of_two_classes_is_sklearns_with_twice_the_c():
    """One logit w or two logits ±w/2 say the same; the penalty on the two is half as large."""
    x, y = gaussian_classes(200, 6, 2, seed=0, spread=0.5)
    targets = torch.unique(y, return_inverse=True)[1]
    fitted = _fit(x, targets, 2, 1e-2, max_iter=1000)
    oracle = LogisticRegression(C=2 / (1e-2 * len(x)), tol=1e-12, max_iter=10_000)
    oracle.fit(x.numpy(), y.numpy())
    difference = fitted.weight[1] - fitted.weight[0]
    expected = torch.from_numpy(oracle.coef_[0])
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)


def test_probe_accuracy_is_sklearns():
    x, y = gaussian_classes(400, 10, 6, seed=0, spread=0.5)
    q, t = gaussian_classes(301, 10, 6, seed=1, spread=0.5)
    x, q = x * torch.arange(1, 11) + 5, q * torch.arange(1, 11) + 5
    mean, std = x.mean(0), x.std(0, correction=0)
    for l2 in (1.0, 1e-2, 1e-4):
        oracle = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000)
        oracle.fit(((x - mean) / std).numpy(), y.numpy())
        expected = oracle.score(((q - mean) / std).numpy(), t.numpy())
        result = linear_probe(x, y, q, t, l2=l2, max_iter=1000)
        assert result == (pytest.approx(expected, abs=1e-9), l2, {})
        assert 0.3 < expected < 0.97


def test_probe_chooses_on_held_out_training_samples():
    """A third of the labels wrong: a weak penalty fits them, and validation has to see it."""
    x, y = gaussian_classes(200, 100, 4, seed=0, spread=0.3)
    q, t = gaussian_classes(1000, 100, 4, seed=1, spread=0.3)
    y = torch.where(torch.rand(200) < 1 / 3, y[torch.randperm(200)], y)
    result = linear_probe(x, y, q, t)
    assert list(result.validation_accuracy) == [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    assert result.l2 == max(result.validation_accuracy, key=result.validation_accuracy.get)
    assert result.l2 >= 0.1
    assert result.accuracy == linear_probe(x, y, q, t, l2=result.l2).accuracy
    assert result.accuracy > linear_probe(x, y, q, t, l2=1e-5).accuracy + 0.02


def test_probe_choice_does_not_see_the_test_set():
    """T49: another test set changes the accuracy and nothing else."""
    x, y = gaussian_classes(200, 8, 4, seed=0)
    q, t = gaussian_classes(100, 8, 4, seed=1)
    expected, other = linear_probe(x, y, q, t), linear_probe(x, y, -q, t.flip(0))
    assert (other.l2, other.validation_accuracy) == (expected.l2, expected.validation_accuracy)
    assert other.accuracy < expected.accuracy


def test_probe_is_deterministic_and_leaves_global_state_alone():
    x, y = gaussian_classes(200, 8, 4, seed=0, dtype=torch.float32)
    q, t = gaussian_classes(100, 8, 4, seed=1, dtype=torch.float32)
    copies = [tensor.clone() for tensor in (x, y, q, t)]
    state = torch.get_rng_state()
    first = linear_probe(x, y, q, t)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    with torch.no_grad():
        assert linear_probe(x, y, q, t) == first
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, y, q, t), strict=True))
    other = linear_probe(x, y, q, t, seed=1)
    assert other.validation_accuracy != first.validation_accuracy


def test_probe_ignores_constant_features_and_scale():
    x, y = gaussian_classes(200, 8, 4, seed=0, dtype=torch.float32)
    q, t = gaussian_classes(100, 8, 4, seed=1, dtype=torch.float32)
    expected = linear_probe(x, y, q, t, l2=1e-2)
    constant = torch.full((200, 1), 3.1)
    padded = torch.cat([x * 2**9, constant], 1), torch.cat([q * 2**9, constant[:100]], 1)
    assert linear_probe(padded[0], y, padded[1], t, l2=1e-2) == expected


@pytest.mark.parametrize("evaluate", [knn_accuracy, linear_probe])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x, y, q, t: (x[0], y, q, t),
            ValueError,
            r"train_features must have shape \(N, D\)",
        ),
        (lambda x, y, q, t: (x, y, q[:0], t[:0]), ValueError, "test_features must have shape"),
        (lambda x, y, q, t: (x, y[1:], q, t), ValueError, r"train_labels must have shape \(300,\)"),
        (lambda x, y, q, t: (x, y, q, t[:, None]), ValueError, r"test_labels must have shape"),
        (lambda x, y, q, t: (x, y, q[:, 1:], t), ValueError, "test_features must have 4 columns"),
        (lambda x, y, q, t: (x.long(), y, q, t), TypeError, "train_features must be floating"),
        (lambda x, y, q, t: (x, y, q, t.float()), TypeError, "test_labels must be integers"),
        (lambda x, y, q, t: (x / 0, y, q, t), ValueError, "train_features must be finite"),
        (lambda x, y, q, t: (x, y, q.log(), t), ValueError, "test_features must be finite"),
        (lambda x, y, q, t: (x, y, q.to("meta"), t), ValueError, "on one device, got cpu, meta"),
    ],
)
def test_wrong_data(evaluate, change, error, message):
    x, y = gaussian_classes(300, 4, 3, seed=0)
    q, t = gaussian_classes(20, 4, 3, seed=1)
    with pytest.raises(error, match=message):
        evaluate(*change(x, y, q, t))


@pytest.mark.parametrize(
    ("evaluate", "options", "error", "message"),
    [
        (knn_accuracy, {"k": 0}, ValueError, r"k must be from 1 to .*\(300\), got 0"),
        (knn_accuracy, {"k": 301}, ValueError, r"k must be from 1 to .*\(300\), got 301"),
        (knn_accuracy, {"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
        (knn_accuracy, {"temperature": 0}, ValueError, "temperature must be positive"),
        (knn_accuracy, {"temperature": float("nan")}, ValueError, "temperature must be positive"),
        (knn_accuracy, {"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        (linear_probe, {"l2": -1.0}, ValueError, "l2 must be finite and not negative"),
        (linear_probe, {"l2": []}, ValueError, "l2 must be finite and not negative"),
        (linear_probe, {"validation_fraction": 1.0}, ValueError, "validation_fraction must be in"),
        (linear_probe, {"validation_fraction": 0.999}, ValueError, "leaves nothing to fit"),
        (linear_probe, {"max_iter": 0}, ValueError, "max_iter must be at least 1"),
    ],
)
def test_wrong_options(evaluate, options, error, message):
    x, y = gaussian_classes(300, 4, 3, seed=0)
    with pytest.raises(error, match=message):
        evaluate(x, y, x, y, **options)


def test_probe_needs_two_classes():
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        linear_probe(x, torch.ones(10, dtype=torch.long), x, torch.ones(10, dtype=torch.long))


def encoder_with_state():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())


def test_features_come_from_a_frozen_encoder_in_eval_mode():
    encoder = encoder_with_state()
    encoder[1].eval()  # a mode of its own, which has to come back
    encoder[1].running_mean.normal_()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    images, labels = torch.rand(11, 3, 6, 5), torch.arange(11)
    features, got = extract_features(encoder, zip(images.split(4), labels.split(4), strict=True))
    assert torch.equal(got, labels)
    assert not features.requires_grad
    assert [m.training for m in encoder.modules()] == [True, True, False, True, True]
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(features, encoder.eval()(images))


def test_features_of_uint8_half_and_double():
    flatten = nn.Flatten()
    images = torch.randint(0, 256, (5, 3, 2, 2), dtype=torch.uint8)
    labels = torch.zeros(5, dtype=torch.long)
    features, _ = extract_features(flatten, [(images, labels)])
    torch.testing.assert_close(features, images.flatten(1) / 255)
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        features, _ = extract_features(flatten, [(torch.rand(5, 3, 2, 2, dtype=dtype), labels)])
        assert features.dtype == expected


def test_features_can_train_a_probe_afterwards():
    features, labels = extract_features(
        nn.Flatten(), [(torch.rand(8, 3, 2, 2), torch.arange(8) % 2)]
    )
    assert 0 <= linear_probe(features, labels, features, labels, l2=1e-2).accuracy <= 1


def test_modes_come_back_after_an_error():
    encoder = encoder_with_state()
    with pytest.raises(RuntimeError):
        extract_features(encoder, [(torch.rand(2, 5, 6, 6), torch.zeros(2, dtype=torch.long))])
    assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches must hold at least one batch"),
        ([(torch.rand(2, 3), torch.zeros(3, dtype=torch.long))], "labels of batch 0 must have"),
        (
            # Together as many labels as images.
            [(torch.rand(n, 3), torch.arange(12 - n)) for n in (6, 8, 4)],
            r"labels of batch 1 must have shape \(8,\), .* got \(4,\)",
        ),
        (
            [(torch.rand(2, n), torch.arange(2)) for n in (3, 4)],
            r"batch 1 must have 3 columns as that of batch 0, got 4",
        ),
        (
            [(torch.rand(2, 3).to_sparse(), torch.arange(2))],
            r"encoder\(images\) of batch 0 must be a dense tensor",
        ),
        ([(torch.rand(2, 3, 4), torch.zeros(2, dtype=torch.long))], r"must have shape \(N, D\)"),
    ],
)
def test_wrong_batches(batches, message):
    with pytest.raises(ValueError, match=message):
        extract_features(nn.Identity(), batches)


@pytest.mark.gpu
def test_gpu_gives_the_cpu_accuracies():
    x, y = gaussian_classes(500, 16, 5, seed=0, spread=0.5)
    q, t = gaussian_classes(200, 16, 5, seed=1, spread=0.5)
    on_gpu = [tensor.cuda() for tensor in (x, y, q, t)]
    assert knn_accuracy(*on_gpu, k=20) == knn_accuracy(x, y, q, t, k=20)
    expected, got = linear_probe(x, y, q, t), linear_probe(*on_gpu)
    assert got.l2 == expected.l2
    assert got.accuracy == pytest.approx(expected.accuracy, abs=0.011)


@pytest.mark.parametrize("evaluate", [knn_accuracy, linear_probe])
class TestAmbientState:
    def data(self, dtype=torch.float32):
        labels = torch.arange(120) % 3
        features = torch.randn(120, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        features[:, 0] += labels
        return features[:80], labels[:80], features[80:], labels[80:]

    def score(self, evaluate, data):
        return evaluate(*data, **({"k": 5} if evaluate is knn_accuracy else {})).accuracy

    def test_autocast_changes_nothing(self, evaluate):
        expected = self.score(evaluate, self.data())
        with torch.autocast("cpu", torch.bfloat16):
            assert self.score(evaluate, self.data()) == expected

    def test_inference_mode_changes_nothing(self, evaluate):
        expected = self.score(evaluate, self.data())
        with torch.inference_mode():
            assert self.score(evaluate, self.data()) == expected

    def test_the_default_device_changes_nothing(self, evaluate):
        data, expected = self.data(), self.score(evaluate, self.data())
        with torch.device("meta"):
            assert self.score(evaluate, data) == expected

    def test_sets_of_different_precision_are_computed_in_the_wider(self, evaluate):
        single, double = self.data(), self.data(torch.float64)
        mixed = (*double[:2], *single[2:])
        assert self.score(evaluate, mixed) == self.score(evaluate, double)


def test_knn_does_not_depend_on_the_length_of_features():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 4
    expected = knn_accuracy(features[:40], labels[:40], features[40:], labels[40:], k=5)
    for length in (2.0**-60, 2.0**80):
        scaled = features * length
        assert expected == knn_accuracy(scaled[:40], labels[:40], scaled[40:], labels[40:], k=5)


def test_extracted_features_outlive_the_buffer_of_the_loader():
    buffer = torch.zeros(2, 3)

    def batches():
        for i in range(3):
            yield buffer.fill_(i), torch.tensor([i, i])

    features, _ = extract_features(torch.nn.Identity(), batches())
    assert features[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_double_precision_encoder_takes_uint8_images():
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).double()
    images = torch.randint(0, 256, (5, 3, 2, 2), dtype=torch.uint8)
    features, _ = extract_features(encoder, [(images, torch.arange(5))])
    assert features.dtype == torch.float64


def test_progress_is_shown_over_chunks_and_penalties():
    x, y = gaussian_classes(60, 4, 3, seed=0)
    seen = []

    def progress(sequence):
        for item in sequence:
            seen.append(item)
            yield item
            assert len(seen) <= len(sequence)

    plain = knn_accuracy(x, y, x, y, k=5)
    assert knn_accuracy(x, y, x, y, k=5, chunk_size=25, progress=progress) == plain
    assert [len(queries) for queries, _ in seen] == [25, 25, 10]
    seen.clear()
    plain = linear_probe(x, y, x, y, l2=[0.1, 1.0])
    assert linear_probe(x, y, x, y, l2=[0.1, 1.0], progress=progress) == plain
    assert seen == [1.0, 0.1]


@pytest.mark.parametrize("scale", [1e37, 1e-30])
def test_a_probe_does_not_depend_on_the_scale_of_features(scale):
    """Squares of such features leave the range of float32."""
    x, y = gaussian_classes(100, 4, 3, seed=0, dtype=torch.float32)
    q, t = gaussian_classes(100, 4, 3, seed=1, dtype=torch.float32)
    expected = linear_probe(x, y, q, t)
    assert 0.4 < expected.accuracy < 1
    actual = linear_probe(x * scale, y, q * scale, t)
    assert actual.l2 == expected.l2
    assert actual.accuracy == pytest.approx(expected.accuracy, abs=0.03)


def test_test_features_out_of_range_of_the_training_set_are_refused():
    x, y = gaussian_classes(100, 4, 3, seed=0, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"test_features lie so far .*; scale both"):
        linear_probe(x * 1e-20, y, x * 1e30, y, l2=1e-2)


@pytest.mark.parametrize("evaluate", [knn_accuracy, linear_probe])
def test_sparse_features_are_refused(evaluate):
    x, y = torch.eye(4), torch.arange(4)
    with pytest.raises(ValueError, match=r"train_features must be a dense .*to_dense"):
        evaluate(x.to_sparse(), y, x, y)


def test_numbers_of_numpy_are_numbers():
    x, y = gaussian_classes(60, 4, 3, seed=0)
    options = {"k": 5, "temperature": 0.5, "chunk_size": 7}
    expected = knn_accuracy(x, y, x, y, **options)
    of_numpy = {"k": np.int64(5), "temperature": np.float32(0.5), "chunk_size": np.uint8(7)}
    actual = knn_accuracy(x, y, x, y, **of_numpy)
    assert actual == expected
    assert [type(value) for value in actual] == [float, int, float]
    options = {"validation_fraction": 0.25, "max_iter": 20, "seed": 3}
    of_numpy = {
        "validation_fraction": np.float32(0.25),
        "max_iter": np.int32(20),
        "seed": np.int64(3),
    }
    expected = linear_probe(x, y, x, y, l2=[0.5, 0.25], **options)
    for l2 in (np.array([0.5, 0.25]), [np.float32(0.5), np.float16(0.25)]):
        assert linear_probe(x, y, x, y, l2=l2, **of_numpy) == expected
    single = linear_probe(x, y, x, y, l2=0.5)
    assert linear_probe(x, y, x, y, l2=np.float32(0.5)) == single
    for wrong in (True, np.True_, "0.1", [True], None):
        with pytest.raises(TypeError, match="l2 must be a number"):
            linear_probe(x, y, x, y, l2=wrong)
    with pytest.raises(TypeError, match=r"validation_fraction must be a number, got '0\.2'"):
        linear_probe(x, y, x, y, validation_fraction="0.2")


def retrieval_loop(queries, keys, query_labels, key_labels, ks, within=False):
    """Each query's list sorted by itself; of equal similarities matches come last."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, keys)]
    recall, precision = {k: [] for k in ks}, []
    for i, query in enumerate(unit[0]):
        similarity = unit[1] @ query
        match = key_labels == query_labels[i]
        order = [
            j
            for j in sorted(range(len(keys)), key=lambda j: (-similarity[j], match[j]))
            if not (within and j == i)
        ]
        hits = [bool(match[j]) for j in order]
        r = sum(hits)
        if r == 0:
            continue
        for k in ks:
            recall[k].append(any(hits[:k]))
        precision.append(sum(hits[j] * np.mean(hits[: j + 1]) for j in range(r)) / r)
    return {k: np.mean(x) for k, x in recall.items()}, np.mean(precision), len(precision)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 40),
    m=st.integers(2, 50),
    d=st.integers(2, 9),
    classes=st.integers(1, 12),
    chunk_size=st.integers(1, 50),
    within=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_retrieval_is_a_sorted_list(n, m, d, classes, chunk_size, within, seed, data):
    queries, query_labels = gaussian_classes(n, d, classes, seed=seed)
    keys, key_labels = gaussian_classes(m, d, classes, seed=seed + 1000)
    if within:
        keys, key_labels = queries, query_labels
    ks = data.draw(st.sets(st.integers(1, len(keys) - within), min_size=1))
    arrays = (x.numpy() for x in (queries, keys, query_labels, key_labels))
    own = torch.arange(n) if within else torch.full((n,), -1)
    matches = (query_labels[:, None] == key_labels) & (own[:, None] != torch.arange(len(keys)))
    options = {"k": list(ks), "chunk_size": chunk_size, "query_labels": query_labels}
    sides = (queries,) if within else (queries, keys)
    options |= {} if within else {"key_labels": key_labels}
    if not matches.any():
        with pytest.raises(ValueError, match="query_labels must have a match"):
            retrieval(*sides, **options)
        return
    recall, precision, n_queries = retrieval_loop(*arrays, ks, within)
    result = retrieval(*sides, **options)
    assert result.recall == pytest.approx(recall)
    assert list(result.recall) == sorted(ks)
    assert result.map_at_r == pytest.approx(precision)
    assert result.queries == n_queries


def test_retrieval_is_that_of_pytorch_metric_learning():
    calculators = pytest.importorskip(
        "pytorch_metric_learning.utils.accuracy_calculator",
        reason="pytorch-metric-learning is not installed",
    )
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.inference import CustomKNN

    x, labels = gaussian_classes(150, 8, 7, seed=3, dtype=torch.float32)
    theirs = calculators.AccuracyCalculator(
        include=("mean_average_precision_at_r", "precision_at_1"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
        device=torch.device("cpu"),
    ).get_accuracy(x, labels)
    ours = retrieval(x, query_labels=labels, k=1)
    assert 0.1 < ours.map_at_r < 0.9
    assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)
    assert ours.recall[1] == pytest.approx(theirs["precision_at_1"])


def test_retrieval_of_pairs_by_row():
    keys = torch.randn(60, 5)
    queries = keys + 0.8 * torch.randn(60, 5)
    rows = torch.arange(60)
    labelled = retrieval(queries, keys, query_labels=rows, key_labels=rows, k=(1, 3))
    assert retrieval(queries, keys, k=(3, 1)) == labelled
    assert 0.1 < labelled.recall[1] < labelled.recall[3] < 1
    assert labelled.map_at_r == pytest.approx(labelled.recall[1])
    assert retrieval(5 * queries.half(), 0.1 * keys.half(), k=1).queries == 60


def test_a_collapsed_encoder_retrieves_nothing():
    result = retrieval(torch.ones(9, 4), torch.ones(9, 4), k=(1, 8, 9))
    assert result.recall == {1: 0.0, 8: 0.0, 9: 1.0}
    assert result.map_at_r == 0


def test_retrieval_shows_progress_and_leaves_its_input():
    x, labels = torch.randn(10, 3, requires_grad=True), torch.arange(10) % 3
    seen, before = [], labels.clone()
    with torch.inference_mode():
        retrieval(
            x, query_labels=labels, k=2, chunk_size=4,
            progress=lambda chunks: seen.extend(chunks) or chunks,
        )  # fmt: skip
    assert [len(chunk) for chunk in seen] == [4, 4, 2]
    assert torch.equal(labels, before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: retrieval(x), ValueError, "keys may be None only with query_labels"),
        (
            lambda x, y: retrieval(x, query_labels=y, key_labels=y),
            ValueError,
            "keys may be None only with query_labels and without key_labels",
        ),
        (lambda x, y: retrieval(x, x, key_labels=y), ValueError, "query_labels must be given"),
        (lambda x, y: retrieval(x, x, query_labels=y), ValueError, "key_labels must be given"),
        (lambda x, y: retrieval(x, x[1:]), ValueError, "keys must have 6 rows as queries"),
        (lambda x, y: retrieval(x, x[:, 1:]), ValueError, "queries must have 2 columns as keys"),
        (lambda x, y: retrieval(x, x.long()), TypeError, "keys must be floating point"),
        (lambda x, y: retrieval(x * torch.nan, x), ValueError, "queries must be finite"),
        (lambda x, y: retrieval([1.0], x), TypeError, "queries must be a tensor"),
        (lambda x, y: retrieval(x, "keys"), TypeError, "keys must be a tensor"),
        (lambda x, y: retrieval(x[0], x), ValueError, "queries must have shape"),
        (
            lambda x, y: retrieval(x, query_labels=y, k=6),
            ValueError,
            r"k must be from 1 to .*\(5\)",
        ),
        (lambda x, y: retrieval(x, x, k=(0, 1)), ValueError, "k must be from 1"),
        (lambda x, y: retrieval(x, x, k=()), ValueError, "k must be from 1"),
        (lambda x, y: retrieval(x, x, k=2.0), TypeError, "k must be an integer or a sequence"),
        (lambda x, y: retrieval(x, x, k=(1.5,)), TypeError, "k must be an integer"),
        (lambda x, y: retrieval(x, x, k=1, chunk_size=0), ValueError, "chunk_size must be"),
        (
            lambda x, y: retrieval(x, x, query_labels=y, key_labels=y + 9, k=1),
            ValueError,
            "query_labels must have a match",
        ),
        (
            lambda x, y: retrieval(x, x, query_labels=y / 2, key_labels=y, k=1),
            TypeError,
            "query_labels must be integers",
        ),
    ],
)
def test_wrong_arguments_of_retrieval(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(6, 3), torch.arange(6) % 2)
