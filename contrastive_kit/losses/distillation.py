"""Similarity distillation: the softmax over candidates follows that of a teacher."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kit._checks import (
    check_dense,
    check_device,
    check_embeddings,
    check_flag,
    check_reverse_mode,
)
from contrastive_kit.distributed import checked, gather_rows, row_counts
from contrastive_kit.losses._common import check_sample_weight, logit_bound, reduce
from contrastive_kit.losses._gathered import gather_batch, settings_of, several_processes
from contrastive_kit.losses._module import LossModule
from contrastive_kit.losses._options import CheckedOptions, Options, Reduction, check_options
from contrastive_kit.ops import BackendName, Problem, logsumexp_for, mma_dtype, scaled_unit_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Rows filled up with zeros to a multiple of this are what all kernels of torch that keep no N × N
# take.
_ALIGNMENT = 8


def similarity_distillation(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    teacher_temperature: float = 0.04,
    symmetric: bool = False,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    gather_distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: BackendName = "auto",
) -> Tensor:
    r"""Cross entropy against the distribution that a teacher has over the same candidates.

    .. math::

        \ell_i = -\sum_j P_{ij} \log \frac{e^{s_{ij}}}{\sum_k e^{s_{ik}}}, \qquad
        P_{ij} = \frac{e^{t_{ij}}}{\sum_k e^{t_{ik}}}, \qquad
        s_{ij} = \cos(q_i, k_j) / \tau, \quad t_{ij} = \cos(q^t_i, k^t_j) / \tau_t

    It teaches relations, not features: teacher and student may have different dimensions. With a
    queue of keys it is SEED and ReSSL; with ``symmetric`` and image and text of both, the
    distillation of CLIP. What is left of the loss where the student equals the teacher is the
    entropy of the teacher, a constant.

    Args:
        query: embeddings (N, D) of the student, any floating dtype, normalized here.
        key: the candidates (M, D), any number of them. A queue that is still empty has M = 0, and
            all losses are 0.
        teacher_query: embeddings (N, E) of the teacher for the images of ``query``, of any length
            E. The teacher gets no gradient.
        teacher_key: embeddings (M, E) of the teacher for the images of ``key``; None if they are
            ``key``, as where teacher and student look at one queue (then E = D).
        temperature: τ > 0 of the student, at least 1.2e-7 (2.3e-16 in float64), or a tensor of one
            value, which then receives its gradient. The value of a tensor is not checked.
        teacher_temperature: τ_t > 0, a number; below τ, the targets are sharper than the student.
        symmetric: average with the loss of keys against queries.
        sample_weight: floating numbers (N,) ≥ 0, one for each query, that multiply the losses; the
            mean is weighted, Σ w·ℓ / Σ w. The sign is not checked. Not with ``symmetric``.
        reduction: "mean", with ``symmetric`` the average of both sides' means; "sum"; or "none" for
            the losses (N,), or with ``symmetric`` (N + M,), the keys last.
        gather_distributed: take the keys (and queries) of all processes as candidates. Exact after
            ``DistributedDataParallel``, also for batches of different sizes: see ``nt_xent``, whose
            conventions these are. Not for keys of a queue that gathers by itself.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``, for the logsumexp of the student.

    Returns:
        The loss, float64 if an embedding of the student is float64 and float32 otherwise, also
        under autocast.

    Raises:
        TypeError: for embeddings or a ``sample_weight`` that are not floating tensors.
        NotImplementedError: for forward-mode differentiation (``torch.func.jvp``, ``jacfwd``).
        ValueError: for shapes or devices that do not match, sparse or nested tensors,
            ``sample_weight`` with ``symmetric``, a temperature that is not positive and finite, an
            unknown ``reduction`` or ``backend``; on every process, if one of them raises, or they
            differ in options, or in embeddings but for their number.
        RuntimeError: for ``gather_distributed`` without an initialized process group where
            ``WORLD_SIZE`` tells of several processes (one process has nothing to gather); under
            ``torch.jit.trace``, which would keep the size of the batch.

    Memory:
        O((N + M)·(D + E)) and a few tiles. The mean of keys under P is an attention of the teacher,
        ``torch.nn.functional.scaled_dot_product_attention``, whose kernels keep no N × M (those of
        a GPU do in float64).

    References:
        Fang et al., SEED, arXiv 2101.04731, equation 5; Zheng et al., ReSSL, arXiv 2107.09282,
        equation 6.

    Example:
        >>> import torch
        >>> from contrastive_kit.functional import similarity_distillation
        >>> student, teacher = torch.eye(3), torch.eye(3)
        >>> similarity_distillation(  # the entropy of the teacher: log(e + 2) - e / (e + 2)
        ...     student, student, teacher, teacher, temperature=1.0, teacher_temperature=1.0
        ... )
        tensor(0.9753)
    """
    options = Options(
        symmetric=symmetric,
        teacher_temperature=teacher_temperature,
        reduction=reduction,
        gather_distributed=gather_distributed,
        process_group=process_group,
        backend=backend,
    )
    gather = several_processes(gather_distributed, process_group)

    def check() -> CheckedOptions:
        _check_pairs(query, key, teacher_query, teacher_key, gather)
        if sample_weight is not None:
            check_sample_weight(sample_weight, query.shape[0], "query", query)
            check_flag("symmetric", symmetric)
            if symmetric:
                raise ValueError(
                    "symmetric=True takes no sample_weight, which is one of each query and none of "
                    "a key; call the loss once in each direction"
                )
        return check_options(temperature, options, query)

    temperature, options = checked(check, process_group) if gather else check()
    queries = scaled_unit_rows((query,), temperature)[0]
    if key.shape[0] == 0:
        return reduce((queries * 0).sum(1), reduction)
    with torch.no_grad():
        of_keys = key if teacher_key is None else teacher_key
        taught_queries, taught_keys = (
            scaled_unit_rows((x.detach(),), options.teacher_temperature)[0]
            for x in (teacher_query, of_keys)
        )
    keys = scaled_unit_rows((key,), temperature)[0]
    own = _Side(queries, taught_queries.to(queries.dtype)), _Side(keys, taught_keys.to(keys.dtype))
    whole: _Sides = own
    shares: tuple[float | Tensor | None, float | Tensor | None] = (None, None)
    if gather:
        settings = settings_of(
            "similarity_distillation",
            (query, key, teacher_query, of_keys),
            temperature=temperature,
            sample_weight=sample_weight,
            **options.of_the_loss().changed(),
        )
        whole, shares = _gathered(own, sample_weight, options, settings)
    n_directions = 2 if symmetric else 1
    directions = [(own[0], whole[1]), (own[1], whole[0])][:n_directions]

    def logsumexp(anchors: _Side, candidates: _Side, both: bool = False) -> Tensor:
        problem = Problem(
            anchors.rows,
            candidates.rows,
            both=both,
            bound=logit_bound(temperature),
            mma_dtype=mma_dtype(query, key),
        )
        return logsumexp_for(problem, backend)(problem)[0]

    if symmetric and not gather:
        lse = logsumexp(*own, both=True)
    else:
        lse = torch.cat([logsumexp(*sides) for sides in directions])
    losses = lse - torch.cat([_expected_logits(*sides) for sides in directions])
    if reduction != "mean":
        return reduce(losses, reduction, sample_weight)
    n = query.shape[0]
    of_queries = reduce(losses[:n], "mean", sample_weight, shares[0])
    if not symmetric:
        return of_queries
    return (of_queries + reduce(losses[n:], "mean", None, shares[1])) / 2


class _Side(NamedTuple):
    """Scaled unit rows of the student (R, D) and, without gradient, of its teacher (R, E)."""

    rows: Tensor
    taught: Tensor


_Sides = tuple[_Side, _Side]


def _expected_logits(anchors: _Side, candidates: _Side) -> Tensor:
    """The mean logit of each anchor under the distribution of its teacher, (R,).

    It is the product with the mean of the candidates, which is what an attention returns.
    """
    rows, dim = candidates.rows, candidates.rows.shape[1]
    width = -(-max(dim, candidates.taught.shape[1]) // _ALIGNMENT) * _ALIGNMENT
    q, k, v = (
        F.pad(x, (0, width - x.shape[1]))[None, None]
        for x in (anchors.taught, candidates.taught, rows)
    )
    with torch.autocast(rows.device.type, enabled=False):
        mean = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return (anchors.rows * mean[0, 0, :, :dim]).sum(1)


def _gathered(
    own: _Sides, sample_weight: Tensor | None, options: Options, settings: str
) -> tuple[_Sides, tuple[float | Tensor, float | Tensor]]:
    """Both sides of all processes, and what the mean of each divides by.

    Without ``symmetric`` the queries of others are no candidates, and are not gathered.
    """
    group = options.process_group

    def everyones(side: _Side) -> _Side:
        rows, taught = (gather_batch(x[None], None, None, group, settings).rows for x in side)
        return _Side(rows[:, 0], taught[:, 0])

    queries, keys = own
    keys = everyones(keys)
    if options.symmetric:
        queries = everyones(queries)
    counts = row_counts(own[0].rows, group, settings=settings)
    total: float | Tensor = float(sum(counts))
    if sample_weight is not None:
        weights = gather_rows(sample_weight, group, counts)
        total = weights.to(keys.rows.dtype).sum()
    return (queries, keys), (total / len(counts), float(keys.rows.shape[0]) / len(counts))


def _check_pairs(
    query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor | None, gather: bool
) -> None:
    check_embeddings("query", query)
    check_embeddings("teacher_query", teacher_query)
    check_device("teacher_query", teacher_query, "query", query)
    if len(teacher_query) != len(query):
        raise ValueError(
            f"teacher_query must have the {len(query)} rows of query, got shape "
            f"{tuple(teacher_query.shape)}"
        )
    _check_candidates("key", key, query, gather)
    check_reverse_mode("query", query)
    check_reverse_mode("key", key)
    if teacher_key is None:
        if teacher_query.shape[1] != query.shape[1]:
            raise ValueError(
                f"teacher_key must be given where teacher_query has another length of rows than "
                f"key, {query.shape[1]}; got shape {tuple(teacher_query.shape)}"
            )
        return
    _check_candidates("teacher_key", teacher_key, teacher_query, gather)
    if len(teacher_key) != len(key):
        raise ValueError(
            f"teacher_key must have the {len(key)} rows of key, got shape "
            f"{tuple(teacher_key.shape)}"
        )


def _check_candidates(name: str, x: Tensor, of: Tensor, gather: bool) -> None:
    """Raise unless ``x`` holds any number of rows as long as those ``of`` its queries."""
    dim = of.shape[1]
    if isinstance(x, Tensor):
        check_dense(name, x)
    may_be_empty = not gather and isinstance(x, Tensor) and x.is_floating_point()
    if not (may_be_empty and x.shape == (0, dim)):
        check_embeddings(name, x)
    if x.shape[1] != dim:
        raise ValueError(f"{name} must have shape (M, {dim}), got {tuple(x.shape)}")
    check_device(name, x, "query", of)


class SimilarityDistillation(LossModule):
    """Similarity distillation as a module: the function with its options stored.

    Args:
        temperature: τ > 0 of the student; the initial one, from 0.01 to 100, if it is learnable.
        teacher_temperature: τ_t > 0; an attribute, which a schedule may set.
        symmetric: average with the loss of keys against queries.
        learnable_temperature: learn τ through the parameter ``logit_scale`` = log(1 / τ), which
            each call brings back to within ±log(100). Give it to the optimizer without weight
            decay.
        reduction: "mean", "sum" or "none".
        gather_distributed: take the keys (and queries) of all processes as candidates.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``.

    Raises:
        ValueError: for a temperature out of range, an unknown ``reduction`` or ``backend``.

    Example:
        >>> import torch
        >>> from contrastive_kit import NegativeQueue, SimilarityDistillation
        >>> loss_fn, queue = SimilarityDistillation(0.1, 0.04), NegativeQueue(dim=16, size=100)
        >>> for _ in range(3):
        ...     student, teacher = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        ...     loss = loss_fn(student, queue(teacher), teacher)
        >>> loss.shape
        torch.Size([])
    """

    teacher_temperature: float

    def __init__(
        self,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        *,
        symmetric: bool = False,
        learnable_temperature: bool = False,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature,
            teacher_temperature=teacher_temperature,
            symmetric=symmetric,
            reduction=reduction,
            gather_distributed=gather_distributed,
            process_group=process_group,
            backend=backend,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of the student's queries and keys: see ``similarity_distillation``."""
        self._limit_logit_scale()
        return similarity_distillation(
            query,
            key,
            teacher_query,
            teacher_key,
            temperature=self.temperature,
            sample_weight=sample_weight,
            **self._options(),
        )

    if TYPE_CHECKING:
        __call__ = forward
