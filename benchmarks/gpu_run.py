"""Run one stage of the GPU benchmarks: ``python -m benchmarks.gpu_run --help``; see ``gpu.sh``."""

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks import machine

STAGES = {
    "correctness": "correctness_gpu.json",
    "loss": "loss_gpu.json",
    "augment": "augment_gpu.json",
    "tables": "loss_gpu.md",
}
RESULTS = machine.REPOSITORY / "benchmarks" / "results"

UNFINISHED = 3  # out of time: run the stage again to go on
DEVICE_BROKEN = 75  # go on in a new process


def main() -> int:
    parser = argparse.ArgumentParser(description="One stage of the GPU benchmarks.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--limit", type=float, default=500.0, help="seconds; no case starts later")
    parser.add_argument("--force", action="store_true", help="measure again what is measured")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, no figures")
    arguments = parser.parse_args()
    if arguments.dry and arguments.out.resolve().is_relative_to(RESULTS):
        parser.error(f"--dry has no figures, and does not write into {RESULTS}")
    if arguments.stage == "tables":
        from benchmarks.gpu_tables import write

        write(arguments.out)
        return 0

    from benchmarks import gpu_augment, gpu_correctness, gpu_loss
    from benchmarks.gpu_device import Device
    from benchmarks.gpu_store import DeviceBroken, OutOfTime, Store

    try:
        device = Device(arguments.dry)
        store = Store(
            arguments.out / STAGES[arguments.stage],
            device.describe(),
            dry=arguments.dry,
            force=arguments.force,
            limit_s=arguments.limit,
        )
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if store.complete:
        print(f"stage {arguments.stage}: results are there, --force measures again")
        return _verdict(store)
    run = {
        "correctness": gpu_correctness.run,
        "loss": gpu_loss.run,
        "augment": gpu_augment.run,
    }[arguments.stage]
    try:
        run(store, device)
    except OutOfTime:
        print(f"stage {arguments.stage}: out of time; run it again to go on where it stopped")
        return UNFINISHED
    except DeviceBroken:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(DEVICE_BROKEN)  # without the destructors, which would wait for the device
    return _verdict(store)


def _verdict(store: Any) -> int:
    failed = [c["case"] for c in store.results["cases"] if c.get("outcome") == "failed"]
    for case in failed:
        print(f"FAILED {case}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
