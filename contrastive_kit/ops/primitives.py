"""The primitives behind the losses, for losses of your own: any question, checked, any backend."""

import torch
from torch import Tensor

from contrastive_kit._checks import check_device
from contrastive_kit.ops.backends import BackendName, logsumexp_for, softplus_sum_for
from contrastive_kit.ops.problem import Exclusion, checked_problem
from contrastive_kit.ops.statistics import LogitStatistics


def kept_logsumexp(
    q: Tensor,
    k: Tensor | None = None,
    *,
    exclusion: Exclusion = Exclusion(),  # noqa: B008  an immutable tuple
    both: bool = False,
    bound: float = torch.inf,
    statistics: bool = False,
    mma_dtype: torch.dtype | None = None,
    limits: Tensor | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, LogitStatistics | None]:
    """Logsumexp over the kept entries of each row of the logits ``q @ k.T``, equation (2).

    A row that keeps no entry has logsumexp -inf and a zero gradient. NaN and inf propagate.
    Gradients flow to ``q`` and ``k`` once; a second differentiation raises (except with the
    ``reference`` backend). Deterministic. Memory beyond the result: for ``triton`` a copy of the
    rows and at most 256 MiB; for ``tiled`` a few tiles, of 2 MiB on a CPU, where up to
    32 MiB of them stay from the forward to the backward, and of 64 MiB on an accelerator (tiles are
    twice as large in float64); and R·C for the ``reference`` backend.

    Args:
        q: rows (R, D), D ≥ 1, floating; computed in float64 if a matrix is, else in float32.
        k: columns (C, D), or None for ``k = q``, where symmetry halves the work.
        exclusion: the pairs left out.
        both: also return the logsumexp of each column; only with ``k``.
        bound: a number ≥ 0 that no logit exceeds in magnitude, if one is known. A small bound
            spares the passes that guard against overflow; a wrong one gives wrong results.
        statistics: also return ``LogitStatistics``. They cost a pass over all logits.
        mma_dtype: the dtype that tensor cores may round rows to before they multiply, float32,
            bfloat16 or float16; None for the half precision both matrices are in, or float32. Only
            ``triton`` rounds so. With float32, ``torch.get_float32_matmul_precision()`` decides.
        limits: floating (R,), with ``both`` (R + C,), or None: a result leaves out the logits above
            its limit, which no exclusion has to know of. Constant. "triton" then takes each
            direction by itself, twice the products.
        backend: "auto" or a name, see ``which_backend``. "triton" leaves out no pairs by class.

    Returns:
        The logsumexp (R,), with ``both`` (R + C,): rows first; and the statistics in the same
        order, or None.

    Raises:
        TypeError: for matrices that are not real floating tensors, ids or classes that are not
            integers, a rule, period, bound or flag that is none.
        ValueError: for shapes or devices that do not match, ids or limits of the wrong length,
            limits that require a gradient, ids of
            columns without those of rows or without ``k``, a negative period or bound, ``both``
            without ``k``, an unknown ``mma_dtype`` or backend, a named backend that refuses.

    Example:
        >>> import torch
        >>> from contrastive_kit.ops import Exclusion, kept_logsumexp
        >>> kept_logsumexp(torch.zeros(3, 2), exclusion=Exclusion(3))[0]  # log 2
        tensor([0.6931, 0.6931, 0.6931])
    """
    problem = checked_problem(
        q, k, exclusion, both=both, bound=bound, statistics=statistics, mma_dtype=mma_dtype,
        limits=limits,
    )  # fmt: skip
    return logsumexp_for(problem, backend)(problem)


def kept_softplus_sum(
    q: Tensor,
    k: Tensor,
    bias: float | Tensor = 0.0,
    *,
    exclusion: Exclusion = Exclusion(),  # noqa: B008  an immutable tuple
    backend: BackendName = "auto",
) -> Tensor:
    """Sum of softplus over the kept entries of each row of ``q @ k.T + bias``, equation (26).

    A row that keeps no entry has sum 0. NaN and inf propagate. Gradients flow to ``q``, ``k`` and
    ``bias`` once; a second differentiation raises (except with the ``reference`` backend).
    Deterministic. Memory beyond the result: a few tiles, and R·C for the ``reference`` backend.

    Args:
        q: rows (R, D), D ≥ 1, floating; computed in float64 if a matrix is, else in float32.
        k: columns (C, D).
        bias: number, or tensor of one value, which receives its gradient.
        exclusion: the pairs left out.
        backend: "auto" or a name, see ``which_backend``. "triton" leaves out no pairs by class.

    Returns:
        The sums (R,).

    Raises:
        TypeError: for matrices or a bias that are not real floating, ids that are not integers.
        ValueError: for shapes or devices that do not match, an exclusion that ``kept_logsumexp``
            would refuse, an unknown backend or one without this primitive.

    Example:
        >>> import torch
        >>> from contrastive_kit.ops import Exclusion, kept_softplus_sum
        >>> kept_softplus_sum(torch.eye(3), torch.eye(3), exclusion=Exclusion(3))  # 2 log 2
        tensor([1.3863, 1.3863, 1.3863])
    """
    if k is None:
        raise TypeError("k must be a tensor of shape (C, D), got NoneType")
    problem = checked_problem(q, k, exclusion).in_compute_dtype()
    return softplus_sum_for(problem, backend)(problem, _checked_bias(bias, problem.q))


def _checked_bias(bias: float | Tensor, q: Tensor) -> Tensor:
    """The bias as a 0-dim tensor like ``q``."""
    if not isinstance(bias, Tensor):
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise TypeError(f"bias must be a number or a tensor, got {bias!r}")
        return q.new_full((), bias)
    if not bias.is_floating_point():
        raise TypeError(f"bias must be a floating point tensor, got {bias.dtype}")
    if bias.numel() != 1:
        raise ValueError(f"bias must be a tensor of one value, got shape {tuple(bias.shape)}")
    if bias.device.type != "cpu" or bias.ndim:
        check_device("bias", bias, "q", q)
    return bias.reshape(()).to(q.device, q.dtype)
