"""What the softmax losses share: from logits to losses, reductions, a learnable temperature."""

import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kit._checks import (
    check_choice,
    check_dense,
    check_device,
    check_flag,
    check_gathering,
    check_number,
    check_temperature,
)
from contrastive_kit._dtypes import compute_dtype
from contrastive_kit.losses._gathered import own_parameters
from contrastive_kit.losses._kept import kept_counts
from contrastive_kit.losses._stats import ContrastiveStats
from contrastive_kit.ops import LogitStatistics, LogSumExp, Problem, check_backend

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LossOutput = Tensor | tuple[Tensor, ContrastiveStats]

# Named here, because torch 2.9 cannot compile a function inside another that spells them out.
Scalar = float | Tensor
Scalars = tuple[Scalar, Scalar]
CheckedOptions = tuple[Scalar, float, float]

REDUCTIONS = ("mean", "sum", "none")

# The bounds of a learnable temperature. Below the one of CLIP training becomes unstable. Far above
# the other the logits, and with them the gradient that could bring the temperature back, vanish.
_SMALLEST_LEARNABLE_TEMPERATURE = 0.01
LARGEST_LEARNABLE_TEMPERATURE = 100.0
_LARGEST_LOGIT_SCALE = -math.log(_SMALLEST_LEARNABLE_TEMPERATURE)
_SMALLEST_LOGIT_SCALE = -math.log(LARGEST_LEARNABLE_TEMPERATURE)


def check_options(
    temperature: object,
    reduction: str,
    backend: str,
    z: Tensor | None = None,
    *,
    label_smoothing: object = 0.0,
    hardness: object = 0.0,
) -> CheckedOptions:
    """Raise unless the options that losses share are valid for embeddings ``z``.

    Returns:
        The temperature, label smoothing and hardness, as numbers of Python.
    """
    tau = check_temperature(temperature, z)
    check_choice("reduction", reduction, REDUCTIONS)
    check_backend(backend)
    smoothing = _check_number("label_smoothing", label_smoothing, 1.0)
    beta = _check_number("hardness", hardness, sys.float_info.max)
    if beta and z is not None and not isinstance(tau, Tensor):
        # The limit of check_temperature, for logits that are multiplied by 1 + hardness.
        largest = tau / torch.finfo(compute_dtype(z)).eps
        if beta > largest:
            raise ValueError(
                f"hardness must be at most {largest:.2g} for a loss in {compute_dtype(z)} at "
                f"temperature {tau}, got {beta}"
            )
    if smoothing and beta:
        raise ValueError(
            "label_smoothing and hardness cannot be combined: weighted negatives have no "
            f"probabilities to smooth; got {smoothing} and {beta}, set one to 0"
        )
    return tau, smoothing, beta


def check_sample_weight(sample_weight: Tensor, n: int, other_name: str, other: Tensor) -> None:
    """Raise unless ``sample_weight`` holds ``n`` floating numbers on the device of ``other``."""
    if not isinstance(sample_weight, Tensor) or not sample_weight.is_floating_point():
        got = getattr(sample_weight, "dtype", type(sample_weight).__name__)
        raise TypeError(f"sample_weight must be a floating point tensor of shape ({n},), got {got}")
    if sample_weight.shape != (n,):
        raise ValueError(
            f"sample_weight must have shape ({n},), one for each row of {other_name}, "
            f"got {tuple(sample_weight.shape)}"
        )
    check_dense("sample_weight", sample_weight)
    check_device("sample_weight", sample_weight, other_name, other)


def _check_number(name: str, value: object, largest: float) -> float:
    number = check_number(name, value)
    if not 0 <= number <= largest:
        bound = "a finite number of at least 0" if largest > 1 else "between 0 and 1"
        raise ValueError(f"{name} must be {bound}, got {number}")
    return number


def preferring_hard(logsumexp: LogSumExp, hardness: float) -> LogSumExp:
    """``logsumexp`` with each negative weighted by its hardness, equation (13).

    The statistics are those without weights.
    """
    return partial(_hard_logsumexp, logsumexp, hardness) if hardness else logsumexp


def _hard_logsumexp(
    logsumexp: LogSumExp, hardness: float, problem: Problem
) -> tuple[Tensor, LogitStatistics | None]:
    n_rows, n_columns = problem.q.shape[0], problem.keys().shape[0]
    exclusion = problem.exclusion
    counts = kept_counts(n_rows, n_columns, exclusion, problem.q.device)
    if problem.both:
        transposed = exclusion.transposed()
        counts_of_columns = kept_counts(n_columns, n_rows, transposed, problem.q.device)
        counts = torch.cat([counts, counts_of_columns])

    def at_scale(scale: float) -> Tensor:
        root = math.sqrt(scale)
        return logsumexp(
            problem._replace(
                q=problem.q * root,
                k=None if problem.k is None else problem.k * root,
                bound=problem.bound * scale,
                statistics=False,
            )
        )[0]

    weighted = weighted_by_hardness(counts, at_scale, hardness)
    return weighted, logsumexp(problem)[1] if problem.statistics else None


def weighted_by_hardness(
    counts: Tensor, at_scale: Callable[[float], Tensor], hardness: float
) -> Tensor:
    """Equation (13) from the number of negatives and their logsumexp with scaled logits."""
    weighted, weights = at_scale(1 + hardness), at_scale(hardness)
    result = weighted - weights + counts.to(weighted.dtype).log()
    return torch.where(counts == 0, -torch.inf, result)


def positive_pair_logits(rows: Tensor) -> Tensor:
    """Logits of each anchor with the other views of its image, (V - 1, V·N), equation (3)."""
    views = rows.unbind(0)
    n_views = len(views)
    pair = {}
    for v, w in combinations(range(n_views), 2):
        pair[v, w] = pair[w, v] = (views[v] * views[w]).sum(1)
    return torch.stack(
        [
            torch.cat([pair[v, (v + shift) % n_views] for v in range(n_views)])
            for shift in range(1, n_views)
        ]
    )


def softmax_loss(positive_logits: Tensor, negative_lse: Tensor, decoupled: bool) -> Tensor:
    """Loss of each anchor, equation (4), or (11) if ``decoupled``; 0 for one without negatives.

    Args:
        positive_logits: (P, M), the P positives of each anchor.
        negative_lse: (M,), logsumexp over the negatives of each anchor.
        decoupled: leave the positives out of the denominator.
    """
    mean_positive = positive_logits.mean(0)
    if decoupled:
        loss = negative_lse - mean_positive
    elif len(positive_logits) == 1:
        # Unlike a difference of logsumexps this keeps its relative precision when the loss is tiny.
        # By default softplus is linear above 20, which float64 would notice.
        loss = F.softplus(negative_lse - mean_positive, threshold=50)
    else:
        loss = torch.logaddexp(negative_lse, positive_logits.logsumexp(0)) - mean_positive
    alone = (negative_lse == -torch.inf) & ~mean_positive.isnan()
    return torch.where(alone, 0, loss)


def smoothed(
    loss: Tensor,
    positive_logits: Tensor,
    negative_total: Tensor,
    negative_counts: Tensor,
    label_smoothing: float,
) -> Tensor:
    """Equation (12): ``loss`` (M,) with a part of the target spread over all candidates.

    Args:
        loss: the loss of each anchor without smoothing, (M,).
        positive_logits: (P, M), the P positives of each anchor.
        negative_total: (M,), the sum of the logits of the negatives of each anchor.
        negative_counts: (M,), how many they are.
        label_smoothing: the part, in [0, 1].
    """
    n_candidates = len(positive_logits) + negative_counts
    mean_candidate = (positive_logits.sum(0) + negative_total) / n_candidates
    shift = label_smoothing * (positive_logits.mean(0) - mean_candidate)
    # Without negatives the shift is 0, but for what subtracting sums leaves of their rounding.
    return loss + torch.where(negative_counts == 0, 0, shift)


def reduce(
    loss: Tensor,
    reduction: str,
    sample_weight: Tensor | None = None,
    weight_per_process: float | Tensor | None = None,
) -> Tensor:
    """Mean, sum, or the losses (..., N) as they are, weighted by ``sample_weight``, equation (14).

    The weights are (N,). The mean is the sum of the weighted losses over that of the weights, 0 if
    they are all 0. Where a batch is spread over processes the weights are those of an average
    process instead, so that the mean over processes is the mean over the whole batch.
    """
    if sample_weight is not None:
        loss = loss * sample_weight.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if weight_per_process is None:
        if sample_weight is None:
            return loss.mean()
        weight_per_process = sample_weight.to(loss.dtype).sum()
    total = weight_per_process * (loss.numel() // loss.shape[-1])
    if isinstance(total, Tensor):
        total = torch.where(total == 0, 1, total)
    return loss.sum() / total


def limited_logit_scale(logit_scale: Tensor, largest: float = _LARGEST_LOGIT_SCALE) -> Tensor:
    """A learnable ``logit_scale`` within its bounds, in at least float32.

    Compared in its own dtype, in which a bound may have been rounded away from 0. No clamp, which
    in torch 2.14 has no gradient at a bound: a parameter there would stay for ever.
    """
    x = at_least_float32(logit_scale)
    x = torch.where(logit_scale < _SMALLEST_LOGIT_SCALE, _SMALLEST_LOGIT_SCALE, x)
    return torch.where(logit_scale > largest, largest, x)


@torch.no_grad()
def limit_logit_scale_(logit_scale: Tensor, largest: float = _LARGEST_LOGIT_SCALE) -> None:
    """Bring the parameter back to its bounds, beyond which it would get no gradient.

    An exported program keeps to the bounds, but writes to no parameter of its own.
    """
    if not torch.compiler.is_exporting():
        logit_scale.clamp_(_SMALLEST_LOGIT_SCALE, largest)


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, unless it is in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shown(value: float | Tensor) -> str:
    """A number as ``repr`` shows it; a module on the device meta can be printed too."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return "?"
        value = value.item()
    return f"{value:.4g}"


class TemperatureLoss(nn.Module):
    """Base of the losses that divide cosines by a temperature, fixed or learnable.

    A learnable temperature is the parameter ``logit_scale`` = log(1 / temperature). Each call
    brings it back into [-log(100), log(100)]: the upper bound is that of CLIP, the lower one keeps
    a gradient that it can come back by. With ``gather_distributed`` its gradient is averaged over
    processes, whether or not the loss is inside a ``DistributedDataParallel``.
    """

    def __init__(
        self,
        temperature: float,
        learnable_temperature: bool,
        reduction: str,
        backend: str,
        *,
        label_smoothing: float = 0.0,
        hardness: float = 0.0,
        gather_distributed: bool = False,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor):
            raise TypeError("temperature must be a number; see learnable_temperature")
        tau, self.label_smoothing, self.hardness = check_options(
            temperature, reduction, backend, label_smoothing=label_smoothing, hardness=hardness
        )
        check_flag("learnable_temperature", learnable_temperature)
        check_gathering(gather_distributed, process_group)
        self.gather_distributed = gather_distributed
        self.process_group = process_group
        self.reduction = reduction
        self.backend = backend
        self.logit_scale: nn.Parameter | None = None
        self._fixed_temperature = float(tau)
        if learnable_temperature:
            smallest, largest = _SMALLEST_LEARNABLE_TEMPERATURE, LARGEST_LEARNABLE_TEMPERATURE
            if not smallest <= tau <= largest:
                raise ValueError(
                    f"temperature must be at least {smallest} and at most {largest} if it is "
                    f"learnable, got {tau}"
                )
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(tau)))

    @property
    def temperature(self) -> float | Tensor:
        """The temperature: a number, or a tensor that carries the gradient of ``logit_scale``."""
        if self.logit_scale is None:
            return self._fixed_temperature
        logit_scale = limited_logit_scale(self.logit_scale)
        logit_scale = own_parameters(logit_scale, self.gather_distributed, self.process_group)
        return (-logit_scale).exp()

    def _limit_logit_scale(self) -> None:
        if self.logit_scale is not None:
            limit_logit_scale_(self.logit_scale)

    def extra_repr(self) -> str:
        """The options, as the constructor takes them."""
        learnable = ", learnable_temperature=True" if self.logit_scale is not None else ""
        smoothing = f", label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        hardness = f", hardness={self.hardness}" if self.hardness else ""
        gathering = ", gather_distributed=True" if self.gather_distributed else ""
        return (
            f"temperature={shown(self.temperature)}{learnable}"
            f"{smoothing}{hardness}{gathering}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )
