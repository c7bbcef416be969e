"""SigLIP: every pair of a batch is its own yes-or-no question, with no softmax over the batch."""

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kit._checks import (
    check_alike,
    check_device,
    check_embeddings,
    check_flag,
    check_ids,
    check_number,
    check_reverse_mode,
    check_scalar,
)
from contrastive_kit.distributed import checked
from contrastive_kit.losses._common import (
    LossOutput,
    check_sample_weight,
    logit_bound,
    mean_from_sum,
    of_each_anchor,
    reduce,
)
from contrastive_kit.losses._gathered import (
    gather_batch,
    settings_of,
    several_processes,
)
from contrastive_kit.losses._matches import Given, matched_by_labels
from contrastive_kit.losses._module import (
    LARGEST_LEARNABLE_TEMPERATURE,
    LossModule,
    at_least_float32,
)
from contrastive_kit.losses._options import Options, Reduction, Scalar, check_options
from contrastive_kit.losses._stats import ContrastiveStats, contrastive_stats
from contrastive_kit.ops import (
    BackendName,
    Exclusion,
    Problem,
    logsumexp_for,
    mma_dtype,
    scaled_unit_rows,
    softplus_sum_for,
    softplus_total_for,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from contrastive_kit.losses._signatures import SigLIPKeywords


@overload
def siglip(
    z1: Tensor,
    z2: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: "Unpack[SigLIPKeywords]",
) -> Tensor: ...
@overload
def siglip(
    z1: Tensor,
    z2: Tensor,
    *,
    return_stats: Literal[True],
    **options: "Unpack[SigLIPKeywords]",
) -> tuple[Tensor, ContrastiveStats]: ...
@overload
def siglip(
    z1: Tensor,
    z2: Tensor,
    *,
    return_stats: bool,
    **options: "Unpack[SigLIPKeywords]",
) -> LossOutput: ...
def siglip(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    logit_bias: float | Tensor = -10.0,
    ids: Tensor | None = None,
    labels: Tensor | None = None,
    z2_labels: Tensor | None = None,
    balance_positives: bool = False,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    gather_distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: BackendName = "auto",
) -> LossOutput:
    r"""The sigmoid loss of SigLIP: is this pair a match, asked of every pair of a batch.

    .. math::

        \ell_i = -\log \sigma(s_{ii} + b) - \sum_{j \ne i} \log \sigma(-s_{ij} - b),
        \qquad s_{ij} = \cos(z^1_i, z^2_j) / \tau

    The value is the mean over i, as in the paper: it grows with the batch, N - 1 negatives to a
    positive, which is why the bias starts at -10. Swapping ``z1`` and ``z2`` changes no sum.

    With ``labels`` the matches are all pairs of equal label instead: several captions of an image,
    images of a class.

    Args:
        z1: embeddings (N, D), any floating dtype, normalized here.
        z2: embeddings (N, D); row i matches row i of ``z1``. With ``z2_labels`` (M, D).
        temperature: τ > 0, at least 1.2e-7 (2.3e-16 in float64), or a tensor of one value, which
            then receives its gradient; 1 / τ is the scale t of the paper. The value of a tensor is
            not checked. A tensor (N,) is a temperature for each row of ``z1``, which its logits are
            divided by; not with ``labels``.
        logit_bias: b, a number, or a tensor of one value, which then receives its gradient. The
            value of a tensor is not checked.
        ids: integers (N,); rows of equal id (duplicates) are no negatives of each other. The pair
            (i, i) stays a match. Not with ``labels``, by which such pairs are matches.
        labels: integers (N,); all pairs of equal label are matches. A row without any is compared
            with its negatives alone.
        z2_labels: integers (M,), the labels of ``z2``; None if they are those of ``z1``.
        balance_positives: with ``labels``, weigh a match by (1/k + 1/k')/2, for its k matches of
            the row of ``z1`` and k' of the row of ``z2``, so that frequent labels do not outweigh
            the others (SigLIP+). If False each counts as one.
        sample_weight: floating numbers (N,) ≥ 0 that multiply the losses; the mean is weighted,
            Σ w·ℓ / Σ w; 0 if all are 0. The sign is not checked.
        reduction: "mean" or "sum" over the rows of ``z1``, or "none" for the losses (N,).
        return_stats: also return ``ContrastiveStats``, those of ``info_nce`` for the same pairs and
            temperature: which candidate is nearest, and the softmax over candidates, do not depend
            on the bias. Over the rows of ``z1`` of this process. It costs a forward pass over the
            pairs, of two passes over each tile.
        gather_distributed: compare the rows of ``z1`` with the ``z2`` of all processes. "mean" is
            then the share of this process, so that the mean over processes, which
            ``DistributedDataParallel`` takes of the gradients, is that of the whole batch, exactly,
            also for batches of different sizes. So is that of tensors given as temperature and
            bias, which ``SigLIP`` takes by itself. "sum" and "none" are of the own rows.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``; with ``labels`` "triton" refuses.

    Returns:
        The loss, float64 if an embedding is float64 and float32 otherwise, also under autocast;
        with ``return_stats`` the pair (loss, ``ContrastiveStats``).

    Raises:
        TypeError: for embeddings or a ``sample_weight`` that are not floating tensors, ids or
            labels that are not integers, a ``logit_bias`` that is no number.
        NotImplementedError: for forward-mode differentiation (``torch.func.jvp``, ``jacfwd``).
        ValueError: for shapes or devices that do not match, sparse or nested tensors, a temperature
            that is not positive and finite, a ``logit_bias`` that is not finite, ``labels`` with
            ``ids``, ``z2_labels`` or ``balance_positives`` without ``labels``, an unknown
            ``reduction`` or ``backend``; on every process, if one of them raises, or they differ
            in embeddings or options.
        RuntimeError: for ``gather_distributed`` without an initialized process group where
            ``WORLD_SIZE`` tells of several processes (one process has nothing to gather); under
            ``torch.jit.trace``, which would keep the size of the batch.

    Memory:
        O(N·D) and a few tiles, in "triton" a strip of at most 256 MiB. The forward leaves the
        gradients to the backward, N·D numbers of either side; with "none" the backward computes
        the logits again. With ``gather_distributed`` N is the number of pairs of all processes.
        ``labels`` cost as much again: the matches run in tiles of their own.

    References:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343, equation 1 and
        algorithm 1.

    Example:
        >>> import torch
        >>> from contrastive_kit.functional import siglip
        >>> z = torch.eye(3)
        >>> siglip(z, z, temperature=1.0, logit_bias=0.0)  # log(1 + 1/e) + 2 log 2
        tensor(1.6996)
        >>> image, captions = torch.eye(2), torch.eye(2).repeat_interleave(2, 0)
        >>> siglip(
        ...     image,
        ...     captions,
        ...     labels=torch.tensor([0, 1]),
        ...     z2_labels=torch.tensor([0, 0, 1, 1]),
        ...     temperature=1.0,
        ...     logit_bias=0.0,
        ... )  # 2 log(1 + 1/e) + 2 log 2
        tensor(2.0128)
    """
    options = Options(
        balance_positives=balance_positives,
        reduction=reduction,
        gather_distributed=gather_distributed,
        process_group=process_group,
        backend=backend,
    )
    gather = several_processes(gather_distributed, process_group)

    def check() -> _Checked:
        check_embeddings("z1", z1)
        check_embeddings("z2", z2)
        _check_labels(z1, z2, ids, labels, z2_labels, balance_positives)
        check_reverse_mode("z1", z1)
        check_reverse_mode("z2", z2)
        if ids is not None:
            check_ids("ids", ids, z1.shape[0], "z1", z1)
        if sample_weight is not None:
            check_sample_weight(sample_weight, z1.shape[0], "z1", z1)
        check_flag("return_stats", return_stats)
        tau, _ = check_options(
            temperature, options, z1, primitive="softplus_sum", per_anchor=labels is None
        )
        return tau, _check_bias(logit_bias, z1)

    temperature, logit_bias = checked(check, process_group) if gather else check()
    if labels is not None:
        z2_labels = labels if z2_labels is None else z2_labels
        given = Given(z1, z2, labels, z2_labels, sample_weight, temperature, logit_bias, options)
        return matched_by_labels(given, gather, return_stats)
    each = of_each_anchor(temperature)
    of_rows = temperature if each is None else 1.0
    rows = scaled_unit_rows((z1,), of_rows)[0]
    columns = scaled_unit_rows((z2,), of_rows)[0]
    if each is not None:
        rows = rows / each.to(rows.dtype)[:, None]
    positive_logits = (rows * columns).sum(1)
    candidates, exclusion, weight_per_process = columns, Exclusion(z1.shape[0], ids), None
    if gather:
        settings = settings_of(
            "siglip",
            (z1, z2),
            temperature=temperature,
            logit_bias=logit_bias,
            ids=ids,
            sample_weight=sample_weight,
            **options.of_the_loss().changed(),
        )
        batch = gather_batch(columns[None], ids, sample_weight, process_group, settings)
        candidates = batch.rows[:, 0]
        exclusion, weight_per_process = batch.exclusion(1), batch.weight_per_process()
    problem = Problem(
        rows,
        candidates,
        exclusion,
        bound=logit_bound(temperature),
        mma_dtype=mma_dtype(z1, z2),
    )
    # By default softplus is linear above 20, which float64 would notice.
    bias = _as_tensor(logit_bias, rows)
    of_pairs = F.softplus(-(positive_logits + bias), threshold=50)
    if reduction == "none" or (sample_weight is not None and sample_weight.requires_grad):
        others = softplus_sum_for(problem, backend)(problem, bias)
        loss = reduce(of_pairs + others, reduction, sample_weight, weight_per_process)
    else:
        total = softplus_total_for(problem, backend)(problem, bias, sample_weight)
        loss = reduce(of_pairs, "sum", sample_weight) + total
        if reduction == "mean":
            n = z1.shape[0]
            loss = mean_from_sum(loss, 1, n, sample_weight, weight_per_process)
    if not return_stats:
        return loss
    with torch.no_grad():
        asked = problem._replace(q=rows.detach(), k=candidates.detach(), statistics=True)
        _, statistics = logsumexp_for(asked, backend)(asked)
    assert statistics is not None
    return loss, contrastive_stats(positive_logits[None].detach(), statistics, temperature)


_Checked = tuple[Scalar, Scalar]


def _check_labels(
    z1: Tensor,
    z2: Tensor,
    ids: Tensor | None,
    labels: Tensor | None,
    z2_labels: Tensor | None,
    balance_positives: bool,
) -> None:
    if z2_labels is None:
        check_alike("z2", z2, "z1", z1)
    elif labels is None:
        raise ValueError("z2_labels need labels of z1 to be compared with, got None")
    else:
        if z2.shape[1] != z1.shape[1]:
            raise ValueError(
                f"z2 must have shape (M, {z1.shape[1]}) to match z1, got {tuple(z2.shape)}"
            )
        check_device("z2", z2, "z1", z1)
        check_ids("z2_labels", z2_labels, z2.shape[0], "z2", z2)
    if labels is None:
        if balance_positives is True:
            raise ValueError("balance_positives=True needs labels, which tell the matches")
        return
    check_ids("labels", labels, z1.shape[0], "z1", z1)
    if ids is not None:
        raise ValueError(
            "ids cannot be combined with labels: ids leave pairs out, of which labels make matches"
        )


def _as_tensor(logit_bias: float | Tensor, rows: Tensor) -> Tensor:
    if isinstance(logit_bias, Tensor):
        return logit_bias.reshape(()).to(rows)
    return rows.new_full((), logit_bias)


def _check_bias(logit_bias: object, z: Tensor | None = None) -> float | Tensor:
    if isinstance(logit_bias, Tensor):
        check_scalar("logit_bias", logit_bias, z)
        return logit_bias
    number = check_number("logit_bias", logit_bias)
    # Not math.isfinite, which would break the graph of torch.compile(dynamic=True).
    if not -math.inf < number < math.inf:
        raise ValueError(f"logit_bias must be finite, got {number}")
    return number


# 1 / eps of float32: between larger logits it cannot tell 1 apart.
_LARGEST_MAX_SCALE = 2.0**23


class SigLIP(LossModule):
    """SigLIP as a module, with a learnable scale and bias.

    The parameters are ``logit_scale`` = log(1 / τ) and ``logit_bias``, from log 10 and -10 as in
    the paper. Each call brings ``logit_scale`` back into [-log(100), log(``max_scale``)]. Give both
    to the optimizer without weight decay; ``requires_grad_(False)`` on one freezes it. With
    ``gather_distributed`` their gradients are averaged over processes, whether or not the loss is
    inside a ``DistributedDataParallel``.

    Args:
        temperature: the initial τ, from 1 / ``max_scale`` to 100.
        logit_bias: the initial b.
        max_scale: the largest scale 1 / τ, from 0.01 to 2²³. The default is far above the scales
            that published models end at, near 100, and far below those at which the loss
            overflows. The paper's code has no bound; open_clip's training bounds it by 100.
        balance_positives: weigh a match by how many share its ends; calls then need ``labels``.
        reduction: "mean", "sum" or "none".
        gather_distributed: compare with the ``z2`` of all processes.
        process_group: the processes to gather from; None for all of them.
        backend: "auto", "tiled" or "reference", see ``siglip``.

    Raises:
        TypeError: for a temperature, a ``logit_bias`` or a ``max_scale`` that is no number.
        ValueError: for one out of range, an unknown ``reduction`` or ``backend``.

    Example:
        >>> import torch
        >>> from contrastive_kit import SigLIP
        >>> loss_fn = SigLIP()
        >>> loss_fn(torch.randn(4, 8), torch.randn(4, 8)).backward()
        >>> {name: p.grad.shape for name, p in loss_fn.named_parameters()}
        {'logit_scale': torch.Size([]), 'logit_bias': torch.Size([])}
    """

    def __init__(
        self,
        temperature: float = 0.1,
        logit_bias: float = -10.0,
        *,
        max_scale: float = 1000.0,
        balance_positives: bool = False,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: BackendName = "auto",
    ) -> None:
        if isinstance(temperature, Tensor) or isinstance(logit_bias, Tensor):
            raise TypeError(
                "temperature and logit_bias must be numbers; both are learnable parameters"
            )
        bias = float(_check_bias(logit_bias))
        max_scale = check_number("max_scale", max_scale)
        if not 1 / LARGEST_LEARNABLE_TEMPERATURE <= max_scale <= _LARGEST_MAX_SCALE:
            raise ValueError(
                f"max_scale must be from {1 / LARGEST_LEARNABLE_TEMPERATURE} to "
                f"{_LARGEST_MAX_SCALE:.0f}, got {max_scale:.12g}"
            )
        super().__init__(
            temperature,
            learnable_temperature=True,
            smallest=1 / max_scale,
            primitive="softplus_sum",
            balance_positives=balance_positives,
            reduction=reduction,
            gather_distributed=gather_distributed,
            process_group=process_group,
            backend=backend,
        )
        self.max_scale = max_scale
        self.logit_bias: nn.Parameter = nn.Parameter(torch.tensor(bias))

    @overload
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        z2_labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        z2_labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: Literal[True],
    ) -> tuple[Tensor, ContrastiveStats]: ...
    @overload
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        z2_labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: bool,
    ) -> LossOutput: ...
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        z2_labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> LossOutput:
        """The loss of two batches of embeddings, (N, D) each: see ``siglip``."""
        self._limit_logit_scale()
        assert self.logit_scale is not None
        logit_scale = self._limited_logit_scale(self.logit_scale)
        # Together, as one collective averages both gradients.
        both = self._averaged(torch.stack([logit_scale, at_least_float32(self.logit_bias)]))
        logit_scale, logit_bias = both.unbind(0)
        return siglip(
            z1,
            z2,
            temperature=(-logit_scale).exp(),
            logit_bias=logit_bias,
            ids=ids,
            labels=labels,
            z2_labels=z2_labels,
            sample_weight=sample_weight,
            return_stats=return_stats,
            **self._options(),
        )

    if TYPE_CHECKING:
        __call__ = forward

    def _shown(self) -> dict[str, float | Tensor | bool]:
        bound = {} if self.max_scale == 1000 else {"max_scale": self.max_scale}
        return {"logit_bias": self.logit_bias, **bound}
