"""Evaluation of frozen representations: k nearest neighbors, a linear probe, retrieval.

All take features (N, D) and labels (N,), on any device; ``extract_features`` makes them from an
encoder. Evaluate the encoder's output h, not the projection z (SimCLR, section 4.2).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from numbers import Integral, Real
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kit._checks import check_dense, check_int, check_number
from contrastive_kit._dtypes import compute_dtype

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _without_ambient_modes(
    function: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """Neither autocast nor inference mode around the call changes what it computes."""

    @wraps(function)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with (
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            return function(*args, **kwargs)

    return wrapper


class KNNResult(NamedTuple):
    """Accuracy in [0, 1], with the settings it depends on."""

    accuracy: float
    k: int
    temperature: float


class LinearProbeResult(NamedTuple):
    """Accuracy in [0, 1] on the test set, and how it came about.

    Attributes:
        accuracy: Accuracy on the test set.
        l2: The chosen strength of the penalty.
        validation_accuracy: Accuracy of each value of the L2 path on the held-out part of the
            training set, as ``{l2: accuracy}``; empty where only one value was given.
    """

    accuracy: float
    l2: float
    validation_accuracy: dict[float, float]


class RetrievalResult(NamedTuple):
    """How well matches are found, averaged over the queries that have one.

    Attributes:
        recall: Share of queries with a match among their k nearest keys, as ``{k: share}``.
        map_at_r: Mean average precision at R, in [0, 1].
        queries: How many queries have a match.
    """

    recall: dict[int, float]
    map_at_r: float
    queries: int


def extract_features(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a frozen encoder over a data set.

    The encoder is put in evaluation mode for the time of the call, without gradients; each of
    its modules gets its own mode back, also after an error. Nothing in it is written to.

    Args:
        encoder: Module from images (B, 3, H, W) to features (B, D).
        batches: Pairs of images and integer labels (B,): a ``DataLoader``, or for tensors
            ``zip(images.split(256), labels.split(256))``. uint8 images are scaled to [0, 1];
            normalize in the encoder, ``nn.Sequential(normalize, encoder)``. Wrap it in
            ``tqdm(...)`` for a progress bar.
        device: Where to run and where the results are; default the device of the encoder's first
            parameter, or of each batch if it has none.

    Returns:
        Features (N, D), float32 (float64 from a float64 encoder), and labels (N,), on ``device``.

    Raises:
        TypeError: Features or labels are no tensors.
        ValueError: ``batches`` is empty, or the features and labels of a batch do not fit together;
            the message tells which.

    Example:
        >>> import torch
        >>> from contrastive_kit.evaluation import extract_features
        >>> images, labels = torch.rand(10, 3, 8, 8), torch.arange(10)
        >>> batches = zip(images.split(4), labels.split(4))
        >>> features, labels = extract_features(torch.nn.Flatten(), batches)
        >>> features.shape
        torch.Size([10, 192])
    """
    parameter = next(encoder.parameters(), None)
    if device is None and parameter is not None:
        device = parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    training = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    features: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        with torch.no_grad():
            for i, (images, batch_labels) in enumerate(batches):
                x = images.to(device, non_blocking=True)
                h = encoder(x.to(dtype) / 255 if x.dtype == torch.uint8 else x)
                # Each: over all of them, what one lacks another may have too much.
                _check(h, batch_labels, f"encoder(images) of batch {i}", f"labels of batch {i}")
                if features and h.shape[1] != features[0].shape[1]:
                    raise ValueError(
                        f"encoder(images) of batch {i} must have {features[0].shape[1]} columns "
                        f"as that of batch 0, got {h.shape[1]}"
                    )
                # A copy: an encoder may return its input, and a loader may reuse that.
                features.append(h.to(compute_dtype(h), copy=True))
                labels.append(batch_labels.to(h.device))
    finally:
        for module, mode in training:
            module.training = mode
    if not features:
        raise ValueError("batches must hold at least one batch, got none")
    return torch.cat(features), torch.cat(labels)


@_without_ambient_modes
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    chunk_size: int = 1024,
    progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
) -> KNNResult:
    r"""Accuracy of a weighted nearest-neighbor classifier under cosine similarity.

    A test sample takes the class with the largest sum of :math:`\exp(s/\tau)` over its ``k`` most
    similar training samples, s being the cosine similarity (Wu et al., section 3.4). Accuracies
    compare only at equal ``k`` and ``temperature``, which is why both are part of the result.

    Args:
        train_features: (N, D), any float dtype, not necessarily normalized. Half precision is
            computed in float32.
        train_labels: (N,) integers, any values.
        test_features: (M, D).
        test_labels: (M,) integers. A class that the training set lacks counts as missed.
        k: Number of neighbors, 1 … N.
        temperature: τ > 0.
        chunk_size: Test samples at a time. Memory is ``chunk_size`` · (N + number of classes)
            floats beside the features.
        progress: ``tqdm``, or what else iterates over a sequence and shows how far it is; here
            over the chunks.

    Returns:
        ``KNNResult`` with the accuracy in [0, 1], ``k`` and ``temperature``.

    Raises:
        TypeError: Features are not floating, labels are not integers, or ``k`` is not an integer.
        ValueError: Shapes or devices do not match, features are NaN or infinite, a set is empty,
            ``k`` is not in 1 … N, ``temperature`` or ``chunk_size`` is not positive.

    References:
        Wu et al., https://arxiv.org/abs/1805.01978.

    Example:
        >>> import torch
        >>> from contrastive_kit.evaluation import knn_accuracy
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> labels = torch.tensor([7, 7, 3])
        >>> knn_accuracy(features, labels, features, labels, k=1)
        KNNResult(accuracy=1.0, k=1, temperature=0.1)
    """
    _check_sets(train_features, train_labels, test_features, test_labels)
    k, chunk_size = check_int("k", k), check_int("chunk_size", chunk_size, 1)
    if not 1 <= k <= len(train_features):
        raise ValueError(
            f"k must be from 1 to the number of training samples ({len(train_features)}), got {k}"
        )
    temperature = check_number("temperature", temperature)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")

    train_features, test_features = _prepared(train_features, test_features)
    bank = _unit_rows(train_features)
    classes, targets = torch.unique(train_labels, return_inverse=True)
    correct = torch.zeros((), dtype=torch.int64, device=bank.device)
    split = (torch.split(x, chunk_size) for x in (test_features, test_labels))
    chunks = list(zip(*split, strict=True))
    for queries, labels in chunks if progress is None else progress(chunks):
        similarity = _unit_rows(queries) @ bank.T
        nearest, index = similarity.topk(k, dim=1)
        # relative to the nearest neighbor, or a small temperature overflows
        weight = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(queries), len(classes))
        votes.scatter_add_(1, targets[index], weight)
        correct += (classes[votes.argmax(dim=1)] == labels).sum()
    return KNNResult(correct.item() / len(test_labels), k, temperature)


@_without_ambient_modes
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    l2: float | Sequence[float] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    validation_fraction: float = 0.2,
    max_iter: int = 100,
    seed: int = 0,
    progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
) -> LinearProbeResult:
    r"""Accuracy of a multinomial logistic regression on frozen features.

    Features are standardized with the training set's mean and standard deviation, then

    .. math:: \frac1N \sum_i \mathrm{CE}(W x_i + b, y_i) + \frac{\lambda}{2} \lVert W \rVert^2

    is minimized by L-BFGS over the whole set from zero. With several values of λ, each is fitted
    on a random part of the *training* set (each starting from the solution for the next larger
    λ), the one with the best accuracy on the rest is chosen, the largest on a tie, and fitted
    again on the whole training set. The test set is used once, for the returned accuracy.

    λ relates to scikit-learn's ``LogisticRegression`` as ``C = 1 / (λ N)``. The result depends
    on nothing but the arguments: no global random state is read or written. Memory is twice that
    of the training features (once with a single λ), time one pass over them per iteration.

    Args:
        train_features: (N, D), any float dtype; half precision is computed in float32.
        train_labels: (N,) integers, any values.
        test_features: (M, D).
        test_labels: (M,) integers. A class that the training set lacks counts as missed.
        l2: The penalty λ ≥ 0, or the values to choose from.
        validation_fraction: Part of the training set held out for that choice, in (0, 1). Not
            used with a single λ.
        max_iter: L-BFGS iterations per fit; a fit that reaches it is stopped early.
        seed: Seed of the split.
        progress: ``tqdm``, or what else iterates over a sequence and shows how far it is; here
            over the values of λ.

    Returns:
        ``LinearProbeResult`` with the accuracy in [0, 1], the chosen λ and the validation
        accuracies.

    Raises:
        TypeError: Features are not floating or labels are not integers.
        ValueError: Shapes or devices do not match, features are NaN or infinite, a set is empty,
            there are fewer than two classes, or an option is out of range.

    Example:
        >>> import torch
        >>> from contrastive_kit.evaluation import linear_probe
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(200) % 2
        >>> features = torch.randn(200, 5, generator=generator) + 4 * labels[:, None]
        >>> linear_probe(features[:100], labels[:100], features[100:], labels[100:]).accuracy
        1.0
    """
    _check_sets(train_features, train_labels, test_features, test_labels)
    values = [l2] if isinstance(l2, Real) else l2
    if isinstance(values, str | Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"l2 must be a number or a sequence of numbers, got {l2!r}")
    path = sorted({check_number("l2", value) for value in values}, reverse=True)
    if not path or not all(value >= 0 and math.isfinite(value) for value in path):
        raise ValueError(f"l2 must be finite and not negative, got {l2!r}")
    validation_fraction = check_number("validation_fraction", validation_fraction)
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction}")
    max_iter, seed = check_int("max_iter", max_iter, 1), check_int("seed", seed)
    classes, targets = torch.unique(train_labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("train_labels must hold at least 2 classes, got 1")

    train, test = _standardized(*_prepared(train_features, test_features))

    validation_accuracy: dict[float, float] = {}
    if len(path) > 1:
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(len(train), generator=generator, device="cpu").to(train.device)
        held_out, fitted = order.tensor_split([max(1, round(validation_fraction * len(train)))])
        if len(fitted) == 0:
            raise ValueError(
                f"validation_fraction leaves nothing to fit, got {validation_fraction} "
                f"with {len(train)} training samples"
            )
        part, part_targets = train[fitted], targets[fitted]
        layer = None
        for value in path if progress is None else progress(path):
            layer = _fit(part, part_targets, len(classes), value, max_iter=max_iter, start=layer)
            hits = layer(train[held_out]).argmax(dim=1) == targets[held_out]
            validation_accuracy[value] = hits.double().mean().item()
    best = max(path, key=lambda value: validation_accuracy.get(value, 0.0))
    layer = _fit(train, targets, len(classes), best, max_iter=max_iter)
    logits = layer(test)
    if not logits.isfinite().all():
        raise ValueError(
            "test_features lie so far from train_features that their logits overflow; scale both "
            "sets alike, or give float64"
        )
    predicted = classes[logits.argmax(dim=1)]
    accuracy = (predicted == test_labels).double().mean().item()
    return LinearProbeResult(accuracy, best, validation_accuracy)


@_without_ambient_modes
def retrieval(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    k: int | Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
    progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
) -> RetrievalResult:
    r"""Recall at k and mean average precision at R, of keys ordered by cosine similarity.

    With R the number of keys that match a query, and P(j) the share of matches among its j nearest,

    .. math:: \text{AP@R} = \frac1R \sum_{j=1}^{R} P(j)\, [\text{the j-th nearest is a match}]

    Matches are what has the same label: captions and their images, say. Without labels, row i of
    the queries and row i of the keys. With one match a query AP@R is recall at 1. Where a match and
    another key are equally similar, the match comes last: a collapsed encoder finds nothing.

    Args:
        queries: (N, D), any float dtype, not necessarily normalized. Half precision is computed in
            float32.
        keys: (M, D); None to search among the queries, each without itself, by ``query_labels``.
        query_labels: (N,) integers, any values; None for pairs by row, with M = N.
        key_labels: (M,) integers; None where there are no ``query_labels`` or no ``keys``.
        k: One or several numbers of neighbors, each from 1 to the number of keys of a query.
        chunk_size: Queries at a time. Memory is some five times ``chunk_size`` · M floats beside
            the features.
        progress: ``tqdm``, or what else iterates over a sequence and shows how far it is; here
            over the chunks.

    Returns:
        ``RetrievalResult``, of the queries that have a match.

    Raises:
        TypeError: Features are not floating, labels or ``k`` are not integers.
        ValueError: Shapes or devices do not match, features are NaN or infinite, a set is empty,
            no query has a match, labels are missing or too many, ``k`` or ``chunk_size`` is out of
            range.

    References:
        Musgrave et al., A Metric Learning Reality Check, arXiv 2003.08505, section 3.2 (AP@R).

    Example:
        >>> import torch
        >>> from contrastive_kit.evaluation import retrieval
        >>> captions = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> images = torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.6, 0.8]])
        >>> found = retrieval(captions, images, k=(1, 2))
        >>> {k: round(share, 4) for k, share in found.recall.items()}
        {1: 0.3333, 2: 0.6667}
        >>> retrieval(images, query_labels=torch.tensor([0, 1, 1]), k=1)
        RetrievalResult(recall={1: 1.0}, map_at_r=1.0, queries=2)
    """
    within = keys is None
    if within and (query_labels is None or key_labels is not None):
        raise ValueError("keys may be None only with query_labels and without key_labels")
    if not within and (query_labels is None) != (key_labels is None):
        given, missing = ("query", "key") if key_labels is None else ("key", "query")
        raise ValueError(f"{missing}_labels must be given with {given}_labels, got None")
    keys = queries if keys is None else keys
    key_labels = query_labels if within else key_labels
    by_row = query_labels is None or key_labels is None
    if query_labels is None or key_labels is None:
        query_labels, key_labels = (_row_numbers(x) for x in (queries, keys))
    names = ("keys", "key_labels", "queries", "query_labels")
    _check_sets(keys, key_labels, queries, query_labels, names)
    if by_row and len(keys) != len(queries):
        raise ValueError(
            f"keys must have {len(queries)} rows as queries, or labels that tell what matches; "
            f"got {len(keys)}"
        )
    chunk_size, n_keys = check_int("chunk_size", chunk_size, 1), len(keys) - within
    several = [k] if isinstance(k, Integral) else k
    if isinstance(several, str | Tensor) or not isinstance(several, Iterable):
        raise TypeError(f"k must be an integer or a sequence of integers, got {k!r}")
    ks = sorted({check_int("k", value) for value in several})
    if not ks or ks[0] < 1 or ks[-1] > n_keys:
        raise ValueError(f"k must be from 1 to the number of keys of a query ({n_keys}), got {k!r}")

    bank, rows = (_unit_rows(x) for x in _prepared(keys, queries))
    recall = bank.new_zeros(len(ks), dtype=torch.int64)
    precision, n_queries = bank.new_zeros((), dtype=torch.float64), 0
    chunks = torch.split(torch.arange(len(rows), device=bank.device), chunk_size)
    for chunk in chunks if progress is None else progress(chunks):
        match = query_labels[chunk, None] == key_labels
        similarity = rows[chunk] @ bank.T
        # The next smaller number puts matches behind others of the same similarity.
        lowest = similarity.new_tensor(-torch.inf)
        similarity = torch.where(match, similarity.nextafter(lowest), similarity)
        if within:
            match.scatter_(1, chunk[:, None], False)
            similarity.scatter_(1, chunk[:, None], -torch.inf)
        matches = match.sum(1)
        has_match = matches > 0
        depth = max(ks[-1], int(matches.max()))
        hits = match.gather(1, similarity.topk(depth, dim=1).indices)[has_match]
        found, matches = hits.cumsum(1), matches[has_match, None]
        recall += torch.stack([(found[:, j - 1] > 0).sum() for j in ks])
        rank = torch.arange(1, depth + 1, device=bank.device)
        precision += (found * hits / rank / matches * (rank <= matches)).sum(dtype=torch.float64)
        n_queries += len(hits)
    if n_queries == 0:
        raise ValueError("query_labels must have a match among the keys for at least one query")
    shares = [count / n_queries for count in recall.tolist()]
    return RetrievalResult(
        dict(zip(ks, shares, strict=True)), precision.item() / n_queries, n_queries
    )


class _Softmax(NamedTuple):
    """A fitted linear classifier: weight (C, D), bias (C,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _fit(
    x: Tensor,
    targets: Tensor,
    classes: int,
    l2: float,
    *,
    max_iter: int,
    start: _Softmax | None = None,
) -> _Softmax:
    """Multinomial logistic regression by L-BFGS from ``start``, or from zero."""
    weight = x.new_zeros(classes, x.shape[1]) if start is None else start.weight.clone()
    bias = x.new_zeros(classes) if start is None else start.bias.clone()
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer: Any = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        tolerance_grad=1e-5 if x.dtype == torch.float32 else 1e-9,
        tolerance_change=1e-9 if x.dtype == torch.float32 else 1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), targets)
        loss = loss + 0.5 * l2 * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return _Softmax(weight.detach(), bias.detach())


def _prepared(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets detached, in float64 if one of them is and in float32 otherwise."""
    dtype = compute_dtype(train, test)
    # an inference tensor cannot take part in the probe's training; its copy can
    train, test = (x.clone() if x.is_inference() else x.detach() for x in (train, test))
    return train.to(dtype), test.to(dtype)


def _standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets less the mean of the first, over its standard deviation."""
    # Dividing by a power of two near the largest entry is exact, and keeps squares in range.
    peak = train.abs().amax(dim=0)
    power = peak / (2 * torch.frexp(peak).mantissa)
    power = torch.where(peak < torch.finfo(peak.dtype).tiny, 1, power)
    train, test = train / power, test / power
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    # a feature that varies by no more than its rounding says nothing; do not blow that up
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
    return train.sub_(mean).div_(std), test.sub_(mean).div_(std)


def _unit_rows(features: Tensor) -> Tensor:
    """Rows of length 1 (zero rows stay zero), whatever their length was."""
    peak = features.abs().amax(dim=1, keepdim=True)
    return F.normalize(features / torch.where(peak > 0, peak, 1), dim=1)


def _check(features: Tensor, labels: Tensor, features_name: str, labels_name: str) -> None:
    for name, tensor in [(features_name, features), (labels_name, labels)]:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"{features_name} must have shape (N, D) with N and D of at least 1, "
            f"got {tuple(features.shape)}"
        )
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"{labels_name} must have shape ({len(features)},), one label for each row of "
            f"{features_name}; got {tuple(labels.shape)}"
        )


def _row_numbers(features: Tensor) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim == 0:
        return torch.empty(0, dtype=torch.int64)  # refused by the check of the features
    return torch.arange(len(features), device=features.device)


def _check_sets(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    names: Sequence[str] = ("train_features", "train_labels", "test_features", "test_labels"),
) -> None:
    tensors = (train_features, train_labels, test_features, test_labels)
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"features and labels must be on one device, got {', '.join(sorted(map(str, devices)))}"
        )
    for (features, labels), (features_name, labels_name) in [
        ((train_features, train_labels), names[:2]),
        ((test_features, test_labels), names[2:]),
    ]:
        _check(features, labels, features_name, labels_name)
        if not features.is_floating_point():
            raise TypeError(f"{features_name} must be floating point, got {features.dtype}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{labels_name} must be integers, got {labels.dtype}")
        if not features.isfinite().all():
            raise ValueError(f"{features_name} must be finite, got NaN or infinity")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"{names[2]} must have {train_features.shape[1]} columns as {names[0]}, "
            f"got {test_features.shape[1]}"
        )
