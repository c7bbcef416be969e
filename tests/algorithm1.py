"""The losses as loops over numpy scalars, after Algorithm 1 of the SimCLR paper.

Independent of torch and of ``contrastive_kit.reference``: no masks, no logsumexp, float64.
"""

import math

import numpy as np


def _cosine(a, b):
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths else 0.0


def nt_xent(
    views,
    temperature,
    ids=None,
    decoupled=False,
    label_smoothing=0.0,
    hardness=0.0,
    positive_prior=0.0,
    margin=0.0,
    false_negative_margin=None,
):
    """Loss of every anchor, (V, N), of ``views`` (V, N, D)."""
    views = np.asarray(views, dtype=np.float64)
    n_views, n, _ = views.shape
    ids = list(range(n)) if ids is None else [int(i) for i in ids]
    losses = np.zeros((n_views, n))
    for v in range(n_views):
        for i in range(n):
            logits = {
                (w, j): _cosine(views[v, i], views[w, j]) / temperature
                for w in range(n_views)
                for j in range(n)
            }
            positives = [logits[w, i] for w in range(n_views) if w != v]
            negatives = [s for (_, j), s in logits.items() if ids[j] != ids[i]]
            negatives = _without_false(positives, negatives, temperature, false_negative_margin)
            if not negatives:
                continue
            positives, negatives = _changed(
                positives, negatives, temperature, hardness, positive_prior, margin
            )
            losses[v, i] = _loss(positives, negatives, decoupled, label_smoothing)
    return losses


def sog_clr(views, temperature, index, normalizers, gamma):
    """Losses (V, N) of a step of SogCLR, and the normalizers of all images after it, a dict."""
    views = np.asarray(views, dtype=np.float64)
    n_views, n, _ = views.shape
    losses, own = np.zeros((n_views, n)), {}
    for v in range(n_views):
        for i in range(n):
            negatives = [
                math.exp(_cosine(views[v, i], views[w, j]) / temperature)
                for w in range(n_views)
                for j in range(n)
                if int(index[j]) != int(index[i])
            ]
            if not negatives:
                continue
            mean = math.fsum(negatives) / len(negatives)
            before = normalizers.get(int(index[i]))
            now = mean if before is None else (1 - gamma) * before + gamma * mean
            own.setdefault(i, []).append(now)
            positives = [_cosine(views[v, i], views[w, i]) for w in range(n_views) if w != v]
            losses[v, i] = math.log(now) - np.mean(positives) / temperature
    after = dict(normalizers)
    for image in {int(i) for i in index}:
        of_image = [np.mean(own[i]) for i in own if int(index[i]) == image]
        if of_image:
            after[image] = max(of_image)
    return losses, after


def info_nce(
    query,
    key,
    temperature,
    negatives=None,
    ids=None,
    label_smoothing=0.0,
    hardness=0.0,
    in_batch=None,
    negative_ids=None,
    query_negatives=False,
    key_negatives=False,
    positive_prior=0.0,
    margin=0.0,
    false_negative_margin=None,
):
    """Loss of every query, (N,); ``negatives`` is None, (K, D) or (N, K, D).

    The other pairs of the batch are negatives without ``negatives``, or as ``in_batch`` says.
    """
    query, key = np.asarray(query, dtype=np.float64), np.asarray(key, dtype=np.float64)
    n = len(query)
    ids = list(range(n)) if ids is None else [int(i) for i in ids]
    in_batch = negatives is None if in_batch is None else in_batch
    losses = np.zeros(n)
    for i in range(n):
        pairs = []
        for j in range(n):
            if ids[j] == ids[i]:
                continue
            if in_batch:
                pairs.append((query[i], key[j]))
            if query_negatives:
                pairs.append((query[i], query[j]))
            if key_negatives:
                pairs.append((key[i], key[j]))
        if negatives is not None:
            mine = np.asarray(negatives, dtype=np.float64)
            mine = mine if mine.ndim == 2 else mine[i]
            their_ids = [None] * len(mine)
            if negative_ids is not None:
                their_ids = np.asarray(negative_ids)
                their_ids = their_ids if their_ids.ndim == 1 else their_ids[i]
            pairs += [(query[i], c) for c, k in zip(mine, their_ids, strict=True) if k != ids[i]]
        if not pairs:
            continue
        positive = _cosine(query[i], key[i]) / temperature
        others = [_cosine(a, b) / temperature for a, b in pairs]
        others = _without_false([positive], others, temperature, false_negative_margin)
        if not others:
            continue
        positives, others = _changed(
            [positive], others, temperature, hardness, positive_prior, margin
        )
        losses[i] = _loss(positives, others, False, label_smoothing)
    return losses


def _without_false(positives, negatives, temperature, margin):
    """The negatives that no positive is behind by more than ``margin``, None for all."""
    if margin is None:
        return negatives
    return [s for s in negatives if (s - max(positives)) * temperature <= margin]


def sup_con(views, labels, temperature, variant="out"):
    """Loss of every anchor, (V, N), 0 for one without positives."""
    views = np.asarray(views, dtype=np.float64)
    n_views, n, _ = views.shape
    rows = [(v, i) for v in range(n_views) for i in range(n)]
    losses = np.zeros((n_views, n))
    for v, i in rows:
        logits = {a: _cosine(views[v, i], views[a]) / temperature for a in rows if a != (v, i)}
        same = [int(labels[j]) == int(labels[i]) for _, j in logits]
        losses[v, i] = _of_several_positives(list(logits.values()), same, variant)
    return losses


def sup_con_of_multi_hot(views, labels, temperature):
    """Loss of every anchor, (V, N), whose positives count by the product of their labels."""
    views, labels = np.asarray(views, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    n_views, n, _ = views.shape
    rows = [(v, i) for v in range(n_views) for i in range(n)]
    losses = np.zeros((n_views, n))
    for v, i in rows:
        logits = {a: _cosine(views[v, i], views[a]) / temperature for a in rows if a != (v, i)}
        log_total = _log_sum_exp(list(logits.values()))
        weights = {(w, j): float(labels[i] @ labels[j]) for w, j in logits}
        total = math.fsum(weights.values())
        if total:
            losses[v, i] = math.fsum(weights[a] * (log_total - s) for a, s in logits.items())
            losses[v, i] /= total
    return losses


def sup_con_between(query, labels, key, key_labels, temperature, variant="out"):
    """Loss of every query among all keys, (N,), 0 for one without a key of its label."""
    query, key = np.asarray(query, dtype=np.float64), np.asarray(key, dtype=np.float64)
    losses = np.zeros(len(query))
    for i, z in enumerate(query):
        logits = [_cosine(z, k) / temperature for k in key]
        same = [int(label) == int(labels[i]) for label in key_labels]
        losses[i] = _of_several_positives(logits, same, variant)
    return losses


def siglip(z1, z2, temperature, bias, ids=None):
    """Loss of every row of ``z1``, (N,)."""
    z1, z2 = np.asarray(z1, dtype=np.float64), np.asarray(z2, dtype=np.float64)
    losses = np.zeros(len(z1))
    for i in range(len(z1)):
        for j in range(len(z2)):
            if ids is not None and i != j and int(ids[i]) == int(ids[j]):
                continue
            logit = _cosine(z1[i], z2[j]) / temperature + bias
            losses[i] += math.log1p(math.exp(-logit if i == j else logit))
    return losses


def siglip_with_labels(z1, labels, z2, z2_labels, temperature, bias, balance_positives=False):
    """Loss of every row of ``z1``, (N,), where the pairs of equal label match."""
    z1, z2 = np.asarray(z1, dtype=np.float64), np.asarray(z2, dtype=np.float64)
    labels, z2_labels = [int(x) for x in labels], [int(x) for x in z2_labels]
    losses = np.zeros(len(z1))
    for i in range(len(z1)):
        for j in range(len(z2)):
            logit = _cosine(z1[i], z2[j]) / temperature + bias
            if labels[i] != z2_labels[j]:
                losses[i] += math.log1p(math.exp(logit))
                continue
            weight = 1.0
            if balance_positives:
                weight = (1 / z2_labels.count(labels[i]) + 1 / labels.count(z2_labels[j])) / 2
            losses[i] += weight * math.log1p(math.exp(-logit))
    return losses


def similarity_distillation(query, key, teacher_query, teacher_key, temperature, teacher_tau):
    """Loss of every query, (N,): cross entropy against the softmax of the teacher."""
    query, key, teacher_query, teacher_key = (
        np.asarray(x, dtype=np.float64) for x in (query, key, teacher_query, teacher_key)
    )
    losses = np.zeros(len(query))
    for i in range(len(query)):
        logits = [_cosine(query[i], k) / temperature for k in key]
        taught = [_cosine(teacher_query[i], k) / teacher_tau for k in teacher_key]
        log_total, log_taught = _log_sum_exp(logits), _log_sum_exp(taught)
        losses[i] = math.fsum(
            math.exp(t - log_taught) * (log_total - s) for t, s in zip(taught, logits, strict=True)
        )
    return losses


def _of_several_positives(logits, is_positive, variant):
    """One anchor: out, in or pairwise; 0 without positives."""
    positives = [s for s, positive in zip(logits, is_positive, strict=True) if positive]
    negatives = [s for s, positive in zip(logits, is_positive, strict=True) if not positive]
    if not positives:
        return 0.0
    if variant == "pairwise":
        log_p = [p - _log_sum_exp([p, *negatives]) for p in positives]
    else:
        log_p = [p - _log_sum_exp(logits) for p in positives]
    if variant == "in":
        return -math.log(math.fsum(math.exp(x) for x in log_p) / len(log_p))
    return -math.fsum(log_p) / len(log_p)


def _changed(positives, negatives, temperature, hardness, positive_prior, margin):
    """The logits of one anchor, as the options change them."""
    if hardness:
        importance = [math.exp(hardness * s) for s in negatives]
        mean = math.fsum(importance) / len(importance)
        negatives = [s + math.log(w / mean) for s, w in zip(negatives, importance, strict=True)]
    if positive_prior:
        n = len(negatives)
        mean = math.fsum(math.exp(s) for s in positives) / len(positives)
        total = math.fsum(math.exp(s) for s in negatives) - positive_prior * n * mean
        negatives = [math.log(max(total / (1 - positive_prior), n * math.exp(-1 / temperature)))]
    return [s - margin / temperature for s in positives], negatives


def _loss(positives, negatives, decoupled, label_smoothing):
    """One anchor: cross entropy with a target over its candidates, written out."""
    log_total = _log_sum_exp(negatives if decoupled else negatives + positives)
    n_candidates = len(positives) + len(negatives)
    target = [(1 - label_smoothing) / len(positives) + label_smoothing / n_candidates] * len(
        positives
    ) + [label_smoothing / n_candidates] * len(negatives)
    return math.fsum(
        t * (log_total - s) for t, s in zip(target, positives + negatives, strict=True)
    )


def _log_sum_exp(values):
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(v - largest) for v in values))
