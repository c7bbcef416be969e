"""Backend ``triton``: fused kernels on a GPU, which never hold the logits.

The package triton is imported at the first launch. Nothing here waits for the GPU or depends on a
value it holds, so all of it can be captured in a CUDA graph.
"""

from torch import Tensor

from contrastive_kit.ops.problem import Problem
from contrastive_kit.ops.registered import register_logsumexp
from contrastive_kit.ops.statistics import LogitStatistics
from contrastive_kit.ops.triton import host
from contrastive_kit.ops.triton.device import refusal as refusal
from contrastive_kit.ops.triton.host import multiplied_as
from contrastive_kit.ops.triton.pair import pair_loss as pair_loss

_rounded_logsumexp = register_logsumexp("triton", host.forward, host.backward)


def logsumexp(problem: Problem) -> tuple[Tensor, LogitStatistics | None]:
    """The logsumexp, with the precision of float32 products settled before the op."""
    return _rounded_logsumexp(problem._replace(mma_dtype=multiplied_as(problem.mma_dtype)))
