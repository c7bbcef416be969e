"""Small runs of examples/train, for its tests."""

import numpy as np
import torch
from PIL import Image

from train.config import arguments


def make_image_folder(root, classes=("blue", "green", "red"), train=14, test=5, side=8):
    """Noise around a color of each class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for i, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for j in range(count):
                pixels = rng.integers(0, 120, (side, side, 3))
                pixels[..., i % 3] += 6
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{j}.png")
    return root


def settings(root, **changes):
    """Those of a run of four epochs of five steps."""
    return {
        "data": "imagefolder", "root": str(root), "size": 8, "encoder": "convnet", "width": 16,
        "epochs": 4, "batch_size": 8, "eval_every": 2, "knn_k": 5, "baselines": False, **changes,
    }  # fmt: skip


def command(root, **changes):
    """The same on the command line."""
    session = {"workers": 0, "device": "cpu", "pictures": False}
    return arguments(settings(root, **{**session, **changes}))


def resume(run, **changes):
    """The command line that goes on."""
    return arguments({"resume": run, "workers": 0, "device": "cpu", "pictures": False, **changes})


def checkpoint(run):
    """What was saved, without the measured times."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["progress"].pop("seconds") >= 0
    assert all(part >= 0 for part in state["progress"].pop("times").values())
    return state


def assert_same(a, b):
    """Equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
