"""The options that losses share: named, checked and compared in one place."""

import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

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
from contrastive_kit.ops import BackendName, check_backend

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Named here, because torch 2.9 cannot compile a function inside another that spells them out.
Scalar = float | Tensor

Reduction = Literal["mean", "sum", "none"]
Variant = Literal["out", "in", "pairwise"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
VARIANTS: tuple[str, ...] = get_args(Variant)

# The options that are numbers of at least 0, 0 being off, and the largest that each may be.
LARGEST = {
    "label_smoothing": 1.0,
    "hardness": sys.float_info.max,
    "positive_prior": 1.0,
    "margin": 2.0,
}


class Options(NamedTuple):
    """What a loss is asked for beside its inputs; a loss without an option has its default.

    Attributes:
        decoupled: leave the positives out of the denominator, equation (12).
        symmetric: average with the loss of keys against queries.
        in_batch_negatives: compare with the other pairs of the batch; None where nothing else is
            given.
        query_negatives: compare queries with the other queries too.
        key_negatives: compare keys with the other keys too.
        variant: "out", "in" or "pairwise", equations (19), (20) and (22).
        balance_positives: weigh each match by how many share its ends, equation (29).
        teacher_temperature: the temperature of the targets, equation (30).
        label_smoothing: the part of the target spread over all candidates, equation (13).
        hardness: how much the most similar negatives are preferred, equation (14).
        positive_prior: the expected share of positives among the negatives, equation (15).
        margin: how far the cosine of a positive must be ahead, equation (16).
        false_negative_margin: leave out candidates whose cosine is ahead of that of the positive by
            more, equation (17); None for all in.
        reduction: "mean", "sum" or "none".
        gather_distributed: compare with the images of all processes.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or the name of a backend.
    """

    decoupled: bool = False
    symmetric: bool = False
    in_batch_negatives: bool | None = None
    query_negatives: bool = False
    key_negatives: bool = False
    variant: Variant = "out"
    balance_positives: bool = False
    teacher_temperature: float = 0.04
    label_smoothing: float = 0.0
    hardness: float = 0.0
    positive_prior: float = 0.0
    margin: float = 0.0
    false_negative_margin: float | None = None
    reduction: Reduction = "mean"
    gather_distributed: bool = False
    process_group: "ProcessGroup | None" = None
    backend: BackendName = "auto"

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
    per_anchor: bool = False,
) -> CheckedOptions:
    """Raise unless the options are valid, together and for embeddings ``z``.

    Args:
        temperature: a number, or a tensor of one value, with ``per_anchor`` also (N,).
        options: as the caller gave them.
        z: embeddings, or None if there are none yet.
        primitive: what the backend must have.
        per_anchor: whether the loss takes a temperature for each anchor.

    Returns:
        The temperature and the options, their numbers those of Python.
    """
    tau = check_temperature(temperature, z, per_anchor=per_anchor)
    check_choice("reduction", options.reduction, REDUCTIONS)
    check_choice("variant", options.variant, VARIANTS)
    check_flag("decoupled", options.decoupled)
    check_flag("symmetric", options.symmetric)
    if options.in_batch_negatives is not None:
        check_flag("in_batch_negatives", options.in_batch_negatives)
    for name in ("query_negatives", "key_negatives"):
        check_flag(name, getattr(options, name))
        if getattr(options, name) and options.in_batch_negatives is False:
            raise ValueError(
                f"{name}=True takes negatives from the batch, which in_batch_negatives=False "
                "leaves out"
            )
    check_flag("balance_positives", options.balance_positives)
    check_gathering(options.gather_distributed, options.process_group)
    check_backend(options.backend, primitive)
    teacher_tau = check_temperature(options.teacher_temperature, z, "teacher_temperature")
    if isinstance(teacher_tau, Tensor):
        raise TypeError("teacher_temperature must be a number, as the teacher has no gradient")
    numbers = {
        name: _check_number(name, getattr(options, name), largest)
        for name, largest in LARGEST.items()
    }
    numbers["teacher_temperature"] = teacher_tau
    if options.false_negative_margin is not None:
        numbers["false_negative_margin"] = _check_number(
            "false_negative_margin", options.false_negative_margin, 2.0
        )
    if any(number is not getattr(options, name) for name, number in numbers.items()):
        options = options.changed_to(**numbers)
    beta = options.hardness
    if options.positive_prior == 1:
        raise ValueError(
            "positive_prior must be below 1, or all negatives would be taken for positives; got 1"
        )
    if beta and z is not None and not isinstance(tau, Tensor):
        # The limit of check_temperature, for logits that are multiplied by 1 + hardness.
        largest = tau / torch.finfo(compute_dtype(z)).eps
        if beta > largest:
            raise ValueError(
                f"hardness must be at most {largest:.2g} for a loss in {compute_dtype(z)} at "
                f"temperature {tau}, got {beta}"
            )
    _check_together(options)
    return tau, options


def _check_together(options: Options) -> None:
    smoothing, beta = options.label_smoothing, options.hardness
    prior, margin = options.positive_prior, options.margin
    ahead = options.false_negative_margin
    if smoothing and beta:
        raise ValueError(
            "label_smoothing and hardness cannot be combined: weighted negatives have no "
            f"probabilities to smooth; got {smoothing} and {beta}, set one to 0"
        )
    if smoothing and prior:
        raise ValueError(
            "label_smoothing and positive_prior cannot be combined: corrected negatives have no "
            f"probabilities to smooth; got {smoothing} and {prior}, set one to 0"
        )
    if margin and options.decoupled:
        raise ValueError(
            "margin needs decoupled=False: without the positives in its denominator it would only "
            f"add a constant to the loss; got {margin}"
        )
    if smoothing and options.decoupled:
        raise ValueError(
            "label_smoothing needs decoupled=False: without the positives in its denominator the "
            f"loss is no cross entropy; got {smoothing}"
        )
    if smoothing and ahead is not None:
        raise ValueError(
            "label_smoothing and false_negative_margin cannot be combined: candidates that are "
            f"left out have no part of the target; got {smoothing} and {ahead}, set the one to 0 "
            "or the other to None"
        )
    if prior and ahead is not None:
        raise ValueError(
            "positive_prior and false_negative_margin cannot be combined: the negatives that the "
            f"prior expects to be positives are left out; got {prior} and {ahead}, set the one to "
            "0 or the other to None"
        )


def _check_number(name: str, value: object, largest: float) -> float:
    number = check_number(name, value)
    if not 0 <= number <= largest:
        endless = largest == sys.float_info.max
        bound = "a finite number of at least 0" if endless else f"between 0 and {largest:g}"
        raise ValueError(f"{name} must be {bound}, got {number}")
    return number
