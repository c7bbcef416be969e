"""InfoNCE: each query against its key and negatives; in both directions it is the loss of CLIP."""

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
from contrastive_kit.losses._common import (
    LossOutput,
    check_sample_weight,
    logit_bound,
    preferring_hard,
    reduce,
    smoothed,
    softmax_loss,
    with_statistics,
)
from contrastive_kit.losses._gathered import (
    gather_batch,
    settings_of,
    several_processes,
)
from contrastive_kit.losses._module import LossModule
from contrastive_kit.losses._negatives import Found, check_own_keys, per_query_logsumexp, totals_of
from contrastive_kit.losses._options import CheckedOptions, Options, check_options
from contrastive_kit.losses._stats import ContrastiveStats, contrastive_stats
from contrastive_kit.ops import (
    Exclusion,
    LogitStatistics,
    Pairs,
    Problem,
    logsumexp_for,
    mma_dtype,
    pair_loss_for,
    scaled_unit_rows,
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
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    reduction: str = "mean",
    return_stats: bool = False,
    gather_distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
) -> LossOutput:
    r"""InfoNCE: cross entropy of finding the key of each query among negatives.

    .. math::

        \ell_i = -\log \frac{e^{s_{ii}}}{e^{s_{ii}} + \sum_{n} e^{s_{in}}},
        \qquad s_{ij} = \cos(q_i, k_j) / \tau

    Without ``negatives``, the negatives of query i are the keys of all other queries; unlike
    NT-Xent, no query is a negative of a query. With ``negatives`` those are the only ones (MoCo's
    queue; mined negatives).

    Args:
        query: embeddings (N, D), any floating dtype, normalised here; N ≥ 2 without ``negatives``.
        key: embeddings (N, D); row i is the positive of row i of ``query``.
        negatives: None, or embeddings (K, D) shared by all queries, or (N, K, D): K per query.
            With K = 0 shared ones, as in a queue that is still empty, all losses are 0. Without
            the keys themselves, which would count each positive twice.
        temperature: τ > 0, at least 1.2e-7 (2.3e-16 in float64), or a tensor of one value, which
            then receives its gradient. The value of a tensor is not checked; if it is not positive
            the loss is NaN.
        symmetric: average with the loss of keys against queries, the loss of CLIP, from the same
            tiles. Not with ``negatives``.
        ids: integers (N,); pairs of equal id are not negatives of each other. A row left without
            negatives has loss 0 and a zero gradient. Not with ``negatives``.
        sample_weight: floating numbers (N,) ≥ 0, one for each pair: its losses are multiplied by
            it, and the mean is weighted, Σ w·ℓ / Σ w; 0 if all are 0. A key of weight 0 stays a
            negative of others. The sign is not checked.
        label_smoothing: the part of the target, in [0, 1], spread evenly over all candidates of a
            query, its key included: what ``torch.nn.functional.cross_entropy`` calls so. Not with
            ``hardness``.
        hardness: β ≥ 0; each negative counts in proportion to e^(β·s), so that those most similar
            to the query count most (arXiv 2010.04592, with τ⁺ = 0). Twice the cost.
        reduction: "mean" (over both directions if ``symmetric``), "sum", or "none" for the losses
            (N,), or (2, N) if ``symmetric``: queries first, then keys.
        return_stats: also return ``ContrastiveStats``, over both directions if ``symmetric``, of
            the softmax without weights, smoothing or hardness. Over the queries of this process.
        gather_distributed: take the keys of all processes as negatives, and the queries too if
            ``symmetric``. Exact after ``DistributedDataParallel``, also for batches of different
            sizes: see ``nt_xent``, whose conventions these are. Not with ``negatives``: let
            ``NegativeQueue`` gather.
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
            ``negatives``, sparse or nested tensors, ``symmetric`` or ``ids`` with ``negatives``,
            ``negatives`` that begin or end with the keys (seen on a CPU only), a temperature that
            is not positive and finite, an option out of its range, ``label_smoothing`` with
            ``hardness``, an unknown ``reduction`` or ``backend``; on every process, if one of them
            raises, or they differ in options, or in embeddings but for their number.
        RuntimeError: for ``gather_distributed`` without an initialised process group; under
            ``torch.jit.trace``, which would keep the size of the batch.

    Memory:
        O((N + K)·D) and a few tiles, on a CPU up to 32 MiB of them from the forward to the
        backward; per-query negatives are an input of N·K·D. With ``gather_distributed`` N is the
        number of pairs of all processes.

    References:
        van den Oord et al., arXiv 1807.03748, equation 4; Radford et al., arXiv 2103.00020,
        figure 3 (symmetric); He et al., arXiv 1911.05722, equation 1 (queue).

    Example:
        >>> import torch
        >>> from contrastive_kit.functional import info_nce
        >>> image, text = torch.eye(4), torch.eye(4)
        >>> info_nce(image, text, temperature=1.0, symmetric=True)  # log(e + 3) - 1
        tensor(0.7437)
        >>> queue = -torch.ones(2, 4)
        >>> info_nce(image, text, queue, temperature=1.0)  # log(e + 2 e^-1/2) - 1
        tensor(0.3690)
    """
    options = Options(
        symmetric=symmetric,
        label_smoothing=label_smoothing,
        hardness=hardness,
        reduction=reduction,
        gather_distributed=gather_distributed,
        process_group=process_group,
        backend=backend,
    )
    gather = several_processes(gather_distributed, process_group)

    def check() -> CheckedOptions:
        least = 1 if gather else 2
        _check_inputs(query, key, negatives, symmetric, ids, gather_distributed, least)
        if sample_weight is not None:
            check_sample_weight(sample_weight, query.shape[0], "query", query)
        check_flag("return_stats", return_stats)
        return check_options(temperature, options, query)

    temperature, options = checked(check, process_group) if gather else check()
    n = query.shape[0]

    # One op answers the options named here, and nothing else.
    if negatives is None and not gather and options.asks_only("symmetric", "reduction"):
        pairs = Pairs(
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
        whole = pair_loss_for(pairs, backend)
        if whole is not None:
            return with_statistics(*whole, temperature)
    # Normalised apart, so that a key or a queue without gradient costs none.
    queries = scaled_unit_rows((query,), temperature)[0]
    keys = scaled_unit_rows((key,), temperature)[0]
    positive_logits = (queries * keys).sum(1)[None]
    if symmetric:
        positive_logits = positive_logits.repeat(1, 2)
    # What queries, and keys if symmetric, are compared with.
    columns = [keys, queries] if symmetric else [keys]
    exclusion, weight_per_process = Exclusion(n, ids), None
    if negatives is not None:
        exclusion = Exclusion()
        if negatives.shape[0] == 0:
            # One column, of which nothing is kept: a defined edge of everything below.
            negatives, exclusion = query.new_zeros(1, query.shape[1]), _nothing(n, query.device)
        columns = [scaled_unit_rows((negatives,), temperature)[0]]
    elif gather:
        settings = settings_of(
            "info_nce",
            (query, key),
            temperature=temperature,
            ids=ids,
            sample_weight=sample_weight,
            **options.of_the_loss().changed(),
        )
        batch = gather_batch(torch.stack(columns), ids, sample_weight, process_group, settings)
        columns = [x.contiguous() for x in batch.rows.unbind(1)]
        exclusion, weight_per_process = batch.exclusion(1), batch.weight_per_process()
    directions = list(zip((queries, keys)[: len(columns)], columns, strict=True))

    def found_among(q: Tensor, k: Tensor, both: bool = False) -> Found:
        problem = Problem(
            q,
            k,
            exclusion,
            both=both,
            bound=logit_bound(temperature),
            statistics=return_stats,
            mma_dtype=mma_dtype(query, key if negatives is None else negatives),
        )
        return preferring_hard(logsumexp_for(problem, backend), options.hardness)(problem)

    if columns[0].ndim == 3:
        found = per_query_logsumexp(queries, columns[0], options.hardness, return_stats)
    elif symmetric and not gather:
        found = found_among(queries, keys, both=True)
    else:
        found = _joined([found_among(q, k) for q, k in directions])
    negative_lse, statistics = found
    per_anchor = softmax_loss(positive_logits, negative_lse, decoupled=False)
    if options.label_smoothing:
        totals, counts = zip(*(totals_of(q, k, exclusion) for q, k in directions), strict=True)
        total, count = torch.cat(totals), torch.cat(counts)
        per_anchor = smoothed(per_anchor, positive_logits, total, count, options.label_smoothing)
    losses = per_anchor.view(2, n) if symmetric else per_anchor
    loss = reduce(losses, reduction, sample_weight, weight_per_process)
    if statistics is None:
        return loss
    return loss, contrastive_stats(positive_logits, statistics, temperature)


def _check_inputs(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    symmetric: bool,
    ids: Tensor | None,
    gather_distributed: bool,
    least: int,
) -> None:
    check_flag("symmetric", symmetric)
    check_embeddings("query", query)
    check_embeddings("key", key)
    check_alike("key", key, "query", query)
    check_reverse_mode("query", query)
    check_reverse_mode("key", key)
    n, d = query.shape
    if negatives is None:
        if n < least:
            raise ValueError(
                "query must have at least 2 rows where no negatives are given, or there are none; "
                f"got {n}"
            )
        if ids is not None:
            check_ids("ids", ids, n, "query", query)
        return
    if symmetric:
        raise ValueError("symmetric=True takes no negatives: keys have no negatives of their own")
    if gather_distributed:
        raise ValueError(
            "gather_distributed=True takes the keys of other processes as negatives; with "
            "negatives given, leave it False and let NegativeQueue gather"
        )
    if ids is not None:
        raise ValueError("ids tell which keys are no negatives; with negatives given, omit ids")
    if isinstance(negatives, Tensor):
        check_dense("negatives", negatives)
    if isinstance(negatives, Tensor) and negatives.ndim == 3:
        check_embeddings("negatives", negatives, ndim=3)
        if (negatives.shape[0], negatives.shape[2]) != (n, d):
            raise ValueError(
                f"negatives must have shape ({n}, K, {d}) to match query, "
                f"got {tuple(negatives.shape)}"
            )
    else:
        if not (isinstance(negatives, Tensor) and negatives.shape == (0, d)):
            check_embeddings("negatives", negatives)
        if negatives.shape[1] != d:
            raise ValueError(
                f"negatives must have shape (K, {d}) to match query, got {tuple(negatives.shape)}"
            )
    check_device("negatives", negatives, "query", query)
    check_reverse_mode("negatives", negatives)
    check_own_keys(key, negatives)


def _joined(found: list[Found]) -> Found:
    """Both directions one after the other."""
    if len(found) == 1:
        return found[0]
    lse, stats = zip(*found, strict=True)
    statistics = None
    if stats[0] is not None:
        statistics = LogitStatistics(*(torch.cat(field) for field in zip(*stats, strict=True)))
    return torch.cat(lse), statistics


def _nothing(n: int, device: torch.device) -> Exclusion:
    """The rule that leaves out the one column there is, for all ``n`` rows."""
    return Exclusion(
        0,
        torch.zeros(n, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


class InfoNCE(LossModule):
    """InfoNCE as a module: ``info_nce`` with its options stored.

    Args:
        temperature: τ > 0; the initial one, from 0.01 to 100, if it is learnable.
        symmetric: average both directions: the loss of CLIP.
        learnable_temperature: learn τ through the parameter ``logit_scale`` = log(1 / τ), which
            each call brings back to within ±log(100). Give it to the optimizer without weight
            decay. With ``gather_distributed`` its gradient is averaged over processes.
        label_smoothing: the part of the target spread over all candidates, in [0, 1]. Not with
            ``hardness``.
        hardness: β ≥ 0, how much the most similar negatives are preferred.
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
        learnable_temperature: bool = False,
        label_smoothing: float = 0.0,
        hardness: float = 0.0,
        reduction: str = "mean",
        gather_distributed: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature,
            symmetric=symmetric,
            label_smoothing=label_smoothing,
            hardness=hardness,
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
        sample_weight: Tensor | None = None,
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
        sample_weight: Tensor | None = None,
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
        sample_weight: Tensor | None = None,
        return_stats: bool,
    ) -> LossOutput: ...
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> LossOutput:
        """The loss of queries and keys, (N, D) each: see ``info_nce``."""
        self._limit_logit_scale()
        return info_nce(
            query,
            key,
            negatives,
            temperature=self.temperature,
            ids=ids,
            sample_weight=sample_weight,
            return_stats=return_stats,
            **self._options(),
        )

    if TYPE_CHECKING:
        __call__ = forward
