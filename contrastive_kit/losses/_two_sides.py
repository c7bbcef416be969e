"""Anchors and candidates on two sides, with labels on both: the losses of SupCon, their figures."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit.losses._kept import equal_id_counts, equal_id_sums
from contrastive_kit.losses._stats import ContrastiveStats, is_nearest
from contrastive_kit.ops import Exclusion, LogitStatistics


class TwoSides(NamedTuple):
    """Rows against columns, and columns against rows if ``both``.

    Attributes:
        rows: the anchors (R, D).
        row_labels: the label of each, (R,).
        columns: the candidates (C, D), anchors too if ``both``.
        column_labels: the label of each, (C,).
        both: also the losses of columns: results are (R + C,), rows first.
    """

    rows: Tensor
    row_labels: Tensor
    columns: Tensor
    column_labels: Tensor
    both: bool

    def swapped(self) -> "TwoSides":
        """Columns against rows."""
        return TwoSides(self.columns, self.column_labels, self.rows, self.row_labels, self.both)

    def n_positives(self) -> Tensor:
        """How many candidates have the label of each anchor."""
        n_of_rows = equal_id_counts(self.row_labels, self.column_labels)
        if not self.both:
            return n_of_rows
        return torch.cat([n_of_rows, equal_id_counts(self.column_labels, self.row_labels)])

    def negatives(self) -> Exclusion:
        """The pairs of different labels."""
        return Exclusion(0, *self._labels())

    def positives(self) -> Exclusion:
        """The pairs of equal labels."""
        return Exclusion(0, None, None, *self._labels())

    def _labels(self) -> tuple[Tensor, Tensor | None]:
        """Those of rows and of columns, None if they are one tensor: Dynamo takes none twice."""
        same = self.column_labels is self.row_labels
        return self.row_labels, None if same else self.column_labels


Found = tuple[Tensor, LogitStatistics | None]
LogSumExpOf = Callable[..., Found]
SoftplusSumOf = Callable[[TwoSides, Tensor], Tensor]


def outside(sides: TwoSides, logsumexp: LogSumExpOf) -> Tensor:
    """L_out of each anchor, equation (19), 0 where it has no positive.

    A positive that is the only one of an anchor is kept out of the tiles, as in (4): with it, in
    both directions, every pair of a label that one row or one column has alone.
    """
    n, mean = sides.n_positives(), _mean_positive(sides)
    only_key = equal_id_counts(sides.column_labels, sides.column_labels) == 1
    n_of_rows = n[: len(sides.rows)]
    peeled_rows, peeled_columns = n_of_rows == 1, only_key
    own = mean
    if sides.both:
        mean = torch.cat([mean, _mean_positive(sides.swapped())])
        only_row = equal_id_counts(sides.row_labels, sides.row_labels) == 1
        n_of_columns = n[len(sides.rows) :]
        peeled_rows = peeled_rows | only_row & (n_of_rows > 0)
        peeled_columns = (peeled_columns & (n_of_columns > 0)) | (n_of_columns == 1)
        # The only row of a label has one logit with each of its columns, which is their mean.
        of_rows, of_columns = mean[: len(sides.rows)], mean[len(sides.rows) :]
        of_stars = [_class_logsumexp(sides, of_columns), _class_logsumexp(sides.swapped(), of_rows)]
        own = torch.where(n == 1, mean, torch.cat(of_stars))
    peeled = torch.cat([peeled_rows, peeled_columns]) if sides.both else peeled_rows
    column_names, row_names = _names(sides.column_labels, sides.row_labels)
    others, _ = logsumexp(
        sides,
        Exclusion(
            0,
            torch.where(peeled_rows, row_names, -1),
            torch.where(peeled_columns, column_names, -2),
        ),
    )
    own = torch.where(peeled, own, 0)
    # One positive is its own mean, and the gradients of the two would not cancel exactly.
    gap = torch.where(n == 1, 0, own - mean)
    of_peeled = F.softplus(others - own, threshold=50) + gap
    return torch.where(n == 0, 0, torch.where(peeled, of_peeled, others - mean))


def inside(sides: TwoSides, logsumexp: LogSumExpOf) -> Tensor:
    """L_in of each anchor, equation (20), 0 where it has no positive."""
    n = sides.n_positives()
    negatives, _ = logsumexp(sides, sides.negatives())
    positives, _ = logsumexp(sides, sides.positives())
    positives = torch.where(n == 0, 0, positives)
    loss = F.softplus(negatives - positives, threshold=50) + n.to(positives.dtype).log()
    return torch.where(n == 0, 0, loss)


def pairwise(sides: TwoSides, logsumexp: LogSumExpOf, softplus_sum: SoftplusSumOf) -> Tensor:
    """The loss of each anchor whose positives do not compete, equation (22), 0 without any."""
    negatives, _ = logsumexp(sides, sides.negatives())
    sums = softplus_sum(sides, negatives[: len(sides.rows)])
    if sides.both:
        of_columns = softplus_sum(sides.swapped(), negatives[len(sides.rows) :])
        sums = torch.cat([sums, of_columns])
    return sums / sides.n_positives().clamp(min=1)


@torch.no_grad()
def statistics_of(
    all_sides: Sequence[TwoSides], logsumexp: LogSumExpOf, temperature: float | Tensor
) -> ContrastiveStats:
    """Figures over the anchors of all ``all_sides``."""
    n = torch.cat([sides.n_positives() for sides in all_sides])
    everything, negatives = (
        _joined([logsumexp(sides, rule(sides), statistics=True)[1] for sides in all_sides])
        for rule in (lambda sides: Exclusion(), TwoSides.negatives)
    )
    lse = everything.logsumexp
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(()).to(lse.dtype)
    hits = is_nearest(everything.maximum, negatives.maximum, temperature) & (n > 0)
    positive_total = everything.total.sum() - negatives.total.sum()
    return ContrastiveStats(
        accuracy=hits.sum() / (n > 0).sum().to(lse.dtype),
        positive_similarity=positive_total / n.sum() * temperature,
        negative_similarity=negatives.total.sum() / negatives.kept.sum() * temperature,
        entropy=(lse - everything.expected).mean(),
    )


def _joined(parts: list[LogitStatistics | None]) -> LogitStatistics:
    present = [part for part in parts if part is not None]
    return LogitStatistics(*(torch.cat(field) for field in zip(*present, strict=True)))


def _mean_positive(sides: TwoSides) -> Tensor:
    """The mean logit of each row with the columns of its label, 0 if there is none."""
    same_label = equal_id_sums(sides.columns, sides.row_labels, sides.column_labels)
    n = equal_id_counts(sides.row_labels, sides.column_labels)
    return (sides.rows * same_label).sum(1) / n.clamp(min=1)


def _names(labels: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """A number in [0, len(labels)] for each label, the same for equal ones among ``labels``.

    That of one of ``others`` which is not among ``labels`` may be the number of another.
    """
    ordered = labels.sort().values
    return torch.searchsorted(ordered, labels), torch.searchsorted(ordered, others)


def _class_logsumexp(sides: TwoSides, column_logits: Tensor) -> Tensor:
    """For each row the logsumexp of a logit of each column of its label, of 0 without any."""
    names, row_names = _names(sides.column_labels, sides.row_labels)
    largest = column_logits.new_full((len(sides.columns) + 1,), -torch.inf)
    largest = largest.scatter_reduce(0, names, column_logits.detach(), "amax")
    shifted = (column_logits - largest[names]).exp()
    sums = equal_id_sums(shifted[:, None], sides.row_labels, sides.column_labels)[:, 0]
    present = equal_id_counts(sides.row_labels, sides.column_labels) > 0
    return torch.where(present, sums, 1).log() + torch.where(present, largest[row_names], 0)
