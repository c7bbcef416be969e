"""What an arm must compute before it is timed: the formula in float64, in little memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.losses.arms import SIGLIP_BIAS

_BLOCK = 512


class Oracle(NamedTuple):
    """Loss and gradients (2, N, D) in float64."""

    loss: Tensor
    grad: Tensor


class Disagreement(AssertionError):
    """An arm computes something else than the oracle."""


def oracle(subject: str, z1: Tensor, z2: Tensor, temperature: float) -> Oracle:
    """NT-Xent, the loss of CLIP, InfoNCE or SigLIP with the anchors z1, some anchors at a time.

    "nt_xent_with_self" counts the anchor itself among its negatives, as losses do that have no
    mask for it. The loss of an anchor is log(1 + Σ exp(negative logit) / exp(positive logit)), in
    the form that stays exact when it is tiny.
    """
    z = torch.stack([z1, z2]).detach().double().requires_grad_()
    u = F.normalize(z, dim=2)
    leaf = u.detach().flatten(0, 1).requires_grad_()
    n, m = len(z1), 2 * len(z1)
    anchors = n if subject in ("info_nce", "siglip") else m
    candidate = torch.arange(m, device=z.device)
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for anchor in candidate[:anchors, None].split(_BLOCK):
        logits = leaf[anchor[:, 0]] @ leaf.T / temperature
        positive = logits.gather(1, (anchor + n) % m)[:, 0]
        no_negative = (candidate - anchor) % n == 0
        if subject in ("clip", "info_nce", "siglip"):
            no_negative |= (candidate < n) == (anchor < n)
        if subject == "nt_xent_with_self":
            no_negative &= candidate != anchor
        if subject == "siglip":
            others = F.softplus(logits + SIGLIP_BIAS, threshold=50).masked_fill(no_negative, 0)
            loss = F.softplus(-positive - SIGLIP_BIAS, threshold=50).sum() + others.sum()
        else:
            negatives = logits.masked_fill(no_negative, -torch.inf).logsumexp(1)
            loss = F.softplus(negatives - positive, threshold=50).sum()
        loss = loss / anchors
        loss.backward()
        total += loss.detach()
    (grad,) = torch.autograd.grad(u, z, leaf.grad.view_as(u))
    return Oracle(total, grad)


def relative_errors(
    loss: Callable[[Tensor, Tensor], Tensor], z1: Tensor, z2: Tensor, expected: Oracle
) -> dict[str, float]:
    """Error of the loss, and of the gradient in the 2-norm, relative to the oracle."""
    value = loss(z1, z2)
    grad = torch.stack(torch.autograd.grad(value, (z1, z2))).double()
    loss_error = (value.detach().double() - expected.loss).abs() / expected.loss.abs()
    grad_error = torch.linalg.vector_norm(grad - expected.grad)
    return {
        "loss": float(loss_error),
        "gradient": float(grad_error / torch.linalg.vector_norm(expected.grad)),
    }


def check(errors: dict[str, float], budget: float) -> None:
    """Raise ``Disagreement`` unless the errors are within the budget; NaN is not."""
    for name, error in errors.items():
        if not error <= budget:
            raise Disagreement(f"relative error of the {name} is {error:.1e}, over {budget:.1e}")
