"""The base of the losses' modules: options stored, a temperature fixed or learned."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_kit._checks import check_flag, check_temperature
from contrastive_kit.losses._gathered import own_parameters
from contrastive_kit.losses._options import Options, Reduction, Variant, check_options
from contrastive_kit.ops import BackendName

# The bounds of a learnable temperature. Below the one of CLIP training becomes unstable. Far above
# the other the logits, and with them the gradient that could bring the temperature back, vanish.
_SMALLEST_LEARNABLE_TEMPERATURE = 0.01
LARGEST_LEARNABLE_TEMPERATURE = 100.0
_SMALLEST_LOGIT_SCALE = -math.log(LARGEST_LEARNABLE_TEMPERATURE)


class LossModule(nn.Module):
    """Base of the losses: it checks, stores and shows options, and has the temperature.

    A learnable temperature is the parameter ``logit_scale`` = log(1 / temperature). Each call
    brings it back into [-log(100), log(100)]: the upper bound is that of CLIP, the lower one keeps
    a gradient that it can come back by. With ``gather_distributed`` its gradient is averaged over
    processes, whether or not the loss is inside a ``DistributedDataParallel``. ``fully_shard``
    takes no 0-dim parameter: ``fully_shard(model, ignored_params=set(loss_fn.parameters()))``.

    Args:
        temperature: τ > 0; the initial one, from ``smallest`` to 100, if it is learnable.
        learnable_temperature: learn it.
        smallest: the lower bound of a learnable temperature.
        primitive: what the backend must have.
        **options: fields of ``Options``, those that the constructor of the loss takes. Each is an
            attribute, and an argument of the function of the loss.
    """

    decoupled: bool
    symmetric: bool
    in_batch_negatives: bool | None
    query_negatives: bool
    key_negatives: bool
    variant: Variant
    balance_positives: bool
    label_smoothing: float
    hardness: float
    positive_prior: float
    margin: float
    false_negative_margin: float | None
    reduction: Reduction
    gather_distributed: bool
    process_group: "torch.distributed.ProcessGroup | None"
    backend: BackendName

    def __init__(
        self,
        temperature: float,
        learnable_temperature: bool,
        *,
        smallest: float = _SMALLEST_LEARNABLE_TEMPERATURE,
        primitive: str = "logsumexp",
        **options: Any,
    ) -> None:
        super().__init__()
        tau = _number(temperature)
        _, checked = check_options(tau, Options(**options), primitive=primitive)
        check_flag("learnable_temperature", learnable_temperature)
        self._option_names = tuple(options)
        for name in options:
            setattr(self, name, getattr(checked, name))
        self.logit_scale: nn.Parameter | None = None
        self._fixed_temperature = tau
        self._largest_logit_scale = -math.log(smallest)
        if learnable_temperature:
            if not smallest <= tau <= LARGEST_LEARNABLE_TEMPERATURE:
                raise ValueError(
                    f"temperature must be at least {smallest:.4g} and at most "
                    f"{LARGEST_LEARNABLE_TEMPERATURE} if it is learnable, got {tau}"
                )
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(tau)))

    @property
    def temperature(self) -> float | Tensor:
        """τ, a number, or a tensor that carries the gradient of ``logit_scale``.

        It is never in half precision. Where it is not learned it can be set, by a schedule for
        one; it is no part of the ``state_dict`` then.
        """
        if self.logit_scale is None:
            return self._fixed_temperature
        return (-self._averaged(self._limited_logit_scale(self.logit_scale))).exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        if self.logit_scale is not None:
            raise AttributeError(
                "temperature is learned, and cannot be set; write to logit_scale, which is "
                "log(1 / temperature)"
            )
        self._fixed_temperature = _number(value)

    def _options(self) -> dict[str, Any]:
        """The options, as the function of the loss takes them."""
        return {name: getattr(self, name) for name in self._option_names}

    def _averaged(self, parameters: Tensor) -> Tensor:
        return own_parameters(parameters, self.gather_distributed, self.process_group)

    def _limited_logit_scale(self, logit_scale: Tensor) -> Tensor:
        """``logit_scale`` within its bounds, in at least float32.

        Compared in its own dtype, in which a bound may have been rounded away from 0. No clamp,
        which in torch 2.14 has no gradient at a bound: a parameter there would stay for ever.
        """
        x = at_least_float32(logit_scale)
        x = torch.where(logit_scale < _SMALLEST_LOGIT_SCALE, _SMALLEST_LOGIT_SCALE, x)
        return torch.where(logit_scale > self._largest_logit_scale, self._largest_logit_scale, x)

    @torch.no_grad()
    def _limit_logit_scale(self) -> None:
        """Bring the parameter back to its bounds, beyond which it would get no gradient.

        An exported program keeps to the bounds, but writes to no parameter of its own.
        """
        if type(self.logit_scale).__name__ == "DTensor":
            raise RuntimeError(
                "logit_scale must be whole on each process, got a shard of it: leave the "
                "parameters of the loss out, "
                "fully_shard(model, ignored_params=set(loss_fn.parameters()))"
            )
        if self.logit_scale is not None and not torch.compiler.is_exporting():
            self.logit_scale.clamp_(_SMALLEST_LOGIT_SCALE, self._largest_logit_scale)

    def extra_repr(self) -> str:
        """The temperature of now, and the options that are not at their defaults."""
        first = {"temperature": self.temperature, **self._shown()}
        numbers = [f"{name}={shown(value)}" for name, value in first.items()]
        changed = Options(**self._options()).changed()
        return ", ".join([*numbers, *(f"{name}={value!r}" for name, value in changed.items())])

    def _shown(self) -> dict[str, float | Tensor | bool]:
        """What is shown beside temperature and options."""
        return {} if self.logit_scale is None else {"learnable_temperature": True}


def _number(temperature: object) -> float:
    if isinstance(temperature, Tensor):
        raise TypeError("temperature must be a number; see learnable_temperature")
    return float(check_temperature(temperature))


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, unless it is in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shown(value: float | Tensor) -> str:
    """A number as ``repr`` shows it; a module on the device meta can be printed too."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return "?"
        value = value.item()
    return repr(value) if isinstance(value, bool) else f"{value:.4g}"
