"""The options that losses share: named, checked and compared in one place."""

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from contrastive_kit._checks import (
    check_choice,
    check_flag,
    check_gathering,
    check_number,
    check_temperature,
)
from contrastive_kit._dtypes import compute_dtype
from contrastive_kit.ops import check_backend

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Named here, because torch 2.9 cannot compile a function inside another that spells them out.
Scalar = float | Tensor

REDUCTIONS = ("mean", "sum", "none")
VARIANTS = ("out", "in")


class Options(NamedTuple):
    """What a loss is asked for beside its inputs; a loss without an option has its default.

    Attributes:
        decoupled: leave the positives out of the denominator, equation (11).
        symmetric: average with the loss of keys against queries.
        variant: "out" or "in", equations (15) and (16).
        label_smoothing: the part of the target spread over all candidates, equation (12).
        hardness: how much the most similar negatives are preferred, equation (13).
        reduction: "mean", "sum" or "none".
        gather_distributed: compare with the images of all processes.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or the name of a backend.
    """

    decoupled: bool = False
    symmetric: bool = False
    variant: str = "out"
    label_smoothing: float = 0.0
    hardness: float = 0.0
    reduction: str = "mean"
    gather_distributed: bool = False
    process_group: "ProcessGroup | None" = None
    backend: str = "auto"

    def of_the_loss(self) -> "Options":
        """What decides the value for given candidates, with the others at their defaults."""
        return self.changed_to(gather_distributed=False, process_group=None, backend="auto")

    def asks_only(self, *names: str) -> bool:
        """Whether all options that decide the value have their defaults, but for those named."""
        names = (*names, "gather_distributed", "process_group", "backend")
        pairs = zip(self._fields, self, Options(), strict=True)
        return all(value == default or name in names for name, value, default in pairs)

    def changed_to(self, **changes: Any) -> "Options":
        """``_replace``, whose result torch 2.9 cannot keep where the graph of a compile breaks."""
        return Options(**{**dict(zip(self._fields, self, strict=True)), **changes})

    def changed(self) -> dict[str, object]:
        """Those that differ from their defaults, by name."""
        defaults = Options()
        pairs = zip(self._fields, self, defaults, strict=True)
        return {name: value for name, value, default in pairs if value != default}


CheckedOptions = tuple[Scalar, Options]


def check_options(
    temperature: object,
    options: Options,
    z: Tensor | None = None,
    *,
    primitive: str = "logsumexp",
) -> CheckedOptions:
    """Raise unless the options are valid, together and for embeddings ``z``.

    Args:
        temperature: a number, or a tensor of one value.
        options: as the caller gave them.
        z: embeddings, or None if there are none yet.
        primitive: what the backend must have.

    Returns:
        The temperature and the options, their numbers those of Python.
    """
    tau = check_temperature(temperature, z)
    check_choice("reduction", options.reduction, REDUCTIONS)
    check_choice("variant", options.variant, VARIANTS)
    check_flag("decoupled", options.decoupled)
    check_flag("symmetric", options.symmetric)
    check_gathering(options.gather_distributed, options.process_group)
    check_backend(options.backend, primitive)
    smoothing = _check_number("label_smoothing", options.label_smoothing, 1.0)
    beta = _check_number("hardness", options.hardness, sys.float_info.max)
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
    if smoothing and options.decoupled:
        raise ValueError(
            "label_smoothing needs decoupled=False: without the positives in its denominator the "
            f"loss is no cross entropy; got {smoothing}"
        )
    if smoothing is options.label_smoothing and beta is options.hardness:
        return tau, options
    return tau, options.changed_to(label_smoothing=smoothing, hardness=beta)


def _check_number(name: str, value: object, largest: float) -> float:
    number = check_number(name, value)
    if not 0 <= number <= largest:
        bound = "a finite number of at least 0" if largest > 1 else "between 0 and 1"
        raise ValueError(f"{name} must be {bound}, got {number}")
    return number
