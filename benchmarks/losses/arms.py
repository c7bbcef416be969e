"""The implementations that are compared, each behind ``loss(z1, z2)`` with the mean over anchors.

Embeddings come in as a projection head leaves them: not normalized, and bfloat16 under autocast.
Arms in plain torch run under autocast then, and so do the peers that are plain torch inside.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.device import Device
from contrastive_kit.functional import info_nce, nt_xent, siglip

Loss = Callable[[Tensor, Tensor], Tensor]
# Takes unit rows, unit columns and the column of each row's positive.
OneWay = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS, TILED = "contrastive-kit", "contrastive-kit, tiled"
EAGER, COMPILED = "eager", "compiled eager"
FORWARD, BOTH, GRAPH = "forward", "forward+backward", "CUDA graph"
# What the machine can do beside them.
GEMM_OF_LOGITS, GEMM_SQUARE = "GEMM, M × D × M", "GEMM, 1024³"
GEMM, COPY, ROOFLINE = "GEMM, 8192³", "copy", "roofline"
SUBJECTS = {
    "nt_xent": "NT-Xent",
    "clip": "Loss of CLIP (`info_nce(symmetric=True)`)",
    "info_nce": "InfoNCE (`info_nce`)",
    "siglip": "SigLIP (`siglip`)",
}
SIGLIP_BIAS = -10.0  # where training begins
PRECISIONS = ("bf16", "tf32", "fp32")
_PER_LOGIT = {"fp32": 1e-6, "tf32": 1e-3, "bf16": 8e-3}


class Setting(NamedTuple):
    subject: str  # of SUBJECTS
    temperature: float
    precision: str  # of PRECISIONS; of products in "tf32", of embeddings too in "bf16" (autocast)
    device: Device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Arm(NamedTuple):
    build: Callable[[Setting], Loss]  # raises ImportError where it is not installed
    subjects: tuple[str, ...] = ("nt_xent",)
    kinds: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False  # whether its first call at a size compiles for that size
    # Pairs beyond which its memory is out of proportion, by kind of device.
    largest_n: Mapping[str, int] = {}
    operands: str = "fp32"  # the precision of its products where that is coarser than the setting's
    masks_itself: bool = True  # whether the anchor is left out of NT-Xent's negatives

    def formula(self, subject: str) -> str:
        """What it computes, see ``oracle``."""
        return subject if self.masks_itself or subject != "nt_xent" else "nt_xent_with_self"


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


def eager_info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """InfoNCE as one writes it in plain torch."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(z1), device=z1.device))


def eager_siglip(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The sigmoid loss as one writes it in plain torch, with a matrix of signs."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature + SIGLIP_BIAS
    sign = 2 * torch.eye(len(z1), device=z1.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(z1)


_EAGER = {
    "nt_xent": eager_nt_xent, "clip": eager_clip, "info_nce": eager_info_nce,
    "siglip": eager_siglip,
}  # fmt: skip


def _ours(s: Setting, backend: str = "auto") -> Loss:
    if s.subject == "nt_xent":
        return partial(nt_xent, temperature=s.temperature, backend=backend)
    if s.subject == "siglip":
        options = {"temperature": s.temperature, "logit_bias": SIGLIP_BIAS, "backend": backend}
        return partial(siglip, **options)
    symmetric = s.subject == "clip"
    return partial(info_nce, temperature=s.temperature, symmetric=symmetric, backend=backend)


def _eager(s: Setting) -> Loss:
    return _with_autocast(partial(_EAGER[s.subject], temperature=s.temperature), s)


def _compiled(s: Setting) -> Loss:
    loss = torch.compile(_EAGER[s.subject], dynamic=False, backend=s.device.compiler)
    return _with_autocast(lambda z1, z2: loss(z1, z2, s.temperature), s)


def _with_autocast(loss: Loss, s: Setting) -> Loss:
    if s.precision != "bf16":
        return loss
    return torch.autocast(s.device.device.type, torch.bfloat16)(loss)


def _lightly(s: Setting) -> Loss:
    from lightly.loss import NTXentLoss

    return _with_autocast(NTXentLoss(s.temperature), s)


def _metric_learning(s: Setting) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(s.temperature)
    return _with_autocast(
        lambda z1, z2: loss(torch.cat([z1, z2]), torch.arange(len(z1)).repeat(2)), s
    )


def _open_clip(s: Setting) -> Loss:
    from open_clip.loss import ClipLoss, SigLipLoss

    scale = 1 / s.temperature
    loss = partial(SigLipLoss(), logit_scale=scale, logit_bias=SIGLIP_BIAS)
    if s.subject == "clip":
        loss = partial(ClipLoss(), logit_scale=scale)
    return _with_autocast(lambda z1, z2: loss(F.normalize(z1, dim=1), F.normalize(z2, dim=1)), s)


def _siglip_kernel(s: Setting) -> Loss:
    from siglip_kernel import fused_siglip_loss

    device = s.device.device
    log_scale = torch.tensor(1 / s.temperature, device=device).log()
    bias = torch.tensor(SIGLIP_BIAS, device=device)

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        u1, u2 = (F.normalize(z.float(), dim=1).to(s.dtype) for z in (z1, z2))
        return fused_siglip_loss(u1, u2, log_scale, bias)

    return call


def _memeff(s: Setting) -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # "Stable" would scale the gradient.
    loss = MemoryEfficientCLIPLoss(s.temperature, stable=False)
    return lambda z1, z2: loss(z1.to(s.dtype), z2.to(s.dtype))


def _info_nce_pytorch(s: Setting) -> Loss:
    from info_nce import InfoNCE

    return _with_autocast(InfoNCE(s.temperature), s)


def _unit_rows(z1: Tensor, z2: Tensor) -> Tensor:
    return F.normalize(torch.cat([z1, z2]).float(), dim=1)


def _flex_attention(s: Setting) -> Loss:
    """The logsumexp of attention over all but oneself; its values are 16 columns of no meaning."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    attention = torch.compile(flex_attention, dynamic=False, backend=s.device.compiler)
    mask_of = cache(lambda m, on: create_block_mask(_not_oneself, None, None, m, m, on))
    scale = 1 / s.temperature

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        u = _unit_rows(z1, z2)
        positive = (u * u.roll(len(z1), 0)).sum(1) * scale
        rows = u.to(s.dtype)[None, None]
        options = {"block_mask": mask_of(len(u), u.device), "return_aux": AuxRequest(lse=True)}
        _, aux = attention(rows, rows, rows[..., :16].detach(), scale=scale, **options)
        return (aux.lse[0, 0] - positive).mean()

    return call


def _not_oneself(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query != key


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


def _linear_cross_entropy(s: Setting) -> OneWay:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    # Without options it computes all logits at once.
    return lambda rows, columns, positive: linear_cross_entropy(
        rows / s.temperature, columns, positive, options=LinearCrossEntropyOptions()
    )


def one_way(peer: Callable[[Setting], OneWay], s: Setting) -> Loss:
    """By a peer that has no mask: NT-Xent with it is another loss, of the same cost."""
    loss = peer(s)

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        u = _unit_rows(z1, z2).to(s.dtype)
        positive = torch.arange(len(u), device=u.device)
        if s.subject == "nt_xent":
            return loss(u, u, positive.roll(len(z1)))
        a, b = (z.contiguous() for z in u.chunk(2))
        positive = positive[: len(a)]
        forth = loss(a, b, positive)
        return forth if s.subject == "info_nce" else (forth + loss(b, a, positive)) / 2

    return call


_ANY, _SOFTMAX, _GPU = tuple(SUBJECTS), ("nt_xent", "clip", "info_nce"), ("cuda",)
_ON_TF32 = {"kinds": _GPU, "operands": "tf32", "masks_itself": False}

ARMS = {
    OURS: Arm(_ours, _ANY),
    TILED: Arm(partial(_ours, backend="tiled"), _ANY, _GPU),
    EAGER: Arm(_eager, _ANY),
    COMPILED: Arm(_compiled, _ANY, compiled=True),
    "FlexAttention": Arm(_flex_attention, kinds=_GPU, compiled=True),
    "lightly": Arm(_lightly),
    # Several tensors of 2N × 2N(2N - 2) numbers: 64 MiB each at N = 128, 0.5 GiB at N = 256.
    "pytorch-metric-learning": Arm(_metric_learning, largest_n={"cpu": 128, "cuda": 256}),
    "open_clip": Arm(_open_clip, ("clip", "siglip")),
    "siglip-kernel": Arm(_siglip_kernel, ("siglip",), _GPU),
    "memeff": Arm(_memeff, ("clip",), _GPU, operands="tf32"),
    "info-nce-pytorch": Arm(_info_nce_pytorch, ("info_nce",)),
    "inf_cl": Arm(partial(one_way, _inf_cl), _SOFTMAX, **_ON_TF32),
    "cut-cross-entropy": Arm(partial(one_way, _cut_cross_entropy), _SOFTMAX, **_ON_TF32),
    "torch linear_cross_entropy": Arm(partial(one_way, _linear_cross_entropy), ("info_nce",)),
}


def arms_of(subject: str, kind: str) -> dict[str, Arm]:
    """Those of a subject on a kind of device."""
    return {n: arm for n, arm in ARMS.items() if subject in arm.subjects and kind in arm.kinds}


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
    with torch.no_grad():
        return loss(z1, z2)


def forward_backward(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(z1, z2), (z1, z2))
