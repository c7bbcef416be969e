"""``sup_con`` whose candidates are keys: both sides prepared, gathered, and reduced."""

from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kit.losses._common import LossOutput, logit_bound, reduce
from contrastive_kit.losses._gathered import gather_batch, gather_labels, settings_of
from contrastive_kit.losses._kept import equal_id_counts
from contrastive_kit.losses._options import Options, Scalar
from contrastive_kit.losses._stats import ContrastiveStats
from contrastive_kit.losses._two_sides import (
    Found,
    TwoSides,
    inside,
    outside,
    pairwise,
    statistics_of,
)
from contrastive_kit.ops import (
    Exclusion,
    Problem,
    logsumexp_for,
    mma_dtype,
    scaled_unit_rows,
    softplus_sum_for,
)


class Given(NamedTuple):
    """What the caller gave, checked.

    Attributes:
        views: V views (N, D).
        labels: the label of each image, (N,).
        keys: the candidates (M, D).
        key_labels: the label of each, (M,).
        sample_weight: the weight of each image, (N,), or None.
        temperature: τ.
        options: all others.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    keys: Tensor
    key_labels: Tensor
    sample_weight: Tensor | None
    temperature: Scalar
    options: Options


def against_keys(given: Given, gather: bool, return_stats: bool) -> LossOutput:
    """The loss of views among keys, and of keys among views if ``symmetric``."""
    views, options, temperature = given.views, given.options, given.temperature
    n_views, n = len(views), len(given.labels)
    rows = scaled_unit_rows(views, temperature)
    if given.keys.shape[0] == 0:
        nothing = (rows * 0).sum(2)
        loss = reduce(nothing.flatten() if options.symmetric else nothing, options.reduction)
        return (loss, _no_statistics(loss)) if return_stats else loss
    keys = scaled_unit_rows((given.keys,), temperature)[0]
    if gather:
        sides, weights_per_process = _gathered(given, rows, keys)
    else:
        anchors, labels = rows.flatten(0, 1), given.labels.repeat(n_views)
        sides = [TwoSides(anchors, labels, keys, given.key_labels, options.symmetric)]
        weights_per_process = [None, None]

    def logsumexp(of: TwoSides, exclusion: Exclusion, statistics: bool = False) -> Found:
        problem = Problem(
            of.rows,
            of.columns,
            exclusion,
            both=of.both,
            bound=logit_bound(temperature),
            statistics=statistics,
            mma_dtype=mma_dtype(*views, given.keys),
        )
        return logsumexp_for(problem, options.backend)(problem)

    def softplus_sum(of: TwoSides, bias: Tensor) -> Tensor:
        dtype = mma_dtype(*views, given.keys)
        problem = Problem(-of.rows, of.columns, of.positives(), mma_dtype=dtype)
        return softplus_sum_for(problem, options.backend)(problem, bias)

    if options.variant == "pairwise":
        losses = torch.cat([pairwise(x, logsumexp, softplus_sum) for x in sides])
    else:
        of_variant = outside if options.variant == "out" else inside
        losses = torch.cat([of_variant(x, logsumexp) for x in sides])
    has_positive = torch.cat([x.n_positives() for x in sides]) > 0
    of_rows, of_keys = losses[: n_views * n].view(n_views, n), losses[n_views * n :]
    if options.reduction != "mean":
        both = losses if options.symmetric else of_rows
        loss = reduce(both, options.reduction, given.sample_weight)
    else:
        weights = has_positive.to(losses.dtype)
        of_images = weights[:n]
        if given.sample_weight is not None:
            of_images = of_images * given.sample_weight.to(losses.dtype)
        loss = reduce(of_rows, "mean", of_images, weights_per_process[0])
        if options.symmetric:
            other = reduce(of_keys, "mean", weights[n_views * n :], weights_per_process[1])
            loss = (loss + other) / 2
    return (loss, statistics_of(sides, logsumexp, temperature)) if return_stats else loss


def _gathered(
    given: Given, rows: Tensor, keys: Tensor
) -> tuple[list[TwoSides], list[Tensor | None]]:
    """Own anchors among the candidates of all processes, and what the mean of each side divides by.

    The queries of others are candidates only of keys: without ``symmetric`` their labels do.
    """
    symmetric, group = given.options.symmetric, given.options.process_group
    settings = settings_of(
        "sup_con",
        (*given.views, given.keys),
        temperature=given.temperature,
        labels=given.labels,
        key_labels=given.key_labels,
        sample_weight=given.sample_weight,
        **given.options.of_the_loss().changed(),
    )
    n_views, weights = len(rows), given.sample_weight
    of_keys = gather_batch(keys[None], given.key_labels, None, group, settings)
    anchors, columns = rows.flatten(0, 1), of_keys.rows[:, 0]
    sides = [TwoSides(anchors, given.labels.long().repeat(n_views), columns, of_keys.ids, False)]
    if symmetric:
        images = gather_batch(rows, given.labels, None, group, settings)
        all_rows, labels = images.rows.flatten(0, 1), images.ids
        row_labels = labels.repeat_interleave(n_views)
        sides.append(TwoSides(keys, of_keys.own_ids, all_rows, row_labels, False))
    else:
        labels, weights = gather_labels(given.labels, weights, group, settings)
    of_images = (equal_id_counts(labels, of_keys.ids) > 0).to(rows.dtype)
    if weights is not None:
        of_images = of_images * weights.to(rows.dtype)
    matched_keys = (equal_id_counts(of_keys.ids, labels) > 0).to(rows.dtype)
    n = of_keys.n_processes
    return sides, [of_images.sum() / n, matched_keys.sum() / n]


def _no_statistics(loss: Tensor) -> ContrastiveStats:
    """Those of anchors without candidates."""
    nan = loss.detach().new_full((), torch.nan)
    return ContrastiveStats(nan, nan, nan, torch.zeros_like(nan))
