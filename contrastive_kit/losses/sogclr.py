"""SogCLR: NT-Xent for small batches, with a running normalizer for each image of the data set."""

import math
import warnings
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from contrastive_kit._checks import (
    check_flag,
    check_ids,
    check_int,
    check_number,
)
from contrastive_kit.distributed import checked, gather_rows, is_overwritten
from contrastive_kit.losses._common import (
    LossOutput,
    check_views,
    logit_bound,
    positive_pair_logits,
    reduce,
)
from contrastive_kit.losses._gathered import gather_batch, settings_of, several_processes
from contrastive_kit.losses._module import LossModule
from contrastive_kit.losses._negatives import InTiles
from contrastive_kit.losses._options import Reduction
from contrastive_kit.losses._stats import ContrastiveStats, contrastive_stats
from contrastive_kit.ops import (
    BackendName,
    Exclusion,
    Problem,
    mma_dtype,
    scaled_unit_rows,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SogCLR(LossModule):
    r"""SogCLR: the contrast with all images of the data set, estimated over many small batches.

    .. math::

        \ell_i = \log u_i - s_{ip}, \qquad
        u_i \leftarrow (1 - \gamma)\, u_i + \gamma\, \bar g_i, \qquad
        \bar g_i = \frac{1}{|n|} \sum_n e^{s_{in}}

    NT-Xent divides by a sum over the negatives of its batch, whose logarithm is too small on
    average, the more so the smaller the batch is. SogCLR divides by a running mean u of that sum,
    one for each image of the data set, so that the gradient is right in the long run for any batch
    size: :math:`\nabla \ell_i = \nabla \bar g_i / u_i - \nabla s_{ip}`, with u constant.
    Negatives, normalization of the embeddings and several views are as in ``nt_xent``; images of
    equal index are no negatives of each other. As in the authors' code each view is divided by its
    own estimate, and the mean over the views is kept; what an image has at first is the mean of its
    first batch. With ``gamma=1`` nothing is remembered, and the loss is ``NTXent(decoupled=True)``
    less the logarithm of the number of negatives.

    The normalizers belong to the ``state_dict``, as logarithms; a call in training mode writes
    them, one in evaluation mode only reads. What is NaN or infinite is not written. If an index is
    in a batch twice, the larger of the two stays. They depend on the temperature: change it slowly.

    Args:
        num_images: how many images there are, N of the data set.
        temperature: τ > 0.
        gamma: γ in (0, 1], the weight of the batch in the running mean.
        reduction: "mean" or "sum" over the V·N anchors, or "none" for the losses (V, N).
        gather_distributed: take the images of all processes as negatives, and write the normalizers
            of all of them on each. If False a process writes those of its own images, and must not
            be inside a ``DistributedDataParallel`` that broadcasts its buffers.
        process_group: the processes to gather from; None for all of them.
        backend: "auto" or a name, see ``which_backend``.

    Raises:
        TypeError: for a ``num_images`` that is no integer, a number that is none.
        ValueError: for an option out of its range, an unknown ``reduction`` or ``backend``.

    Memory:
        As ``nt_xent``, linear in the batch; ``num_images`` numbers beside it, float32.

    References:
        Yuan et al., Provable Stochastic Optimization for Global Contrastive Learning: Small Batch
        Does Not Harm Performance, arXiv 2202.12387, algorithm 1.

    Example:
        >>> import torch
        >>> from contrastive_kit import SogCLR
        >>> loss_fn = SogCLR(num_images=1000, temperature=0.1)
        >>> z1, z2 = torch.randn(2, 8, 16).unbind(0)
        >>> index = torch.randint(1000, (8,))  # where the images are in the data set
        >>> loss = loss_fn(z1, z2, index=index)
        >>> len(loss_fn.state_dict()["log_normalizer"])
        1000
    """

    log_normalizer: Tensor

    def __init__(
        self,
        num_images: int,
        temperature: float = 0.1,
        *,
        gamma: float = 0.9,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(
            temperature,
            False,
            reduction=reduction,
            gather_distributed=gather_distributed,
            process_group=process_group,
            backend=backend,
        )
        num_images, gamma = check_int("num_images", num_images, 1), check_number("gamma", gamma)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {gamma}")
        self.gamma = gamma
        # The logarithm: at a temperature of 0.01 the mean itself would overflow. -inf: not seen.
        self.register_buffer("log_normalizer", torch.full((num_images,), -torch.inf))
        self._warned = False

    @overload
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *more_views: Tensor,
        index: Tensor,
        return_stats: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *more_views: Tensor,
        index: Tensor,
        return_stats: Literal[True],
    ) -> tuple[Tensor, ContrastiveStats]: ...
    @overload
    def forward(
        self, z1: Tensor, z2: Tensor, *more_views: Tensor, index: Tensor, return_stats: bool
    ) -> LossOutput: ...
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *more_views: Tensor,
        index: Tensor,
        return_stats: bool = False,
    ) -> LossOutput:
        """The loss of two or more views.

        Args:
            z1: embeddings of the first views, (N, D), N ≥ 2, any floating dtype.
            z2: embeddings of the second views, like ``z1``.
            *more_views: embeddings of further views, like ``z1``.
            index: integers (N,), from 0 to ``num_images`` - 1: where each image is in the data set.
            return_stats: also return ``ContrastiveStats``, of the softmax of ``nt_xent``.

        Returns:
            The loss, float64 if an embedding is float64 and float32 otherwise; with
            ``return_stats`` the pair (loss, ``ContrastiveStats``). It may be below 0. An image
            without negatives has loss 0 and a zero gradient.

        Raises:
            TypeError: for embeddings that are not floating tensors, an index that is no integers.
            ValueError: for shapes or devices that do not match, fewer than two rows, an index out
                of range (on a GPU, and in a compiled graph, torch's own error); with
                ``gather_distributed`` on every process.
            NotImplementedError: for forward-mode differentiation.
        """
        views, group, temperature = (
            (z1, z2, *more_views),
            self.process_group,
            self._fixed_temperature,
        )
        gather = several_processes(self.gather_distributed, group)

        def check() -> None:
            self._check(views, index, return_stats, gather)

        checked(check, group) if gather else check()
        n = len(z1)
        views_of_rows = scaled_unit_rows(views, temperature)
        positive_logits = positive_pair_logits(views_of_rows)
        columns, weight_per_process = None, None
        exclusion = Exclusion(0, index.repeat(len(views)))
        if gather:
            settings = settings_of(
                "SogCLR",
                views,
                num_images=len(self.log_normalizer),
                temperature=temperature,
                gamma=self.gamma,
                reduction=self.reduction,
            )
            batch = gather_batch(views_of_rows, index, None, group, settings)
            columns = batch.rows.flatten(0, 1)
            exclusion, weight_per_process = batch.exclusion(len(views)), batch.weight_per_process()
        problem = Problem(
            views_of_rows.flatten(0, 1),
            columns,
            exclusion,
            bound=logit_bound(temperature),
            statistics=return_stats,
            mma_dtype=mma_dtype(*views),
        )
        negatives = InTiles(problem, self.backend)
        lse, statistics = negatives.found()
        log_mean = lse - negatives.counts().to(lse.dtype).log()
        alone = lse == -torch.inf
        log_mean = torch.where(alone, -torch.inf, log_mean)
        log_u = self._estimate(index, log_mean.detach().view(len(views), n))
        if self.training:
            self._remember(index, log_u)
        log_u = log_u.flatten()
        # Its value is log u, its gradient that of the mean over u.
        weight = torch.where(alone, 0, (log_mean.detach() - log_u).exp())
        change = torch.where(alone, 0, log_mean - log_mean.detach())
        loss = torch.where(alone, 0, log_u + weight * change - positive_logits.mean(0))
        loss = reduce(loss.view(len(views), n), self.reduction, None, weight_per_process)
        if statistics is None:
            return loss
        return loss, contrastive_stats(positive_logits, statistics, temperature)

    if TYPE_CHECKING:
        __call__ = forward

    def _check(
        self, views: tuple[Tensor, ...], index: Tensor, return_stats: bool, gather: bool
    ) -> None:
        check_views(views, gather)
        num_images = len(self.log_normalizer)
        check_ids("index", index, len(views[0]), "z1", views[0])
        check_flag("return_stats", return_stats)
        # On a GPU it would have to be waited for; torch's own look-up refuses it there.
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            lowest, highest = index.aminmax()
            if lowest < 0 or highest >= num_images:
                raise ValueError(
                    f"index must be from 0 to num_images - 1 ({num_images - 1}), got "
                    f"{int(lowest)} to {int(highest)}"
                )
        if (
            not self._warned
            and self.training
            and not gather
            and is_overwritten(self.log_normalizer)
        ):
            self._warned = True
            warnings.warn(
                "a SogCLR with gather_distributed=False is inside a DistributedDataParallel that "
                "broadcasts its buffers: the normalizers of rank 0 overwrite those of the other "
                "processes. Use gather_distributed=True, or broadcast_buffers=False",
                stacklevel=3,
            )

    @torch.no_grad()
    def _estimate(self, index: Tensor, log_mean: Tensor) -> Tensor:
        """Log u of each view of each image, (V, N), with its batch in it."""
        before = self.log_normalizer.index_select(0, index.long()).to(log_mean.dtype)
        if self.gamma == 1:
            return log_mean
        mixed = torch.logaddexp(before + math.log1p(-self.gamma), log_mean + math.log(self.gamma))
        return torch.where(before == -torch.inf, log_mean, mixed)

    @torch.no_grad()
    def _remember(self, index: Tensor, log_u: Tensor) -> None:
        """Keep the mean over the views, of the images of all processes."""
        log_u = log_u.logsumexp(0) - math.log(len(log_u))
        index = index.long()
        if several_processes(self.gather_distributed, self.process_group):
            log_u, index = (gather_rows(x, self.process_group) for x in (log_u, index))
        before = self.log_normalizer.index_select(0, index)
        log_u = torch.where(log_u.isfinite(), log_u.to(before.dtype), before)
        # Emptied first, and then the largest: no order among equal indices decides.
        emptied = self.log_normalizer.index_fill(0, index, -torch.inf)
        self.log_normalizer.copy_(emptied.scatter_reduce(0, index, log_u, "amax"))

    def _shown(self) -> dict[str, float | Tensor | bool]:
        return {"num_images": len(self.log_normalizer), "gamma": self.gamma}
