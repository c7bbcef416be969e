"""What the softmax losses share: from logits to losses, reductions, a learnable temperature."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kit._checks import check_choice, check_temperature
from contrastive_kit.losses._stats import ContrastiveStats
from contrastive_kit.ops import BACKENDS

LossOutput = Tensor | tuple[Tensor, ContrastiveStats]

REDUCTIONS = ("mean", "sum", "none")

# The bound of CLIP: below this temperature training with a learnable one becomes unstable.
_SMALLEST_LEARNABLE_TEMPERATURE = 0.01
_LARGEST_LOG_SCALE = -math.log(_SMALLEST_LEARNABLE_TEMPERATURE)


def check_options(
    temperature: float | Tensor, reduction: str, backend: str, z: Tensor | None = None
) -> None:
    """Raise unless the options that every loss has are valid for embeddings ``z``."""
    check_temperature(temperature, z)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, ["auto", *BACKENDS])


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


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """Mean, sum, or the losses as they are."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


class TemperatureLoss(nn.Module):
    """Base of the losses that divide cosines by a temperature, fixed or learnable.

    A learnable temperature is the parameter ``log_scale`` = log(1 / temperature), kept at or below
    log(100) at each call, as CLIP does.
    """

    def __init__(
        self, temperature: float, learnable_temperature: bool, reduction: str, backend: str
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor):
            raise TypeError("temperature must be a number; see learnable_temperature")
        check_options(temperature, reduction, backend)
        self.reduction = reduction
        self.backend = backend
        self.log_scale: nn.Parameter | None = None
        self._fixed_temperature = float(temperature)
        if learnable_temperature:
            if temperature < _SMALLEST_LEARNABLE_TEMPERATURE:
                raise ValueError(
                    "temperature must be at least "
                    f"{_SMALLEST_LEARNABLE_TEMPERATURE} if it is learnable, got {temperature}"
                )
            self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    @property
    def temperature(self) -> float | Tensor:
        """The temperature: a number, or a tensor that carries the gradient of ``log_scale``."""
        if self.log_scale is None:
            return self._fixed_temperature
        dtype = torch.promote_types(self.log_scale.dtype, torch.float32)
        return (-self.log_scale.to(dtype).clamp(max=_LARGEST_LOG_SCALE)).exp()

    def _limit_log_scale(self) -> None:
        """Bring the parameter back to its bound, beyond which it would get no gradient."""
        if self.log_scale is not None:
            with torch.no_grad():
                self.log_scale.clamp_(max=_LARGEST_LOG_SCALE)

    def extra_repr(self) -> str:
        """The options, as the constructor takes them."""
        learnable = ", learnable_temperature=True" if self.log_scale is not None else ""
        return (
            f"temperature={float(torch.as_tensor(self.temperature).detach()):.4g}{learnable}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
