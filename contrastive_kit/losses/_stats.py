"""Figures about a batch that come with its loss, at no second N × N product."""

from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kit.ops import LogitStatistics


class ContrastiveStats(NamedTuple):
    """Detached diagnostics of one call, each a 0-dim tensor, averaged over anchors.

    All depend on the number of candidates: compare them at one batch size only. The candidates of
    an anchor are the positives and negatives of its loss, so that other codes report other figures
    of the same name:

    - sthalles/SimCLR: NT-Xent's 2N - 1 candidates, both views but for the anchor. Its top-1
      accuracy is 100 times that of ``NTXent``.
    - google-research/simclr: only the N embeddings of the second view, for anchors of the first.
      Its ``train_contrast_acc`` and ``contrast_entropy`` are those of ``InfoNCE`` on the two views
      at the same temperature (but for 1e-8 in its logarithm). Half as many candidates make the
      accuracy higher and the entropy lower.

    Attributes:
        accuracy: share of anchors whose most similar candidate is a positive, in [0, 1]. A tie with
            a negative is a miss: a collapsed encoder has accuracy 0. Cosines closer than 16 times
            the epsilon of the loss's dtype are a tie, 2e-6 in float32. Products in half precision
            or TensorFloat-32 are less exact than that, and may break a tie either way.
        positive_similarity: mean cosine between anchors and positives, in [-1, 1].
        negative_similarity: mean cosine over all negative pairs, in [-1, 1]; NaN if there is none.
        entropy: mean entropy, in nats, of the softmax over the candidates of an anchor, from 0 to
            the logarithm of their number.
    """

    accuracy: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    entropy: Tensor


def is_nearest(
    positive_logits: Tensor, negative_logits: Tensor, temperature: float | Tensor
) -> Tensor:
    """Where the largest positive logit is above the largest negative one, and no tie."""
    # One is a sum over a row, the other comes from a product of matrices: equal rows give the two
    # different roundings, and by chance a collapsed encoder would always be right.
    tie = 16 * torch.finfo(positive_logits.dtype).eps / temperature
    return positive_logits > negative_logits + tie


def contrastive_stats(
    positive_logits: Tensor,
    negatives: LogitStatistics,
    temperature: float | Tensor,
) -> ContrastiveStats:
    """Statistics from positive logits (P, M) and per-anchor figures of the negatives (M,).

    The temperature is one, or that of each anchor, (M,).
    """
    with torch.no_grad():
        if isinstance(temperature, Tensor):
            if temperature.numel() == 1:
                temperature = temperature.reshape(())
            temperature = temperature.to(positive_logits.dtype)
        log_total = torch.logaddexp(negatives.logsumexp, positive_logits.logsumexp(0))
        expected_logit = (negatives.logsumexp - log_total).exp() * negatives.expected
        expected_logit += ((positive_logits - log_total).exp() * positive_logits).sum(0)
        hit = is_nearest(positive_logits.amax(0), negatives.maximum, temperature)
        return ContrastiveStats(
            accuracy=hit.to(log_total.dtype).mean(),
            positive_similarity=(positive_logits * temperature).mean(),
            negative_similarity=(negatives.total * temperature).sum() / negatives.kept.sum(),
            entropy=(log_total - expected_logit).mean(),
        )
