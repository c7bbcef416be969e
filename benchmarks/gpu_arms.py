"""The losses that are compared on a GPU, each behind ``loss(z1, z2)`` with the mean over anchors.

Embeddings come in as a projection head leaves them: not normalised, bfloat16 under autocast. Arms
in plain torch run under autocast then, and so do the peers that are plain torch inside.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss_arms import CLIP, NT_XENT, OURS, Loss, eager_clip, eager_nt_xent
from contrastive_kit.functional import info_nce, nt_xent

TILED = "contrastive-kit, tiled"
EAGER, COMPILED = "eager", "compiled eager"

PRECISIONS = ("bf16", "tf32", "fp32")


class Setting(NamedTuple):
    """What an arm is built for.

    Attributes:
        temperature: τ.
        precision: "bf16": embeddings in bfloat16, autocast; "fp32": float32 throughout; "tf32":
            float32 embeddings, products in tf32.
        device: "cuda", or "cpu" in a dry run.
    """

    temperature: float
    precision: str
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class GpuArm(NamedTuple):
    """One implementation.

    Attributes:
        build: from the setting to the loss; raises ImportError where it is not installed.
        formula: what it computes, a subject of ``parity.oracle``.
        compiled: whether it compiles for every size, which takes seconds.
        largest_n: pairs beyond which its memory is out of proportion, or None.
        operands: the precision of its products where that is coarser than the setting's.
    """

    build: Callable[[Setting], Loss]
    formula: str
    compiled: bool = False
    largest_n: int | None = None
    operands: str | None = None


def _with_autocast(loss: Loss, setting: Setting) -> Loss:
    def call(z1: Tensor, z2: Tensor) -> Tensor:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16"):
            return loss(z1, z2)

    return call


def _ours(subject: str, backend: str) -> Callable[[Setting], Loss]:
    def build(setting: Setting) -> Loss:
        t = setting.temperature
        if subject == "nt_xent":
            return lambda z1, z2: nt_xent(z1, z2, temperature=t, backend=backend)
        return lambda z1, z2: info_nce(z1, z2, temperature=t, symmetric=True, backend=backend)

    return build


def _plain(eager: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Setting], Loss]:
    return lambda setting: _with_autocast(
        lambda z1, z2: eager(z1, z2, setting.temperature), setting
    )


def _compiled(eager: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Setting], Loss]:
    def build(setting: Setting) -> Loss:
        compiled = torch.compile(eager, dynamic=False, backend=_compiler(setting))
        return _with_autocast(lambda z1, z2: compiled(z1, z2, setting.temperature), setting)

    return build


def _compiler(setting: Setting) -> str:
    """A dry run traces and does not wait for generated code to build."""
    return "inductor" if setting.device == "cuda" else "aot_eager"


def _peer(build: Callable[[float], Loss]) -> Callable[[Setting], Loss]:
    return lambda setting: _with_autocast(build(setting.temperature), setting)


def _scaled_rows(z1: Tensor, z2: Tensor, setting: Setting) -> Tensor:
    """Unit rows in the precision of the operands."""
    return F.normalize(torch.cat([z1, z2]).float(), dim=1).to(setting.dtype)


def _flex_attention(setting: Setting) -> Loss:
    """The logsumexp of attention over all but oneself; its values are 16 columns of no meaning."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    attention = torch.compile(flex_attention, dynamic=False, backend=_compiler(setting))
    masks = {}

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        u = F.normalize(torch.cat([z1, z2]).float(), dim=1)
        positive = (u * u.roll(len(z1), 0)).sum(1) / setting.temperature
        m = len(u)
        if m not in masks:
            masks[m] = create_block_mask(lambda b, h, q, k: q != k, None, None, m, m, u.device)
        rows = u.to(setting.dtype)[None, None]
        _, aux = attention(
            rows,
            rows,
            rows[..., :16].detach(),
            scale=1 / setting.temperature,
            block_mask=masks[m],
            return_aux=AuxRequest(lse=True),
        )
        return (aux.lse[0, 0] - positive).mean()

    return call


def _inf_cl(z: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Setting], Loss]:
    def build(setting: Setting) -> Loss:
        from inf_cl import cal_flash_loss

        def one_way(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
            head = min(rows.shape[1], 128)
            return cal_flash_loss(rows, columns, labels, 1 / setting.temperature, head).mean()

        return _directions(z, one_way, setting)

    return build


def _cut_cross_entropy(z: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Setting], Loss]:
    def build(setting: Setting) -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        def one_way(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
            scaled = rows / setting.temperature
            # The default filter drops gradients below a threshold, which grows wrong with N.
            return linear_cross_entropy(scaled, columns, labels, filter_eps=None)

        return _directions(z, one_way, setting)

    return build


def _directions(
    rows_and_columns: Callable[..., tuple[Tensor, Tensor]],
    one_way: Callable[[Tensor, Tensor, Tensor], Tensor],
    setting: Setting,
) -> Loss:
    def call(z1: Tensor, z2: Tensor) -> Tensor:
        rows, columns = rows_and_columns(z1, z2, setting)
        itself = torch.arange(len(rows), device=rows.device)
        if rows is columns:
            return one_way(rows, columns, itself.roll(len(z1)))
        return (one_way(rows, columns, itself) + one_way(columns, rows, itself)) / 2

    return call


def _same(z1: Tensor, z2: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    rows = _scaled_rows(z1, z2, setting)
    return rows, rows


def _apart(z1: Tensor, z2: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    first, second = _scaled_rows(z1, z2, setting).chunk(2)
    return first.contiguous(), second.contiguous()


_SELF = "nt_xent_with_self"

GPU_SUBJECTS = {
    "nt_xent": {
        OURS: GpuArm(_ours("nt_xent", "auto"), "nt_xent"),
        TILED: GpuArm(_ours("nt_xent", "tiled"), "nt_xent"),
        EAGER: GpuArm(_plain(eager_nt_xent), "nt_xent"),
        COMPILED: GpuArm(_compiled(eager_nt_xent), "nt_xent", compiled=True),
        "FlexAttention": GpuArm(_flex_attention, "nt_xent", compiled=True),
        "lightly": GpuArm(_peer(NT_XENT["lightly"].build), "nt_xent"),
        # Tensors of 2N × 2N(2N - 2) numbers: 0.5 GiB each at N = 256.
        "pytorch-metric-learning": GpuArm(
            _peer(NT_XENT["pytorch-metric-learning"].build), "nt_xent", largest_n=256
        ),
        # These two have no mask for the anchor itself: another loss, of the same cost.
        "inf_cl": GpuArm(_inf_cl(_same), _SELF, operands="tf32"),
        "cut-cross-entropy": GpuArm(_cut_cross_entropy(_same), _SELF, operands="tf32"),
    },
    "clip": {
        OURS: GpuArm(_ours("clip", "auto"), "clip"),
        TILED: GpuArm(_ours("clip", "tiled"), "clip"),
        EAGER: GpuArm(_plain(eager_clip), "clip"),
        COMPILED: GpuArm(_compiled(eager_clip), "clip", compiled=True),
        "open_clip": GpuArm(_peer(CLIP["open_clip"].build), "clip"),
        "inf_cl": GpuArm(_inf_cl(_apart), "clip", operands="tf32"),
        "cut-cross-entropy": GpuArm(_cut_cross_entropy(_apart), "clip", operands="tf32"),
    },
}


def gate(arm: GpuArm, setting: Setting) -> float:
    """Relative error of loss and gradient beyond which an arm computes something else.

    Wide for half precision: it tells a different loss apart, and the errors stand in the report.
    """
    per_logit = {"fp32": 1e-6, "tf32": 1e-3, "bf16": 8e-3}
    coarsest = max(per_logit[setting.precision], per_logit[arm.operands or "fp32"])
    # Embeddings in bfloat16 take their gradient in bfloat16.
    rounding = 8e-3 if setting.precision == "bf16" else 0.0
    return rounding + coarsest / setting.temperature
