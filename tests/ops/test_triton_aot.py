"""The kernels compiled for GPUs that are not here: registers, spills, shared memory, tensor cores.

Triton's compiler and its interpreter cannot share a process, so the compiling is done by this file
run as a script.
"""

import inspect
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
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "hip": 65536,
}
# Of which all blocks of a multiprocessor share so many, and each costs 1 KiB more.
SHARED = {
    "sm_80": 167936, "sm_86": 102400, "sm_89": 102400, "sm_90": 233472, "sm_100": 233472,
    "sm_120": 102400,
}  # fmt: skip
# How many programs of a kernel a multiprocessor has room for, as the table of tiles says, for rows
# of some width in half precision.
PROGRAMS = {
    ("forward_kernel", 128): {
        "sm_80": 3, "sm_86": 2, "sm_89": 2, "sm_90": 2, "sm_100": 2, "sm_120": 2
    },
    ("backward_kernel", 128): {
        "sm_80": 3, "sm_86": 2, "sm_89": 2, "sm_90": 2, "sm_100": 2, "sm_120": 2
    },
    ("forward_kernel", 256): {"sm_90": 2},
    ("forward_kernel", 512): {"sm_90": 2},
    ("backward_kernel", 256): {"sm_90": 2},
}  # fmt: skip
# The instructions of PTX for tensor cores.
TENSOR_CORES = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
}

# Pointers of a dtype other than float32, and numbers other than int32.
POINTERS = {
    "p_row_ids": "i64", "p_column_ids": "i64", "p_running": "fp64", "p_sums": "fp64",
    "p_z1": "bf16", "p_z2": "bf16", "p_dz1": "bf16", "p_dz2": "bf16", "p_arrived": "i32",
}  # fmt: skip
OF_OPERANDS = ("p_q", "p_k", "p_packed", "p_strip", "p_a", "p_b")
FLOATS = ("scale", "weight_scale", "undo_scale", "root_scale")


def types(argument, dtype):
    """The type of an argument of a kernel, whose names say what is a pointer."""
    if argument in OF_OPERANDS:
        return f"*{dtype}"
    if argument.startswith("p_"):
        return f"*{POINTERS.get(argument, 'fp32')}"
    return "fp32" if argument in FLOATS else "i32"


def variants(target, everything):
    """Kernel, dtype of operands, constants, warps and stages, for each row of the table of tiles.

    Everything: also rows of 16 and of 4096, and pairs excluded by ids where no bound is known.
    """
    import torch

    from contrastive_kit.ops.triton import configs, host

    arch = {"sm_89": "sm_86", "sm_120": "sm_86"}.get(target, target)
    exact = "ieee" if target == "hip" else "tf32x3"
    fast = "ieee" if target == "hip" else "tf32"
    half, single = ("fp16", torch.float16, "ieee"), ("fp32", torch.float32, exact)
    rounded = ("fp32", torch.float32, fast)

    def common(tile, depth, dtype, precision, step, shifted=False):
        constants = {
            "BM": tile.rows, "BN": tile.columns, "BD": depth, "PRECISION": precision,
            "SCALE_LOGITS": dtype == "fp32" or shifted,
        }  # fmt: skip
        return {**constants, "BK": tile.slice_of(depth)} if step else constants

    plain = {"RULE": 1, "SHIFTED": False, "LIMITED": False}
    general = {"RULE": 2, "SHIFTED": True, "LIMITED": False}
    limited = {**general, "LIMITED": True}
    bf16 = ("bf16", torch.bfloat16, "ieee")
    cases = [(half, 128, plain), (half, 256, plain), (half, 512, plain), (single, 128, plain)]
    # Two views at a low temperature, as one op.
    colder = {"RULE": 1, "SHIFTED": True, "LIMITED": False}
    if target == "sm_90":
        cases += [(half, 128, limited), (half, 128, colder), (rounded, 128, plain)]
    if everything:
        cases = [
            (half, 128, plain), (bf16, 128, plain), (half, 256, plain), (half, 512, plain),
            (half, 4096, plain), (half, 16, plain), (half, 128, general), (half, 256, general),
            (half, 128, colder), (half, 256, colder), (half, 512, general),
            (single, 16, plain), (single, 16, general), (single, 128, plain),
            (single, 512, general),
            (rounded, 128, plain), (rounded, 128, general),
            (half, 128, limited), (half, 512, limited), (single, 128, limited),
        ]  # fmt: skip
    for (dtype, torch_dtype, precision), depth, rule in cases:
        key, shifted = (arch, torch_dtype, precision, depth), rule["SHIFTED"]
        tile = configs.forward(*key, shifted)
        both_ways = not rule["LIMITED"]
        way = {"SELF": both_ways, "BY_COLUMN": both_ways}
        constants = {**common(tile, depth, dtype, precision, True, shifted), **rule, **way}
        yield "forward_kernel", dtype, constants, tile.warps, tile.stages
        tile = configs.backward(*key, shifted)
        way = {"FROM_ROWS": True, "FROM_COLUMNS": both_ways}
        stored = tile is None
        if not stored:
            way["DEFERRED"] = dtype == "fp16" and (not shifted or rule["RULE"] == 1)
        tile = configs.weights(*key, shifted) if stored else tile
        constants = {**common(tile, depth, dtype, precision, stored, shifted), **rule, **way}
        name = "weights_kernel" if stored else "backward_kernel"
        yield name, dtype, constants, tile.warps, tile.stages
    for (dtype, torch_dtype, precision), depth in ((half, 128), (half, 768), (single, 128)):
        if not (everything or (target == "sm_90" and depth == 128)):
            continue
        tile = configs.softplus(torch_dtype)
        way = {"WEIGHTED": dtype == "fp32", "SUMMED": True, "STORED": True}
        constants = {**common(tile, depth, dtype, precision, True), **plain, **way}
        del constants["SHIFTED"]
        yield "softplus_kernel", dtype, constants, tile.warps, tile.stages
    if target == "hip":
        tile = configs.PRODUCT
        constants = {"BM": tile.rows, "BN": tile.columns, "BD": 512, "BK": tile.step}
        yield "add_product_kernel", "fp16", constants, tile.warps, tile.stages
    if not (everything or target == "sm_90"):
        return
    for dtype, torch_dtype, precision in (half, single):
        tile = configs.statistics(arch, torch_dtype, precision, 128)
        constants = {**common(tile, 128, dtype, precision, True), "RULE": 2, "LIMITED": True}
        yield "statistics_kernel", dtype, constants, tile.warps, tile.stages
    pair = {"BM": 16, "BD": 128}
    yield "pair_prepare_kernel", "fp16", {**pair, "PRECISION": "ieee"}, 4, 3
    yield "pair_prepare_kernel", "fp32", {**pair, "PRECISION": fast}, 4, 3
    yield "pair_finish_kernel", "fp32", {"BM": 8, "BD": 256}, 4, 3
    sizes = {"BM": 128, "BN": 64, "PARTS": 32, "WIDTH": 64, "PROGRAMS": 256}
    yield "pair_loss_kernel", "fp32", {"SHIFTED": True, **sizes}, 4, 3
    small = {"PARTS": host.PARTS, "WIDTH": host.WIDTH, "BM": 128, "BN": 64}
    for shifted in (False, True):
        way = {"SELF": True, "BY_ROW": True, "BY_COLUMN": True, "SHIFTED": shifted}
        way |= {"FIRST": not shifted, "LAST": True}
        yield "reduce_kernel", "fp32", {**small, **way}, 4, 3
        yield "factor_kernel", "fp32", {"SHIFTED": shifted, "BLOCK": host.BLOCK}, 4, 3
    yield "pack_kernel", "fp16", {"BM": 16, "BN": 128, "BD": 128, "PRECISION": "ieee"}, 4, 3
    yield "pack_kernel", "fp32", {"BM": 16, "BN": 128, "BD": 128, "PRECISION": fast}, 4, 3
    yield "finish_kernel", "fp32", {"BM": 16, "BD": 128}, 4, 3


def compile_all(target, everything):
    """Compile every variant for a target; what each takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from contrastive_kit.ops.triton import (
        backward_kernels,
        kernels,
        pair_kernels,
        softplus_kernels,
    )

    backend = GPUTarget("hip", "gfx942", 64)
    if target != "hip":
        backend = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    report, seen = [], set()
    for name, dtype, constants, warps, stages in variants(target, everything):
        label = f"{name} {dtype} {constants} warps={warps} stages={stages}"
        if label in seen:
            continue
        seen.add(label)
        modules = (kernels, backward_kernels, pair_kernels, softplus_kernels)
        kernel = next(getattr(x, name) for x in modules if hasattr(x, name))
        names = kernel.arg_names
        signature = {x: "constexpr" if x in constants else types(x, dtype) for x in names}
        aligned = {
            (number,): [["tt.divisibility", 16]]
            for number, argument in enumerate(names)
            if signature[argument].startswith("*")
        }
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
            target=backend,
            options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
        )
        found = amd_figures(compiled) if target == "hip" else nvidia_figures(compiled, target)
        report.append({"kernel": label, "shared": compiled.metadata.shared, **found})
    return report


def amd_figures(compiled):
    code = compiled.asm["amdgcn"]
    return {
        "spilled": int(re.search(r"\.vgpr_spill_count:?\s*(\d+)", code)[1]),
        "products": code.count("v_mfma"),
        "warnings": [],
    }


def nvidia_figures(compiled, target):
    tools = Path(triton_folder(), "backends/nvidia/bin")
    products = compiled.asm["ptx"].count(TENSOR_CORES[target])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = output([tools / "cuobjdump", "-res-usage", cubin], tools)
        memory = re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)
        assert len(memory) == 2, usage
        registers = int(re.search(r"\bREG:(\d+)", usage)[1])
        # To disassemble takes as long as to compile, and only shows where memory is spilled to.
        spilled = 0
        if any(map(int, memory)):
            listing = output([tools / "cuobjdump", "-sass", cubin], tools)
            # Each program of this kernel makes one tile.
            spilled = spills(
                listing, everywhere=compiled.name in ("weights_kernel", "softplus_kernel")
            )
        warnings = ptxas_warnings(compiled, folder) if target == "sm_90" and products else []
    doubles = len(re.findall(r"\.f64\b", compiled.asm["ptx"]))
    figures = {"registers": registers, "spilled": spilled, "products": products}
    figures["doubles"] = doubles
    return {**figures, "warnings": warnings}


def triton_folder():
    import triton

    return Path(triton.__file__).parent


def output(command, tools):
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


def spills(listing, everywhere):
    """Accesses of local memory; in a kernel with products, those in the outermost loop of one.

    That loop takes a tile each time. What is done with the tile comes after its last product.
    """
    code = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", listing)
    lines = [(int(address, 16), text) for address, text in code]
    products = [i for i, x in lines if re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", x)]
    local = [i for i, x in lines if re.search(r"\b(LDL|STL)\b", x)]
    jumps = [(i, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", x)) for i, x in lines]
    loops = [(int(jump[1], 16), i) for i, jump in jumps if jump and int(jump[1], 16) < i]
    loops = [(a, b) for a, b in loops if any(a <= i <= b for i in products)]
    everywhere = everywhere or not products
    return sum(everywhere or any(a <= i <= b for a, b in loops) for i in local)


def ptxas_warnings(compiled, folder):
    """What ptxas says of products that wait for each other."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = Path(folder, "kernel.ptx")
    ptx.write_text(compiled.asm["ptx"])
    ptxas = get_ptxas(90) if inspect.signature(get_ptxas).parameters else get_ptxas()
    said = subprocess.run(
        [ptxas.path, "-v", "--gpu-name=sm_90a", ptx, "-o", Path(folder, "out")],
        check=True, capture_output=True, text=True,
    ).stderr  # fmt: skip
    return re.findall(r"C75\d\d", said)


def reports(targets, which):
    """The figures of each target, compiled one after the other in a process without interpreter."""
    pytest.importorskip("triton", minversion="3.5")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, which, *targets], check=False, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


USUAL = ["sm_80", "sm_90", "sm_100", "hip"]


def line(address, instruction):
    return f"        /*{address:04x}*/                   {instruction} ;   /* 0x000000 */\n"


@pytest.mark.parametrize(
    ("spill_at", "everywhere", "counted"),
    [
        (0x10, False, 0),  # before the loop
        (0x30, False, 1),  # between its products
        (0x60, False, 1),  # after the last of them, and before the next tile
        (0x90, False, 0),  # after the loop
        (0x90, True, 1),
    ],
)
def test_spills_are_those_of_the_outermost_loop(spill_at, everywhere, counted):
    """Where the products are in a loop of their own, a tile is finished after that loop."""
    code = {
        0x20: "HGMMA.64x128x16.F32 R24, gdesc[UR8]", 0x40: "HGMMA.64x128x16.F32 R24, gdesc[UR8]",
        0x50: "@P0 BRA 0x20", 0x70: "@!P1 BRA 0x18", 0x80: "BRA 0xa0",
    }  # fmt: skip
    code[spill_at] = "STL.64 [R1+0x8], R4"
    listing = "".join(line(*x) for x in sorted(code.items()))
    assert spills(listing, everywhere) == counted


@pytest.fixture(scope="module")
def usual():
    return reports(USUAL, "usual")


@pytest.mark.parametrize("target", USUAL)
def test_tiles(usual, target):
    check(usual[target], target, 8)


def test_little_is_computed_in_float64(usual):
    """Of each number of the rows nothing but the logit of a pair."""
    doubles = {x["kernel"].split()[0]: x["doubles"] for x in usual["sm_90"]}
    assert doubles["pair_prepare_kernel"] <= 80
    assert doubles["pair_finish_kernel"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_way_to_use_the_tiles(target):
    check(reports([target], "everything")[target], target, 25)


def check(report, target, at_least):
    """None spills in its loop, each fits, and all products are made by tensor cores."""
    assert len(report) >= at_least
    for kernel in report:
        # Excluded by ids and with a maximum, Blackwell's logits wait in a few registers too many.
        rare = target == "sm_100" and "'RULE': 2, 'SHIFTED': True" in kernel["kernel"]
        assert kernel["spilled"] <= (4 if rare else 0), kernel
        assert kernel["shared"] <= SHARED_LIMIT[target], kernel
        if target != "hip":
            assert programs(kernel, target) >= promised(kernel["kernel"], target), kernel
        assert not kernel["warnings"], kernel
        multiplies = kernel["kernel"].startswith(
            ("forward", "backward", "weights", "softplus", "statistics", "add_product")
        )
        assert (kernel["products"] > 0) == multiplies, kernel


def programs(kernel, target):
    """How many programs of a kernel fit on a multiprocessor by registers and shared memory."""
    warps = int(re.search(r"warps=(\d+)", kernel["kernel"])[1])
    registers = 32 * warps * -(-kernel["registers"] // 8) * 8
    return min(65536 // registers, SHARED[target] // (kernel["shared"] + 1024))


def promised(label, target):
    name, dtype, *_ = label.split()
    depth = int(re.search(r"'BD': (\d+)", label)[1]) if "'BD'" in label else 0
    plain = dtype == "fp16" and "'SHIFTED': False" in label
    return PROGRAMS.get((name, depth), {}).get(target, 1) if plain else 1


if __name__ == "__main__":
    which, *targets = sys.argv[1:]
    print(json.dumps({target: compile_all(target, which == "everything") for target in targets}))
