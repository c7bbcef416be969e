"""``siglip`` whose matches are told by labels: several of a row, and two sides of any sizes."""

from typing import NamedTuple

from torch import Tensor

from contrastive_kit.losses._common import LossOutput, logit_bound, reduce
from contrastive_kit.losses._gathered import gather_batch, gather_labels, settings_of
from contrastive_kit.losses._kept import equal_id_counts
from contrastive_kit.losses._options import Options, Scalar
from contrastive_kit.losses._two_sides import Found, TwoSides, statistics_of
from contrastive_kit.ops import (
    Exclusion,
    Problem,
    kept_softplus_sum,
    logsumexp_for,
    mma_dtype,
    scaled_unit_rows,
)


class Given(NamedTuple):
    """What the caller gave, checked.

    Attributes:
        z1: the anchors (N, D).
        z2: what they are compared with, (M, D).
        labels: the label of each row of ``z1``, (N,).
        z2_labels: the label of each row of ``z2``, (M,).
        sample_weight: the weight of each anchor, (N,), or None.
        temperature: τ.
        logit_bias: b.
        options: all others.
    """

    z1: Tensor
    z2: Tensor
    labels: Tensor
    z2_labels: Tensor
    sample_weight: Tensor | None
    temperature: Scalar
    logit_bias: Scalar
    options: Options


def matched_by_labels(given: Given, gather: bool, return_stats: bool) -> LossOutput:
    """The loss of equation (28), its matches weighed by (29) with ``balance_positives``."""
    options, temperature, bias = given.options, given.temperature, given.logit_bias
    rows = scaled_unit_rows((given.z1,), temperature)[0]
    columns = scaled_unit_rows((given.z2,), temperature)[0]
    labels, all_labels, column_labels = given.labels, given.labels, given.z2_labels
    weight_per_process: float | Tensor | None = None
    if gather:
        group = options.process_group
        settings = settings_of(
            "siglip",
            (given.z1, given.z2),
            temperature=temperature,
            logit_bias=bias,
            labels=labels,
            z2_labels=column_labels,
            sample_weight=given.sample_weight,
            **options.of_the_loss().changed(),
        )
        batch = gather_batch(columns[None], column_labels, None, group, settings)
        columns, column_labels, labels = batch.rows[:, 0], batch.ids, labels.long()
        all_labels, weights = gather_labels(labels, given.sample_weight, group, settings)
        total = float(all_labels.shape[0]) if weights is None else weights.to(rows.dtype).sum()
        weight_per_process = total / batch.n_processes
    sides = TwoSides(rows, labels, columns, column_labels, False)
    others = kept_softplus_sum(
        rows, columns, bias, exclusion=sides.negatives(), backend=options.backend
    )
    matches = kept_softplus_sum(
        -rows, columns, -bias, exclusion=sides.positives(), backend=options.backend
    )
    if options.balance_positives:
        # Rows of equal label have the same number of matches, and so have columns.
        of_row = sides.n_positives().clamp(min=1).to(rows.dtype)
        of_column = equal_id_counts(labels, all_labels).to(rows.dtype)
        matches = matches * (1 / of_row + 1 / of_column) / 2
    per_anchor = matches + others
    loss = reduce(per_anchor, options.reduction, given.sample_weight, weight_per_process)
    if not return_stats:
        return loss

    def logsumexp(of: TwoSides, exclusion: Exclusion, statistics: bool) -> Found:
        problem = Problem(
            of.rows,
            of.columns,
            exclusion,
            bound=logit_bound(temperature),
            statistics=statistics,
            mma_dtype=mma_dtype(given.z1, given.z2),
        )
        return logsumexp_for(problem, options.backend)(problem)

    return loss, statistics_of([sides], logsumexp, temperature)
