"""``sup_con`` whose labels are rows of weights: the positives of an anchor share labels with it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit._checks import check_dense, check_device
from contrastive_kit.distributed import gather_rows, row_counts
from contrastive_kit.losses._common import logit_bound, positive_pair_logits, reduce
from contrastive_kit.losses._gathered import gather_batch, settings_of
from contrastive_kit.losses._labelled import LabelledBatch
from contrastive_kit.losses._options import Options, Scalar
from contrastive_kit.ops import Problem, logsumexp_for, mma_dtype, scaled_unit_rows


def check_multi_hot(labels: Tensor, n: int, view: Tensor) -> None:
    """Raise unless ``labels`` holds ``n`` rows of C ≥ 1 real numbers where ``view`` is."""
    check_dense("labels", labels)
    if labels.is_complex():
        raise TypeError(f"labels must hold real numbers, got {labels.dtype}")
    if labels.shape[0] != n or labels.shape[1] == 0:
        raise ValueError(
            f"labels must have shape ({n},), or ({n}, C) for several labels of an image, got "
            f"{tuple(labels.shape)}"
        )
    check_device("labels", labels, "views[0]", view)


def check_of_multi_hot(options: Options, keys: Tensor | None, return_stats: bool) -> None:
    """Raise for what has no meaning where a positive has a weight."""
    if options.variant != "out":
        raise ValueError(
            f"labels of shape (N, C) weigh a mean of log-probabilities, variant='out', got "
            f"{options.variant!r}"
        )
    if keys is not None:
        raise ValueError("labels of shape (N, C) are of one side; with keys give labels (N,)")
    if return_stats:
        raise ValueError(
            "return_stats=True needs labels (N,): with weights a pair is not simply positive or not"
        )


def sup_con_of_multi_hot(
    views: tuple[Tensor, ...],
    labels: Tensor,
    sample_weight: Tensor | None,
    temperature: Scalar,
    options: Options,
    gather: bool,
) -> Tensor:
    """Equation (23) of views (N, D) with labels (N, C), all of them checked."""
    rows = scaled_unit_rows(views, temperature)
    n_views, n, _ = rows.shape
    labels = labels.to(rows.dtype)
    all_labels, all_weights, n_processes = labels, sample_weight, 1
    # Summed over the views of an image first, as all of them have its labels.
    summed = rows.sum(0)
    batch = LabelledBatch.alone(rows, torch.arange(n, device=rows.device))
    if gather:
        group = options.process_group
        settings = settings_of(
            "sup_con",
            views,
            temperature=temperature,
            labels=f"of {labels.shape[1]} classes",
            sample_weight=sample_weight,
            **options.of_the_loss().changed(),
        )
        everything = gather_batch(rows, None, sample_weight, group, settings)
        batch, n_processes = LabelledBatch.among(rows, everything), everything.n_processes
        summed = everything.rows.sum(1)
        counts = row_counts(labels, group, settings=settings)
        all_labels, all_weights = gather_rows(labels, group, counts), everything.sample_weight
    problem = Problem(
        batch.rows,
        batch.columns,
        batch.other_images(),
        bound=logit_bound(temperature),
        mma_dtype=mma_dtype(*views),
    )
    others = logsumexp_for(problem, options.backend)(problem)[0].view(n_views, n)
    shares_with_others = _shares(labels, all_labels)
    own_weight = labels.square().sum(1)
    with torch.autocast(rows.device.type, enabled=False):
        of_classes = all_labels.T @ summed
        weighted = labels @ of_classes - own_weight[:, None] * rows.sum(0)
        weight = n_views * (labels @ all_labels.sum(0) - own_weight)
    # Where there is none, the differences are what rounding leaves.
    total = torch.where(shares_with_others, (rows * weighted).sum(2), 0)
    weight = torch.where(shares_with_others, weight, 0)
    has_positive = shares_with_others
    if n_views == 1:
        per_anchor = others - total / torch.where(has_positive, weight, 1)
    else:
        has_positive = own_weight > 0
        own_logits = positive_pair_logits(rows)
        own = own_logits.logsumexp(0).view(n_views, n)
        total = total + own_weight * own_logits.sum(0).view(n_views, n)
        weight = weight + (n_views - 1) * own_weight
        mean = total / torch.where(has_positive, weight, 1)
        only_one = ~shares_with_others & (n_views == 2)
        gap = torch.where(only_one, 0, own - mean)
        per_anchor = F.softplus(others - own, threshold=50) + gap
    per_anchor = torch.where(has_positive, per_anchor, 0)
    if options.reduction != "mean":
        return reduce(per_anchor, options.reduction, sample_weight)
    counted = has_positive.to(rows.dtype)
    if sample_weight is not None:
        counted = counted * sample_weight.to(rows.dtype)
    per_process = None
    if gather:
        of_all = _shares(all_labels, all_labels) if n_views == 1 else all_labels.square().sum(1) > 0
        counted_of_all = of_all.to(rows.dtype)
        if all_weights is not None:
            counted_of_all = counted_of_all * all_weights
        per_process = counted_of_all.sum() / n_processes
    return reduce(per_anchor, "mean", counted, per_process)


def _shares(labels: Tensor, all_labels: Tensor) -> Tensor:
    """Whether each image shares a label with another one: counted, which is exact."""
    return ((labels != 0) & ((all_labels != 0).sum(0) > 1)).any(1)
