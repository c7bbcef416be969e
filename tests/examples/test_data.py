"""What the trainer learns from: image files of any kind, in memory or streamed, and CIFAR-10."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from trainer import assert_same, make_image_folder, settings

from train import data
from train.config import UserError, make_config
from train.data import load_data

CPU = torch.device("cpu")


def load(given, workers=0):
    return load_data(make_config(given), CPU, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_images_are_those_in_memory(root, workers):
    given = settings(root, size=12, load_size=14)
    kept, streamed = load(given), load({**given, "stream": True}, workers)
    assert isinstance(streamed.train, data.Streamed)
    assert isinstance(kept.train, data.InMemory)
    assert kept.classes == ["blue", "green", "red"]
    order = torch.randperm(42)
    for a, b in zip(kept.train.batches(order, 9), streamed.train.batches(order, 9), strict=True):
        assert_same(list(a), list(b))
    images, _ = next(kept.train.batches(order, 9))
    assert (images.shape, images.dtype) == ((9, 3, 14, 14), torch.uint8)


def test_what_does_not_fit_in_memory_is_streamed(root, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", (42 + 15) * 3 * 8 * 8 - 1)
    assert isinstance(load(settings(root)).train, data.Streamed)


def test_images_of_any_size_and_mode_become_squares(tmp_path):
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    root = make_image_folder(tmp_path, classes=("red",), train=0)
    folder = root / "train" / "red"
    Image.fromarray(np.full((40, 90), 200, np.uint8)).save(folder / "0.png")
    Image.new("RGBA", (30, 70), (0, 100, 200, 255)).save(folder / "1.png")
    Image.fromarray(levels).save(folder / "2.png")
    Image.fromarray(levels).save(folder / "3.tif")
    part = load(settings(root, size=64, batch_size=2, knn_k=2)).train
    ((gray, alpha, *sixteen), _) = next(part.batches(torch.arange(4), 4))
    side = round(64 * 8 / 7)
    assert gray.shape == (3, side, side)
    assert (gray == 200).all()
    assert alpha[:, 12, 12].tolist() == [0, 100, 200]
    for image in sixteen:  # the upper eight bits, where Pillow alone would clip at 255
        assert image.float().mean() == pytest.approx(levels.mean() / 256, abs=2)
    at_its_size = load(settings(root, size=8, load_size=64, batch_size=2, knn_k=2)).train
    ((image,), _) = next(at_its_size.batches(torch.tensor([2]), 1))
    assert image[1].tolist() == (levels // 256).tolist()
    Image.fromarray(levels.astype(np.float32)).save(folder / "float.tif")
    with pytest.raises(UserError, match=r"cannot read .*float.tif .*no known range"):
        load(settings(root, batch_size=2, knn_k=2))


def test_cifar10_comes_from_torchvision(monkeypatch, tmp_path):
    class FakeCIFAR10:
        classes = ("cat", "dog")

        def __init__(self, root, train, download):
            assert (root, download) == (str(tmp_path), True)
            count = 30 if train else 10
            self.data = np.full((count, 32, 32, 3), (7, 8, 9), np.uint8)
            self.targets = [0, 1] * (count // 2)

    monkeypatch.setattr(data, "CIFAR10", FakeCIFAR10)
    given = {"data": "cifar10", "root": str(tmp_path), "batch_size": 8, "knn_k": 5}
    found = load({**given, "train_images": 20})
    assert (len(found.train), len(found.test), found.classes) == (20, 10, ["cat", "dog"])
    images, labels = next(found.train.batches(torch.arange(20), 20))
    assert images[3, :, 5, 6].tolist() == [7, 8, 9]
    assert set(labels.tolist()) == {0, 1}

    def fail(*_args, **_options):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(data, "CIFAR10", fail)
    with pytest.raises(UserError, match=r"cannot get CIFAR-10 .*no route"):
        load(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 200}, "--size must be at most 192 with the photographs, got 200"),
        ({"train_images": 5000}, "--train-images must be at most 4096, got 5000"),
        ({"train_images": 100}, r"--batch-size must be at most .*\(100\), got 256"),
        ({"knn_k": 5000}, r"--knn-k must be at most .*\(4096\), got 5000"),
    ],
)
def test_settings_that_do_not_fit_the_data(given, message):
    with pytest.raises(UserError, match=message):
        load(given)


def remove_all(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: remove_all(root / "train" / "red"), "train: .*red"),
        (lambda root: (root / "test").rename(root / "validation"), "test is missing"),
        (lambda root: (root / "test" / "red").rename(root / "test" / "rot"), "red, rot"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_damaged_folders(tmp_path, damage, message, stream):
    root = make_image_folder(tmp_path)
    damage(root)
    with pytest.raises(UserError, match=message):
        load(settings(root, **({"stream": True} if stream else {})))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("text", [b"no image", b"", b"\x89PNG\r\n\x1a\n cut off"])
def test_damaged_images(tmp_path, text, workers):
    path = tmp_path / "3.png"
    path.write_bytes(text)
    folder = make_image_folder(tmp_path / "images")
    files = data.ImageFolder(str(folder / "train"), loader=data.load_image)
    files.samples[3] = (str(path), 0)
    part = data.Streamed(Subset(files, range(42)), CPU, workers)
    with pytest.raises(UserError, match=r"^cannot read .*3.png.*repair or remove it$"):
        list(part.batches(torch.tensor([3]), 8))
