"""Every two options of a loss: together they are the loops, or they are refused by name."""

from itertools import combinations

import algorithm1
import numpy as np
import pytest
import torch

from contrastive_kit.functional import info_nce, nt_xent, siglip, similarity_distillation, sup_con

N, D, TAU = 7, 4, 0.3
IDS = torch.tensor([3, 3, -1, 8, 5, 8, 8])
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 0.1, 1.0], dtype=torch.float64)
TAUS = torch.linspace(0.1, 0.9, N, dtype=torch.float64)
SOFTMAX = {
    "label_smoothing": {"label_smoothing": 0.2},
    "hardness": {"hardness": 0.7},
    "positive_prior": {"positive_prior": 0.1},
    "margin": {"margin": 0.2},
    "false_negative_margin": {"false_negative_margin": 0.1},
}
SHARED = {
    "sample_weight": {"sample_weight": WEIGHTS},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "return_stats": {"return_stats": True},
}
REFUSED_SOFTMAX = [
    ("label_smoothing", "hardness"),
    ("label_smoothing", "positive_prior"),
    ("label_smoothing", "false_negative_margin"),
    ("positive_prior", "false_negative_margin"),
]


def embeddings(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def pairs_of(options, refused):
    """Each two names, and whether they are refused together; without two values of one option."""
    refused = {frozenset(pair) for pair in refused}
    unknown = {name for pair in refused for name in pair} - set(options)
    assert not unknown
    found = []
    for a, b in combinations(options, 2):
        clash = [
            key
            for key in set(options[a]) & set(options[b])
            if options[a][key] is not options[b][key]
        ]
        if not clash:
            both = {**options[a], **options[b]}
            found.append(pytest.param(both, {a, b} in refused, id=f"{a}, {b}"))
    return found


def check(call, oracle, options, refused):
    """``oracle`` is given the options of the formula, and answers with the losses (..., N)."""
    if refused:
        with pytest.raises((ValueError, TypeError)):
            call(**options)
        return
    formula = {k: v for k, v in options.items() if k not in ("reduction", "return_stats")}
    weights = formula.pop("sample_weight", None)
    losses = torch.as_tensor(oracle(**formula))
    total = losses.numel()
    if weights is not None:
        losses, total = losses * weights, weights.sum() * total / N
    reduction = options.get("reduction", "mean")
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / total}[reduction]
    actual = call(**options)
    if options.get("return_stats"):
        actual, stats = actual
        assert all(x.isfinite() for x in stats)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


VIEWS = embeddings(3, N, D) + embeddings(N, D)
NT_XENT = {
    "three views": {"views": 3},
    "ids": {"ids": IDS},
    "decoupled": {"decoupled": True},
    **SOFTMAX,
    **SHARED,
}
REFUSED_NT_XENT = [*REFUSED_SOFTMAX, ("decoupled", "label_smoothing"), ("decoupled", "margin")]


@pytest.mark.parametrize(("options", "refused"), pairs_of(NT_XENT, REFUSED_NT_XENT))
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_nt_xent(options, refused, backend):
    def call(views=2, **options):
        return nt_xent(*VIEWS[:views], temperature=TAU, backend=backend, **options)

    def oracle(views=2, **options):
        return algorithm1.nt_xent(VIEWS[:views], TAU, **options)

    check(call, oracle, options, refused)


QUERY, KEY = VIEWS[:2]
QUEUE, MINED = embeddings(9, D), embeddings(N, 3, D)
QUEUE_IDS, MINED_IDS = torch.arange(9), torch.arange(3 * N).view(N, 3) % 9
BATCH = {"in_batch_negatives": True}
INFO_NCE = {
    "symmetric": {"symmetric": True},
    "queue": {"negatives": QUEUE},
    "queue and batch": {"negatives": QUEUE, **BATCH},
    "mined": {"negatives": MINED},
    "mined and batch": {"negatives": MINED, **BATCH},
    "ids of the queue": {"negatives": QUEUE, "negative_ids": QUEUE_IDS, "ids": IDS},
    "ids of the mined": {"negatives": MINED, "negative_ids": MINED_IDS, "ids": IDS},
    "query_negatives": {"query_negatives": True},
    "key_negatives": {"key_negatives": True},
    "ids": {"ids": IDS},
    "temperatures": {"temperature": TAUS},
    **SOFTMAX,
    **SHARED,
}
WITHOUT_BATCH = ["queue", "mined", "ids of the queue", "ids of the mined"]
REFUSED_INFO_NCE = [
    *REFUSED_SOFTMAX,
    *((a, b) for a in WITHOUT_BATCH for b in ("symmetric", "query_negatives", "key_negatives")),
    ("queue", "ids"),
    ("mined", "ids"),
]


def info_nce_loops(temperature=TAU, symmetric=False, in_batch_negatives=None, **options):
    def directions(tau):
        if not symmetric:
            return algorithm1.info_nce(QUERY, KEY, tau, in_batch=in_batch_negatives, **options)
        of_batch = {k: v for k, v in options.items() if k not in ("negatives", "negative_ids")}
        same_side = {k: of_batch.pop(k, False) for k in ("query_negatives", "key_negatives")}
        given = {k: v for k, v in options.items() if k in ("negatives", "negative_ids")}
        queries = same_side["query_negatives"], same_side["key_negatives"]
        rows = algorithm1.info_nce(
            QUERY, KEY, tau, in_batch=True, query_negatives=queries[0], **of_batch, **given
        )
        columns = algorithm1.info_nce(KEY, QUERY, tau, query_negatives=queries[1], **of_batch)
        return np.stack([rows, columns])

    if not isinstance(temperature, torch.Tensor):
        return directions(temperature)
    return np.stack([directions(float(t))[..., i] for i, t in enumerate(temperature)], -1)


@pytest.mark.parametrize(("options", "refused"), pairs_of(INFO_NCE, REFUSED_INFO_NCE))
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_info_nce(options, refused, backend):
    def call(temperature=TAU, **options):
        return info_nce(QUERY, KEY, temperature=temperature, backend=backend, **options)

    check(call, info_nce_loops, options, refused)


LABELS, KEYS, KEY_LABELS = torch.arange(N) % 3, embeddings(8, D), torch.arange(8) % 3
MULTI_HOT = torch.tensor(
    [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]]
)
ACROSS = {"keys": KEYS, "key_labels": KEY_LABELS, "views": 1}
SUP_CON = {
    "two views": {"views": 2},
    "in": {"variant": "in"},
    "pairwise": {"variant": "pairwise"},
    "keys": ACROSS,
    "multi-hot": {"labels": MULTI_HOT},
    **SHARED,
}
REFUSED_SUP_CON = [
    ("multi-hot", "in"),
    ("multi-hot", "pairwise"),
    ("multi-hot", "keys"),
    ("multi-hot", "return_stats"),
]


@pytest.mark.parametrize(("options", "refused"), pairs_of(SUP_CON, REFUSED_SUP_CON))
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_sup_con(options, refused, backend):
    def call(views=1, labels=LABELS, **options):
        given = VIEWS[:views]
        return sup_con(*given, labels=labels, temperature=TAU, backend=backend, **options)

    def oracle(views=1, labels=LABELS, keys=None, key_labels=None, variant="out"):
        if labels.ndim == 2:
            return algorithm1.sup_con_of_multi_hot(VIEWS[:views], labels, TAU)
        if keys is not None:
            rows = algorithm1.sup_con_between(VIEWS[0], labels, keys, key_labels, TAU, variant)
            return rows[None]
        return algorithm1.sup_con(VIEWS[:views], labels, TAU, variant)

    check(call, oracle, options, refused)


SYMMETRIC = {
    "in": {"variant": "in"},
    "pairwise": {"variant": "pairwise"},
    **SHARED,
    "two views": {"views": 2},
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_sup_con_in_both_directions(name):
    """The mean over both is that of the two; weights, which keys have none of, are refused."""

    def call(views=1, **options):
        return sup_con(
            *VIEWS[:views], labels=LABELS, keys=KEYS, key_labels=KEY_LABELS, symmetric=True,
            temperature=TAU, **options,
        )  # fmt: skip

    options = SYMMETRIC[name]
    if name == "sample_weight":
        with pytest.raises(ValueError, match="sample_weight"):
            call(**options)
        return
    variant, views = options.get("variant", "out"), options.get("views", 1)
    images, labels = VIEWS[:views].flatten(0, 1), LABELS.repeat(views)
    rows = algorithm1.sup_con_between(images, labels, KEYS, KEY_LABELS, TAU, variant)
    columns = algorithm1.sup_con_between(KEYS, KEY_LABELS, images, labels, TAU, variant)
    actual = call(**options)
    actual = actual[0] if name == "return_stats" else actual
    expected = {
        "sum": rows.sum() + columns.sum(),
        "none": np.concatenate([rows, columns]),
    }.get(options.get("reduction"), (rows.mean() + columns.mean()) / 2)
    if name == "none" and isinstance(actual, tuple):
        actual = torch.cat(actual)
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=1e-11, atol=1e-12)


SIGLIP = {
    "ids": {"ids": IDS},
    "labels": {"labels": LABELS},
    "captions": {"z2": KEYS, "labels": LABELS, "z2_labels": KEY_LABELS},
    "balanced": {"labels": LABELS, "balance_positives": True},
    "temperatures": {"temperature": TAUS},
    **SHARED,
}
REFUSED_SIGLIP = [
    *(("ids", x) for x in ("labels", "captions", "balanced")),
    *(("temperatures", x) for x in ("labels", "captions", "balanced")),
]


@pytest.mark.parametrize(("options", "refused"), pairs_of(SIGLIP, REFUSED_SIGLIP))
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_siglip(options, refused, backend):
    def call(z2=KEY, temperature=TAU, **options):
        return siglip(
            QUERY, z2, temperature=temperature, logit_bias=-1.0, backend=backend, **options
        )

    def oracle(
        z2=KEY, temperature=TAU, ids=None, labels=None, z2_labels=None, balance_positives=False
    ):
        if labels is not None:
            z2_labels = labels if z2_labels is None else z2_labels
            return algorithm1.siglip_with_labels(
                QUERY, labels, z2, z2_labels, temperature, -1.0, balance_positives
            )
        if isinstance(temperature, torch.Tensor):
            rows = [algorithm1.siglip(QUERY, z2, float(t), -1.0, ids) for t in temperature]
            return np.stack([row[i] for i, row in enumerate(rows)])
        return algorithm1.siglip(QUERY, z2, temperature, -1.0, ids)

    check(call, oracle, options, refused)


TEACHER = embeddings(N, 3), embeddings(N, 3) + 1
DISTILLATION = {
    "symmetric": {"symmetric": True},
    "sample_weight": {"sample_weight": WEIGHTS},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
}


@pytest.mark.parametrize(
    ("options", "refused"), pairs_of(DISTILLATION, [("symmetric", "sample_weight")])
)
def test_similarity_distillation(options, refused):
    taus = {"temperature": TAU, "teacher_temperature": 0.1}

    def call(**options):
        return similarity_distillation(QUERY, KEY, *TEACHER, **taus, **options)

    def oracle(symmetric=False):
        rows = algorithm1.similarity_distillation(QUERY, KEY, *TEACHER, TAU, 0.1)
        if not symmetric:
            return rows
        columns = algorithm1.similarity_distillation(KEY, QUERY, *TEACHER[::-1], TAU, 0.1)
        return np.concatenate([rows, columns])

    check(call, oracle, options, refused)
