"""SigLIP: every pair of a batch is its own yes-or-no question, with no softmax over the batch."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kit._checks import (
    check_alike,
    check_choice,
    check_embeddings,
    check_gathering,
    check_ids,
    check_number,
    check_reverse_mode,
    check_scalar,
    check_temperature,
)
from contrastive_kit.distributed import checked
from contrastive_kit.losses._common import (
    LARGEST_LEARNABLE_TEMPERATURE,
    REDUCTIONS,
    Scalars,
    at_least_float32,
    check_sample_weight,
    limit_logit_scale_,
    limited_logit_scale,
    reduce,
    shown,
)
from contrastive_kit.losses._gathered import (
    gather_batch,
    own_parameters,
    settings_of,
    several_processes,
)
from contrastive_kit.ops import Exclusion, check_backend, kept_softplus_sum, scaled_unit_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def siglip(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    logit_bias: float | Tensor = -10.0,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    gather_distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor:
    r"""The sigmoid loss of SigLIP: is this pair a match, asked of every pair of a batch.

    .. math::

        \ell_i = -\log \sigma(s_{ii} + b) - \sum_{j \ne i} \log \sigma(-s_{ij} - b),
        \qquad s_{ij} = \cos(z^1_i, z^2_j) / \tau

    The value is the mean over i, as in the paper: it grows with the batch, N - 1 negatives to a
    positive, which is why the bias starts at -10. Swapping ``z1`` and ``z2`` changes no sum.

    Args:
        z1: embeddings (N, D), any floating dtype, normalised here.
        z2: embeddings (N, D); row i matches row i of ``z1``.
        temperature: τ > 0, at least 1.2e-7 (2.3e-16 in float64), or a tensor of one value, which
            then receives its gradient; 1 / τ is the scale t of the paper. The value of a tensor is
            not checked.
        logit_bias: b, a number, or a tensor of one value, which then receives its gradient. The
            value of a tensor is not checked.
        ids: integers (N,); rows of equal id (duplicates) are no negatives of each other. The pair
            (i, i) stays a match.
        sample_weight: floating numbers (N,) ≥ 0 that multiply the losses; the mean is weighted,
            Σ w·ℓ / Σ w; 0 if all are 0. The sign is not checked.
        reduction: "mean" or "sum" over the rows of ``z1``, or "none" for the losses (N,).
        gather_distributed: compare the rows of ``z1`` with the ``z2`` of all processes. "mean" is
            then the share of this process, so that the mean over processes, which
            ``DistributedDataParallel`` takes of the gradients, is that of the whole batch, exactly,
            also for batches of different sizes. So is that of tensors given as temperature and
            bias, which ``SigLIP`` takes by itself. "sum" and "none" are of the own rows.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or "tiled" (any device), or "reference" (the formula, memory N²). No fused
            kernel computes this loss: on a GPU the tiles run through cuBLAS.

    Returns:
        The loss, float64 if an embedding is float64 and float32 otherwise, also under autocast.

    Raises:
        TypeError: for embeddings or a ``sample_weight`` that are not floating tensors, ids that are
            not integers, a ``logit_bias`` that is no number.
        NotImplementedError: for forward-mode differentiation (``torch.func.jvp``, ``jacfwd``).
        ValueError: for shapes or devices that do not match, sparse or nested tensors, a temperature
            that is not positive and finite, a ``logit_bias`` that is not finite, an unknown
            ``reduction`` or ``backend``; on every process, if one of them raises, or they differ
            in embeddings or options.
        RuntimeError: for ``gather_distributed`` without an initialised process group; under
            ``torch.jit.trace``, which would keep the size of the batch.

    Memory:
        O(N·D) and a few tiles, in the backward too, which computes the logits again. With
        ``gather_distributed`` N is the number of pairs of all processes.

    References:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343, equation 1 and
        algorithm 1.

    Example:
        >>> import torch
        >>> from contrastive_kit.functional import siglip
        >>> z = torch.eye(3)
        >>> siglip(z, z, temperature=1.0, logit_bias=0.0)  # log(1 + 1/e) + 2 log 2
        tensor(1.6996)
    """
    gather = several_processes(gather_distributed, process_group)

    def check() -> Scalars:
        check_embeddings("z1", z1)
        check_embeddings("z2", z2)
        check_alike("z2", z2, "z1", z1)
        check_reverse_mode("z1", z1)
        check_reverse_mode("z2", z2)
        if ids is not None:
            check_ids("ids", ids, z1.shape[0], "z1", z1)
        if sample_weight is not None:
            check_sample_weight(sample_weight, z1.shape[0], "z1", z1)
        check_choice("reduction", reduction, REDUCTIONS)
        check_backend(backend, "softplus_sum")
        return check_temperature(temperature, z1), _check_bias(logit_bias, z1)

    temperature, logit_bias = checked(check, process_group) if gather else check()
    rows = scaled_unit_rows((z1,), temperature)[0]
    columns = scaled_unit_rows((z2,), temperature)[0]
    match = (rows * columns).sum(1) + _as(logit_bias, rows)
    candidates, exclusion, weight_per_process = columns, Exclusion(z1.shape[0], ids), None
    if gather:
        settings = settings_of(
            "siglip",
            (z1, z2),
            temperature=temperature,
            logit_bias=logit_bias,
            ids=ids,
            sample_weight=sample_weight,
            reduction=reduction,
        )
        batch = gather_batch(columns[None], ids, sample_weight, process_group, settings)
        candidates, exclusion = batch.rows.flatten(0, 1), batch.exclusion(1, 1)
        weight_per_process = batch.weight_per_process
    others = kept_softplus_sum(rows, candidates, logit_bias, exclusion=exclusion, backend=backend)
    # By default softplus is linear above 20, which float64 would notice.
    loss = F.softplus(-match, threshold=50) + others
    return reduce(loss, reduction, sample_weight, weight_per_process)


def _as(logit_bias: float | Tensor, rows: Tensor) -> float | Tensor:
    return logit_bias.reshape(()).to(rows) if isinstance(logit_bias, Tensor) else logit_bias


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


class SigLIP(nn.Module):
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
        reduction: str = "mean",
        gather_distributed: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) or isinstance(logit_bias, Tensor):
            raise TypeError(
                "temperature and logit_bias must be numbers; both are learnable parameters"
            )
        tau, b = float(check_temperature(temperature)), float(_check_bias(logit_bias))
        self.max_scale = check_number("max_scale", max_scale)
        if not 1 / LARGEST_LEARNABLE_TEMPERATURE <= self.max_scale <= _LARGEST_MAX_SCALE:
            raise ValueError(
                f"max_scale must be from {1 / LARGEST_LEARNABLE_TEMPERATURE} to "
                f"{_LARGEST_MAX_SCALE:.0f}, got {max_scale}"
            )
        if not 1 / self.max_scale <= tau <= LARGEST_LEARNABLE_TEMPERATURE:
            raise ValueError(
                f"temperature must be at least 1 / max_scale, {1 / self.max_scale:.4g}, and at "
                f"most {LARGEST_LEARNABLE_TEMPERATURE}, got {tau}"
            )
        check_choice("reduction", reduction, REDUCTIONS)
        check_backend(backend, "softplus_sum")
        check_gathering(gather_distributed, process_group)
        self.gather_distributed = gather_distributed
        self.process_group = process_group
        self.reduction = reduction
        self.backend = backend
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(tau)))
        self.logit_bias = nn.Parameter(torch.tensor(b))

    @property
    def temperature(self) -> Tensor:
        """The temperature, with the gradient of ``logit_scale``; never in half precision."""
        return (-limited_logit_scale(self.logit_scale, math.log(self.max_scale))).exp()

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of two batches of embeddings, (N, D) each: see ``siglip``."""
        largest = math.log(self.max_scale)
        limit_logit_scale_(self.logit_scale, largest)
        logit_scale = limited_logit_scale(self.logit_scale, largest)
        scalars = torch.stack([logit_scale, at_least_float32(self.logit_bias)])
        scalars = own_parameters(scalars, self.gather_distributed, self.process_group)
        logit_scale, logit_bias = scalars.unbind(0)
        return siglip(
            z1,
            z2,
            temperature=(-logit_scale).exp(),
            logit_bias=logit_bias,
            ids=ids,
            sample_weight=sample_weight,
            reduction=self.reduction,
            gather_distributed=self.gather_distributed,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options, as the constructor takes them, with the present temperature and bias."""
        gathering = "gather_distributed=True, " if self.gather_distributed else ""
        bound = f"max_scale={shown(self.max_scale)}, " if self.max_scale != 1000 else ""
        return (
            f"temperature={shown(self.temperature)}, "
            f"logit_bias={shown(self.logit_bias)}, {bound}{gathering}"
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
