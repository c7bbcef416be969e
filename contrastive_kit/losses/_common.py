"""What losses share: from logits to losses, weights, reductions."""

import math
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit._checks import (
    check_alike,
    check_dense,
    check_device,
    check_embeddings,
    check_reverse_mode,
)
from contrastive_kit.losses._negatives import Found, Negatives
from contrastive_kit.losses._options import Options, Scalar
from contrastive_kit.losses._stats import ContrastiveStats, contrastive_stats
from contrastive_kit.ops import PairStatistics, rounds_float32

LossOutput = Tensor | tuple[Tensor, ContrastiveStats]


def with_statistics(
    loss: Tensor, found: PairStatistics | None, temperature: float | Tensor
) -> LossOutput:
    """The loss, and what its op has found beside it as ``ContrastiveStats``."""
    return loss if found is None else (loss, contrastive_stats(*found, temperature))


def check_views(views: tuple[Tensor, ...], gather: bool) -> None:
    """Raise unless all views (N, D) are alike, with negatives here or on other processes."""
    names = ["z1", "z2", *(f"more_views[{i}]" for i in range(len(views) - 2))]
    for name, view in zip(names, views, strict=True):
        check_embeddings(name, view)
        check_alike(name, view, "z1", views[0])
        check_reverse_mode(name, view)
    n = views[0].shape[0]
    if n < 2 and not gather:
        raise ValueError(f"z1 must have at least 2 rows, or there are no negatives; got {n}")


def check_sample_weight(sample_weight: Tensor, n: int, other_name: str, other: Tensor) -> None:
    """Raise unless ``sample_weight`` holds ``n`` floating numbers on the device of ``other``."""
    if not isinstance(sample_weight, Tensor) or not sample_weight.is_floating_point():
        got = getattr(sample_weight, "dtype", type(sample_weight).__name__)
        raise TypeError(f"sample_weight must be a floating point tensor of shape ({n},), got {got}")
    if sample_weight.shape != (n,):
        raise ValueError(
            f"sample_weight must have shape ({n},), one for each row of {other_name}, "
            f"got {tuple(sample_weight.shape)}"
        )
    check_dense("sample_weight", sample_weight)
    check_device("sample_weight", sample_weight, other_name, other)


def of_each_anchor(temperature: float | Tensor) -> Tensor | None:
    """The temperatures (N,) where each anchor has its own, else None."""
    if isinstance(temperature, Tensor) and temperature.numel() > 1:
        return temperature
    return None


def logit_bound(temperature: float | Tensor) -> float:
    """What no logit exceeds; rows of unit length are so but for rounding."""
    return torch.inf if isinstance(temperature, Tensor) else 1.001 / temperature


def anchor_losses(
    positive_logits: Tensor,
    negatives: Negatives,
    options: Options,
    temperature: float | Tensor,
    return_stats: bool,
) -> Found:
    """The loss of each anchor as the options make it, and the statistics, which are without them.

    Args:
        positive_logits: (P, M), the P positives of each anchor.
        negatives: those of each anchor.
        options: checked.
        temperature: that of the logits, or that of each anchor, (M,).
        return_stats: whether there are statistics.
    """
    if options.hardness:
        negative_lse = weighted_by_hardness(negatives, options.hardness)
        statistics = negatives.found()[1] if return_stats else None
    else:
        negative_lse, statistics = negatives.found()
    if options.positive_prior or options.margin:
        scale = 1 / _scalar(temperature, positive_logits.dtype)
        if options.positive_prior:
            prior, counts = options.positive_prior, negatives.counts()
            negative_lse = debiased(negative_lse, positive_logits, counts, prior, scale)
        if options.margin:
            positive_logits = positive_logits - options.margin * scale
    loss = softmax_loss(positive_logits, negative_lse, options.decoupled)
    if options.label_smoothing:
        total, counts = negatives.totals(), negatives.counts()
        loss = smoothed(loss, positive_logits, total, counts, options.label_smoothing)
    return loss, statistics


def weighted_by_hardness(negatives: Negatives, hardness: float) -> Tensor:
    """The logsumexp with each negative weighted by its hardness, equation (14)."""
    weighted, weights = negatives.at_scale(1 + hardness), negatives.at_scale(hardness)
    counts = negatives.counts()
    result = weighted - weights + counts.to(weighted.dtype).log()
    return torch.where(counts == 0, -torch.inf, result)


def debiased(
    negative_lse: Tensor, positive_logits: Tensor, counts: Tensor, prior: float, scale: Scalar
) -> Tensor:
    """The logsumexp without the positives that are expected among the negatives, equation (15).

    Args:
        negative_lse: (M,), logsumexp over the negatives of each anchor, weighted or not.
        positive_logits: (P, M), the P positives of each anchor.
        counts: (M,), how many negatives there are.
        prior: the expected share of positives among them, above 0 and below 1.
        scale: 1 / temperature, or (M,).
    """
    n = counts.to(negative_lse.dtype)
    log_mean_positive = positive_logits.logsumexp(0) - math.log(len(positive_logits))
    # The logarithm of the share of the sum that is taken away.
    share = (prior * n).log() + log_mean_positive - negative_lse
    share = share.masked_fill(counts == 0, -torch.inf)
    # As much as there is, or more: the floor takes its place, and -1 keeps the gradient finite.
    all_of_it = share >= 0
    left = -torch.expm1(share.masked_fill(all_of_it, -1)) / (1 - prior)
    estimate, floor = negative_lse + left.log(), n.log() - scale
    return torch.where(all_of_it | (estimate < floor), floor, estimate)


def _scalar(x: Scalar, dtype: torch.dtype) -> Scalar:
    """A number as it is, a tensor of one value as one of no dimension, or one of several."""
    if not isinstance(x, Tensor):
        return x
    return (x.reshape(()) if x.numel() == 1 else x).to(dtype)


def limits_of_logits(
    positive_logits: Tensor,
    options: Options,
    temperature: float | Tensor,
    *embeddings: Tensor | None,
) -> Tensor | None:
    """The largest logit that each anchor keeps, equation (17), constant (M,); None for no limit.

    The slack is more than two ways of rounding one cosine differ by.

    Args:
        positive_logits: (P, M), the P positives of each anchor; the most similar one counts.
        options: checked.
        temperature: that of the logits, or that of each anchor, (M,).
        *embeddings: those given, by whose dtypes there is slack.
    """
    margin = options.false_negative_margin
    if margin is None:
        return None
    half = any(x is not None and x.dtype in (torch.float16, torch.bfloat16) for x in embeddings)
    dtype = positive_logits.dtype
    # Where torch may round float32 before it multiplies, a product is as exact as one of halves.
    rounded = half or rounds_float32()
    slack = 1e-12 if dtype == torch.float64 else 1e-3 if rounded else 1e-5
    nearest = positive_logits.detach().amax(0)
    tau = temperature.detach() if isinstance(temperature, Tensor) else temperature
    return nearest + (margin + slack) / _scalar(tau, dtype)


def positive_pair_logits(rows: Tensor) -> Tensor:
    """Logits of each anchor with the other views of its image, (V - 1, V·N), equation (3)."""
    views = rows.unbind(0)
    n_views = len(views)
    pair = {}
    for v, w in combinations(range(n_views), 2):
        pair[v, w] = pair[w, v] = (views[v] * views[w]).sum(1)
    return torch.stack(
        [
            torch.cat([pair[v, (v + shift) % n_views] for v in range(n_views)])
            for shift in range(1, n_views)
        ]
    )


def softmax_loss(positive_logits: Tensor, negative_lse: Tensor, decoupled: bool) -> Tensor:
    """Loss of each anchor, equation (4), or (12) if ``decoupled``; 0 for one without negatives.

    Args:
        positive_logits: (P, M), the P positives of each anchor.
        negative_lse: (M,), logsumexp over the negatives of each anchor.
        decoupled: leave the positives out of the denominator.
    """
    mean_positive = positive_logits.mean(0)
    if decoupled:
        loss = negative_lse - mean_positive
    elif len(positive_logits) == 1:
        # Unlike a difference of logsumexps this keeps its relative precision when the loss is tiny.
        # By default softplus is linear above 20, which float64 would notice.
        loss = F.softplus(negative_lse - mean_positive, threshold=50)
    else:
        loss = torch.logaddexp(negative_lse, positive_logits.logsumexp(0)) - mean_positive
    alone = (negative_lse == -torch.inf) & ~mean_positive.isnan()
    return torch.where(alone, 0, loss)


def smoothed(
    loss: Tensor,
    positive_logits: Tensor,
    negative_total: Tensor,
    negative_counts: Tensor,
    label_smoothing: float,
) -> Tensor:
    """Equation (13): ``loss`` (M,) with a part of the target spread over all candidates.

    Args:
        loss: the loss of each anchor without smoothing, (M,).
        positive_logits: (P, M), the P positives of each anchor.
        negative_total: (M,), the sum of the logits of the negatives of each anchor.
        negative_counts: (M,), how many they are.
        label_smoothing: the part, in [0, 1].
    """
    n_candidates = len(positive_logits) + negative_counts
    mean_candidate = (positive_logits.sum(0) + negative_total) / n_candidates
    shift = label_smoothing * (positive_logits.mean(0) - mean_candidate)
    # Without negatives the shift is 0, but for what subtracting sums leaves of their rounding.
    return loss + torch.where(negative_counts == 0, 0, shift)


def reduce(
    loss: Tensor,
    reduction: str,
    sample_weight: Tensor | None = None,
    weight_per_process: float | Tensor | None = None,
) -> Tensor:
    """Mean, sum, or the losses (..., N) as they are, weighted by ``sample_weight``, equation (18).

    The weights are (N,). The mean is the sum of the weighted losses over that of the weights, 0 if
    they are all 0. Where a batch is spread over processes the weights are those of an average
    process instead, so that the mean over processes is the mean over the whole batch.
    """
    if sample_weight is not None:
        loss = loss * sample_weight.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if weight_per_process is None and sample_weight is None:
        return loss.mean()
    n = loss.shape[-1]
    return mean_from_sum(loss.sum(), loss.numel() // n, n, sample_weight, weight_per_process)


def mean_from_sum(
    total: Tensor,
    per_image: int,
    n: int,
    sample_weight: Tensor | None = None,
    weight_per_process: float | Tensor | None = None,
) -> Tensor:
    """The mean as ``reduce`` has it, from the weighted sum of ``per_image`` losses of n images."""
    if weight_per_process is None:
        if sample_weight is None:
            return total / (n * per_image)
        weight_per_process = sample_weight.to(total.dtype).sum()
    weight = weight_per_process * per_image
    if isinstance(weight, Tensor):
        weight = torch.where(weight == 0, 1, weight)
    return total / weight
