"""What embeddings look like on the sphere: positives close, all spread out, no dimension lost.

A low loss does not tell these apart, and a collapsed representation shows here first. Where not
said otherwise the values depend on the number of samples and on the augmentation: compare them at
equal ones. All are differentiable.
"""

import math

import torch
from torch import Tensor

from contrastive_kit._checks import (
    check_alike,
    check_choice,
    check_embeddings,
    check_number,
    check_reverse_mode,
)
from contrastive_kit.ops import (
    BACKENDS,
    BackendName,
    Exclusion,
    kept_logsumexp,
    scaled_unit_rows,
)


def alignment(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> Tensor:
    r"""How far the two views of an image are apart, on the unit sphere.

    .. math:: \frac{1}{N} \sum_i \lVert u_i - v_i \rVert^\alpha

    Args:
        z1: embeddings of the first views, (N, D), any floating dtype; normalized here.
        z2: embeddings of the second views, like ``z1``.
        alpha: the exponent α > 0.

    Returns:
        A 0-dim tensor, from 0 (views coincide) to 2\ :sup:`α`; float64 if an embedding
        is, float32 otherwise. With α = 2 it is 2 - 2 · ``ContrastiveStats.positive_similarity``.

    Raises:
        TypeError: for embeddings that are not floating tensors.
        ValueError: for shapes or devices that do not match, or ``alpha`` not positive.

    References:
        Wang and Isola, Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere, arXiv 2005.10242, section 4.1.1.

    Example:
        >>> import torch
        >>> from contrastive_kit.metrics import alignment
        >>> alignment(torch.eye(4), torch.eye(4).roll(1, 0))  # orthogonal rows
        tensor(2.)
    """
    check_embeddings("z1", z1)
    check_embeddings("z2", z2)
    check_alike("z2", z2, "z1", z1)
    check_reverse_mode("z1", z1)
    check_reverse_mode("z2", z2)
    alpha = _check_positive("alpha", alpha)
    u, v = scaled_unit_rows((z1, z2), 1.0)
    squared = (u - v).square().sum(1)
    # Where views coincide, the derivative of a power below 1 is infinite, and times 0 it is NaN.
    coincide = squared == 0
    distance = torch.where(coincide, 1, squared).pow(alpha / 2)
    return torch.where(coincide, 0, distance).mean()


def uniformity(z: Tensor, *, t: float = 2.0, backend: BackendName = "auto") -> Tensor:
    r"""How unevenly embeddings spread over the unit sphere: lower is more uniform.

    .. math:: \log \frac{1}{N (N - 1)} \sum_{i \neq j} e^{-t \lVert u_i - u_j \rVert^2}

    With :math:`\lVert u_i - u_j \rVert^2 = 2 - 2 \cos(z_i, z_j)` this is the logsumexp behind the
    losses, at temperature 1 / (2t), over all pairs but an embedding and itself.

    Args:
        z: embeddings (N, D), N ≥ 2, any floating dtype; normalized here. Give one view of each
            image: with two, the positive pairs count as well.
        t: the scale t > 0.
        backend: "auto" or a name, see ``which_backend``.

    Returns:
        A 0-dim tensor, from -2t · N / (N - 1), which no N points fall below, to 0,
        where all coincide; float64 if ``z`` is, float32 otherwise.

    Raises:
        TypeError: for embeddings that are not a floating tensor.
        ValueError: for a shape other than (N, D), fewer than two rows, ``t`` not positive and
            finite, or an unknown ``backend``.

    Memory:
        O(N·D) and a few tiles; nothing of size N × N (except with ``backend="reference"``).

    References:
        Wang and Isola, arXiv 2005.10242, section 4.1.2.

    Example:
        >>> import torch
        >>> from contrastive_kit.metrics import uniformity
        >>> uniformity(torch.eye(8))  # squared distances of 2
        tensor(-4.)
    """
    check_embeddings("z", z)
    check_reverse_mode("z", z)
    n = z.shape[0]
    if n < 2:
        raise ValueError(f"z must have at least 2 rows, or there are no pairs; got {n}")
    t = _check_positive("t", t)
    check_choice("backend", backend, ["auto", *BACKENDS])
    rows = scaled_unit_rows((z,), 1 / (2 * t))[0]
    lse, _ = kept_logsumexp(rows, exclusion=Exclusion(n), bound=2.002 * t, backend=backend)
    return lse.logsumexp(0) - 2 * t - math.log(n * (n - 1))


def effective_rank(z: Tensor) -> Tensor:
    r"""How many directions the embeddings use: the exponential of the entropy of the spectrum.

    .. math:: \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \qquad p_k = \sigma_k / \sum_l \sigma_l

    with the singular values σ of the embeddings as they are: neither normalized nor centered. A
    singular value of 0 contributes nothing, exactly; ``rankme`` adds a constant to each share.

    Args:
        z: embeddings or features (N, D), any floating dtype. The rank is at most N: take several
            times more samples than dimensions (RankMe: 25 600).

    Returns:
        A 0-dim tensor, from 1 (one direction) to min(N, D) (all alike), float64 (float32
        on devices without it). NaN if ``z`` is all zero, or not finite.

    Raises:
        TypeError: for embeddings that are not a floating tensor.
        ValueError: for a shape other than (N, D).

    Memory:
        A few copies of ``z`` in float64. Waits for the device.

    References:
        Garrido et al., RankMe, arXiv 2210.02885, equation 1; Roy and Vetterli, The Effective Rank,
        EUSIPCO 2007.

    Example:
        >>> import torch
        >>> from contrastive_kit.metrics import effective_rank
        >>> round(effective_rank(torch.eye(8)).item(), 6)
        8.0
    """
    check_embeddings("z", z)
    sigma = _singular_values(z)
    share = sigma / sigma.sum()
    # The derivative is infinite at 0, and times 0 it is NaN; at 1 the summand is 0 as well.
    entropy: Tensor = torch.special.entr(torch.where(share == 0, 1, share)).sum()
    return entropy.exp()


def rankme(z: Tensor, *, epsilon: float = 1e-7) -> Tensor:
    r"""RankMe: the effective rank as its paper writes it, with a constant added to each share.

    .. math::

        \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \qquad p_k = \sigma_k / \sum_l \sigma_l + \epsilon

    ``effective_rank`` is the same without the constant. Take this one to compare with figures that
    others have published.

    Args:
        z: embeddings or features (N, D), any floating dtype, neither normalized nor centered here.
            The rank is at most N: take several times more samples than dimensions (the paper:
            25,600).
        epsilon: ε > 0.

    Returns:
        A 0-dim tensor, float64 (float32 on devices without it). NaN if ``z`` is all zero, or not
        finite.

    Raises:
        TypeError: for embeddings that are not a floating tensor.
        ValueError: for a shape other than (N, D), or ``epsilon`` not positive and finite.

    Memory:
        A few copies of ``z`` in float64. Waits for the device.

    References:
        Garrido et al., RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
        Representations by Their Rank, arXiv 2210.02885, equation 1.

    Example:
        >>> import torch
        >>> from contrastive_kit.metrics import rankme
        >>> round(rankme(torch.eye(8)).item(), 4)
        8.0
    """
    check_embeddings("z", z)
    return _rank_of_shares(_singular_values(z), _check_positive("epsilon", epsilon))


def lidar(views: Tensor, *, delta: float = 1e-4, epsilon: float = 1e-7) -> Tensor:
    r"""LiDAR: how many directions tell images apart beyond what their views differ by.

    .. math::

        \Sigma = \Sigma_w^{-1/2}\, \Sigma_b\, \Sigma_w^{-1/2}, \qquad
        \Sigma_b = \frac1N \sum_i (\mu_i - \mu)(\mu_i - \mu)^\top, \qquad
        \Sigma_w = \frac1{NV} \sum_{iv} (z_{iv} - \mu_i)(z_{iv} - \mu_i)^\top + \delta I

    with μ\ :sub:`i` the mean over the views of image i and μ the mean over images. The value is the
    exponential of the entropy of the spectrum of Σ, whose shares have ε added. Unlike a plain rank
    it does not count directions in which the views of one image differ as much as images do.

    Args:
        views: embeddings (V, N, D), V ≥ 2 views of N ≥ 2 images, any floating dtype, neither
            normalized nor centered here. The rank is below N; the paper takes 1,000 images of 50
            views.
        delta: δ > 0, what keeps Σ\ :sub:`w` invertible. It is not relative to the scale of the
            embeddings: compare at one scale.
        epsilon: ε > 0.

    Returns:
        A 0-dim tensor, float64 (float32 on devices without it). NaN if the means of all images
        coincide, or embeddings are not finite.

    Raises:
        TypeError: for embeddings that are not a floating tensor.
        ValueError: for a shape other than (V, N, D), fewer than two views or images, ``delta`` or
            ``epsilon`` not positive and finite.

    Memory:
        A few copies of ``views`` in float64, and D². Waits for the device.

    References:
        Thilak et al., LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL
        Architectures, arXiv 2312.04000, section 4.

    Example:
        >>> import torch
        >>> from contrastive_kit.metrics import lidar
        >>> z = torch.cat([torch.eye(8), -torch.eye(8)])  # 16 images, whose views coincide
        >>> round(lidar(torch.stack([z, z])).item(), 4)
        8.0
    """
    if isinstance(views, Tensor) and views.ndim != 3:
        raise ValueError(f"views must have shape (V, N, D), got {tuple(views.shape)}")
    check_embeddings("views", views.flatten(0, 1) if isinstance(views, Tensor) else views)
    if min(views.shape[:2]) < 2:
        raise ValueError(
            f"views must be of at least 2 images and 2 views of each, (V, N, D), got "
            f"{tuple(views.shape)}"
        )
    delta, epsilon = _check_positive("delta", delta), _check_positive("epsilon", epsilon)
    views = _in_double(views)
    n_views, n, dim = views.shape
    means = views.mean(0)
    between = (means - means.mean(0)) / math.sqrt(n)
    within = (views - means).flatten(0, 1) / math.sqrt(n_views * n)
    if not within.isfinite().all():
        return views.new_full((), torch.nan)
    # Σ has the eigenvalues of L⁻¹ Σ_b L⁻ᵀ with Σ_w = L Lᵀ: the squares of these singular values.
    eye = torch.eye(dim, dtype=views.dtype, device=views.device)
    root = torch.linalg.cholesky(within.T @ within + delta * eye)
    whitened = torch.linalg.solve_triangular(root, between.T, upper=False)
    return _rank_of_shares(torch.linalg.svdvals(whitened).square(), epsilon)


def feature_std(z: Tensor) -> Tensor:
    r"""Standard deviation of the unit embeddings over the batch, as a share of the isotropic one.

    .. math:: \sqrt{D} \cdot \frac{1}{D} \sum_d \operatorname{std}_i(u_{id})

    Near 1 where embeddings spread over all directions, 0 where they have collapsed into a point.
    The standard deviation divides by N.

    Args:
        z: embeddings (N, D), N ≥ 2, any floating dtype; normalized here.

    Returns:
        A 0-dim tensor, in [0, 1]; float64 if ``z`` is, float32 otherwise.

    Raises:
        TypeError: for embeddings that are not a floating tensor.
        ValueError: for a shape other than (N, D), or fewer than two rows.

    References:
        Chen and He, SimSiam, arXiv 2011.10566, figure 2.

    Example:
        >>> import torch
        >>> from contrastive_kit.metrics import feature_std
        >>> feature_std(torch.cat([torch.eye(8), -torch.eye(8)]))
        tensor(1.0000)
        >>> feature_std(torch.ones(16, 8))
        tensor(0.)
    """
    check_embeddings("z", z)
    check_reverse_mode("z", z)
    if z.shape[0] < 2:
        raise ValueError(f"z must have at least 2 rows, or nothing varies; got {z.shape[0]}")
    rows = scaled_unit_rows((z,), 1.0)[0]
    return rows.std(0, correction=0).mean() * math.sqrt(z.shape[1])


def _check_positive(name: str, value: object) -> float:
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {number}")
    return number


def _in_double(z: Tensor) -> Tensor:
    return z.to(torch.float32 if z.device.type == "mps" else torch.float64)


def _singular_values(z: Tensor) -> Tensor:
    """Those of ``z`` (N, D) over its largest entry; NaN if it is all zero, or not finite."""
    z = _in_double(z)
    # Only shares matter, and no length of the rows shall over- or underflow.
    z = z / z.detach().abs().amax()
    if not z.isfinite().all():
        return z.new_full((1,), torch.nan)
    sigma: Tensor = torch.linalg.svdvals(z)
    return sigma


def _rank_of_shares(values: Tensor, epsilon: float) -> Tensor:
    """exp(-Σ p log p) of the shares of ``values``, each with ``epsilon`` added."""
    share = values / values.sum() + epsilon
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp()
