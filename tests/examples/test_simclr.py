"""The one file that a newcomer reads: it runs as it stands, but for the number of epochs."""

import json
import runpy
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import photographs

SCRIPT = Path(__file__).parents[2] / "examples" / "simclr.py"


@pytest.mark.slow
def test_it_beats_its_baselines_after_one_epoch(tmp_path, monkeypatch, capsys):
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 150
    shorter = text.replace("EPOCHS = 32, 256, 10", "EPOCHS = 32, 256, 1")
    assert shorter != text
    (tmp_path / "simclr.py").write_text(shorter)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("simclr.py")
    results = json.loads((tmp_path / "runs" / "simclr" / "results.json").read_text())
    assert list(results) == ["raw pixels", "untrained encoder", "SimCLR"]
    assert 0.2 < results["raw pixels"] < results["untrained encoder"] < results["SimCLR"] - 0.03
    assert np.asarray(Image.open(tmp_path / "runs" / "simclr" / "simclr.png")).std() > 10
    assert f"kNN accuracy {results['SimCLR']:.3f}" in capsys.readouterr().out


def test_photographs_are_deterministic_and_need_no_network(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("the network is not needed")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    photographs.load_photographs.cache_clear()
    train, train_labels, test, test_labels, classes = photographs.load_patches()
    assert len(classes) == len(set(classes)) == 16
    assert (train.shape, train.dtype) == ((16 * 256, 3, 32, 32), torch.uint8)
    assert test.shape == (16 * 100, 3, 32, 32)
    assert train_labels.bincount().tolist() == [256] * 16
    assert test_labels.bincount().tolist() == [100] * 16
    photo = torch.from_numpy(photographs.load_photographs()[classes[3]]).permute(2, 0, 1)
    assert torch.equal(train[3 * 256], photo[:, :32, :32])
    assert torch.equal(test[3 * 100 + 99], photo[:, -32:, -32:])
    assert torch.equal(photographs.load_patches()[0], train)


@pytest.mark.parametrize("size", [32, 21])
def test_training_and_test_patches_share_no_pixel(monkeypatch, size):
    def photo(height, width):
        """A photograph whose pixels say where they are: column // 256, column % 256, row // 2."""
        rows, columns = np.mgrid[:height, :width]
        return np.stack([columns // 256, columns % 256, rows // 2], axis=2).astype(np.uint8)

    photos = {"even": photo(300, 452), "odd": photo(303, 385)}
    monkeypatch.setattr(photographs, "load_photographs", lambda: photos)
    train, train_labels, test, test_labels, _ = photographs.load_patches(size)
    for i, name in enumerate(photos):
        columns = [
            images[labels == i][:, 0].int() * 256 + images[labels == i][:, 1]
            for images, labels in ((train, train_labels), (test, test_labels))
        ]
        width = photos[name].shape[1]
        assert (columns[0].min(), columns[1].max()) == (0, width - 1)
        assert columns[0].max() < width // 2 <= columns[1].min()
