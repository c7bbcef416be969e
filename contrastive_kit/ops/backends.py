"""The backends: one table of what each computes and why it refuses, and the choice among them."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from contrastive_kit import reference
from contrastive_kit._checks import check_choice
from contrastive_kit.ops import tiled, triton
from contrastive_kit.ops.pairs import PairLoss, Pairs
from contrastive_kit.ops.problem import Problem
from contrastive_kit.ops.registered import LogSumExp, SoftplusSum, SoftplusTotal
from contrastive_kit.ops.statistics import LogitStatistics, row_statistics

# What a caller may name: "auto" and the keys of BACKENDS.
BackendName = Literal["auto", "triton", "tiled", "reference"]

# The loss of a batch of pairs, or None where it does not take them.
PairLossOf = Callable[[Pairs], PairLoss | None]


class Backend(NamedTuple):
    """What a backend can compute. One without a primitive refuses what needs it, by its name.

    Attributes:
        refuse: why it cannot run on the matrices of a problem, or None if it can.
        logsumexp: equation (2), differentiable in both matrices.
        same_class_logsumexp: the same where the rule leaves out pairs of different classes.
        softplus_sum: equation (26), differentiable in both matrices and the bias.
        same_class_softplus_sum: the same where the rule leaves out pairs of different classes; the
            bias may be one of each row, (R,).
        softplus_total: the sum of those sums, each row times its weight; the gradients come from
            the same pass.
        pair_loss: a whole loss of pairs, where one op is faster than many.
    """

    refuse: Callable[[Problem], str | None]
    logsumexp: LogSumExp
    same_class_logsumexp: LogSumExp | None = None
    softplus_sum: SoftplusSum | None = None
    same_class_softplus_sum: SoftplusSum | None = None
    softplus_total: SoftplusTotal | None = None
    pair_loss: PairLossOf | None = None


class BackendChoice(NamedTuple):
    """Which backend runs, and why each backend before it in the order of preference does not.

    Attributes:
        name: the backend that runs.
        refusals: name of a preferred backend to its reason.
    """

    name: str
    refusals: dict[str, str]


def which_backend(
    q: Tensor, k: Tensor | None = None, *, backend: BackendName = "auto"
) -> BackendChoice:
    """Tell which backend a loss would use for these embeddings, and why not the others.

    That is for its logsumexp. The variants "in" and "pairwise" of ``SupCon``, and ``SigLIP`` with
    labels, need a sum over the columns of a class beside the other, which "triton" has not.

    Args:
        q: embeddings (N, D), or one matrix of rows.
        k: the other matrix (C, D), or None for NT-Xent and the like, which compare rows of ``q``.
        backend: "auto", or the name of a backend: "triton" (fused kernels on a GPU), "tiled" (any
            device, torch only, memory of a few tiles) or "reference" (the formula, memory N²).

    Raises:
        ValueError: for an unknown backend, or a named one that refuses; the message says why.

    Example:
        >>> import torch
        >>> from contrastive_kit import which_backend
        >>> which_backend(torch.randn(8, 4)).name
        'tiled'
        >>> which_backend(torch.randn(8, 4)).refusals
        {'triton': 'it needs tensors on a CUDA device, got cpu'}
    """
    return _choose(Problem(q, k), "logsumexp", backend)


def logsumexp_for(problem: Problem, backend: str) -> LogSumExp:
    """The logsumexp of the backend that runs on ``problem``; raises if a named one refuses."""
    if problem.exclusion.row_classes is None:
        return BACKENDS[_choose(problem, "logsumexp", backend).name].logsumexp
    chosen = BACKENDS[_choose(problem, "same_class_logsumexp", backend).name]
    return _present(chosen.same_class_logsumexp)


def softplus_sum_for(problem: Problem, backend: str) -> SoftplusSum:
    """The sum of softplus of the backend that runs; raises if a named one refuses."""
    if problem.exclusion.row_classes is None:
        return _present(BACKENDS[_choose(problem, "softplus_sum", backend).name].softplus_sum)
    chosen = BACKENDS[_choose(problem, "same_class_softplus_sum", backend).name]
    return _present(chosen.same_class_softplus_sum)


def softplus_total_for(problem: Problem, backend: str) -> SoftplusTotal:
    """The total of softplus of the backend that runs; raises if a named one refuses."""
    return _present(BACKENDS[_choose(problem, "softplus_total", backend).name].softplus_total)


def pair_loss_for(pairs: Pairs, backend: str) -> PairLoss | None:
    """The loss of the backend whose logsumexp runs on the pairs, if it has them as one op."""
    chosen = BACKENDS[_choose(Problem(pairs.z1, pairs.z2), "logsumexp", backend).name]
    return None if chosen.pair_loss is None else chosen.pair_loss(pairs)


def check_backend(backend: str, primitive: str = "logsumexp") -> None:
    """Raise unless ``backend`` is "auto" or the name of one that has the primitive."""
    check_choice("backend", backend, ["auto", *BACKENDS])
    reason = None if backend == "auto" else _lacks(BACKENDS[backend], primitive)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run here: {reason}")


def _choose(problem: Problem, primitive: str, backend: str) -> BackendChoice:
    check_backend(backend, primitive)
    if backend != "auto":
        reason = BACKENDS[backend].refuse(problem)
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot run here: {reason}")
        return BackendChoice(backend, {})
    refusals: dict[str, str] = {}
    for name, candidate in BACKENDS.items():
        reason = _lacks(candidate, primitive) or candidate.refuse(problem)
        if reason is None:
            return BackendChoice(name, refusals)
        refusals[name] = reason
    raise ValueError(f"no backend can run here: {refusals}")


def _lacks(backend: Backend, primitive: str) -> str | None:
    return f"it has no {primitive}" if getattr(backend, primitive) is None else None


_Primitive = TypeVar("_Primitive")


def _present(primitive: _Primitive | None) -> _Primitive:
    assert primitive is not None  # or the choice would have refused
    return primitive


def _never_refuses(problem: Problem) -> None:
    return None


def _reference_logsumexp(problem: Problem) -> tuple[Tensor, LogitStatistics | None]:
    problem = problem.in_compute_dtype()
    q, keys, left_out, limits = problem.q, problem.keys(), problem.mask(), problem.limits
    of_rows, of_columns = (None, None) if limits is None else (limits[: len(q)], limits[len(q) :])
    sides = [(q, keys, left_out, of_rows)]
    if problem.both:
        sides.append((keys, q, left_out.T, of_columns))
    with torch.autocast(q.device.type, enabled=False):
        parts = [reference.kept_logsumexp(*side) for side in sides]
        lse = torch.cat(parts)
        if not problem.statistics:
            return lse, None
        figures = []
        for (a, b, excluded, limit), part in zip(sides, parts, strict=True):
            logits = (a @ b.T).detach().masked_fill(excluded, -torch.inf)
            if limit is not None:
                logits = logits.masked_fill(logits > limit[:, None], -torch.inf)
            figures.append(row_statistics(logits, part.detach(), 1))
    return lse, LogitStatistics(lse.detach(), *torch.cat(figures, dim=1).unbind(0))


def _reference_softplus_sum(problem: Problem, bias: Tensor) -> Tensor:
    q, k = problem.in_compute_dtype()[:2]
    assert k is not None
    with torch.autocast(q.device.type, enabled=False):
        return reference.kept_softplus_sum(q, k, bias[..., None], problem.mask())


def _reference_softplus_total(problem: Problem, bias: Tensor, weights: Tensor | None) -> Tensor:
    sums = _reference_softplus_sum(problem, bias)
    return sums.sum() if weights is None else (sums * weights).sum()


# In the order of preference.
BACKENDS = {
    "triton": Backend(
        triton.refusal,
        triton.logsumexp,
        softplus_sum=triton.softplus_sum,
        softplus_total=triton.softplus_total,
        pair_loss=triton.pair_loss,
    ),
    "tiled": Backend(
        _never_refuses,
        tiled.logsumexp,
        tiled.logsumexp,
        tiled.softplus_sum,
        tiled.softplus_sum,
        tiled.softplus_total,
        tiled.pair_loss,
    ),
    "reference": Backend(
        _never_refuses,
        _reference_logsumexp,
        _reference_logsumexp,
        _reference_softplus_sum,
        _reference_softplus_sum,
        _reference_softplus_total,
    ),
}
