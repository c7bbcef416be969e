"""The result of the CIFAR-10 recipe on a GPU, from a finished run: see ``cifar10_gpu.sh``."""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks import trainer
from benchmarks.harness import report
from benchmarks.harness.machine import RESULTS
from benchmarks.targets import CIFAR10, judge

# What others could reproduce is dkobak/simclr-cifar10 (100 epochs in 20 minutes on an A100),
# rather than the 94.0 of the paper.
PUBLISHED = {
    100: {"knn": 0.832, "linear": 0.856},
    1000: {"knn": 0.914, "linear": 0.917},
}
FREE = {"epochs", "lr", "warmup_epochs", "eval_every", "seed", "compile", "root", "recipe"}


def collect(run: Path, archive: Path) -> dict[str, Any]:
    config = json.loads((run / "config.json").read_text())
    results = json.loads((run / "results.json").read_text())
    return {
        "data": "CIFAR-10 (JPEG)" if archive.name == "cifar10-jpeg.tar.xz" else archive.name,
        "archive sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "about": config.pop("about"),
        "config": config,
        **results,
    }


def differences(config: dict[str, Any]) -> list[str]:
    """Settings, other than those of the length, that are not the recipe's."""
    options = ["--recipe", "cifar10_resnet18", "--data", "imagefolder", "--root", "images"]
    expected = json.loads(json.dumps(trainer.settings(options)))
    return [
        f"{name} {config[name]!r} instead of {value!r}"
        for name, value in expected.items()
        if name not in FREE and config.get(name, value) != value
    ]


def markdown(found: dict[str, Any]) -> str:
    epochs, minutes = found["config"]["epochs"], found["training"]["seconds"] / 60
    values = [found["SimCLR"]["knn"], found["SimCLR"]["linear"], minutes]
    judged = [
        judge(name, target, [x], "{:.3g}".format)
        for (name, target), x in zip(CIFAR10.items(), values, strict=True)
    ]
    return report.page(
        "cifar10",
        found=found,
        minutes=minutes,
        published=PUBLISHED.get(epochs),
        targets=judged if epochs == 100 else [],
        dry=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--archive", type=Path, required=True, help="where its images came from")
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    found = collect(arguments.run, arguments.archive)
    page = markdown(found)
    print(page)
    others = differences(found["config"])
    if arguments.dry or others or not found["about"]["device"].startswith("NVIDIA"):
        print(f"not written to benchmarks/results: {', '.join(others) or 'not on a CUDA GPU'}")
        return
    epochs = found["config"]["epochs"]
    name = "cifar10_gpu" if epochs == 100 else f"cifar10_gpu_{epochs}"
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(page.replace("cifar10_gpu.png", f"{name}.png"))
    shutil.copy(arguments.run / "curve.png", RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
