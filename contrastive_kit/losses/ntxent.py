"""NT-Xent, the loss of SimCLR: each view of an image against all views of all others."""

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from contrastive_kit._checks import (
    check_flag,
    check_ids,
)
from contrastive_kit.distributed import checked
from contrastive_kit.losses._common import (
    LossOutput,
    anchor_losses,
    check_sample_weight,
    check_views,
    limits_of_logits,
    logit_bound,
    positive_pair_logits,
    reduce,
    with_statistics,
)
from contrastive_kit.losses._gathered import (
    gather_batch,
    settings_of,
    several_processes,
)
from contrastive_kit.losses._module import LossModule
from contrastive_kit.losses._negatives import InTiles
from contrastive_kit.losses._options import CheckedOptions, Options, Reduction, check_options
from contrastive_kit.losses._stats import ContrastiveStats, contrastive_stats
from contrastive_kit.ops import (
    BackendName,
    Exclusion,
    Pairs,
    Problem,
    mma_dtype,
    pair_loss_for,
    scaled_unit_rows,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from contrastive_kit.losses._signatures import NTXentKeywords


@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *more_views: Tensor,
    return_stats: Literal[False] = False,
    **options: "Unpack[NTXentKeywords]",
) -> Tensor: ...
@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *more_views: Tensor,
    return_stats: Literal[True],
    **options: "Unpack[NTXentKeywords]",
) -> tuple[Tensor, ContrastiveStats]: ...
@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *more_views: Tensor,
    return_stats: bool,
    **options: "Unpack[NTXentKeywords]",
) -> LossOutput: ...
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *more_views: Tensor,
    temperature: float | Tensor = 0.5,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    decoupled: bool = False,
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
    r"""NT-Xent, the normalized temperature-scaled cross entropy of SimCLR.

    .. math::

        \ell_i = -\log \frac{e^{s_{ip}}}{e^{s_{ip}} + \sum_{n} e^{s_{in}}},
        \qquad s_{ij} = \cos(z_i, z_j) / \tau

    Row i of every view is image i. The positive p of an anchor is the other view of its image, its
    negatives n are both views of all other images; the value is the mean over all anchors, as in
    the paper (google-research's code returns twice that). With more than two views the positives
    of an anchor are all other views of its image, combined as L_out of SupCon: the mean of their
    log-probabilities, all of them in the denominator.

    Args:
        z1: embeddings of the first views, (N, D), N ≥ 2, any floating dtype. They are normalized
            here: their lengths do not matter. A zero row has cosine 0 to all and a zero gradient.
        z2: embeddings of the second views, like ``z1``.
        *more_views: embeddings of further views, like ``z1``.
        temperature: τ > 0, at least 1.2e-7 (2.3e-16 in float64), or a tensor of one value, which
            then receives its gradient. The value of a tensor is not checked; if it is not positive
            the loss is NaN.
        ids: integers (N,); images of equal id (duplicates, known false negatives) are not
            negatives of each other, and no positives either. An anchor left without negatives has
            loss 0 and a zero gradient.
        sample_weight: floating numbers (N,) ≥ 0, one for each image: the losses of its anchors
            are multiplied by it, and the mean is weighted, Σ w·ℓ / Σ w; 0 if all are 0. An image
            of weight 0 stays a negative of others. The sign is not checked.
        decoupled: leave the positives out of the denominator (DCL, arXiv 2110.06848, equation 6).
        label_smoothing: the part of the target, in [0, 1], spread evenly over all candidates of an
            anchor, its positives included: what ``torch.nn.functional.cross_entropy`` calls so.
            Not with ``decoupled``, ``hardness`` or ``positive_prior``.
        hardness: β ≥ 0; each negative counts in proportion to e^(β·s), so that those most similar
            to the anchor count most (arXiv 2010.04592; τ⁺ is ``positive_prior``). Twice the cost.
        positive_prior: τ⁺ in [0, 1), the share of negatives that are expected to be positives in
            truth, 1 / C for C balanced classes; what they add is taken out of the sum over the
            negatives (debiased, arXiv 2007.00224). Not with ``label_smoothing``.
        margin: m in [0, 2]; the cosine of a positive counts as less by m, so that it must be
            ahead of the negatives by that. Not with ``decoupled``.
        false_negative_margin: m in [0, 2], or None for off. Candidates whose cosine with the anchor
            is above that of its positive (of several, the most similar one) by more than m are
            taken for false negatives and left out, for each anchor by itself (GISTEmbed with m = 0,
            Qwen3 with 0.1). Which they are is constant in the gradient. Ties stay: there is a slack
            of 1e-5 (1e-12 in float64, 1e-3 for embeddings in half precision, or where
            ``torch.get_float32_matmul_precision()`` is not "highest"), more than rounding makes of
            one cosine. Not with ``label_smoothing`` or ``positive_prior``.
        reduction: "mean" or "sum" over the V·N anchors, or "none" for the losses (V, N): entry
            (v, i) has row i of view v as its anchor.
        return_stats: also return ``ContrastiveStats``, of the softmax without weights or the
            options above, over the anchors of this process. It costs a second pass over each tile.
        gather_distributed: take the images of all processes as negatives. The anchors are those
            of this process. "mean" is then the share of this process: the sum of its losses over
            the mean number of anchors (or sum of weights) of a process, so that the mean over
            processes, which ``DistributedDataParallel`` takes of the gradients, is that of the
            whole batch, exactly, also for batches of different sizes. So is that of a temperature
            tensor, which ``NTXent`` takes by itself. "sum" and "none" are of the own anchors.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``.

    Returns:
        The loss, float64 if an embedding is float64 and float32 otherwise, also under autocast;
        with ``return_stats`` the pair (loss, ``ContrastiveStats``).

    Raises:
        TypeError: for embeddings or a ``sample_weight`` that are not floating tensors, ids that are
            not integers.
        NotImplementedError: for forward-mode differentiation (``torch.func.jvp``, ``jacfwd``).
        ValueError: for shapes or devices that do not match, sparse or nested tensors, fewer than
            two rows, a temperature that is not positive and finite, an option out of its range or
            next to one it cannot be combined with, an unknown ``reduction`` or ``backend``; on
            every process, if one of them raises, or they differ in options, or in embeddings but
            for their number.
        RuntimeError: for ``gather_distributed`` without an initialized process group where
            ``WORLD_SIZE`` tells of several processes (one process has nothing to gather); under
            ``torch.jit.trace``, which would keep the size of the batch.

    Memory:
        O(V·N·D) and a few tiles, on a CPU up to 32 MiB of them from the forward to the backward;
        nothing of size N × N (except with ``backend="reference"``). With ``gather_distributed`` N
        is the number of images of all processes.

    References:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations,
        arXiv 2002.05709, equation 1 and algorithm 1.

    Example:
        >>> import torch
        >>> from contrastive_kit.functional import nt_xent
        >>> z1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> nt_xent(z1, z1, temperature=0.5)  # log(e² + 2) - 2
        tensor(0.2395)
    """
    views = (z1, z2, *more_views)
    options = Options(
        decoupled=decoupled,
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
        check_views(views, gather)
        n = z1.shape[0]
        if ids is not None:
            check_ids("ids", ids, n, "z1", z1)
        if sample_weight is not None:
            check_sample_weight(sample_weight, n, "z1", z1)
        check_flag("return_stats", return_stats)
        return check_options(temperature, options, z1)

    temperature, options = checked(check, process_group) if gather else check()
    n = z1.shape[0]

    # One op answers two views and the options named here, and nothing else.
    if not (more_views or gather) and options.asks_only("decoupled", "reduction"):
        pairs = Pairs(
            z1,
            z2,
            temperature,
            ids,
            sample_weight,
            decoupled=decoupled,
            reduction=reduction,
            statistics=return_stats,
        )
        whole = pair_loss_for(pairs, backend)
        if whole is not None:
            return with_statistics(*whole, temperature)
    views_of_rows = scaled_unit_rows(views, temperature)
    positive_logits = positive_pair_logits(views_of_rows)
    rows = views_of_rows.flatten(0, 1)
    columns, weight_per_process = None, None
    ids_of_rows = None if ids is None else ids.repeat(len(views))
    exclusion = Exclusion(n, ids_of_rows)
    if gather:
        settings = settings_of(
            "nt_xent",
            views,
            temperature=temperature,
            ids=ids,
            sample_weight=sample_weight,
            **options.of_the_loss().changed(),
        )
        batch = gather_batch(views_of_rows, ids, sample_weight, process_group, settings)
        columns = batch.rows.flatten(0, 1)
        exclusion, weight_per_process = batch.exclusion(len(views)), batch.weight_per_process()
    problem = Problem(
        rows,
        columns,
        exclusion,
        bound=logit_bound(temperature),
        statistics=return_stats,
        mma_dtype=mma_dtype(*views),
        limits=limits_of_logits(positive_logits, options, temperature, *views),
    )
    negatives = InTiles(problem, backend)
    per_anchor, statistics = anchor_losses(
        positive_logits, negatives, options, temperature, return_stats
    )
    loss = reduce(per_anchor.view(len(views), n), reduction, sample_weight, weight_per_process)
    if statistics is None:
        return loss
    return loss, contrastive_stats(positive_logits, statistics, temperature)


class NTXent(LossModule):
    """NT-Xent as a module: ``nt_xent`` with its options stored.

    Args:
        temperature: τ > 0; the initial one, from 0.01 to 100, if it is learnable.
        learnable_temperature: learn τ through the parameter ``logit_scale`` = log(1 / τ), which
            each call brings back to within ±log(100). Give it to the optimizer without weight
            decay. With ``gather_distributed`` its gradient is averaged over processes.
            ``fully_shard`` has to leave it out: ``ignored_params=set(loss_fn.parameters())``.
        decoupled: leave the positives out of the denominator.
        label_smoothing: the part of the target spread over all candidates, in [0, 1]. Not with
            ``decoupled``, ``hardness`` or ``positive_prior``.
        hardness: β ≥ 0, how much the most similar negatives are preferred.
        positive_prior: τ⁺ in [0, 1), the expected share of positives among the negatives. Not with
            ``label_smoothing``.
        margin: m in [0, 2], by how much the cosine of a positive must be ahead. Not with
            ``decoupled``.
        false_negative_margin: m in [0, 2] or None, by how much the cosine of a candidate that is
            no false negative may be ahead of the positive's. Not with ``label_smoothing`` or
            ``positive_prior``.
        reduction: "mean", "sum" or "none".
        gather_distributed: take the images of all processes as negatives.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``.

    Raises:
        ValueError: for a temperature or another option out of range, options that cannot be
            combined, an unknown ``reduction`` or ``backend``.

    Example:
        >>> import torch
        >>> from contrastive_kit import NTXent
        >>> loss_fn = NTXent(temperature=0.1)
        >>> z = torch.ones(8, 16, requires_grad=True)
        >>> loss, stats = loss_fn(z, z, return_stats=True)
        >>> round(loss.item(), 4)  # identical rows: log(2N - 1)
        2.7081
        >>> round(stats.positive_similarity.item(), 4)
        1.0
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        learnable_temperature: bool = False,
        decoupled: bool = False,
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
            decoupled=decoupled,
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
        z1: Tensor,
        z2: Tensor,
        *more_views: Tensor,
        ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *more_views: Tensor,
        ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: Literal[True],
    ) -> tuple[Tensor, ContrastiveStats]: ...
    @overload
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *more_views: Tensor,
        ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: bool,
    ) -> LossOutput: ...
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *more_views: Tensor,
        ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> LossOutput:
        """The loss of two or more views, (N, D) each: see ``nt_xent``."""
        self._limit_logit_scale()
        return nt_xent(
            z1,
            z2,
            *more_views,
            temperature=self.temperature,
            ids=ids,
            sample_weight=sample_weight,
            return_stats=return_stats,
            **self._options(),
        )

    if TYPE_CHECKING:
        __call__ = forward
