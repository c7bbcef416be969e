"""The one command for CIFAR-10 on a GPU, run on a CPU in its dry mode."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "cifar10_gpu.sh"


@pytest.fixture
def archive(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "images.tar.xz"
    with tarfile.open(path, "w:xz") as file:
        for part, count in (("train", 20), ("test", 6)):
            for name in ("cat", "dog"):
                folder = tmp_path / "source" / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
            file.add(tmp_path / "source" / part, part)
    return path


def call(archive, tmp_path, minutes):
    return subprocess.run(
        ["bash", str(SCRIPT), str(archive), "--work", "work", "--dry", "--minutes", str(minutes),
         "--", "--train-images", "40", "--batch-size", "8", "--knn-k", "5", "--no-pictures"],
        cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_stages(archive, tmp_path):
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    first = call(archive, tmp_path, 0)
    assert first.returncode == 3, first.stderr
    assert "time is up" in first.stdout
    assert "call this again" in first.stdout
    second = call(archive, tmp_path, 8.5)
    assert second.returncode == 0, second.stderr
    assert "unpacking" not in second.stdout
    assert "| SimCLR |" in second.stdout
    assert "not written to benchmarks/results" in second.stdout
    results = json.loads((tmp_path / "work" / "run" / "results.json").read_text())
    assert [row["epoch"] for row in results["history"]] == [1, 2]
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before


def test_only_the_recipe_becomes_the_result():
    from benchmarks import trainer
    from benchmarks.cifar10 import differences, markdown

    options = [
        "--recipe",
        "cifar10_resnet18",
        "--data",
        "imagefolder",
        "--root",
        "x",
        "--seed",
        "3",
    ]
    config = json.loads(json.dumps(trainer.settings(options)))
    assert differences(config) == []
    assert differences({**config, "batch_size": 64}) == ["batch_size 64 instead of 512"]
    scores = {"knn": 0.83, "linear": 0.849, "l2": 0.1}
    names = ("device", "torch", "python", "platform", "commit", "uncommitted_changes", "date")
    page = markdown(
        {"data": "some images", "config": config, "SimCLR": scores,
         "about": dict.fromkeys(names, "x"),
         "training": {"seconds": 300.0, "images per second": 1.0},
         "kNN settings": {"k": 200, "temperature": 0.1}}
    )  # fmt: skip
    assert "| kNN | ≥ 0.825 | 0.83 | yes |" in page
    assert "| linear probe | ≥ 0.85 | 0.849 | **no** |" in page
    assert "| minutes | ≤ 6 | 5 | yes |" in page


def test_a_missing_archive(tmp_path):
    done = call(tmp_path / "nothing.tar.xz", tmp_path, 1)
    assert done.returncode == 2
    assert "error: no archive at" in done.stderr
