"""SupCon: all images of the same label are positives of each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit._checks import (
    check_alike,
    check_choice,
    check_embeddings,
    check_flag,
    check_ids,
    check_reverse_mode,
)
from contrastive_kit.distributed import checked, gather_rows, rank_and_size, row_counts
from contrastive_kit.losses._common import (
    LossOutput,
    Scalar,
    TemperatureLoss,
    check_options,
    check_sample_weight,
    positive_pair_logits,
    reduce,
)
from contrastive_kit.losses._gathered import settings_of, several_processes
from contrastive_kit.losses._kept import equal_id_counts, equal_id_sums
from contrastive_kit.losses._stats import ContrastiveStats, is_nearest
from contrastive_kit.ops import (
    Exclusion,
    LogitStatistics,
    Problem,
    logsumexp_for,
    mma_dtype,
    scaled_unit_rows,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

VARIANTS = ("out", "in")


def sup_con(
    *views: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    variant: str = "out",
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    gather_distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
) -> LossOutput:
    r"""SupCon, the supervised contrastive loss: L_out, or L_in by name.

    .. math::

        \ell_i^{out} = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{e^{s_{ip}}}{\sum_{a \ne i} e^{s_{ia}}},
        \qquad
        \ell_i^{in} = -\log \frac{1}{|P(i)|} \sum_{p \in P(i)}
            \frac{e^{s_{ip}}}{\sum_{a \ne i} e^{s_{ia}}}

    The positives P(i) of an anchor are all views of all images of its label, but itself; the
    denominator holds everything but itself. Where every image has its own label, "out" is
    ``nt_xent``.

    Args:
        *views: one or more views, embeddings (N, D) each, N ≥ 2, any floating dtype, normalised
            here. Row i of every view is image i.
        labels: integers (N,), the label of each image.
        temperature: τ > 0, at least 1.2e-7 (2.3e-16 in float64), or a tensor of one value, which
            then receives its gradient. The value of a tensor is not checked; if it is not positive
            the loss is NaN.
        variant: "out", the mean of log-probabilities, which the paper recommends; "in", the
            logarithm of the mean probability. They are equal where there is one positive.
        sample_weight: floating numbers (N,) ≥ 0, one for each image, that multiply the losses of
            its anchors; the mean is weighted, Σ w·ℓ / Σ w. The sign is not checked.
        reduction: "mean" over the anchors that have a positive (0 if none has), "sum", or "none"
            for the losses (V, N), 0 for an anchor without positive.
        return_stats: also return ``ContrastiveStats``: the accuracy over anchors that have a
            positive, the similarities over pairs, the entropy over the candidates of all anchors.
            It costs two more forward passes.
        gather_distributed: take the images of all processes as positives and negatives. The
            anchors are those of this process. "mean" is then the share of this process, so that
            the mean over processes, which ``DistributedDataParallel`` takes of the gradients, is
            that of the whole batch, exactly, also for batches of different sizes. So is that of a
            temperature tensor, which ``SupCon`` takes by itself. "sum" and "none" are of the own
            anchors.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``. "triton" has no sum over positives for
            the variant "in".

    Returns:
        The loss, float64 if an embedding is float64 and float32 otherwise, also under autocast;
        with ``return_stats`` the pair (loss, ``ContrastiveStats``).

    Raises:
        TypeError: for embeddings or a ``sample_weight`` that are not floating tensors, labels that
            are not integers.
        NotImplementedError: for forward-mode differentiation (``torch.func.jvp``, ``jacfwd``).
        ValueError: for no view, shapes or devices that do not match, sparse or nested tensors,
            fewer than two rows, a temperature that is not positive and finite, an unknown
            ``variant``, ``reduction`` or ``backend``; on every process, if one of them raises, or
            they differ in options, or in embeddings but for their number.
        RuntimeError: for ``gather_distributed`` without an initialised process group; under
            ``torch.jit.trace``, which would keep the size of the batch.

    Memory:
        O(V·N·D) and a few tiles, on a CPU up to 32 MiB of them from the forward to the backward;
        nothing of size N × N (except with ``backend="reference"``). With ``gather_distributed`` N
        is the number of images of all processes.
        "out" costs what ``nt_xent`` does. "in" costs twice that; no fused kernel computes its sum
        over positives, which runs in tiles on a GPU.

    Note:
        An image that is alone with its label keeps the relative precision of a tiny loss, as in
        ``nt_xent``. With several positives, P of them, a loss "out" is at least log P. Only a
        single view with pairs of equal label has losses that can be tiny and are rounded to
        1e-7 / τ.

    References:
        Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362, equations 2 and 3.

    Example:
        >>> import torch
        >>> from contrastive_kit.functional import sup_con
        >>> z = torch.eye(2).repeat_interleave(2, 0)
        >>> sup_con(z, labels=torch.tensor([0, 0, 1, 1]), temperature=1.0)  # log(e + 2) - 1
        tensor(0.5514)
    """
    gather = several_processes(gather_distributed, process_group)

    def check() -> Scalar:
        if not views:
            raise ValueError("views must be at least one tensor of shape (N, D), got none")
        for i, view in enumerate(views):
            check_embeddings(f"views[{i}]", view)
            check_alike(f"views[{i}]", view, "views[0]", views[0])
            check_reverse_mode(f"views[{i}]", view)
        n = views[0].shape[0]
        if n < 2 and not gather:
            raise ValueError(
                f"views[0] must have at least 2 rows, or there are no negatives; got {n}"
            )
        check_ids("labels", labels, n, "views[0]", views[0])
        if sample_weight is not None:
            check_sample_weight(sample_weight, n, "views[0]", views[0])
        check_choice("variant", variant, VARIANTS)
        check_flag("return_stats", return_stats)
        return check_options(temperature, reduction, backend, views[0])[0]

    temperature = checked(check, process_group) if gather else check()
    n = views[0].shape[0]

    rows = scaled_unit_rows(views, temperature)
    weight_per_process = None
    if gather:
        settings = settings_of(
            "sup_con",
            views,
            temperature=temperature,
            variant=variant,
            labels=labels,
            sample_weight=sample_weight,
            reduction=reduction,
        )
        batch, weight_per_process = _gather(rows, labels, sample_weight, process_group, settings)
    else:
        images = torch.arange(n, device=rows.device)
        batch = _Batch(rows, images.repeat(len(views)), labels.repeat(len(views)), n)
    n_positives = equal_id_counts(batch.labels, batch.candidate_labels) - 1
    whole = Problem(
        rows.flatten(0, 1),
        batch.columns,
        bound=torch.inf if isinstance(temperature, Tensor) else 1.001 / temperature,
        mma_dtype=mma_dtype(*views),
    )

    def logsumexp(exclusion: Exclusion, statistics: bool = False) -> _Found:
        problem = whole._replace(exclusion=exclusion, statistics=statistics)
        return logsumexp_for(problem, backend)(problem)

    of_variant = _outside if variant == "out" else _inside
    per_anchor = of_variant(batch, n_positives.clamp(min=1), logsumexp)
    per_anchor = torch.where(n_positives == 0, 0, per_anchor).view(len(views), n)
    if reduction == "mean":
        anchors = (n_positives[:n] > 0).to(rows.dtype)
        sample_weight = anchors if sample_weight is None else sample_weight.to(rows.dtype) * anchors
    loss = reduce(per_anchor, reduction, sample_weight, weight_per_process)
    if not return_stats:
        return loss
    return loss, _statistics(batch, n_positives, logsumexp, temperature)


def _gather(
    rows: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    group: "ProcessGroup | None",
    settings: str,
) -> tuple["_Batch", Tensor]:
    """The batch with the candidates of all processes, and the weight that divides the mean."""
    n_views, n, _ = rows.shape
    counts = row_counts(rows.transpose(0, 1), group, settings=settings)
    rank, size = rank_and_size(group)
    labels = labels.long()  # gloo and NCCL send no int16
    candidates = gather_rows(rows.transpose(0, 1), group, counts)
    everyones_labels = gather_rows(labels, group, counts)
    images = torch.arange(len(candidates), device=rows.device)
    batch = _Batch(
        rows,
        images[sum(counts[:rank]) :][:n].repeat(n_views),
        labels.repeat(n_views),
        len(candidates),
        candidates.flatten(0, 1),
        images.repeat_interleave(n_views),
        everyones_labels.repeat_interleave(n_views),
    )
    has_positive = n_views * equal_id_counts(everyones_labels, everyones_labels) > 1
    anchors = has_positive.to(rows.dtype)
    if sample_weight is not None:
        anchors = anchors * gather_rows(sample_weight.to(rows.dtype), group, counts)
    return batch, anchors.sum() / size


@dataclass(frozen=True)
class _Batch:
    """Anchors and candidates: the same rows, or those of this process and of all.

    Attributes:
        views: the anchors by view, (V, n, D).
        images: the number of the image of each anchor, (V·n,).
        labels: the label of each anchor.
        n_images: how many images there are.
        columns: the candidates (C, D), or None if they are the anchors.
        column_images: the number of the image of each candidate, likewise.
        column_labels: the label of each candidate, likewise.
    """

    views: Tensor
    images: Tensor
    labels: Tensor
    n_images: int
    columns: Tensor | None = None
    column_images: Tensor | None = None
    column_labels: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        return self.views.flatten(0, 1)

    @property
    def candidate_labels(self) -> Tensor:
        return self.labels if self.column_labels is None else self.column_labels

    def other_images(self) -> Exclusion:
        """The candidates that show another image than the anchor."""
        if self.columns is None:
            return Exclusion(self.n_images)
        return Exclusion(0, self.images, self.column_images)


_Found = tuple[Tensor, LogitStatistics | None]
_LogSumExp = Callable[..., _Found]


def _outside(batch: _Batch, n_positives: Tensor, logsumexp: _LogSumExp) -> Tensor:
    """L_out of each anchor, equation (15), as (20): the own views are kept out of the tiles."""
    rows, n_views = batch.rows, len(batch.views)
    others, _ = logsumexp(batch.other_images())
    candidates = rows if batch.columns is None else batch.columns
    same_label = equal_id_sums(candidates, batch.labels, batch.candidate_labels)
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


def _inside(batch: _Batch, n_positives: Tensor, logsumexp: _LogSumExp) -> Tensor:
    """L_in of each anchor, equation (16)."""
    rows = batch.rows
    negatives, _ = logsumexp(Exclusion(0, batch.labels, batch.column_labels))
    same_label = Exclusion(0, batch.images, batch.column_images, batch.labels, batch.column_labels)
    positives, _ = logsumexp(same_label)
    if len(batch.views) > 1:
        positives = torch.logaddexp(positives, positive_pair_logits(batch.views).logsumexp(0))
    positives = positives.masked_fill(positives == -torch.inf, 0)  # an anchor without any
    return F.softplus(negatives - positives, threshold=50) + n_positives.to(rows.dtype).log()


@torch.no_grad()
def _statistics(
    batch: _Batch, n_positives: Tensor, logsumexp: _LogSumExp, temperature: float | Tensor
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


class SupCon(TemperatureLoss):
    """SupCon as a module: ``sup_con`` with its options stored.

    Args:
        temperature: τ > 0; the initial one, from 0.01 to 100, if it is learnable.
        learnable_temperature: learn τ through the parameter ``logit_scale`` = log(1 / τ), which
            each call brings back to within ±log(100). Give it to the optimizer without weight
            decay.
        variant: "out" or "in".
        reduction: "mean", "sum" or "none".
        gather_distributed: take the images of all processes as positives and negatives.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``.

    Raises:
        ValueError: for a temperature out of range, an unknown ``variant``, ``reduction`` or
            ``backend``.

    Example:
        >>> import torch
        >>> from contrastive_kit import SupCon
        >>> loss_fn = SupCon()
        >>> z1, z2 = torch.randn(2, 8, 16)
        >>> loss_fn(z1, z2, labels=torch.arange(8) // 2).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable_temperature: bool = False,
        variant: str = "out",
        reduction: str = "mean",
        gather_distributed: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature,
            reduction,
            backend,
            gather_distributed=gather_distributed,
            process_group=process_group,
        )
        check_choice("variant", variant, VARIANTS)
        self.variant = variant

    def forward(
        self,
        *views: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> LossOutput:
        """The loss of one or more views, (N, D) each: see ``sup_con``."""
        self._limit_logit_scale()
        return sup_con(
            *views,
            labels=labels,
            temperature=self.temperature,
            variant=self.variant,
            sample_weight=sample_weight,
            reduction=self.reduction,
            return_stats=return_stats,
            gather_distributed=self.gather_distributed,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options, as the constructor takes them."""
        return f"{super().extra_repr()}, variant={self.variant!r}"
