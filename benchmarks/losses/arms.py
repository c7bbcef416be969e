"""The implementations that are compared, each behind ``loss(z1, z2)`` with the mean over anchors.

Embeddings come in as a projection head leaves them: not normalized, and bfloat16 under autocast.
Arms in plain torch run under autocast then, and so do the peers that are plain torch inside.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.device import Device
from contrastive_kit.functional import info_nce, nt_xent

Loss = Callable[[Tensor, Tensor], Tensor]
Formula = Callable[[Tensor, Tensor, float], Tensor]

OURS, TILED = "contrastive-kit", "contrastive-kit, tiled"
EAGER, COMPILED = "eager", "compiled eager"

PRECISIONS = ("bf16", "tf32", "fp32")
_PER_LOGIT = {"fp32": 1e-6, "tf32": 1e-3, "bf16": 8e-3}


class Setting(NamedTuple):
    """What an arm is built for."""

    temperature: float
    precision: str  # of PRECISIONS; of products in "tf32", of embeddings too in "bf16" (autocast)
    device: Device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


Build = Callable[[Setting], Loss]


class Arm(NamedTuple):
    """One implementation of a loss."""

    build: Build  # raises ImportError where it is not installed
    formula: str  # what it computes, a subject of ``oracle``
    compiled: bool = False  # whether its first call at a size compiles for that size
    # Pairs beyond which its memory is out of proportion, by kind of device.
    largest_n: Mapping[str, int] = {}
    operands: str = "fp32"  # the precision of its products where that is coarser than the setting's
    gpu_only: bool = False


def eager_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent as one writes it in plain torch, with the diagonal masked in place."""
    u = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = u @ u.T / temperature
    logits.fill_diagonal_(-torch.inf)
    positive = torch.arange(len(u), device=u.device).roll(len(z1))
    return F.cross_entropy(logits, positive)


def eager_clip(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The loss of CLIP as one writes it in plain torch, with one matrix of logits."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    positive = torch.arange(len(z1), device=z1.device)
    return (F.cross_entropy(logits, positive) + F.cross_entropy(logits.T, positive)) / 2


def our_nt_xent(backend: str) -> Build:
    return lambda s: lambda z1, z2: nt_xent(z1, z2, temperature=s.temperature, backend=backend)


def our_clip(backend: str) -> Build:
    return lambda s: (
        lambda z1, z2: info_nce(z1, z2, temperature=s.temperature, symmetric=True, backend=backend)
    )


def _plain(formula: Formula) -> Build:
    return lambda s: _with_autocast(lambda z1, z2: formula(z1, z2, s.temperature), s)


def _compiled(formula: Formula) -> Build:
    return lambda s: _plain(torch.compile(formula, dynamic=False, backend=s.device.compiler))(s)


def _with_autocast(loss: Loss, setting: Setting) -> Loss:
    if setting.precision != "bf16":
        return loss

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        with torch.autocast(setting.device.device.type, torch.bfloat16):
            return loss(z1, z2)

    return call


def _lightly(setting: Setting) -> Loss:
    from lightly.loss import NTXentLoss

    return _with_autocast(NTXentLoss(setting.temperature), setting)


def _metric_learning(setting: Setting) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(setting.temperature)
    return _with_autocast(
        lambda z1, z2: loss(torch.cat([z1, z2]), torch.arange(len(z1)).repeat(2)), setting
    )


def _open_clip(setting: Setting) -> Loss:
    from open_clip.loss import ClipLoss

    loss, scale = ClipLoss(), 1 / setting.temperature
    return _with_autocast(
        lambda z1, z2: loss(F.normalize(z1, dim=1), F.normalize(z2, dim=1), scale), setting
    )


def _unit_rows(z1: Tensor, z2: Tensor) -> Tensor:
    return F.normalize(torch.cat([z1, z2]).float(), dim=1)


def _flex_attention(setting: Setting) -> Loss:
    """The logsumexp of attention over all but oneself; its values are 16 columns of no meaning."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    attention = torch.compile(flex_attention, dynamic=False, backend=setting.device.compiler)
    mask_of = cache(lambda m, on: create_block_mask(_not_oneself, None, None, m, m, on))
    scale = 1 / setting.temperature

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        u = _unit_rows(z1, z2)
        positive = (u * u.roll(len(z1), 0)).sum(1) * scale
        rows = u.to(setting.dtype)[None, None]
        options = {"block_mask": mask_of(len(u), u.device), "return_aux": AuxRequest(lse=True)}
        _, aux = attention(rows, rows, rows[..., :16].detach(), scale=scale, **options)
        return (aux.lse[0, 0] - positive).mean()

    return call


def _not_oneself(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query != key


OneWay = Callable[[Tensor, Tensor, Tensor], Tensor]


def _inf_cl(s: Setting) -> OneWay:
    from inf_cl import cal_flash_loss

    return lambda rows, columns, positive: cal_flash_loss(
        rows, columns, positive, 1 / s.temperature, min(rows.shape[1], 128)
    ).mean()


def _cut_cross_entropy(s: Setting) -> OneWay:
    from cut_cross_entropy import linear_cross_entropy

    # The default filter drops gradients below a threshold, which grows wrong with N.
    return lambda rows, columns, positive: linear_cross_entropy(
        rows / s.temperature, columns, positive, filter_eps=None
    )


def _against_itself(peer: Callable[[Setting], OneWay]) -> Arm:
    """NT-Xent by a peer without a mask for the anchor itself: another loss, of the same cost."""

    def build(setting: Setting) -> Loss:
        one_way = peer(setting)

        def call(z1: Tensor, z2: Tensor) -> Tensor:
            rows = _unit_rows(z1, z2).to(setting.dtype)
            positive = torch.arange(len(rows), device=rows.device).roll(len(z1))
            return one_way(rows, rows, positive)

        return call

    return Arm(build, "nt_xent_with_self", operands="tf32", gpu_only=True)


def _both_directions(peer: Callable[[Setting], OneWay]) -> Arm:
    """The loss of CLIP by a peer that takes rows, columns and the column of each positive."""

    def build(setting: Setting) -> Loss:
        one_way = peer(setting)

        def call(z1: Tensor, z2: Tensor) -> Tensor:
            a, b = (z.contiguous() for z in _unit_rows(z1, z2).to(setting.dtype).chunk(2))
            positive = torch.arange(len(a), device=a.device)
            return (one_way(a, b, positive) + one_way(b, a, positive)) / 2

        return call

    return Arm(build, "clip", operands="tf32", gpu_only=True)


SUBJECTS = {
    "nt_xent": {
        OURS: Arm(our_nt_xent("auto"), "nt_xent"),
        TILED: Arm(our_nt_xent("tiled"), "nt_xent", gpu_only=True),
        EAGER: Arm(_plain(eager_nt_xent), "nt_xent"),
        COMPILED: Arm(_compiled(eager_nt_xent), "nt_xent", compiled=True),
        "FlexAttention": Arm(_flex_attention, "nt_xent", compiled=True, gpu_only=True),
        "lightly": Arm(_lightly, "nt_xent"),
        # Several tensors of 2N × 2N(2N - 2) numbers: 64 MiB each at N = 128, 0.5 GiB at N = 256.
        "pytorch-metric-learning": Arm(
            _metric_learning, "nt_xent", largest_n={"cpu": 128, "cuda": 256}
        ),
        "inf_cl": _against_itself(_inf_cl),
        "cut-cross-entropy": _against_itself(_cut_cross_entropy),
    },
    "clip": {
        OURS: Arm(our_clip("auto"), "clip"),
        TILED: Arm(our_clip("tiled"), "clip", gpu_only=True),
        EAGER: Arm(_plain(eager_clip), "clip"),
        COMPILED: Arm(_compiled(eager_clip), "clip", compiled=True),
        "open_clip": Arm(_open_clip, "clip"),
        "inf_cl": _both_directions(_inf_cl),
        "cut-cross-entropy": _both_directions(_cut_cross_entropy),
    },
}


def gate(arm: Arm, setting: Setting) -> float:
    """Relative error of loss and gradient beyond which an arm computes something else.

    Wide for half precision: it tells a different loss apart, and the errors stand in the report.
    """
    coarsest = max(_PER_LOGIT[setting.precision], _PER_LOGIT[arm.operands])
    # Embeddings in bfloat16 take their gradient in bfloat16.
    rounding = 8e-3 if setting.precision == "bf16" else 0.0
    return rounding + coarsest / setting.temperature


def embeddings(n: int, d: int, seed: int = 0, noise: float = 0.65) -> tuple[Tensor, Tensor]:
    """Two views (n, d) that want gradients: an image plus noise each.

    The cosine between the views of an image is about 1 / (1 + noise²), 0.7 by default.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, d, generator=generator)
    z1, z2 = (image + noise * torch.randn(n, d, generator=generator) for _ in range(2))
    return z1.requires_grad_(), z2.requires_grad_()


def forward(loss: Loss, z1: Tensor, z2: Tensor) -> Tensor:
    """The value alone."""
    with torch.no_grad():
        return loss(z1, z2)


def forward_backward(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    """The gradients with respect to both views."""
    return torch.autograd.grad(loss(z1, z2), (z1, z2))
