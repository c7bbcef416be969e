"""SupCon: all images of the same label are positives of each other, on one side or across two."""

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from contrastive_kit._checks import (
    check_alike,
    check_dense,
    check_device,
    check_embeddings,
    check_flag,
    check_ids,
    check_reverse_mode,
)
from contrastive_kit.distributed import checked
from contrastive_kit.losses._against_keys import Given, against_keys
from contrastive_kit.losses._common import (
    LossOutput,
    check_sample_weight,
    logit_bound,
    reduce,
)
from contrastive_kit.losses._gathered import (
    gather_batch,
    settings_of,
    several_processes,
)
from contrastive_kit.losses._kept import equal_id_counts
from contrastive_kit.losses._labelled import (
    Found,
    LabelledBatch,
    inside,
    label_statistics,
    outside,
    pairwise,
)
from contrastive_kit.losses._module import LossModule
from contrastive_kit.losses._multi_hot import (
    check_multi_hot,
    check_of_multi_hot,
    sup_con_of_multi_hot,
)
from contrastive_kit.losses._options import (
    CheckedOptions,
    Options,
    Reduction,
    Scalar,
    Variant,
    check_options,
)
from contrastive_kit.losses._stats import ContrastiveStats
from contrastive_kit.ops import (
    BackendName,
    Exclusion,
    Problem,
    logsumexp_for,
    mma_dtype,
    scaled_unit_rows,
    softplus_sum_for,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from contrastive_kit.losses._signatures import SupConKeywords


@overload
def sup_con(
    *views: Tensor,
    labels: Tensor,
    return_stats: Literal[False] = False,
    **options: "Unpack[SupConKeywords]",
) -> Tensor: ...
@overload
def sup_con(
    *views: Tensor,
    labels: Tensor,
    return_stats: Literal[True],
    **options: "Unpack[SupConKeywords]",
) -> tuple[Tensor, ContrastiveStats]: ...
@overload
def sup_con(
    *views: Tensor,
    labels: Tensor,
    return_stats: bool,
    **options: "Unpack[SupConKeywords]",
) -> LossOutput: ...
def sup_con(
    *views: Tensor,
    labels: Tensor | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    variant: Variant = "out",
    symmetric: bool = False,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    gather_distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: BackendName = "auto",
) -> LossOutput:
    r"""SupCon, the supervised contrastive loss, in three variants, on one side or across two.

    .. math::

        \ell_i^{out} = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{e^{s_{ip}}}{\sum_{a \ne i} e^{s_{ia}}},
        \qquad
        \ell_i^{in} = -\log \frac{1}{|P(i)|} \sum_{p \in P(i)}
            \frac{e^{s_{ip}}}{\sum_{a \ne i} e^{s_{ia}}},
        \qquad
        \ell_i^{pairwise} = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{e^{s_{ip}}}{e^{s_{ip}} + \sum_{n \notin P(i) \cup \{i\}} e^{s_{in}}}

    The positives P(i) of an anchor are all views of all images of its label, but itself; the
    denominator holds everything but itself. Where every image has its own label, "out" is
    ``nt_xent``.

    With ``keys``, the candidates are those alone: P(i) are the keys of the anchor's label, the
    denominator holds all keys (several captions of an image; UniCL; a queue with labels). Where
    every label has one row and one key, it is ``info_nce``.

    Args:
        *views: one or more views, embeddings (N, D) each, N ≥ 2 (1 with ``keys``), any floating
            dtype, normalized here. Row i of every view is image i.
        labels: integers (N,), the label of each image; or numbers (N, C) ≥ 0 of any dtype, its
            labels among C: a positive then counts by the product of both rows, for zeros and ones
            the number of shared labels. Only for the variant "out", without ``keys`` and
            ``return_stats``. The sign is not checked.
        keys: None, or the candidates (M, D), any number of them, instead of the views; a queue
            that is still empty has M = 0, and all losses are 0.
        key_labels: integers (M,), the label of each key.
        temperature: τ > 0, at least 1.2e-7 (2.3e-16 in float64), or a tensor of one value, which
            then receives its gradient. The value of a tensor is not checked; if it is not positive
            the loss is NaN.
        variant: "out", the mean of log-probabilities, which the paper recommends; "in", the
            logarithm of the mean probability; "pairwise", as "out" but with each positive against
            the negatives alone, so that positives do not push each other apart (SINCERE). They are
            equal where there is one positive.
        symmetric: average with the loss of keys against views, as UniCL; only with ``keys``.
        sample_weight: floating numbers (N,) ≥ 0, one for each image, that multiply the losses of
            its anchors; the mean is weighted, Σ w·ℓ / Σ w. The sign is not checked. Not with
            ``symmetric``.
        reduction: "mean" over the anchors that have a positive (0 if none has), with ``symmetric``
            the average of both sides' means; "sum"; or "none" for the losses, 0 for an anchor
            without positive: (V, N), or with ``symmetric`` (V·N + M,), the keys last.
        return_stats: also return ``ContrastiveStats``: the accuracy over anchors that have a
            positive, the similarities over pairs, the entropy over the candidates of all anchors.
            It costs two more forward passes.
        gather_distributed: take the images, or the keys, of all processes as positives and
            negatives. The anchors are those of this process. "mean" is then the share of this
            process, so that the mean over processes, which ``DistributedDataParallel`` takes of the
            gradients, is that of the whole batch, exactly, also for batches of different sizes. So
            is that of a temperature tensor, which ``SupCon`` takes by itself. "sum" and "none" are
            of the own anchors. Not for keys of a queue that gathers by itself, which would be
            candidates several times; keys may then not be empty.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``. "triton" has no sum over positives for
            the variants "in" and "pairwise".

    Returns:
        The loss, float64 if an embedding is float64 and float32 otherwise, also under autocast;
        with ``return_stats`` the pair (loss, ``ContrastiveStats``).

    Raises:
        TypeError: for embeddings or a ``sample_weight`` that are not floating tensors, labels that
            are not integers.
        NotImplementedError: for forward-mode differentiation (``torch.func.jvp``, ``jacfwd``).
        ValueError: for no view, shapes or devices that do not match, sparse or nested tensors,
            fewer than two rows without ``keys``, ``keys`` without ``key_labels`` or the reverse,
            ``symmetric`` without ``keys`` or with ``sample_weight``, labels (N, C) with ``keys``,
            ``return_stats`` or another variant than "out", a temperature that is not
            positive and finite, an unknown ``variant``, ``reduction`` or ``backend``; on every
            process, if one of them raises, or they differ in options, or in embeddings but for
            their number.
        RuntimeError: for ``gather_distributed`` without an initialized process group where
            ``WORLD_SIZE`` tells of several processes (one process has nothing to gather); under
            ``torch.jit.trace``, which would keep the size of the batch.

    Memory:
        O(V·N·D) and a few tiles, on a CPU up to 32 MiB of them from the forward to the backward;
        nothing of size N × N (except with ``backend="reference"``). With ``gather_distributed`` N
        is the number of images of all processes. Labels (N, C) add O((N + D)·C).
        "out" costs what ``nt_xent`` does, "in" twice that, "pairwise" three times; no fused kernel
        computes their sum over positives, which runs in tiles on a GPU.

    Note:
        An image that is alone with its label keeps the relative precision of a tiny loss, as in
        ``nt_xent``. With several positives, P of them, a loss "out" is at least log P. Only a
        single view with pairs of equal label has losses that can be tiny and are rounded to
        1e-7 / τ.

    References:
        Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362, equations 2 and 3; Yang
        et al., Unified Contrastive Learning, arXiv 2204.03610, equations 2 to 4 (keys); Feeney and
        Hughes, SINCERE, arXiv 2309.14277, equation 6 (pairwise).

    Example:
        >>> import torch
        >>> from contrastive_kit.functional import sup_con
        >>> z = torch.eye(2).repeat_interleave(2, 0)
        >>> sup_con(z, labels=torch.tensor([0, 0, 1, 1]), temperature=1.0)  # log(e + 2) - 1
        tensor(0.5514)
        >>> image, captions = torch.eye(2), torch.eye(2).repeat_interleave(3, 0)
        >>> of_image = torch.arange(2)
        >>> caption_of = of_image.repeat_interleave(3)
        >>> sup_con(image, labels=of_image, keys=captions, key_labels=caption_of, temperature=1.0)
        tensor(1.4119)
    """
    options = Options(
        variant=variant,
        symmetric=symmetric,
        reduction=reduction,
        gather_distributed=gather_distributed,
        process_group=process_group,
        backend=backend,
    )
    labels = _given(labels, views)
    gather = several_processes(gather_distributed, process_group)

    def check() -> CheckedOptions:
        if not views:
            raise ValueError("views must be at least one tensor of shape (N, D), got none")
        for i, view in enumerate(views):
            _check_view(f"views[{i}]", view, views[0])
        n = views[0].shape[0]
        if keys is None and n < 2 and not gather:
            raise ValueError(
                f"views[0] must have at least 2 rows, or there are no negatives; got {n}"
            )
        if isinstance(labels, Tensor) and labels.ndim == 2:
            check_multi_hot(labels, n, views[0])
            check_of_multi_hot(options, keys, return_stats)
        else:
            check_ids("labels", labels, n, "views[0]", views[0])
        if sample_weight is not None:
            check_sample_weight(sample_weight, n, "views[0]", views[0])
        _check_keys(views[0], keys, key_labels, symmetric, sample_weight, gather)
        check_flag("return_stats", return_stats)
        return check_options(temperature, options, views[0])

    temperature, _ = checked(check, process_group) if gather else check()
    n = views[0].shape[0]
    if labels.ndim == 2:
        return sup_con_of_multi_hot(views, labels, sample_weight, temperature, options, gather)
    if keys is not None:
        assert key_labels is not None
        given = Given(views, labels, keys, key_labels, sample_weight, temperature, options)
        return against_keys(given, gather, return_stats)
    rows = scaled_unit_rows(views, temperature)
    batch, weight_per_process = LabelledBatch.alone(rows, labels), None
    if gather:
        batch, weight_per_process = _gathered(
            views, rows, labels, temperature, sample_weight, options
        )
    n_positives = equal_id_counts(batch.labels, batch.candidate_labels) - 1
    whole = Problem(
        batch.rows,
        batch.columns,
        bound=logit_bound(temperature),
        mma_dtype=mma_dtype(*views),
    )

    def logsumexp(exclusion: Exclusion, statistics: bool = False) -> Found:
        problem = whole._replace(exclusion=exclusion, statistics=statistics)
        return logsumexp_for(problem, backend)(problem)

    def softplus_sum(exclusion: Exclusion, bias: Tensor) -> Tensor:
        """Over the candidates of each anchor, of the bias less their logit."""
        problem = Problem(-batch.rows, batch.candidates, exclusion, mma_dtype=whole.mma_dtype)
        return softplus_sum_for(problem, backend)(problem, bias)

    at_least_one = n_positives.clamp(min=1)
    if variant == "pairwise":
        per_anchor = pairwise(batch, at_least_one, logsumexp, softplus_sum)
    else:
        of_variant = outside if variant == "out" else inside
        per_anchor = of_variant(batch, at_least_one, logsumexp)
    per_anchor = torch.where(n_positives == 0, 0, per_anchor).view(len(views), n)
    if reduction == "mean":
        anchors = (n_positives[:n] > 0).to(rows.dtype)
        sample_weight = anchors if sample_weight is None else sample_weight.to(rows.dtype) * anchors
    loss = reduce(per_anchor, reduction, sample_weight, weight_per_process)
    if not return_stats:
        return loss
    return loss, label_statistics(batch, n_positives, logsumexp, temperature)


def _given(labels: Tensor | None, views: tuple[Tensor, ...]) -> Tensor:
    """The labels, or an error that writes the call as it must be."""
    if labels is not None:
        return labels
    last = views[-1] if views else None
    if len(views) > 1 and isinstance(last, Tensor) and not last.is_floating_point():
        first = "*features.unbind(1)" if views[0].ndim == 3 else "z1, z2"
        raise TypeError(f"labels must be given by name: pass ({first}, labels=labels)")
    raise TypeError("labels must be an integer tensor of shape (N,), got None; without: nt_xent")


def _gathered(
    views: tuple[Tensor, ...],
    rows: Tensor,
    labels: Tensor,
    temperature: Scalar,
    sample_weight: Tensor | None,
    options: Options,
) -> tuple[LabelledBatch, Tensor]:
    """Own anchors among the images of all processes, and what the mean divides by."""
    settings = settings_of(
        "sup_con",
        views,
        temperature=temperature,
        labels=labels,
        sample_weight=sample_weight,
        **options.of_the_loss().changed(),
    )
    everything = gather_batch(rows, labels, sample_weight, options.process_group, settings)
    has_positive = len(views) * equal_id_counts(everything.ids, everything.ids) > 1
    anchors = has_positive.to(rows.dtype)
    if everything.sample_weight is not None:
        anchors = anchors * everything.sample_weight
    return LabelledBatch.among(rows, everything), anchors.sum() / everything.n_processes


def _check_view(name: str, view: Tensor, first: Tensor) -> None:
    if isinstance(view, Tensor) and not view.is_nested and view.ndim == 3:
        raise ValueError(
            f"{name} must have shape (N, D), got {tuple(view.shape)}; features (N, V, D), as "
            "SupContrast has them, are passed as (*features.unbind(1), labels=labels)"
        )
    check_embeddings(name, view)
    check_alike(name, view, "views[0]", first)
    check_reverse_mode(name, view)


def _check_keys(
    view: Tensor,
    keys: Tensor | None,
    key_labels: Tensor | None,
    symmetric: bool,
    sample_weight: Tensor | None,
    gather: bool,
) -> None:
    check_flag("symmetric", symmetric)
    if keys is None:
        if key_labels is not None:
            raise ValueError("key_labels are the labels of keys, which are not given")
        if symmetric:
            raise ValueError("symmetric=True needs keys, whose loss against the views it adds")
        return
    if key_labels is None:
        raise ValueError("keys need key_labels, which tell the positives")
    if symmetric and sample_weight is not None:
        raise ValueError(
            "symmetric=True takes no sample_weight, which is one of each image and none of a key; "
            "call the loss once in each direction"
        )
    d = view.shape[1]
    if isinstance(keys, Tensor):
        check_dense("keys", keys)
    may_be_empty = not gather and isinstance(keys, Tensor) and keys.is_floating_point()
    if not (may_be_empty and keys.shape == (0, d)):
        check_embeddings("keys", keys)
    if keys.shape[1] != d:
        raise ValueError(
            f"keys must have shape (M, {d}) to match views[0], got {tuple(keys.shape)}"
        )
    check_device("keys", keys, "views[0]", view)
    check_reverse_mode("keys", keys)
    check_ids("key_labels", key_labels, keys.shape[0], "keys", keys)


class SupCon(LossModule):
    """SupCon as a module: ``sup_con`` with its options stored.

    Args:
        temperature: τ > 0; the initial one, from 0.01 to 100, if it is learnable.
        learnable_temperature: learn τ through the parameter ``logit_scale`` = log(1 / τ), which
            each call brings back to within ±log(100). Give it to the optimizer without weight
            decay. With ``gather_distributed`` its gradient is averaged over processes.
            ``fully_shard`` has to leave it out: ``ignored_params=set(loss_fn.parameters())``.
        variant: "out", "in" or "pairwise".
        symmetric: average with the loss of keys against views; calls then need ``keys``.
        reduction: "mean", "sum" or "none".
        gather_distributed: take the images, or keys, of all processes as positives and negatives.
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
        variant: Variant = "out",
        symmetric: bool = False,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature,
            variant=variant,
            symmetric=symmetric,
            reduction=reduction,
            gather_distributed=gather_distributed,
            process_group=process_group,
            backend=backend,
        )

    @overload
    def forward(
        self,
        *views: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        *views: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: Literal[True],
    ) -> tuple[Tensor, ContrastiveStats]: ...
    @overload
    def forward(
        self,
        *views: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: bool,
    ) -> LossOutput: ...
    def forward(
        self,
        *views: Tensor,
        labels: Tensor | None = None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> LossOutput:
        """The loss of one or more views, (N, D) each: see ``sup_con``."""
        self._limit_logit_scale()
        return sup_con(
            *views,
            labels=_given(labels, views),
            keys=keys,
            key_labels=key_labels,
            temperature=self.temperature,
            sample_weight=sample_weight,
            return_stats=return_stats,
            **self._options(),
        )

    if TYPE_CHECKING:
        __call__ = forward
