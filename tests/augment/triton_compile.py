"""Compile the kernels ahead of time and print their registers and spills as JSON; needs no GPU.

A process of its own, because a process that interprets Triton cannot compile it.
"""

import json
import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from contrastive_kit.augment import _triton_kernels as kernels

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SIZE = 224
CROP = {"HEIGHT": SIZE, "WIDTH": SIZE, "SCALE": 255.0, "BICUBIC": False, "ANTIALIAS": True}
LAST = {"SOLARIZE": True, "NORMALIZE": True}
CASES = {
    "gray_sums": ({"source": "*u8", "table": "*fp32", "sums": "*fp32"}, {**CROP, "BLOCK": 256}),
    "views": (
        {"source": "*u8", "table": "*fp32", "sums": "*fp32", "out": "*fp16", "blurred": "*fp32"},
        {**CROP, **LAST, "BLUR": True, "TILES": 256, "BLOCK": 256},
    ),
    "blur": (
        {"source": "*fp32", "target": "*fp16", "table": "*fp32"},
        {"HEIGHT": SIZE, "WIDTH": SIZE, "RADIUS": 11, "TAPS": 32, "VERTICAL": True, "MIRROR": True}
        | {**LAST, "BLOCK": 256},
    ),
}


def compile_kernel(name, capability, pointers, constants):
    kernel = getattr(kernels, name)
    signature = {
        argument: "constexpr"
        if argument in constants
        else pointers.get(
            argument,
            "fp32" if argument.startswith(("threshold", "mean_", "std_")) else "i32",
        )
        for argument in kernel.arg_names
    }
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument in pointers
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin, folder=Path(triton.__file__).parent / "backends/nvidia/bin"):
    path = Path("/tmp") / "contrastive_kit_kernel.cubin"
    path.write_bytes(cubin)
    try:
        command = [str(folder / "cuobjdump"), "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        path.unlink()
    return {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{name} {target}": resources(
                    compile_kernel(name, capability, *CASES[name]).asm["cubin"]
                )
                for name in CASES
                for target, capability in TARGETS.items()
            }
        )
    )
