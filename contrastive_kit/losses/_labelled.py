"""Anchors with several positives: the three losses of SupCon, and their figures."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit.losses._common import positive_pair_logits
from contrastive_kit.losses._gathered import GatheredBatch
from contrastive_kit.losses._kept import equal_id_sums
from contrastive_kit.losses._stats import ContrastiveStats, is_nearest
from contrastive_kit.ops import Exclusion, LogitStatistics


@dataclass(frozen=True)
class LabelledBatch:
    """Anchors and candidates: the same rows, or those of this process and of all.

    Attributes:
        views: the anchors by view, (V, n, D).
        images: the number of the image of each anchor, (V·n,).
        labels: the label of each anchor.
        columns: the candidates (C, D), or None if they are the anchors.
        column_images: the number of the image of each candidate, likewise.
        column_labels: the label of each candidate, likewise.
    """

    views: Tensor
    images: Tensor
    labels: Tensor
    columns: Tensor | None = None
    column_images: Tensor | None = None
    column_labels: Tensor | None = None

    @classmethod
    def alone(cls, views: Tensor, labels: Tensor) -> "LabelledBatch":
        """Anchors that are the candidates."""
        n_views, n, _ = views.shape
        images = torch.arange(n, device=views.device)
        return cls(views, images.repeat(n_views), labels.repeat(n_views))

    @classmethod
    def among(cls, views: Tensor, batch: GatheredBatch) -> "LabelledBatch":
        """Anchors among the images of all processes."""
        n_views, n, _ = views.shape
        images = torch.arange(len(batch.ids), device=views.device)
        own = images[batch.first :][:n]
        return cls(
            views,
            own.repeat(n_views),
            batch.own_ids.repeat(n_views),
            batch.rows.flatten(0, 1),
            images.repeat_interleave(n_views),
            batch.ids.repeat_interleave(n_views),
        )

    @property
    def rows(self) -> Tensor:
        return self.views.flatten(0, 1)

    @property
    def candidate_labels(self) -> Tensor:
        return self.labels if self.column_labels is None else self.column_labels

    @property
    def candidates(self) -> Tensor:
        return self.rows if self.columns is None else self.columns

    def positives(self) -> Exclusion:
        """The candidates of the anchor's label, but for the anchor itself."""
        n_views = len(self.views)
        view = torch.arange(n_views, device=self.views.device)
        row = self.images * n_views + view.repeat_interleave(self.views.shape[1])
        if self.columns is None:
            return Exclusion(0, row, None, self.labels)
        # Candidates of other processes come image by image, the views of each beside each other.
        columns = torch.arange(len(self.columns), device=row.device)
        return Exclusion(0, row, columns, self.labels, self.column_labels)

    def other_images(self) -> Exclusion:
        """The candidates that show another image than the anchor."""
        if self.columns is None:
            return Exclusion(self.views.shape[1])
        return Exclusion(0, self.images, self.column_images)


Found = tuple[Tensor, LogitStatistics | None]
LogSumExpOf = Callable[..., Found]
SoftplusSumOf = Callable[[Exclusion, Tensor], Tensor]


def outside(batch: LabelledBatch, n_positives: Tensor, logsumexp: LogSumExpOf) -> Tensor:
    """L_out of each anchor, equation (19), as (21): the own views are kept out of the tiles."""
    rows, n_views = batch.rows, len(batch.views)
    others, _ = logsumexp(batch.other_images())
    same_label = equal_id_sums(batch.candidates, batch.labels, batch.candidate_labels)
    same_label = same_label - batch.views.sum(0).repeat(n_views, 1)
    # Where there is none, the difference is what rounding leaves.
    positive_total = torch.where(n_positives < n_views, 0, (rows * same_label).sum(1))
    if n_views == 1:
        return others - positive_total / n_positives
    own_logits = positive_pair_logits(batch.views)
    own = own_logits.logsumexp(0)
    mean_positive = (own_logits.sum(0) + positive_total) / n_positives
    # One positive is its own mean. Said so, because the gradients of the two would not cancel
    # exactly, and bury that of a tiny loss.
    gap = torch.where(n_positives == 1, 0, own - mean_positive)
    return F.softplus(others - own, threshold=50) + gap


def inside(batch: LabelledBatch, n_positives: Tensor, logsumexp: LogSumExpOf) -> Tensor:
    """L_in of each anchor, equation (20)."""
    rows = batch.rows
    negatives, _ = logsumexp(Exclusion(0, batch.labels, batch.column_labels))
    same_label = Exclusion(0, batch.images, batch.column_images, batch.labels, batch.column_labels)
    positives, _ = logsumexp(same_label)
    if len(batch.views) > 1:
        positives = torch.logaddexp(positives, positive_pair_logits(batch.views).logsumexp(0))
    positives = positives.masked_fill(positives == -torch.inf, 0)  # an anchor without any
    return F.softplus(negatives - positives, threshold=50) + n_positives.to(rows.dtype).log()


def pairwise(
    batch: LabelledBatch,
    n_positives: Tensor,
    logsumexp: LogSumExpOf,
    softplus_sum: SoftplusSumOf,
) -> Tensor:
    """The loss of each anchor whose positives do not compete with each other, equation (22)."""
    negatives, _ = logsumexp(Exclusion(0, batch.labels, batch.column_labels))
    return softplus_sum(batch.positives(), negatives) / n_positives


@torch.no_grad()
def label_statistics(
    batch: LabelledBatch, n_positives: Tensor, logsumexp: LogSumExpOf, temperature: float | Tensor
) -> ContrastiveStats:
    # A positive is nearest where the largest of all logits is above that of the negatives.
    lse, others = logsumexp(batch.other_images(), statistics=True)
    _, negatives = logsumexp(Exclusion(0, batch.labels, batch.column_labels), statistics=True)
    assert others is not None
    assert negatives is not None
    n_own = len(batch.views) - 1
    own = (
        positive_pair_logits(batch.views) if n_own else lse.new_full((1, lse.shape[0]), -torch.inf)
    )
    own_finite = own.masked_fill(own == -torch.inf, 0)
    log_total = torch.logaddexp(lse, own.logsumexp(0))
    expected = (lse - log_total).exp() * others.expected
    expected += ((own - log_total).exp() * own_finite).sum(0)
    nearest = torch.maximum(own.amax(0), others.maximum)
    has_positive = n_positives > 0
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(()).to(lse.dtype)
    hits = is_nearest(nearest, negatives.maximum, temperature) & has_positive
    positive_total = others.total - negatives.total + own_finite.sum(0)
    return ContrastiveStats(
        accuracy=hits.sum() / has_positive.sum().to(lse.dtype),
        positive_similarity=positive_total.sum() / n_positives.sum() * temperature,
        negative_similarity=negatives.total.sum() / negatives.kept.sum() * temperature,
        entropy=(log_total - expected).mean(),
    )
