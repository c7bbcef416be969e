"""The primitive that carries every loss: the logsumexp over the kept entries of ``q @ k.T``."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kit import reference
from contrastive_kit._checks import check_choice
from contrastive_kit._dtypes import compute_dtype
from contrastive_kit.ops._exclusion import Exclusion
from contrastive_kit.ops._registered import registered_logsumexp
from contrastive_kit.ops._statistics import LogitStatistics, row_statistics
from contrastive_kit.ops._triton import refusal as triton_refusal

_HALF = (torch.float16, torch.bfloat16)

# Roundings average out over the length of a row; shorter ones count as float32.
_SHORTEST_ROUNDED = 32


class Backend(NamedTuple):
    """A way to compute the primitive.

    Attributes:
        refuse: why it cannot run on these tensors, or None if it can.
        run: called as ``run(q, k, exclusion, both, bound, statistics, operands)``, differentiable
            in ``q`` and ``k``; returns the logsumexp and its statistics. ``operands`` is the dtype
            that tensor cores may round rows to before they multiply.
    """

    refuse: Callable[[Tensor, Tensor | None], str | None]
    run: Callable[..., tuple[Tensor, Tensor]]


class BackendChoice(NamedTuple):
    """Which backend runs, and why each backend before it in the order of preference does not.

    Attributes:
        name: the backend that runs.
        refusals: name of a preferred backend to its reason.
    """

    name: str
    refusals: dict[str, str]


def which_backend(q: Tensor, k: Tensor | None = None, *, backend: str = "auto") -> BackendChoice:
    """Tell which backend a loss would use for these embeddings, and why not the others.

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
    check_choice("backend", backend, ["auto", *BACKENDS])
    if backend != "auto":
        reason = BACKENDS[backend].refuse(q, k)
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot run here: {reason}")
        return BackendChoice(backend, {})
    refusals: dict[str, str] = {}
    for name, candidate in BACKENDS.items():
        reason = candidate.refuse(q, k)
        if reason is None:
            return BackendChoice(name, refusals)
        refusals[name] = reason
    raise ValueError(f"no backend can run here: {refusals}")


def operand_dtype(*embeddings: Tensor) -> torch.dtype:
    """What tensor cores may round unit rows of these embeddings to before they multiply.

    Half precision where all embeddings are, and then float16: unit rows do not need the range of
    bfloat16, and three more bits make logits and gradients eight times as exact at the same speed.
    Rows (..., D) of D < 32 count as float32.
    """
    half = all(x.dtype in _HALF and x.shape[-1] >= _SHORTEST_ROUNDED for x in embeddings)
    return torch.float16 if half else torch.float32


def kept_logsumexp(
    q: Tensor,
    k: Tensor | None = None,
    *,
    exclusion: Exclusion = Exclusion(),  # noqa: B008  an immutable tuple
    both: bool = False,
    bound: float = torch.inf,
    statistics: bool = False,
    operands: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, LogitStatistics | None]:
    """Logsumexp over the kept entries of each row of the logits ``q @ k.T``, equation (2).

    A row that keeps no entry has logsumexp -inf and a zero gradient. NaN and inf propagate.
    Gradients flow to ``q`` and ``k`` once; a second differentiation raises (except with the
    ``reference`` backend). Deterministic. Memory beyond the result: for ``triton`` a copy of the
    rows and at most 256 MiB; for ``tiled`` a few tiles, of 2 MiB on a CPU, where up to
    32 MiB of them stay from the forward to the backward, and of 64 MiB on an accelerator (tiles are
    twice as large in float64); and R·C for the ``reference`` backend.

    Args:
        q: rows (R, D), floating; computed in float64 if float64, else in float32.
        k: columns (C, D), or None for ``k = q``, where symmetry halves the work.
        exclusion: the pairs left out.
        both: also return the logsumexp of each column; only with ``k``.
        bound: a number that no logit exceeds in magnitude, if one is known. A small bound spares
            the passes that guard against overflow.
        statistics: also return ``LogitStatistics``, detached.
        operands: the dtype that tensor cores may round rows to before they multiply, float32,
            bfloat16 or float16; None for the half precision both matrices are in, or float32. Only
            ``triton`` rounds so. With float32, ``torch.get_float32_matmul_precision()`` decides.
        backend: "auto" or a name, see ``which_backend``.

    Returns:
        The logsumexp (R,), with ``both`` (R + C,): rows first; and the statistics in the same
        order, or None.
    """
    choice = which_backend(q, k, backend=backend)
    inputs = (q,) if k is None else (q, k)
    dtype = compute_dtype(*inputs)
    if operands is None:
        same = k is None or k.dtype == q.dtype
        operands = q.dtype if same and q.dtype in _HALF else torch.float32
    lse, stats = BACKENDS[choice.name].run(
        q.to(dtype),
        None if k is None else k.to(dtype),
        exclusion,
        both,
        bound,
        statistics,
        operands,
    )
    return lse, LogitStatistics(*stats.unbind(0)) if statistics else None


def _run_reference(
    q: Tensor,
    k: Tensor | None,
    exclusion: Exclusion,
    both: bool,
    bound: float,
    statistics: bool,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor]:
    keys = q if k is None else k
    excluded = exclusion.mask(q.shape[0], keys.shape[0], q.device)
    with torch.autocast(q.device.type, enabled=False):
        lse = [reference.kept_logsumexp(q, keys, excluded)]
        if both and k is not None:
            lse.append(reference.kept_logsumexp(k, q, excluded.T))
        stats = q.new_empty(0)
        if statistics:
            logits = (q @ keys.T).detach().masked_fill(excluded, -torch.inf)
            stats = torch.cat(
                [
                    row_statistics(logits, x.detach(), dim)
                    for x, dim in zip(lse, (1, 0), strict=False)
                ],
                dim=1,
            )
    return torch.cat(lse), stats


def _run_registered(
    kernels_for: Callable[[torch.dtype], str],
) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        q: Tensor,
        k: Tensor | None,
        exclusion: Exclusion,
        both: bool,
        bound: float,
        statistics: bool,
        operands: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        return registered_logsumexp(q, k, exclusion, both, bound, statistics, kernels_for(operands))

    return run


def operand_name(dtype: torch.dtype) -> str:
    """What tensor cores multiply where rows may be rounded to ``dtype``, as ops are told."""
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    # The same setting as torch.get_float32_matmul_precision(), which breaks a compiled graph.
    matmul = torch.backends.cuda.matmul
    try:
        rounded = matmul.allow_tf32
    except RuntimeError:  # fp32_precision has been set instead, and the two do not mix
        rounded = matmul.fp32_precision == "tf32"
    return "tf32" if rounded else "float32"


def _triton_kernels(operands: torch.dtype) -> str:
    return f"triton {operand_name(operands)}"


def _never_refuses(q: Tensor, k: Tensor | None) -> None:
    return None


BACKENDS = {
    "triton": Backend(triton_refusal, _run_registered(_triton_kernels)),
    "tiled": Backend(_never_refuses, _run_registered(lambda operands: "tiled")),
    "reference": Backend(_never_refuses, _run_reference),
}
