"""The mean NT-Xent of two views as one op: five launches where small batches wait for launches.

What ``losses/ntxent.py`` composes of small ops, the preparation of rows, the logsumexp and the rest
of equation (4). Three launches forward: unit rows and the logits of pairs; partial sums; the loss.
Two backward: partial gradients; those of the views.
"""

from typing import Any

import torch
from torch import Tensor

from contrastive_kit.ops.differentiable_once import (
    differentiable_once,
    first_is_differentiable,
    with_signature,
)
from contrastive_kit.ops.problem import mma_dtype
from contrastive_kit.ops.registered import register, registered
from contrastive_kit.ops.triton import configs, device
from contrastive_kit.ops.triton.host import (
    FINISH_ELEMENTS,
    PADDING,
    PARTS,
    SMALL,
    WIDTH,
    Mma,
    Packed,
    Side,
    Weights,
    ceil_div,
    mma_of,
    multiplied_as,
    needs_shift,
    partial_gradients,
    tiles_of_program,
)

# Rows up to which launches take longer than their work; all partial sums then fit at once.
LARGEST_PAIRED = 2**14


def pair_loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor | None:
    """Mean NT-Xent of two views (N, D), a 0-dim tensor, or None for views that it does not take.

    It takes those where launches count, and where the gradients of a block of rows fit on chip. It
    rounds as the small ops do, and gives the same loss and gradients to within that.
    """
    if z1.dtype != z2.dtype or z1 is z2:
        return None
    mma = multiplied_as(mma_dtype(z1, z2))
    widest = {"float16": 256, "bfloat16": 256, "tf32": 0 if torch.version.hip else 128}
    if 2 * len(z1) > LARGEST_PAIRED or z1.shape[1] > widest.get(mma, 0):
        return None
    loss: Tensor = _PairLoss.apply(z1, z2, float(temperature), mma)[0]
    return loss


def _forward(
    z1: Tensor, z2: Tensor, temperature: float, mma_name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and what the backward needs.

    That is the packed unit rows of both views, (padded 2N, depth); slope, factor and logsumexp in
    base 2 of each anchor, (3, 2N rounded up), so that each begins at an address for which nothing
    is compiled anew; and the scale of the gradients, (1,).
    """
    from contrastive_kit.ops.triton import kernels, pair_kernels

    n, width = z1.shape
    m, mma = 2 * n, mma_of(mma_name)
    loss, unit_rows, anchors, grad_scale = _fake_forward(z1, z2, temperature, mma_name)
    padded, depth = unit_rows.shape

    def floats(*shape: int) -> Tensor:
        return loss.new_empty(shape)

    positive, arrived = floats(n), z1.new_empty(1, dtype=torch.int32)
    shifted = needs_shift(_bound(temperature))
    with device.on_device(z1.device):
        height = max(1, FINISH_ELEMENTS // depth)
        pair_kernels.pair_prepare_kernel[(ceil_div(max(n, padded - m), height),)](
            z1, *z1.stride(), z2, *z2.stride(), unit_rows, positive, arrived, n, width,
            temperature**-0.5, mma.scale, padded, BM=height, BD=depth,
            PRECISION=mma.precision, **SMALL,
        )  # fmt: skip
        packed = _packed(unit_rows, n, mma)
        config = configs.forward(*packed.key(), shifted)
        blocks = ceil_div(m, config.rows)
        n_tiles, row_parts = tiles_of_program(config, m, m, True, z1.device)
        fields = 2 if shifted else 1
        row_part, column_part = floats(fields, row_parts, m), floats(fields, blocks, m)
        kernels.forward_kernel[(blocks, row_parts)](
            *packed.matrices(), *packed.ids(), packed.row_limits(), row_part, column_part,
            *packed.sizes(), 0, n_tiles, row_parts, blocks, SELF=True, BY_COLUMN=True,
            SHIFTED=shifted, BK=config.slice_of(depth), **packed.constants(), **config.options(),
        )  # fmt: skip
        programs = ceil_div(m, WIDTH)
        sums = z1.new_empty(programs, dtype=torch.float64)
        pair_kernels.pair_loss_kernel[(programs,)](
            row_part, column_part, positive, *anchors, sums, floats(programs), arrived, loss,
            grad_scale, m, blocks, n_tiles, row_parts, programs, mma.weight_scale,
            SHIFTED=shifted, BM=config.rows, BN=config.columns, PARTS=PARTS, WIDTH=WIDTH,
            PROGRAMS=max(256, 1 << (programs - 1).bit_length()), **SMALL,
        )  # fmt: skip
    return loss, unit_rows, anchors, grad_scale


def _fake_forward(
    z1: Tensor, z2: Tensor, temperature: float, mma_name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = 2 * z1.shape[0]
    padded = ceil_div(m, PADDING) * PADDING
    depth = configs.packed_depth(z1.shape[1])
    return (
        z1.new_empty((), dtype=torch.float32),
        z1.new_empty((padded, depth), dtype=mma_of(mma_name).dtype),
        z1.new_empty((3, ceil_div(m, WIDTH) * WIDTH), dtype=torch.float32),
        z1.new_empty(1, dtype=torch.float32),
    )


def _backward(
    grad: Tensor,
    z1: Tensor,
    z2: Tensor,
    unit_rows: Tensor,
    anchors: Tensor,
    grad_scale: Tensor,
    temperature: float,
    mma_name: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of both views."""
    from contrastive_kit.ops.triton import pair_kernels

    n, width = z1.shape
    mma, depth = mma_of(mma_name), unit_rows.shape[1]
    dz1, dz2 = z1.new_empty(n, width), z2.new_empty(n, width)
    slope, factor, lse2 = anchors
    with device.on_device(z1.device):
        packed = _packed(unit_rows, n, mma)
        shifted = needs_shift(_bound(temperature))
        config = configs.backward(*packed.key(), shifted)
        assert config is not None
        sides = (factor, lse2, factor, lse2)
        weights = Weights(packed, shifted, *sides, True, True, grad_scale)
        part = partial_gradients(weights, config, deferred=True)
        height = max(1, FINISH_ELEMENTS // (2 * depth))
        pair_kernels.pair_finish_kernel[(ceil_div(n, height),)](
            z1, *z1.stride(), z2, *z2.stride(), part, slope, grad, grad_scale, dz1, dz2, n, width,
            len(part), temperature**-0.5, 1 / mma.scale, BM=height, BD=depth, **SMALL,
        )  # fmt: skip
    return dz1, dz2


def _packed(unit_rows: Tensor, n: int, mma: Mma) -> Packed:
    side = Side(unit_rows, 2 * n, None)
    return Packed(side, side, mma, device.architecture_of(unit_rows.device), n)


def _bound(temperature: float) -> float:
    """What no logit of unit rows exceeds, rounded as they are."""
    return 1.001 / temperature


register(
    "triton_pair_loss",
    "(Tensor z1, Tensor z2, float temperature, str mma_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
register(
    "triton_pair_loss_backward",
    "(Tensor grad, Tensor z1, Tensor z2, Tensor unit_rows, Tensor anchors, Tensor grad_scale, "
    "float temperature, str mma_dtype) -> (Tensor, Tensor)",
    _backward,
    lambda grad, z1, z2, *rest: (z1.new_empty(z1.shape), z2.new_empty(z2.shape)),
)


class _PairLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(z1: Tensor, z2: Tensor, temperature: float, mma_name: str) -> Any:
        return registered("triton_pair_loss")(z1, z2, temperature, mma_name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z1, z2, *ctx.settings = inputs
        first_is_differentiable(ctx, *output)
        ctx.save_for_backward(z1, z2, *output[1:])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        op = registered("triton_pair_loss_backward")
        dz1, dz2 = op(grad, *ctx.saved_tensors, *ctx.settings)
        needs_z1, needs_z2 = ctx.needs_input_grad[:2]
        return dz1 if needs_z1 else None, dz2 if needs_z2 else None, None, None
