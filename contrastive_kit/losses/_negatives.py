"""Negatives of ``info_nce``: their check, those of each query alone, and their sums."""

import torch
from torch import Tensor

from contrastive_kit.losses._common import weighted_by_hardness
from contrastive_kit.losses._kept import kept_counts, kept_sums
from contrastive_kit.ops import Exclusion, LogitStatistics, row_statistics

Found = tuple[Tensor, LogitStatistics | None]


def check_own_keys(key: Tensor, negatives: Tensor) -> None:
    """Raise where shared negatives begin or end with the keys, if that can be seen for nothing.

    On a GPU, and in a graph, it would have to be waited for. Keys that are all alike, as of a
    collapsed encoder, may well have been seen before.
    """
    plain = type(key) is Tensor and type(negatives) is Tensor and key.device.type == "cpu"
    if not plain or negatives.ndim != 2 or torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        return
    n, same = len(key), key.to(negatives.dtype)
    again = torch.equal(negatives[:n], same) or torch.equal(negatives[-n:], same)
    if again and not torch.equal(key, key[:1].expand_as(key)):
        raise ValueError(
            "negatives must not hold the keys of the same call, which would count each positive "
            "twice; omit negatives to compare with the other keys, or give the rows of the queue "
            "alone"
        )


def per_query_logsumexp(
    queries: Tensor, negatives: Tensor, hardness: float, return_stats: bool
) -> Found:
    """The logsumexp of queries (N, D) with K negatives each, (N, K, D), and its statistics."""
    dtype = torch.promote_types(queries.dtype, negatives.dtype)
    with torch.autocast(queries.device.type, enabled=False):
        logits = torch.einsum("nd,nkd->nk", queries.to(dtype), negatives.to(dtype))
    plain = weighted = logits.logsumexp(1)
    if hardness:
        counts = torch.full_like(plain, logits.shape[1], dtype=torch.int64)
        weighted = weighted_by_hardness(counts, lambda c: (c * logits).logsumexp(1), hardness)
    stats = None
    if return_stats:
        plain = plain.detach()
        stats = LogitStatistics(plain, *row_statistics(logits.detach(), plain, 1).unbind(0))
    return weighted, stats


def totals_of(queries: Tensor, columns: Tensor, exclusion: Exclusion) -> tuple[Tensor, Tensor]:
    """Sum of the logits of the negatives of each query, and how many they are."""
    n, device = queries.shape[0], queries.device
    if columns.ndim == 3:
        counts = torch.full((n,), columns.shape[1], device=device)
        return (queries * columns.sum(1)).sum(1), counts
    counts = kept_counts(n, columns.shape[0], exclusion, device)
    return (queries * kept_sums(n, columns, exclusion)).sum(1), counts
