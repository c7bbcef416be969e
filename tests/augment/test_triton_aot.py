"""The kernels compiled for GPUs that are not here: registers, spills, shared memory.

Triton's compiler and its interpreter cannot share a process, so the compiling is done by this file
run as a script.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Bytes of shared memory a block may have.
SHARED_LIMIT = {
    "sm_70": 98304, "sm_75": 65536, "sm_80": 166912, "sm_89": 101376, "sm_90": 232448,
    "sm_100": 232448, "sm_120": 101376,
}  # fmt: skip
USUAL = ("sm_80", "sm_90", "sm_100")
RARE = [target for target in SHARED_LIMIT if target not in USUAL]
REGISTER_LIMIT = 64

INTEGERS = "batch views tiles source_height source_width"
NUMBERS = "threshold mean_red mean_green mean_blue scale_red scale_green scale_blue"


def variants():
    """Kernel, dtype of source and result, channels last or not, compile-time constants."""
    image = {"HEIGHT": 224, "WIDTH": 224}
    odd = {"HEIGHT": 33, "WIDTH": 20}
    plain = {"BICUBIC": False, "ANTIALIAS": True, "HSV": False}
    google = {"BICUBIC": True, "ANTIALIAS": False, "HSV": True}
    yield "crop_kernel", "u8", "fp32", False, {**image, **plain}
    yield "crop_kernel", "u8", "fp32", True, {**image, **plain}
    yield "crop_kernel", "bf16", "fp32", False, {**odd, **plain}
    yield "crop_kernel", "u8", "fp32", True, {**image, **plain, "BICUBIC": True}
    yield "crop_kernel", "fp32", "fp32", False, {**odd, **google}
    plain = {"CHANNEL_MEAN": False, "HSV": False}
    google = {"CHANNEL_MEAN": True, "HSV": True}
    yield "color_kernel", "u8", "fp16", True, {**image, **plain, "BLUR": True}
    yield "color_kernel", "u8", "fp32", False, {**odd, **plain, "BLUR": False}
    yield "color_kernel", "fp32", "bf16", False, {**image, **google, "BLUR": True}
    for vertical in (False, True):
        for result, padding in (("fp32", True), ("fp16", False)):
            flags = {"RADIUS": 11, "REFLECT": padding, "VERTICAL": vertical}
            yield "blur_kernel", "fp32", result, not padding, {**image, **flags}


def compile_all(target):
    """Compile every variant for a target; what each takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from contrastive_kit.augment.backends import triton as host
    from contrastive_kit.augment.backends import triton_kernels

    capability = int(target.removeprefix("sm_"))
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    report = []
    for name, source, result, last, flags in variants():
        kernel = getattr(triton_kernels, name)
        constants = {**flags, "BLOCK": host.BLOCK}
        first = "source" if name == "blur_kernel" else "images"
        pointers = {
            "images": source, "source": source, "crops": "u8" if source == "u8" else "fp32",
            "table": "fp32", "sums": "fp32", "totals": "fp32", "sharp": "fp32", "out": result,
        }  # fmt: skip
        # As the launcher does, strides of one are constants.
        strides = ["sharp_stride", "stride"] if name == "color_kernel" else ["stride"]
        strides += [f"{first}_stride"]
        for stride in strides:
            constants[f"{stride}_{'c' if last else 'x'}"] = 1
        names = kernel.arg_names
        constants = {key: value for key, value in constants.items() if key in names}
        signature = {}
        for argument in names:
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument in pointers:
                signature[argument] = f"*{pointers[argument]}"
            else:
                signature[argument] = "fp32" if argument in NUMBERS.split() else "i32"
        aligned = {
            (number,): [["tt.divisibility", 16]]
            for number, argument in enumerate(names)
            if argument in pointers
        }
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4, "enable_fp_fusion": True},
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tools / "cuobjdump", "-res-usage", file.name],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
        report.append(
            {
                "kernel": f"{name} {source} to {result} last={last} {flags}",
                "registers": int(re.search(r"REG:(\d+)", usage)[1]),
                "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
                "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
                "shared": compiled.metadata.shared,
            }
        )
    return report


def reports(targets):
    """The figures of each target, compiled in a process without interpreter."""
    pytest.importorskip("triton", minversion="3.5")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, *targets], check=False, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def usual():
    return reports(USUAL)


@pytest.mark.parametrize("target", USUAL)
def test_registers_and_shared_memory(usual, target):
    check(usual[target], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", RARE)
def test_registers_and_shared_memory_of_rare_cards(target):
    check(reports([target])[target], target)


def check(report, target):
    """None spills, and enough of their blocks fit on a multiprocessor."""
    assert len(report) == len(list(variants()))
    for kernel in report:
        # A bicubic crop of uint8 sums a line and the lines: 7 blocks a multiprocessor, not 8.
        sums_twice = (
            kernel["kernel"].startswith("crop_kernel u8") and "'BICUBIC': True" in kernel["kernel"]
        )
        limit = 72 if sums_twice else REGISTER_LIMIT
        if target == "sm_70":
            limit = 80
        assert 0 < kernel["registers"] <= limit, kernel
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["shared"] <= SHARED_LIMIT[target], kernel


if __name__ == "__main__":
    print(json.dumps({target: compile_all(target) for target in sys.argv[1:]}))
