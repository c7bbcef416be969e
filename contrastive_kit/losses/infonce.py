"""InfoNCE: each query against its key and negatives; in both directions it is the loss of CLIP."""

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from contrastive_kit._checks import check_flag
from contrastive_kit.distributed import checked
from contrastive_kit.losses._candidates import (
    check_batch_alone,
    check_negatives,
    check_pairs,
    in_batch,
    of_batch,
    of_given,
    rows_of_pairs,
)
from contrastive_kit.losses._common import (
    LossOutput,
    anchor_losses,
    check_sample_weight,
    limits_of_logits,
    logit_bound,
    of_each_anchor,
    reduce,
    with_statistics,
)
from contrastive_kit.losses._gathered import (
    gather_batch,
    gather_more,
    settings_of,
    several_processes,
)
from contrastive_kit.losses._module import LossModule
from contrastive_kit.losses._negatives import InTiles, Negatives, together
from contrastive_kit.losses._options import CheckedOptions, Options, Reduction, check_options
from contrastive_kit.losses._stats import ContrastiveStats, contrastive_stats
from contrastive_kit.ops import (
    BackendName,
    Exclusion,
    Pairs,
    Problem,
    mma_dtype,
    pair_loss_for,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from contrastive_kit.losses._signatures import InfoNCEKeywords


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: "Unpack[InfoNCEKeywords]",
) -> Tensor: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: "Unpack[InfoNCEKeywords]",
) -> tuple[Tensor, ContrastiveStats]: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    return_stats: bool,
    **options: "Unpack[InfoNCEKeywords]",
) -> LossOutput: ...
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    in_batch_negatives: bool | None = None,
    query_negatives: bool = False,
    key_negatives: bool = False,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    positive_prior: float = 0.0,
    margin: float = 0.0,
    false_negative_margin: float | None = None,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    gather_distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: BackendName = "auto",
) -> LossOutput:
    r"""InfoNCE: cross entropy of finding the key of each query among negatives.

    .. math::

        \ell_i = -\log \frac{e^{s_{ii}}}{e^{s_{ii}} + \sum_{n} e^{s_{in}}},
        \qquad s_{ij} = \cos(q_i, k_j) / \tau

    Without ``negatives``, the negatives of query i are the keys of all other queries; unlike
    NT-Xent, no query is a negative of a query. With ``negatives`` those are the only ones (MoCo's
    queue), or with ``in_batch_negatives=True`` both (mined negatives, a queue beside the batch).

    Args:
        query: embeddings (N, D), any floating dtype, normalized here; N ≥ 2 without ``negatives``.
        key: embeddings (N, D); row i is the positive of row i of ``query``.
        negatives: None, or embeddings (K, D) shared by all queries, or (N, K, D): K per query,
            which no other query sees. With K = 0 shared ones, as in a queue that is still empty,
            and no others all losses are 0. Without the keys themselves, which would count each
            positive twice.
        temperature: τ > 0, at least 1.2e-7 (2.3e-16 in float64), or a tensor of one value, which
            then receives its gradient. The value of a tensor is not checked; if it is not positive
            the loss is NaN. A tensor (N,) is a temperature for each pair: the logits of its query,
            and of its key as an anchor, are divided by it. Both directions of ``symmetric`` then
            have tiles of their own.
        symmetric: average with the loss of keys against queries, the loss of CLIP, from the same
            tiles. ``negatives`` meet the queries alone (NegCLIP), and need the negatives of the
            batch beside them: without those the keys would have none.
        in_batch_negatives: whether the keys of other queries are negatives; None for yes without
            ``negatives``, and no with them.
        query_negatives: the other queries are negatives of each query too (GTE, Qwen3).
        key_negatives: the other keys are negatives of each key, in the direction of the keys if
            ``symmetric``, else in the one denominator of the pair (Qwen3). With both, and
            ``symmetric``, the loss is ``nt_xent``.
        ids: integers (N,); pairs of equal id are not negatives of each other. A row left without
            negatives has loss 0 and a zero gradient. Where the batch gives no negatives, only
            with ``negative_ids``.
        negative_ids: integers (K,), or (N, K) for negatives per query: the ids of ``negatives``.
            One is left out for the queries that have its id in ``ids``, which must be given.
        sample_weight: floating numbers (N,) ≥ 0, one for each pair: its losses are multiplied by
            it, and the mean is weighted, Σ w·ℓ / Σ w; 0 if all are 0. A key of weight 0 stays a
            negative of others. The sign is not checked.
        label_smoothing: the part of the target, in [0, 1], spread evenly over all candidates of a
            query, its key included: what ``torch.nn.functional.cross_entropy`` calls so. Not with
            ``hardness`` or ``positive_prior``.
        hardness: β ≥ 0; each negative counts in proportion to e^(β·s), so that those most similar
            to the query count most (arXiv 2010.04592; τ⁺ is ``positive_prior``). Twice the cost.
        positive_prior: τ⁺ in [0, 1), the share of negatives that are expected to be positives in
            truth, 1 / C for C balanced classes; what they add is taken out of the sum over the
            negatives (debiased, arXiv 2007.00224). Not with ``label_smoothing``.
        margin: m in [0, 2]; the cosine of a positive counts as less by m, so that it must be
            ahead of the negatives by that.
        false_negative_margin: m in [0, 2], or None for off. Candidates whose cosine with the anchor
            is above that of the pair by more than m are taken for false negatives and left out, for
            each anchor, direction and kind of negative by itself (GISTEmbed with m = 0, Qwen3 with
            0.1). Which they are is constant in the gradient. Ties stay: there is a slack of 1e-5
            (1e-12 in float64, 1e-3 for embeddings in half precision, or where
            ``torch.get_float32_matmul_precision()`` is not "highest"), more than rounding makes of
            one cosine. Not with ``label_smoothing`` or ``positive_prior``.
        reduction: "mean" (over both directions if ``symmetric``), "sum", or "none" for the losses
            (N,), or (2, N) if ``symmetric``: queries first, then keys.
        return_stats: also return ``ContrastiveStats``, over both directions if ``symmetric``, of
            the softmax without weights and the options above. Over the queries of this process.
        gather_distributed: take the keys of all processes as negatives, and the queries too if
            ``symmetric``. Exact after ``DistributedDataParallel``, also for batches of different
            sizes: see ``nt_xent``, whose conventions these are. Shared ``negatives`` of all
            processes are taken too, their number K may differ: let a ``NegativeQueue`` beside the
            batch hold the keys of its own process. Negatives per query stay with their query. Not
            with ``negatives`` alone: there let ``NegativeQueue`` gather.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``. Per-query negatives need no tiles: each
            is used once, and every backend computes them alike.

    Returns:
        The loss, float64 if an embedding is float64 and float32 otherwise, also under autocast;
        with ``return_stats`` the pair (loss, ``ContrastiveStats``).

    Raises:
        TypeError: for embeddings or a ``sample_weight`` that are not floating tensors, ids that are
            not integers.
        NotImplementedError: for forward-mode differentiation (``torch.func.jvp``, ``jacfwd``).
        ValueError: for shapes or devices that do not match, fewer than two rows without
            ``negatives``, sparse or nested tensors, ``symmetric``, ``query_negatives``,
            ``key_negatives`` or ``gather_distributed`` where the batch gives no negatives, ids
            that are compared with nothing,
            ``negatives`` that begin or end with the keys (seen on a CPU only), a temperature that
            is not positive and finite, an option out of its range, ``label_smoothing`` with
            ``hardness``, an unknown ``reduction`` or ``backend``; on every process, if one of them
            raises, or they differ in options, or in embeddings but for their number.
        RuntimeError: for ``gather_distributed`` without an initialized process group where
            ``WORLD_SIZE`` tells of several processes (one process has nothing to gather); under
            ``torch.jit.trace``, which would keep the size of the batch.

    Memory:
        O((N + K)·D) and a few tiles, on a CPU up to 32 MiB of them from the forward to the
        backward, for each of up to four kinds of negatives; per-query negatives are an input of
        N·K·D. With ``gather_distributed`` N and K are the numbers of all processes.

    References:
        van den Oord et al., arXiv 1807.03748, equation 4; Radford et al., arXiv 2103.00020,
        figure 3 (symmetric); He et al., arXiv 1911.05722, equation 1 (queue); Yuksekgonul et al.,
        arXiv 2210.01936 (NegCLIP); Zhang et al., arXiv 2506.05176, section 3 (Qwen3 Embedding).

    Example:
        >>> import torch
        >>> from contrastive_kit.functional import info_nce
        >>> image, text = torch.eye(4), torch.eye(4)
        >>> info_nce(image, text, temperature=1.0, symmetric=True)  # log(e + 3) - 1
        tensor(0.7437)
        >>> queue = -torch.ones(2, 4)
        >>> info_nce(image, text, queue, temperature=1.0)  # log(e + 2 e^-1/2) - 1
        tensor(0.3690)
        >>> info_nce(image, text, queue, temperature=1.0, in_batch_negatives=True)  # + 3
        tensor(0.9361)
    """
    options = Options(
        symmetric=symmetric,
        in_batch_negatives=in_batch_negatives,
        query_negatives=query_negatives,
        key_negatives=key_negatives,
        label_smoothing=label_smoothing,
        hardness=hardness,
        positive_prior=positive_prior,
        margin=margin,
        false_negative_margin=false_negative_margin,
        reduction=reduction,
        gather_distributed=gather_distributed,
        process_group=process_group,
        backend=backend,
    )
    gather = several_processes(gather_distributed, process_group)

    def check() -> CheckedOptions:
        check_flag("return_stats", return_stats)
        checked_options = check_options(temperature, options, query, per_anchor=True)
        check_pairs(query, key, ids)
        if negatives is None:
            check_batch_alone(query, options, negative_ids, 1 if gather else 2)
        else:
            check_negatives(query, key, negatives, ids, negative_ids, options)
        if sample_weight is not None:
            check_sample_weight(sample_weight, query.shape[0], "query", query)
        return checked_options

    temperature, options = checked(check, process_group) if gather else check()
    n, each = query.shape[0], of_each_anchor(temperature)

    # One op answers the options named here, and nothing else. Without other negatives, those of the
    # batch are there in any case.
    answered = ("symmetric", "in_batch_negatives", "reduction")
    if negatives is None and not gather and each is None and options.asks_only(*answered):
        asked_pairs = Pairs(
            query,
            key,
            temperature,
            ids,
            sample_weight,
            between=True,
            both=symmetric,
            reduction=reduction,
            statistics=return_stats,
        )
        whole = pair_loss_for(asked_pairs, backend)
        if whole is not None:
            return with_statistics(*whole, temperature)
    pairs, queries, keys, given = rows_of_pairs(query, key, negatives, temperature)
    pair_logits = (pairs.queries * keys).sum(1)[None]
    positive_logits = pair_logits.repeat(1, 2) if symmetric else pair_logits
    exclusion, weight_per_process = Exclusion(n, ids), None
    if gather:
        settings = settings_of(
            "info_nce",
            (query, key),
            temperature=temperature,
            ids=ids,
            sample_weight=sample_weight,
            negatives=negatives,
            negative_ids=negative_ids,
            per_query=negatives is not None and negatives.ndim == 3,
            **options.of_the_loss().changed(),
        )
        sides = [keys, queries] if symmetric or query_negatives else [keys]
        batch = gather_batch(torch.stack(sides), ids, sample_weight, process_group, settings)
        pairs = pairs.among(*(x.contiguous() for x in batch.rows.unbind(1)))
        exclusion, weight_per_process = batch.exclusion(1), batch.weight_per_process()
        if given is not None and given.ndim == 2:
            given, negative_ids = gather_more(given, negative_ids, process_group)

    asked = InTiles(
        Problem(
            pairs.queries,
            keys,
            exclusion,
            bound=logit_bound(temperature),
            statistics=return_stats,
            mma_dtype=mma_dtype(query, key),
            limits=limits_of_logits(pair_logits, options, temperature, query, key, negatives),
        ),
        backend,
    )
    others: list[Negatives] = []
    if given is not None and negatives is not None:
        among_given = asked.among(pairs.queries, given, mma_dtype=mma_dtype(query, negatives))
        others = of_given(among_given, ids, negative_ids)
    if in_batch(options, negatives):
        found = of_batch(asked, pairs, options, others)
    else:
        found = together(others, pairs.queries, return_stats)
    if each is not None and symmetric:
        temperature = each.repeat(2)
    per_anchor, statistics = anchor_losses(
        positive_logits, found, options, temperature, return_stats
    )
    losses = per_anchor.view(2, n) if symmetric else per_anchor
    loss = reduce(losses, reduction, sample_weight, weight_per_process)
    if statistics is None:
        return loss
    return loss, contrastive_stats(positive_logits, statistics, temperature)


class InfoNCE(LossModule):
    """InfoNCE as a module: ``info_nce`` with its options stored.

    Args:
        temperature: τ > 0; the initial one, from 0.01 to 100, if it is learnable.
        symmetric: average both directions: the loss of CLIP.
        in_batch_negatives: whether the keys of other queries are negatives; None for yes without
            ``negatives``, and no with them.
        query_negatives: the other queries are negatives of each query too.
        key_negatives: the other keys are negatives of each key too.
        learnable_temperature: learn τ through the parameter ``logit_scale`` = log(1 / τ), which
            each call brings back to within ±log(100). Give it to the optimizer without weight
            decay. With ``gather_distributed`` its gradient is averaged over processes.
            ``fully_shard`` has to leave it out: ``ignored_params=set(loss_fn.parameters())``.
        label_smoothing: the part of the target spread over all candidates, in [0, 1]. Not with
            ``hardness`` or ``positive_prior``.
        hardness: β ≥ 0, how much the most similar negatives are preferred.
        positive_prior: τ⁺ in [0, 1), the expected share of positives among the negatives. Not with
            ``label_smoothing``.
        margin: m in [0, 2], by how much the cosine of a positive must be ahead.
        false_negative_margin: m in [0, 2] or None, by how much the cosine of a candidate that is
            no false negative may be ahead of the pair's. Not with ``label_smoothing`` or
            ``positive_prior``.
        reduction: "mean", "sum" or "none".
        gather_distributed: take the keys (and queries) of all processes as negatives.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``.

    Raises:
        ValueError: for a temperature or another option out of range, options that cannot be
            combined, an unknown ``reduction`` or ``backend``.

    Example:
        >>> import torch
        >>> from contrastive_kit import InfoNCE
        >>> clip_loss = InfoNCE(symmetric=True, learnable_temperature=True)
        >>> loss = clip_loss(torch.randn(4, 8), torch.randn(4, 8))
        >>> loss.backward()
        >>> clip_loss.logit_scale.grad.shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        symmetric: bool = False,
        in_batch_negatives: bool | None = None,
        query_negatives: bool = False,
        key_negatives: bool = False,
        learnable_temperature: bool = False,
        label_smoothing: float = 0.0,
        hardness: float = 0.0,
        positive_prior: float = 0.0,
        margin: float = 0.0,
        false_negative_margin: float | None = None,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature,
            symmetric=symmetric,
            in_batch_negatives=in_batch_negatives,
            query_negatives=query_negatives,
            key_negatives=key_negatives,
            label_smoothing=label_smoothing,
            hardness=hardness,
            positive_prior=positive_prior,
            margin=margin,
            false_negative_margin=false_negative_margin,
            reduction=reduction,
            gather_distributed=gather_distributed,
            process_group=process_group,
            backend=backend,
        )

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
        temperature: Tensor | None = None,
        return_stats: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
        temperature: Tensor | None = None,
        return_stats: Literal[True],
    ) -> tuple[Tensor, ContrastiveStats]: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
        temperature: Tensor | None = None,
        return_stats: bool,
    ) -> LossOutput: ...
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
        temperature: Tensor | None = None,
        return_stats: bool = False,
    ) -> LossOutput:
        """The loss of queries and keys, (N, D) each: see ``info_nce``.

        A ``temperature`` (N,), one for each pair, takes the place of that of the module.

        Raises:
            ValueError: for a ``temperature`` where the module learns its own.
        """
        if temperature is not None and self.logit_scale is not None:
            raise ValueError(
                "temperature must be None where the module learns its own; set "
                "learnable_temperature=False"
            )
        self._limit_logit_scale()
        return info_nce(
            query,
            key,
            negatives,
            temperature=self.temperature if temperature is None else temperature,
            ids=ids,
            negative_ids=negative_ids,
            sample_weight=sample_weight,
            return_stats=return_stats,
            **self._options(),
        )

    if TYPE_CHECKING:
        __call__ = forward
