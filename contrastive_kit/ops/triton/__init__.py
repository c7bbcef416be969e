"""Backend ``triton``: fused kernels on a GPU, which never hold the logits.

The package triton is imported at the first launch. Nothing here waits for the GPU or depends on a
value it holds, so all of it can be captured in a CUDA graph.
"""

from torch import Tensor

from contrastive_kit.ops.pairs import PairLoss, Pairs
from contrastive_kit.ops.problem import Problem
from contrastive_kit.ops.registered import (
    SoftplusSum,
    SoftplusTotal,
    register_logsumexp,
    register_softplus_sum,
    register_softplus_total,
)
from contrastive_kit.ops.statistics import LogitStatistics
from contrastive_kit.ops.triton import host, softplus
from contrastive_kit.ops.triton.device import refusal as refusal
from contrastive_kit.ops.triton.host import multiplied_as
from contrastive_kit.ops.triton.pair import pair_loss as mean_pair_loss

_rounded_logsumexp = register_logsumexp("triton", host.forward, host.backward)
_rounded_sum: SoftplusSum = register_softplus_sum("triton", softplus.forward, softplus.backward)
_rounded_total: SoftplusTotal = register_softplus_total("triton", softplus.total)


def logsumexp(problem: Problem) -> tuple[Tensor, LogitStatistics | None]:
    """The logsumexp, with the precision of float32 products settled before the op."""
    return _rounded_logsumexp(_settled(problem))


def softplus_sum(problem: Problem, bias: Tensor) -> Tensor:
    """The sums of softplus of each row."""
    return _rounded_sum(_settled(problem), bias)


def softplus_total(problem: Problem, bias: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sum of those sums, with its gradients from the same pass."""
    return _rounded_total(_settled(problem), bias, weights)


def _settled(problem: Problem) -> Problem:
    return problem._replace(mma_dtype=multiplied_as(problem.mma_dtype))


def pair_loss(pairs: Pairs) -> PairLoss | None:
    """The mean NT-Xent of two views, or None for another loss or views it does not take."""
    z1, z2, temperature, ids, weight, *settings = pairs
    plain = settings == [Pairs._field_defaults[name] for name in Pairs._fields[5:]]
    if ids is not None or weight is not None or isinstance(temperature, Tensor) or not plain:
        return None
    loss = mean_pair_loss(z1, z2, temperature)
    return None if loss is None else (loss, None)
