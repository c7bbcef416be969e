"""The mean NT-Xent of two views as one op: five launches where small batches wait for launches.

What ``losses/ntxent.py`` composes of small ops, the preparation of rows, the primitive and the rest
of equation (4), for the backend ``triton`` and the usual options only.
"""

from typing import Any

import torch
from torch import Tensor

from contrastive_kit.ops import _triton_pair
from contrastive_kit.ops._differentiable_once import differentiable_once, first_is_differentiable
from contrastive_kit.ops._lse import operand_dtype, operand_name, which_backend
from contrastive_kit.ops._registered import _register


def pair_loss(z1: Tensor, z2: Tensor, temperature: float, backend: str) -> Tensor | None:
    """Mean NT-Xent of two views (N, D) if there is an op that takes them, else None.

    The op rounds as the small ones do, and gives the same loss and gradients to within that.
    """
    if z1.dtype != z2.dtype or z1 is z2:
        return None
    if which_backend(z1, z2, backend=backend).name != "triton":
        return None
    operands = operand_name(operand_dtype(z1, z2))
    if not _triton_pair.takes_pairs(len(z1), z1.shape[1], operands):
        return None
    loss: Tensor = _PairLoss.apply(z1, z2, float(temperature), operands)[0]
    return loss


def _forward(
    z1: Tensor, z2: Tensor, temperature: float, operands: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(z1.device.type, enabled=False):
        return _triton_pair.pair_forward(z1, z2, temperature, operands)


def _fake_forward(
    z1: Tensor, z2: Tensor, temperature: float, operands: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = _triton_pair.pair_shapes(z1.shape[0], z1.shape[1], operands)
    return (
        z1.new_empty((), dtype=torch.float32),
        z1.new_empty(shape, dtype=dtype),
        z1.new_empty((3, 2 * z1.shape[0]), dtype=torch.float32),
        z1.new_empty(1, dtype=torch.float32),
    )


def _backward(
    grad: Tensor,
    z1: Tensor,
    z2: Tensor,
    packed: Tensor,
    state: Tensor,
    unit: Tensor,
    temperature: float,
    operands: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(z1.device.type, enabled=False):
        return _triton_pair.pair_backward(grad, z1, z2, packed, state, unit, temperature, operands)


def _fake_backward(
    grad: Tensor,
    z1: Tensor,
    z2: Tensor,
    packed: Tensor,
    state: Tensor,
    unit: Tensor,
    temperature: float,
    operands: str,
) -> tuple[Tensor, Tensor]:
    return z1.new_empty(z1.shape), z2.new_empty(z2.shape)


pair_loss_forward = _register(
    "contrastive_kit::pair_loss",
    "(Tensor z1, Tensor z2, float temperature, str operands) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
pair_loss_backward = _register(
    "contrastive_kit::pair_loss_backward",
    "(Tensor grad, Tensor z1, Tensor z2, Tensor packed, Tensor state, Tensor unit, "
    "float temperature, str operands) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _PairLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        z1: Tensor, z2: Tensor, temperature: float, operands: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor, Tensor] = pair_loss_forward(
            z1, z2, temperature, operands
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z1, z2, ctx.temperature, ctx.operands = inputs
        _, packed, state, unit = output
        first_is_differentiable(ctx, *output)
        ctx.save_for_backward(z1, z2, packed, state, unit)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dz1, dz2 = pair_loss_backward(grad, *ctx.saved_tensors, ctx.temperature, ctx.operands)
        needs_z1, needs_z2 = ctx.needs_input_grad[:2]
        return dz1 if needs_z1 else None, dz2 if needs_z2 else None, None, None
