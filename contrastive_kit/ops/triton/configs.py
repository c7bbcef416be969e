"""How the Triton kernels run, by architecture, dtype and width: a table, no search at run time.

Chosen from what the compiler makes of the kernels (registers, shared memory, spills;
``tests/ops/test_triton_aot.py`` compiles every row of the table): no row spills inside its loop,
and each leaves room for as many programs on a multiprocessor as its comment says. In half precision
those of sm_90 were the fastest of several that do so, timed on an H100 with Triton 3.6; no other
device has been timed. Figures are ranges over Triton 3.5, 3.6 and 3.8, of rows of 128, 256 and 512
where a table has these widths; of sm_90 in half precision they are of Triton 3.8.
"""

from typing import Any, NamedTuple

import torch

# Whose row of the table the interpreter takes; it has no architecture of its own.
INTERPRETED = "sm_90"


class Config(NamedTuple):
    """Shape of a tile and how a kernel runs it.

    Attributes:
        rows: of the tile.
        columns: of the tile.
        warps: of a program.
        stages: loads in flight of the pipelined loop.
        step: slice of the width that is read at a time, or 0 to keep a row block whole on chip.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    step: int = 0

    def slice_of(self, depth: int) -> int:
        """How much of ``depth`` is read at a time."""
        return min(self.step or depth, depth)

    def options(self) -> dict[str, Any]:
        """The tile as arguments of a launch."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
            # Fused multiply-adds round once instead of twice; their default differs by release.
            "enable_fp_fusion": True,
        }


# The first row whose width is not exceeded counts; None: the weights are stored in strips instead.
_Rows = tuple[tuple[float, Config | None], ...]
_ANY = float("inf")

# Ampere and Ada have fewer registers to spare for wide tiles than Hopper, whose operands stay in
# shared memory; those other than sm_80 also have only 99 KiB of shared memory.
_FORWARD_HALF: dict[str, _Rows] = {
    # 163 to 168 registers and 49 KiB: 3 programs; 174 and 64 KiB: 1.
    "sm_80": ((128, Config(128, 64, 4, 2)), (_ANY, Config(128, 128, 8, 3, 64))),
    # 141 to 168 and 49 KiB: 2; 170 to 176 and 64 KiB: 1.
    "sm_86": ((128, Config(128, 64, 4, 2)), (_ANY, Config(128, 128, 8, 3, 64))),
    # 202 to 239 registers and 96 KiB: 2 at every width, so that the exponentials of one program
    # overlap the products of the other. Tensor descriptors instead of pointers make room for no
    # program more, for a dearer launch.
    "sm_90": (
        (64, Config(128, 64, 4, 4)),
        (128, Config(128, 128, 4, 2)),
        (_ANY, Config(128, 128, 4, 3, 64)),
    ),
    # 139 to 168 registers and 81 KiB: 2; 128 to 236 and 161 KiB: 1; 184 to 255 and 96 KiB: 1, where
    # 4 warps would spill.
    "sm_100": (
        (128, Config(128, 64, 4, 3)),
        (256, Config(128, 64, 8, 3)),
        (_ANY, Config(128, 128, 8, 3, 64)),
    ),
    # 110 and 182 registers, 32 KiB.
    "hip": ((128, Config(128, 64, 8, 2)), (_ANY, Config(128, 128, 8, 2, 64))),
}
_FORWARD_FLOAT = {
    # 168 to 251 registers; a tile of 128 x 128 spills in its loop.
    "sm_80": Config(128, 64, 8, 3, 32),
    "sm_86": Config(128, 64, 8, 3, 32),
    # 218 to 248 registers, 96 to 112 KiB.
    "sm_90": Config(128, 128, 8, 3, 32),
    "sm_100": Config(128, 64, 8, 3, 32),
    "hip": Config(128, 128, 8, 2, 32),
}
# Where a maximum is subtracted there is more to hold, and the tiles above spill in their loop.
_FORWARD_SHIFTED: dict[str, _Rows] = {
    "sm_90": (
        (128, Config(128, 64, 4, 3)),
        (256, Config(128, 64, 8, 3)),
        (_ANY, Config(128, 128, 8, 3, 64)),
    ),
    "sm_100": (
        (128, Config(128, 64, 8, 3)),
        (256, None),
        (_ANY, Config(128, 64, 8, 3, 64)),
    ),
}
# With 4 warps it spills.
_STATISTICS_FLOAT = Config(128, 64, 8, 2, 32)
_STATISTICS_HALF = Config(128, 64, 8, 2, 64)

_BACKWARD_HALF: dict[str, _Rows] = {
    # 168 registers and 40 KiB: 3; 164 to 180 and 72 KiB: 1.
    "sm_80": ((128, Config(64, 64, 4, 2)), (256, Config(64, 64, 8, 2)), (_ANY, None)),
    # 174 to 180 and 40 KiB: 2; 178 to 182 and 72 KiB: 1.
    "sm_86": ((128, Config(64, 64, 4, 2)), (256, Config(64, 64, 8, 2)), (_ANY, None)),
    # 254 registers and 48 KiB: 2; 234 and 96 KiB: 2. With two stages the first is faster where the
    # compiler overlaps products; the newest makes them one by one for want of registers.
    "sm_90": ((128, Config(64, 128, 4, 1)), (256, Config(64, 64, 4, 2)), (_ANY, None)),
    # 126 to 233 registers and 81 KiB: 2; 234 to 255 and 160 KiB: 1.
    "sm_100": ((128, Config(64, 64, 4, 3)), (256, Config(128, 64, 8, 2)), (_ANY, None)),
    # 218 and 236 registers, 16 and 32 KiB.
    "hip": ((128, Config(64, 32, 4, 2)), (256, Config(64, 32, 8, 1)), (_ANY, None)),
}
# As for the forward.
_BACKWARD_SHIFTED: dict[str, _Rows] = {
    "sm_90": ((128, Config(64, 64, 4, 3)), (256, Config(128, 64, 8, 2)), (_ANY, None)),
}
# TensorFloat-32 only, 119 to 172 registers. What float32 proper needs beyond it, three products and
# their parts, does not fit beside a row block of gradients.
_BACKWARD_TF32: dict[str, _Rows] = {
    "sm_80": ((128, Config(64, 32, 8, 2)), (_ANY, None)),
    "sm_86": ((128, Config(64, 32, 8, 2)), (_ANY, None)),
    "sm_90": ((128, Config(64, 64, 8, 2)), (_ANY, None)),
    "sm_100": ((128, Config(64, 64, 8, 2)), (_ANY, None)),
    "hip": ((_ANY, None),),
}

_WEIGHTS_HALF = {
    "sm_80": Config(128, 128, 8, 3, 64),
    "sm_86": Config(128, 128, 8, 3, 64),
    # 182 registers, 96 KiB; with 4 warps it spills where factors are deferred.
    "sm_90": Config(128, 128, 8, 3, 64),
    # 212 registers; 128 x 256 spills in its loop.
    "sm_100": Config(128, 128, 8, 3, 64),
    "hip": Config(128, 128, 8, 2, 64),
}
# As for the forward.
_WEIGHTS_SHIFTED = {"sm_100": Config(128, 64, 8, 3, 64)}
_WEIGHTS_FLOAT = {
    "sm_80": Config(128, 64, 8, 3, 32),
    "sm_86": Config(128, 64, 8, 3, 32),
    "sm_90": Config(128, 128, 8, 3, 32),
    "sm_100": Config(128, 64, 8, 3, 32),
    "hip": Config(128, 64, 8, 2, 32),
}

# 155 to 166 registers: 3 programs on every architecture; wider tiles leave room for 1 or 2, or
# spill. In float32 161 to 248. Not timed on any device.
_SOFTPLUS_HALF = Config(64, 64, 4, 3, 64)
_SOFTPLUS_FLOAT = Config(64, 64, 4, 3, 32)

# For a product that torch has not on AMD: half precision, added to float32.
PRODUCT = Config(64, 64, 4, 2, 64)

ARCHITECTURES = tuple(_FORWARD_HALF)


def architecture(major: int, minor: int) -> str:
    """The row of the table for a compute capability."""
    if (major, minor) == (8, 0):
        return "sm_80"
    # 12.x has the shared memory and the instructions of Ada, not of sm_100.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86")


def packed_depth(width: int) -> int:
    """The width of packed rows: a power of two up to 256, above that a multiple of 64."""
    if width > 256:
        return -(-width // 64) * 64
    return max(16, 1 << (width - 1).bit_length())


def forward(
    arch: str, dtype: torch.dtype, precision: str, depth: int, shifted: bool = False
) -> Config:
    """The tile of the forward kernel."""
    if dtype == torch.float32:
        return _FORWARD_FLOAT[arch]
    tile = _first(_FORWARD_SHIFTED.get(arch, ((_ANY, None),)), depth) if shifted else None
    tile = tile or _first(_FORWARD_HALF[arch], depth)
    assert tile is not None
    return tile


def statistics(arch: str, dtype: torch.dtype, precision: str, depth: int) -> Config:
    """The tile of the kernel of statistics."""
    return _STATISTICS_FLOAT if dtype == torch.float32 else _STATISTICS_HALF


def backward(
    arch: str, dtype: torch.dtype, precision: str, depth: int, shifted: bool = False
) -> Config | None:
    """The tile of the backward kernel, or None where it does not fit."""
    if dtype == torch.float32:
        return _first(_BACKWARD_TF32[arch], depth) if precision == "tf32" else None
    rows = _BACKWARD_HALF[arch]
    return _first(_BACKWARD_SHIFTED.get(arch, rows) if shifted else rows, depth)


def weights(
    arch: str, dtype: torch.dtype, precision: str, depth: int, shifted: bool = False
) -> Config:
    """The tile of the kernel that stores weights."""
    if dtype == torch.float32:
        return _WEIGHTS_FLOAT[arch]
    return _WEIGHTS_SHIFTED.get(arch, _WEIGHTS_HALF[arch]) if shifted else _WEIGHTS_HALF[arch]


def softplus(dtype: torch.dtype) -> Config:
    """The tile of the kernel of softplus, on any architecture."""
    return _SOFTPLUS_FLOAT if dtype == torch.float32 else _SOFTPLUS_HALF


def _first(rows: _Rows, depth: int) -> Config | None:
    return next(tile for largest, tile in rows if depth <= largest)
