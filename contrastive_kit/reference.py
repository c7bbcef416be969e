"""The losses as their papers write them. Read this page first; every faster path must equal it.

Everything is materialised (memory O(N²), or O(N·K) with K negatives) and differentiated by
autograd alone, so these functions are the oracle of the tests and the ``reference`` backend. They
take what the formulas take and check nothing. Equation numbers are those of ``docs/nt_xent.md``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(views: Tensor, temperature: float | Tensor, ids: Tensor | None = None) -> Tensor:
    """NT-Xent, equation (1), of ``views`` (V, N, D): the loss of every anchor, (V, N)."""
    positive_logits, negative_logits = _pairs(views, temperature, ids)
    log_total = torch.cat([positive_logits, negative_logits], dim=1).logsumexp(1, keepdim=True)
    loss = -_mean_of_finite(positive_logits - log_total)
    return _zero_without_negatives(loss, negative_logits).view(views.shape[:2])


def decoupled_nt_xent(
    views: Tensor, temperature: float | Tensor, ids: Tensor | None = None
) -> Tensor:
    """NT-Xent without the positive in its denominator, equation (11): (V, N)."""
    positive_logits, negative_logits = _pairs(views, temperature, ids)
    loss = negative_logits.logsumexp(1) - _mean_of_finite(positive_logits)
    return _zero_without_negatives(loss, negative_logits).view(views.shape[:2])


def info_nce(query: Tensor, key: Tensor, temperature: float | Tensor, ids: Tensor) -> Tensor:
    """InfoNCE within a batch, equation (9): row i against every key with another id, (N,)."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = query @ key.T / temperature
    positive_logit = logits.diagonal()
    negative_logits = logits.masked_fill(ids[:, None] == ids[None, :], -torch.inf)
    return _cross_entropy(positive_logit, negative_logits)


def info_nce_with_negatives(
    query: Tensor, key: Tensor, negatives: Tensor, temperature: float | Tensor
) -> Tensor:
    """InfoNCE against explicit negatives, (K, D) shared or (N, K, D) per query: (N,)."""
    query, key, negatives = (F.normalize(x, dim=-1) for x in (query, key, negatives))
    positive_logit = (query * key).sum(1) / temperature
    negative_logits = (query[:, None] * negatives).sum(2) / temperature
    return _cross_entropy(positive_logit, negative_logits)


def kept_logsumexp(q: Tensor, k: Tensor, excluded: Tensor) -> Tensor:
    """Equation (2): the logsumexp over the kept entries of each row of ``q @ k.T``, (R,)."""
    return (q @ k.T).masked_fill(excluded, -torch.inf).logsumexp(1)


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


def _cross_entropy(positive_logit: Tensor, negative_logits: Tensor) -> Tensor:
    logits = torch.cat([positive_logit[:, None], negative_logits], dim=1)
    return logits.logsumexp(1) - positive_logit


def _mean_of_finite(logits: Tensor) -> Tensor:
    present = logits != -torch.inf
    return logits.masked_fill(~present, 0).sum(1) / present.sum(1)


def _zero_without_negatives(loss: Tensor, negative_logits: Tensor) -> Tensor:
    has_negatives = (negative_logits != -torch.inf).any(1)
    return torch.where(has_negatives, loss, 0)
