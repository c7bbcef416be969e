"""The losses as their papers write them. Read this page first; every faster path must equal it.

Everything is materialized (memory O(N²), or O(N·K) with K negatives) and differentiated by
autograd alone, so these functions are the oracle of the tests and the ``reference`` backend. They
take what the formulas take and check nothing; their ``options`` are what ``_cross_entropy`` takes.
Equation numbers are those of ``docs/nt_xent.md``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(
    views: Tensor,
    temperature: float | Tensor,
    ids: Tensor | None = None,
    **options: float,
) -> Tensor:
    """NT-Xent, equation (1), of ``views`` (V, N, D): the loss of every anchor, (V, N)."""
    positive_logits, negative_logits = _pairs(views, temperature, ids)
    loss = _cross_entropy(positive_logits, negative_logits, temperature, **options)
    return loss.view(views.shape[:2])


def decoupled_nt_xent(
    views: Tensor,
    temperature: float | Tensor,
    ids: Tensor | None = None,
    *,
    hardness: float = 0.0,
    positive_prior: float = 0.0,
    false_negative_margin: float = torch.inf,
) -> Tensor:
    """NT-Xent without the positive in its denominator, equation (12): (V, N)."""
    positive_logits, negative_logits = _pairs(views, temperature, ids)
    negative_logits = _without_false(
        positive_logits, negative_logits, temperature, false_negative_margin
    )
    negative_logits = _weighted_by_hardness(negative_logits, hardness)
    negative_logits = _debiased(positive_logits, negative_logits, temperature, positive_prior)
    loss = negative_logits.logsumexp(1) - _mean_of_finite(positive_logits)
    return _zero_without_negatives(loss, negative_logits).view(views.shape[:2])


def sog_clr(
    views: Tensor,
    temperature: float | Tensor,
    index: Tensor,
    normalizer: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """SogCLR, equation (32): the losses (V, N), and the new normalizers of the images, (N,).

    ``normalizer`` (N,) is that of each image before, 0 for one that has not been seen. The gradient
    is that of the mean over the negatives, divided by the normalizer.
    """
    positive_logits, negative_logits = _pairs(views, temperature, index)
    kept = negative_logits != -torch.inf
    mean = negative_logits.exp().sum(1) / kept.sum(1)
    before = normalizer.repeat(len(views))
    now = torch.where(before == 0, mean, (1 - gamma) * before + gamma * mean).detach()
    loss = now.log() + (mean - mean.detach()) / now - _mean_of_finite(positive_logits)
    loss = _zero_without_negatives(loss, negative_logits)
    return loss.view(views.shape[:2]), now.view(views.shape[:2]).mean(0)


def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    ids: Tensor,
    *,
    negatives: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_negatives: bool = False,
    key_negatives: bool = False,
    **options: float,
) -> Tensor:
    """InfoNCE within a batch, equation (9): row i against every key with another id, (N,).

    By equation (11) also against ``negatives``, (K, D) or (N, K, D), with another id, against the
    other queries, and its key against the other keys, if asked for.
    """
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    pairs = [(query, key)] + [(query, query)] * query_negatives + [(key, key)] * key_negatives
    same_id = ids[:, None] == ids[None, :]
    logits = [(a @ b.T / temperature).masked_fill(same_id, -torch.inf) for a, b in pairs]
    if negatives is not None:
        more = (query[:, None] * F.normalize(negatives, dim=-1)).sum(2) / temperature
        if negative_ids is not None:
            more = more.masked_fill(ids[:, None] == negative_ids, -torch.inf)
        logits.append(more)
    positive_logits = (query * key).sum(1, keepdim=True) / temperature
    return _cross_entropy(positive_logits, torch.cat(logits, 1), temperature, **options)


def info_nce_with_negatives(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    **options: float,
) -> Tensor:
    """InfoNCE against explicit negatives, (K, D) shared or (N, K, D) per query: (N,)."""
    query, key, negatives = (F.normalize(x, dim=-1) for x in (query, key, negatives))
    positive_logits = (query * key).sum(1, keepdim=True) / temperature
    negative_logits = (query[:, None] * negatives).sum(2) / temperature
    return _cross_entropy(positive_logits, negative_logits, temperature, **options)


def sup_con(
    views: Tensor, labels: Tensor, temperature: float | Tensor, variant: str = "out"
) -> Tensor:
    """SupCon, equation (19), (20) or (22) by ``variant``, of ``views`` (V, N, D): (V, N).

    NaN where an anchor has no positive.
    """
    u = F.normalize(views.flatten(0, 1), dim=1)
    label = labels.repeat(len(views))
    itself = torch.eye(len(u), dtype=torch.bool, device=u.device)
    logits = (u @ u.T / temperature).masked_fill(itself, -torch.inf)
    positive = (label[:, None] == label[None, :]) & ~itself
    return _of_several_positives(logits, positive, variant).view(views.shape[:2])


def sup_con_of_multi_hot(views: Tensor, labels: Tensor, temperature: float | Tensor) -> Tensor:
    """SupCon with positives weighted by shared labels (N, C), equation (23): (V, N).

    NaN where an anchor shares no label with another row.
    """
    u = F.normalize(views.flatten(0, 1), dim=1)
    labels = labels.to(u.dtype).repeat(len(views), 1)
    itself = torch.eye(len(u), dtype=torch.bool, device=u.device)
    logits = u @ u.T / temperature
    log_p = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    weights = (labels @ labels.T).masked_fill(itself, 0)
    total = weights.sum(1)
    loss = -(weights * log_p).sum(1) / total.masked_fill(total == 0, 1)
    return loss.masked_fill(total == 0, torch.nan).view(views.shape[:2])


def sup_con_between(
    query: Tensor,
    labels: Tensor,
    key: Tensor,
    key_labels: Tensor,
    temperature: float | Tensor,
    variant: str = "out",
) -> Tensor:
    """SupCon across two sides, by the same equations: each query against all keys, (N,).

    NaN where a query has no key of its label.
    """
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
    positive = labels[:, None] == key_labels[None, :]
    return _of_several_positives(logits, positive, variant)


def siglip(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    bias: float | Tensor,
    ids: Tensor | None = None,
) -> Tensor:
    """The sigmoid loss, equation (25): each row of ``z1`` against all of ``z2``, (N,)."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature + bias
    pair = torch.eye(len(z1), dtype=torch.bool, device=z1.device)
    loss = -F.logsigmoid(torch.where(pair, logits, -logits))
    if ids is not None:
        loss = loss.masked_fill((ids[:, None] == ids[None, :]) & ~pair, 0)
    return loss.sum(1)


def siglip_with_labels(
    z1: Tensor,
    labels: Tensor,
    z2: Tensor,
    z2_labels: Tensor,
    temperature: float | Tensor,
    bias: float | Tensor,
    *,
    balance_positives: bool = False,
) -> Tensor:
    """The sigmoid loss whose matches are the pairs of equal label, equation (28) or (29): (N,)."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature + bias
    match = labels[:, None] == z2_labels[None, :]
    loss = -F.logsigmoid(torch.where(match, logits, -logits))
    if balance_positives:
        # An end without a match has none to weigh.
        of_row, of_column = (match.sum(dim, True, dtype=loss.dtype).clamp(1) for dim in (1, 0))
        loss = torch.where(match, loss * (1 / of_row + 1 / of_column) / 2, loss)
    return loss.sum(1)


def similarity_distillation(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    temperature: float | Tensor,
    teacher_temperature: float,
) -> Tensor:
    """Cross entropy against the distribution of a teacher, equation (30): (N,)."""
    query, key, teacher_query, teacher_key = (
        F.normalize(x, dim=1) for x in (query, key, teacher_query, teacher_key)
    )
    target = (teacher_query @ teacher_key.T / teacher_temperature).softmax(1).detach()
    return -(target * (query @ key.T / temperature).log_softmax(1)).sum(1)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Equation (18): the mean of ``losses`` (..., N) weighted by ``weights`` (N,)."""
    weights = weights.expand_as(losses)
    return (weights * losses).sum() / weights.sum()


def kept_logsumexp(q: Tensor, k: Tensor, excluded: Tensor, limits: Tensor | None = None) -> Tensor:
    """Equation (2): the logsumexp over the kept entries of each row of ``q @ k.T``, (R,).

    Entries above the limit of their row, (R,), are left out too.
    """
    logits = q @ k.T
    if limits is not None:
        excluded = excluded | (logits > limits[:, None])
    return logits.masked_fill(excluded, -torch.inf).logsumexp(1)


def kept_softplus_sum(q: Tensor, k: Tensor, bias: Tensor, excluded: Tensor) -> Tensor:
    """Equation (26): the sum of softplus over the kept entries of ``q @ k.T + bias``, (R,).

    The bias is one number, or one of each row, (R, 1).
    """
    return -F.logsigmoid(-(q @ k.T + bias)).masked_fill(excluded, 0).sum(1)


def _pairs(views: Tensor, temperature: float | Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits of the positive and of the negative pairs, (V·N, V·N) each, -inf where there is none.

    The positives of an anchor are the other views of its image, its negatives every view of every
    image with another id; without ``ids`` each image is its own.
    """
    n_views, n, _ = views.shape
    image = torch.arange(n, device=views.device).repeat(n_views)
    identity = image if ids is None else ids.repeat(n_views)
    u = F.normalize(views.flatten(0, 1), dim=1)
    logits = u @ u.T / temperature
    itself = torch.eye(len(u), dtype=torch.bool, device=u.device)
    same_image = image[:, None] == image[None, :]
    same_id = identity[:, None] == identity[None, :]
    return (
        logits.masked_fill(~same_image | itself, -torch.inf),
        logits.masked_fill(same_id, -torch.inf),
    )


def _cross_entropy(
    positive_logits: Tensor,
    negative_logits: Tensor,
    temperature: float | Tensor,
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    positive_prior: float = 0.0,
    margin: float = 0.0,
    false_negative_margin: float = torch.inf,
) -> Tensor:
    """Cross entropy between the softmax over all pairs of a row and the target on its positives.

    With ``label_smoothing`` a part of the target is spread over all pairs, equation (13); with
    ``margin`` the positives have to be ahead by it, equation (16). With ``false_negative_margin``
    the negatives that are ahead by more are left out, equation (17).
    """
    negative_logits = _without_false(
        positive_logits, negative_logits, temperature, false_negative_margin
    )
    negative_logits = _weighted_by_hardness(negative_logits, hardness)
    negative_logits = _debiased(positive_logits, negative_logits, temperature, positive_prior)
    positive_logits = positive_logits - margin / temperature
    logits = torch.cat([positive_logits, negative_logits], dim=1)
    log_total = logits.logsumexp(1)
    of_positives = log_total - _mean_of_finite(positive_logits)
    of_all = log_total - _mean_of_finite(logits)
    loss = (1 - label_smoothing) * of_positives + label_smoothing * of_all
    return _zero_without_negatives(loss, negative_logits)


def _without_false(
    positive_logits: Tensor,
    negative_logits: Tensor,
    temperature: float | Tensor,
    margin: float,
) -> Tensor:
    """Negatives without those more similar than every positive by more than ``margin``."""
    limit = positive_logits.amax(1, keepdim=True) + margin / temperature
    return negative_logits.masked_fill(negative_logits > limit, -torch.inf)


def _of_several_positives(logits: Tensor, positive: Tensor, variant: str) -> Tensor:
    """The losses of SupCon from logits, -inf where there is no pair, and which are positive."""
    if variant == "pairwise":
        negatives = logits.masked_fill(positive, -torch.inf).logsumexp(1, keepdim=True)
        log_p = torch.where(positive, logits - torch.logaddexp(logits, negatives), -torch.inf)
        return -_mean_of_finite(log_p)
    log_p = logits - logits.logsumexp(1, keepdim=True)
    if variant == "in":
        n_positives = positive.sum(1, dtype=log_p.dtype)
        loss = n_positives.log() - log_p.masked_fill(~positive, -torch.inf).logsumexp(1)
        return loss.masked_fill(n_positives == 0, torch.nan)
    return -_mean_of_finite(log_p.masked_fill(~positive, -torch.inf))


def _weighted_by_hardness(negative_logits: Tensor, hardness: float) -> Tensor:
    """Equation (14): each negative counts exp(β s) over the mean of exp(β s) of its row."""
    if hardness == 0:
        return negative_logits
    present = negative_logits != -torch.inf
    log_share = (hardness * negative_logits).log_softmax(1)
    n_negatives = present.sum(1, keepdim=True, dtype=log_share.dtype)
    weighted = negative_logits + log_share + n_negatives.log()
    return weighted.masked_fill(~present, -torch.inf)


def _debiased(
    positive_logits: Tensor,
    negative_logits: Tensor,
    temperature: float | Tensor,
    positive_prior: float,
) -> Tensor:
    """Equation (15): one logit for all negatives, less what positives among them would add."""
    if positive_prior == 0:
        return negative_logits
    n_positives, n_negatives = (
        (logits != -torch.inf).sum(1, keepdim=True, dtype=logits.dtype)
        for logits in (positive_logits, negative_logits)
    )
    mean_positive = positive_logits.exp().sum(1, keepdim=True) / n_positives
    total = negative_logits.exp().sum(1, keepdim=True)
    total = (total - positive_prior * n_negatives * mean_positive) / (1 - positive_prior)
    smallest = torch.exp(-torch.ones_like(total) / temperature)
    return torch.maximum(total, n_negatives * smallest).log()


def _mean_of_finite(logits: Tensor) -> Tensor:
    present = logits != -torch.inf
    return logits.masked_fill(~present, 0).sum(1) / present.sum(1)


def _zero_without_negatives(loss: Tensor, negative_logits: Tensor) -> Tensor:
    has_negatives = (negative_logits != -torch.inf).any(1)
    return torch.where(has_negatives, loss, 0)
