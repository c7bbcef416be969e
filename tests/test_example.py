"""The reference training loop: its data, its files, its resume, and what it says to bad input."""

import importlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples" / "simclr.py"
CPU = torch.device("cpu")

sys.path.insert(0, str(SCRIPT.parent))
simclr, simclr_data, simclr_session, simclr_settings = map(
    importlib.import_module, ("simclr", "simclr_data", "simclr_session", "simclr_settings")
)

WORLD = simclr_session.World(CPU)
pytestmark = pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")


def make_image_folder(root, classes=("blue", "green", "red"), train=14, test=5, side=8):
    """Noise around a colour of each class."""
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


@pytest.fixture
def root(tmp_path):
    return make_image_folder(tmp_path / "images")


def options(root, **changes):
    given = {
        "data": "imagefolder", "root": root, "size": 8, "encoder": "convnet", "epochs": 4,
        "batch_size": 8, "eval_every": 1, "knn_k": 5, "workers": 0, "device": "cpu",
        "pictures": False, **changes,
    }  # fmt: skip
    texts = []
    for name, value in given.items():
        flag = simclr.flag(name)
        if isinstance(value, bool):
            texts += [flag if value else flag.replace("--", "--no-", 1)]
        else:
            texts += [flag, str(value)]
    return texts


def checkpoint(run):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state.pop("seconds") >= 0
    return state


def assert_same(a, b):
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


@pytest.mark.parametrize("changes", [{}, {"stream": True, "optimizer": "sgd"}, {"amp": True}])
def test_two_and_two_epochs_are_four_bit_for_bit(root, tmp_path, changes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"eval_every": 2, **changes}
    expected = simclr.main(options(root, out=whole, **changes))
    assert simclr.main(options(root, out=parts, stop_after=2, **changes)) is None
    assert len(checkpoint(parts)["history"]) == 2
    torch.manual_seed(1234)
    scores = simclr.main(["--resume", str(parts), "--device", "cpu", "--workers", "0"])
    assert scores == expected
    assert_same(checkpoint(parts), checkpoint(whole))
    weights = torch.load(parts / "encoder.pt", weights_only=True)
    assert_same(weights, checkpoint(parts)["encoder"])


class StopAtThirdStepOfEpochTwo(simclr.StopRequest):
    """Asked once after each of the 5 steps of an epoch."""

    asked = 0

    def __bool__(self):
        self.asked += 1
        return self.asked >= 8


@pytest.mark.parametrize("changes", [{}, {"stream": True, "norm": "group", "chunk_size": 3}])
def test_a_stop_within_an_epoch_changes_nothing(root, tmp_path, changes, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = simclr.main(options(root, out=whole, **changes))
    with monkeypatch.context() as patch:
        patch.setattr(simclr, "StopRequest", StopAtThirdStepOfEpochTwo)
        assert simclr.main(options(root, out=parts, **changes)) is None
    assert "stopped in epoch 2 after 3 of 5 steps (time is up)" in capsys.readouterr().out
    state = checkpoint(parts)
    assert (state["step"], len(state["history"])) == (3, 1)
    config = state["config"]
    factor = simclr.warmup_cosine(5 + 3, 5 * config["warmup_epochs"], 5 * config["epochs"])
    for group in state["optimizer"]["param_groups"]:  # a new rate at every step, not every epoch
        assert group["lr"] == pytest.approx(group["initial_lr"] * factor)
    torch.manual_seed(1234)
    assert simclr.main(["--resume", str(parts), "--device", "cpu", "--workers", "0"]) == expected
    assert_same(checkpoint(parts), checkpoint(whole))


def test_other_seeds_give_other_runs(root, tmp_path):
    for seed in (0, 1):
        simclr.main(options(root, out=tmp_path / str(seed), epochs=1, seed=seed))
    with pytest.raises(AssertionError):
        assert_same(*(checkpoint(tmp_path / str(seed))["encoder"] for seed in (0, 1)))


def test_run_folder(root, tmp_path, capsys):
    run = tmp_path / "run"
    scores = simclr.main(options(root, out=run, epochs=2, pictures=True))
    pictures = {"pairs.png", "curve.png", "neighbours.png", "map.png"}
    others = {"checkpoint.pt", "config.json", "encoder.pt", "results.json"}
    assert {path.name for path in run.iterdir()} == pictures | others
    for name in pictures:
        assert np.asarray(Image.open(run / name)).std() > 10
    config = json.loads((run / "config.json").read_text())
    assert (config["seed"], config["size"], config["load_size"]) == (0, 8, 8)
    assert config["about"]["torch"] == torch.__version__
    assert config["about"]["commit"] == simclr_session.git("rev-parse", "HEAD")
    results = json.loads((run / "results.json").read_text())
    assert results.pop("kNN settings") == {"k": 5, "temperature": 0.1}
    assert results["training"]["images per second"] > 0
    assert results.pop("training")["seconds"] > 0
    assert results.pop("history") == checkpoint(run)["history"]
    assert list(results) == ["raw pixels", "random encoder", "SimCLR"]
    assert results["SimCLR"] == scores["SimCLR"]._asdict()
    history = checkpoint(run)["history"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(0 < row["loss"] < math.log(15) + 10 for row in history)
    assert all(0 <= row["accuracy"] <= 1 for row in history)
    assert history[-1]["knn"] == scores["SimCLR"].knn
    assert "random encoder" in capsys.readouterr().out


def test_both_views_go_through_the_encoder_in_one_forward(root, monkeypatch):
    """T26, and T49: training mode in training, evaluation mode in evaluation."""
    config = simclr.make_config(
        {"data": "imagefolder", "root": str(root), "size": 8, "encoder": "convnet",
         "batch_size": 8, "knn_k": 5}
    )  # fmt: skip
    data = simclr.load_data(config, CPU, 0)
    run = simclr.Run(config, data, WORLD)
    calls = []
    run.encoder.register_forward_hook(lambda m, x, _: calls.append((m.training, len(x[0]))))
    run.train_epoch(simclr.StopRequest(None), lambda _: None)
    assert calls == [(True, 16)] * 5
    calls.clear()
    before = {key: value.clone() for key, value in run.encoder.state_dict().items()}
    features = simclr.features_of(run.encoder, data, config, WORLD)
    scores = simclr.score(features, config, linear=True)
    assert calls == [(False, 42), (False, 15)]
    assert_same(dict(run.encoder.state_dict()), before)
    mean, std = (torch.tensor(v)[:, None, None] for v in simclr.IMAGENET_NORMALIZATION)
    run.encoder.eval()
    with torch.no_grad():
        h = [run.encoder((p.images / 255 - mean) / std) for p in (data.train, data.test)]
    near = torch.nn.functional.normalize(h[1]) @ torch.nn.functional.normalize(h[0]).T
    top = near.topk(5)
    votes = torch.zeros(15, 3)
    for i in range(15):
        for j in range(5):
            votes[i, data.train.labels[top.indices[i, j]]] += (top.values[i, j] / 0.1).exp()
    assert 0.3 < scores.knn < 1
    assert scores.knn == pytest.approx((votes.argmax(1) == data.test.labels).float().mean().item())


def test_processes_on_gpus_share_the_statistics_of_their_batches():
    """T26; on the CPU, where SyncBatchNorm cannot run, the network stays and the user is told."""
    model = simclr.build_model(simclr.make_config({}), 2)
    several = simclr_session.World(torch.device("cuda", 0), rank=1, size=2)
    shared = simclr.share_statistics(model, several)
    kinds = [type(m) for m in shared.modules() if "Norm" in type(m).__name__]
    assert kinds == [torch.nn.SyncBatchNorm] * 6
    assert shared.state_dict().keys() == model.state_dict().keys()


def test_batch_statistics_without_gpus(capsys):
    model = simclr.build_model(simclr.make_config({}), 2)
    assert simclr.share_statistics(model, simclr_session.World(CPU, rank=0, size=2)) is model
    assert "--norm group" in capsys.readouterr().out


def test_group_norm_knows_no_other_images():
    config = simclr.make_config({"norm": "group"})
    model = simclr.build_model(config, 2).train()
    images = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)


def test_streamed_images_are_those_in_memory(root):
    given = {"data": "imagefolder", "root": str(root), "size": 12, "load_size": 14,
             "encoder": "convnet", "batch_size": 8, "knn_k": 5}  # fmt: skip
    kept = simclr.load_data(simclr.make_config(given), CPU, 2)
    streamed = simclr.load_data(simclr.make_config({**given, "stream": True}), CPU, 0)
    assert isinstance(streamed.train, simclr_data.Streamed)
    assert kept.classes == ["blue", "green", "red"]
    order = torch.randperm(42)
    for a, b in zip(kept.train.batches(order, 9), streamed.train.batches(order, 9), strict=True):
        assert_same(list(a), list(b))
    images, _ = next(kept.train.batches(order, 9))
    assert (images.shape, images.dtype) == ((9, 3, 14, 14), torch.uint8)


def test_images_of_any_size_and_mode_become_squares(root):
    folder = root / "train" / "red"
    Image.fromarray(np.full((40, 90), 200, np.uint8)).save(folder / "gray.png")
    Image.new("RGBA", (30, 70), (0, 100, 200, 255)).save(folder / "alpha.png")
    files = simclr_data.ImageFiles(
        [(str(folder / "gray.png"), 0), (str(folder / "alpha.png"), 1)], 24
    )
    gray, _ = files[0]
    alpha, _ = files[1]
    assert gray.shape == alpha.shape == (3, 24, 24)
    assert (gray == 200).all()
    assert alpha[:, 12, 12].tolist() == [0, 100, 200]


def test_16_bits_keep_their_upper_eight_and_floats_are_refused(tmp_path):
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    for name in ("16.png", "16.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        image, _ = simclr_data.ImageFiles([(str(tmp_path / name), 0)], 64)[0]
        assert image[1].tolist() == (levels // 256).tolist()
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(simclr.UserError, match=r"cannot read .*float.tif .*no known range"):
        simclr_data.ImageFiles([(str(tmp_path / "float.tif"), 0)], 64)[0]


def test_photos_are_deterministic_and_need_no_network(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("the network is not needed")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    config = simclr.make_config({})
    first, again = simclr_data.photo_patches(config), simclr_data.photo_patches(config)
    assert_same(first, again)
    train, train_labels, test, test_labels, classes = first
    assert len(classes) == len(set(classes)) == 16
    assert (train.shape, train.dtype) == ((16 * 256, 3, 32, 32), torch.uint8)
    assert test.shape == (16 * 100, 3, 32, 32)
    assert train_labels.bincount().tolist() == [256] * 16
    assert test_labels.bincount().tolist() == [100] * 16
    photos = simclr_data.load_photographs()
    corner = torch.from_numpy(photos[classes[3]][:32, :32]).permute(2, 0, 1)
    assert torch.equal(train[3 * 256], corner)
    corner = torch.from_numpy(photos[classes[3]][-32:, -32:]).permute(2, 0, 1)
    assert torch.equal(test[3 * 100 + 99], corner)


@pytest.mark.parametrize("size", [32, 21])
def test_training_and_test_patches_share_no_pixel(monkeypatch, size):
    def photo(height, width):
        """A photograph whose pixels say where they are: column // 256, column % 256, row // 2."""
        rows, columns = np.mgrid[:height, :width]
        return np.stack([columns // 256, columns % 256, rows // 2], axis=2).astype(np.uint8)

    photos = {"even": photo(300, 452), "odd": photo(303, 385)}
    monkeypatch.setattr(simclr_data, "load_photographs", lambda: photos)
    train, train_labels, test, test_labels, _ = simclr_data.photo_patches(
        simclr.make_config({"size": size})
    )
    for i, name in enumerate(photos):
        columns = [
            images[labels == i][:, 0].int() * 256 + images[labels == i][:, 1]
            for images, labels in ((train, train_labels), (test, test_labels))
        ]
        width = photos[name].shape[1]
        assert (columns[0].min(), columns[1].max()) == (0, width - 1)
        assert columns[0].max() < width // 2 <= columns[1].min()


def test_cifar10_comes_from_torchvision(monkeypatch, tmp_path):
    class FakeCIFAR10:
        classes = ("cat", "dog")

        def __init__(self, root, train, download):
            assert (root, download) == (str(tmp_path), True)
            count = 30 if train else 10
            self.data = np.full((count, 32, 32, 3), (7, 8, 9), np.uint8)
            self.targets = [0, 1] * (count // 2)

    monkeypatch.setattr(simclr_data.torchvision.datasets, "CIFAR10", FakeCIFAR10)
    given = {"data": "cifar10", "root": str(tmp_path), "batch_size": 8, "knn_k": 5}
    config = simclr.make_config({**given, "train_images": 20})
    assert (config.encoder, config.stem, config.epochs) == ("resnet18", "cifar", 100)
    data = simclr.load_data(config, CPU, 0)
    assert (len(data.train), len(data.test), data.classes) == (20, 10, ["cat", "dog"])
    images, labels = next(data.train.batches(torch.arange(20), 20))
    assert images[3, :, 5, 6].tolist() == [7, 8, 9]
    assert set(labels.tolist()) == {0, 1}

    def fail(*_args, **_options):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(simclr_data.torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(simclr.UserError, match=r"cannot get CIFAR-10 .*no route"):
        simclr.load_data(config, CPU, 0)


def test_learning_rate_schedule():
    factors = [simclr.warmup_cosine(step, 10, 110) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.001


def test_normalisation_and_biases_are_not_decayed():
    config = simclr.make_config({"batch_size": 512})
    encoder, head = simclr.build_model(config, 2)
    decayed, free = simclr.build_optimizer(config, [encoder, head]).param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert decayed["lr"] == pytest.approx(2 * config.lr)
    count = sum(1 for module in (encoder, head) for _ in module.parameters())
    assert len(decayed["params"]) + len(free["params"]) == count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"root": "x"}, "--root has no meaning with --data photos"),
        ({"stream": True}, "--stream has no meaning with --data photos"),
        ({"data": "imagefolder"}, "--data imagefolder needs --root"),
        ({"data": "cifar10", "size": 64}, "--size must be 32"),
        ({"stem": "cifar"}, "--stem has no meaning with --encoder convnet"),
        ({"encoder": "resnet18", "width": 32}, "--width has no meaning with --encoder resnet18"),
        ({"width": 40}, "--width must be a multiple of 16, got 40"),
        ({"temperature": 0.0}, "--temperature must be above 0, got 0.0"),
        ({"lr": math.nan}, "--lr must be above 0, got nan"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"seed": 2**32}, "--seed must be at most 4294967295"),
        ({"batch_size": 1}, "--batch-size must be at least 2, got 1"),
        ({"epochs": 3, "warmup_epochs": 3.0}, r"--warmup-epochs must be below --epochs \(3\)"),
        ({"data": "imagefolder", "root": "x", "load_size": 100}, "--load-size must be at least"),
    ],
)
def test_wrong_settings(given, message):
    with pytest.raises(simclr.UserError, match=message):
        simclr.make_config(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 200}, "--size must be at most 192 with --data photos, got 200"),
        ({"train_images": 5000}, "--train-images must be at most 4096, got 5000"),
        ({"train_images": 100}, r"--batch-size must be at most .*\(100\), got 256"),
        ({"knn_k": 5000}, r"--knn-k must be at most .*\(4096\), got 5000"),
    ],
)
def test_settings_that_do_not_fit_the_data(given, message):
    with pytest.raises(simclr.UserError, match=message):
        simclr.load_data(simclr.make_config(given), CPU, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder": "alexnet"}, "name must be one of .*; got 'alexnet'"),
        ({"head_layers": 0, "head_dim": 3}, "out_dim must equal in_dim"),
    ],
)
def test_wrong_models(given, message):
    with pytest.raises(simclr.UserError, match=message):
        simclr.build_model(simclr.make_config(given), 2)


def test_recipes_are_complete_and_have_their_published_settings():
    names = {path.stem for path in simclr_settings.RECIPES.glob("*.toml")}
    assert names >= {"photos", "cifar10_resnet18", "cifar10_resnet18_1000", "imagenet_resnet50"}
    for name in names:
        config = simclr.make_config(
            {"recipe": name, "root": "somewhere"} if name != "photos" else {}
        )
        assert config.recipe == name
    assert simclr.make_config({}) == simclr_settings.Config(warmup_epochs=1.0, width=32)
    cifar = simclr.make_config({"recipe": "cifar10_resnet18"})
    assert (cifar.stem, cifar.temperature, cifar.batch_size, cifar.strength) == (
        "cifar", 0.5, 512, 0.5,
    )  # fmt: skip
    assert "blur" not in cifar.augment
    longer = simclr.make_config({"recipe": "cifar10_resnet18_1000"})
    assert (longer.epochs, longer.lr, longer.temperature) == (1000, 0.03, 0.5)
    paper = simclr.make_config({"recipe": "imagenet_resnet50", "root": "x", "epochs": 1000})
    assert (paper.optimizer, paper.weight_decay, paper.temperature) == ("lars", 1e-6, 0.1)
    assert (paper.epochs, paper.warmup_epochs, paper.load_size) == (1000, 10, 256)


def test_a_recipe_of_ones_own(tmp_path):
    recipe = tmp_path / "own.toml"
    recipe.write_text('base = "cifar10_resnet18"\nlr = 1\naugment = ["crop"]\n')
    config = simclr.make_config({"recipe": str(recipe), "batch_size": 64, "amp": False})
    assert (config.encoder, config.lr, config.augment) == ("resnet18", 1.0, ("crop",))
    assert (config.batch_size, config.amp) == (64, False)
    given, _ = simclr.parse(["--recipe", str(recipe), "--augment", "crop", "blur", "--no-amp"])
    assert simclr.make_config(given).augment == ("crop", "blur")
    assert simclr.make_config(simclr.parse(["--augment"])[0]).augment == ()


def test_a_recipe_on_other_data():
    given = {"recipe": "cifar10_resnet18", "data": "imagefolder", "root": "images"}
    config = simclr.make_config(given)
    assert (config.encoder, config.load_size) == ("resnet18", 32)
    assert config.root == str(Path.cwd() / "images")  # a run may be resumed from another folder
    with pytest.raises(simclr.UserError, match="needs --root"):
        simclr.make_config({"recipe": "cifar10_resnet18", "data": "imagefolder"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "keys that are no settings: epoch"),
        ('recipe = "photos"', "keys that are no settings: recipe"),
        ('epochs = "3"', "epochs in .* must be of type int, got '3'"),
        ("epochs = true", "epochs in .* must be of type int, got True"),
        ("epochs = 0", "--epochs must be at least 1"),
        ('optimizer = "adam"', "--optimizer must be one of adamw, sgd, lars; got adam"),
        ('augment = ["crop", "cut"]', "--augment must be one of crop, .*; got cut"),
        ("crop_min = 1.5", "--crop-min must be at most 1, got 1.5"),
        ("epochs = ", "is no TOML file"),
        ("base = 3", "base in .* must be of type str, got 3"),
        ('base = "nonesuch"', "--recipe must be a .toml file or one of .*photos.*; got nonesuch"),
    ],
)
def test_wrong_recipes(tmp_path, text, message):
    recipe = tmp_path / "wrong.toml"
    recipe.write_text(text)
    with pytest.raises(simclr.UserError, match=message):
        simclr.make_config({"recipe": str(recipe)})


def test_a_base_is_looked_for_beside_the_recipe_that_names_it(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "common.toml").write_text("epochs = 3\nlr = 0.5\n")
    (folder / "own.toml").write_text('base = "common.toml"\nlr = 1.0\n')
    config = simclr.make_config({"recipe": str(folder / "own.toml")})
    assert (config.epochs, config.lr) == (3, 1.0)


def test_the_width_of_the_convnet():
    config = simclr.make_config({"width": 48})
    encoder, head = simclr.build_model(config, 2)
    assert encoder(torch.rand(2, 3, 24, 24)).shape == (2, 8 * 48)
    assert head(torch.rand(2, 8 * 48)).shape == (2, 128)
    assert simclr.make_config({}).width == 32
    assert simclr.make_config({"encoder": "resnet18"}).width is None


@pytest.mark.parametrize("base", ["{folder}/second.toml", "../{name}/second.toml"])
def test_recipes_in_a_circle(tmp_path, base):
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(f'base = "{base.format(folder=tmp_path, name=tmp_path.name)}"')
    second.write_text(f'base = "{first}"')
    with pytest.raises(simclr.UserError, match=r"first.toml is its own base"):
        simclr.make_config({"recipe": str(first)})


def peak_lr(**given):
    config = simclr.make_config(given)
    model = simclr.build_model(config, 2)
    return simclr.build_optimizer(config, model).param_groups[0]["lr"]


def test_both_rules_of_the_learning_rate_agree_at_batch_4096_alone():
    """T29."""
    pytest.importorskip("timm")
    linear = {"recipe": "imagenet_resnet50", "root": "x", "encoder": "convnet"}
    root = {**linear, "lr_rule": "sqrt", "lr": 0.075}
    assert peak_lr(**linear) == pytest.approx(4.8)
    assert peak_lr(**root) == pytest.approx(4.8)
    assert peak_lr(**linear, batch_size=256) == pytest.approx(0.3)
    assert peak_lr(**root, batch_size=256) == pytest.approx(1.2)


def test_lars_adapts_weights_and_leaves_biases_and_normalisation_to_sgd():
    """T28: the first step, from the formula in the recipe."""
    pytest.importorskip("timm")
    config = simclr.make_config({"optimizer": "lars", "lr": 0.5, "weight_decay": 0.01})
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3).double()
    optimizer = simclr.build_optimizer(config, [layer])
    weight, bias = (p.detach().clone() for p in (layer.weight, layer.bias))
    layer(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    gradient = layer.weight.grad
    trust = 0.001 * weight.norm() / (gradient.norm() + 0.01 * weight.norm() + 1e-8)
    expected = weight - 0.5 * trust * (gradient + 0.01 * weight)
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.bias.detach(), bias - 0.5 * layer.bias.grad)


@pytest.mark.parametrize("left_out", [None, "crop", "flip", "jitter", "gray", "blur"])
def test_each_transform_can_be_left_out(left_out):
    """And T47: the two views of an image differ."""
    names = ("crop", "flip", "jitter", "gray", "blur")
    config = simclr.make_config({"augment": tuple(n for n in names if n != left_out), "size": 32})
    augment = simclr.build_augment(config, generator=torch.Generator().manual_seed(0))
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    (first, second), params = augment(images, return_params=True)
    assert not torch.equal(first, second)
    drawn = simclr_params(params)
    for name in names:
        assert (drawn[name] == 0) == (name == left_out), name
    nothing = simclr.build_augment(simclr.make_config({"augment": ()}))
    for view in nothing(images):
        torch.testing.assert_close(view, images / 255)


def simclr_params(params):
    """How many of the views are cropped, mirrored, …."""
    from contrastive_kit.augment.parameters import unpack

    drawn = unpack(params)
    return {
        "crop": int((drawn.box[..., 2:] < 31).any(-1).sum()),
        "flip": int(drawn.flip.sum()),
        "jitter": int(drawn.jitter.sum()),
        "gray": int(drawn.grayscale.sum()),
        "blur": int(drawn.blur.sum()),
    }


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_heads_and_the_evaluation_of_z(root, tmp_path, layers):
    scores = simclr.main(
        options(root, out=tmp_path / "run", epochs=1, head_layers=layers, eval_z=True)
    )
    assert list(scores) == ["raw pixels", "random encoder", "SimCLR", "SimCLR, z"]
    assert (scores["SimCLR"] == scores["SimCLR, z"]) == (layers == 0)


def test_the_supervised_comparison_learns_the_labels(root, tmp_path):
    run = tmp_path / "run"
    changes = {"supervised": True, "epochs": 12, "augment": "flip", "eval_every": 12}
    scores = simclr.main(options(root, out=run, baselines=False, **changes))
    history = checkpoint(run)["history"]
    assert history[0]["loss"] > 0.9
    assert history[-1]["loss"] < 0.7
    assert list(scores) == ["supervised"]


def loss_curve(root, out, **changes):
    simclr.main(options(root, out=out, baselines=False, epochs=3, norm="group", **changes))
    return [row["loss"] for row in checkpoint(out)["history"]]


def test_a_batch_of_16_chunks_has_the_loss_curve_of_the_whole(tmp_path):
    root = make_image_folder(tmp_path / "images", train=43)
    whole = loss_curve(root, tmp_path / "whole", batch_size=64)
    chunked = loss_curve(root, tmp_path / "chunked", batch_size=64, chunk_size=4)
    assert chunked == pytest.approx(whole, rel=1e-5)
    assert abs(whole[0] - whole[-1]) > 1e-3
    # the small batch alone is another objective
    assert loss_curve(root, tmp_path / "small", batch_size=4) != pytest.approx(whole, rel=0.1)


def remove_all(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: remove_all(root / "train" / "red"), "train: .*red"),
        (lambda root: (root / "test").rename(root / "validation"), "test is missing"),
        (lambda root: (root / "test" / "red").rename(root / "test" / "rot"), "red, rot"),
        (
            lambda root: (root / "train" / "red" / "3.png").write_text("no image"),
            "cannot read .*3.png.*repair or remove it",
        ),
        (
            lambda root: (root / "test" / "red" / "2.png").write_bytes(
                (root / "test" / "red" / "1.png").read_bytes()[:200]
            ),
            "cannot read .*2.png",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_damaged_image_folders(root, tmp_path, damage, message, stream):
    damage(root)
    changes = {"stream": True} if stream else {}
    with pytest.raises(simclr.UserError, match=message):
        simclr.main(options(root, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    root = make_image_folder(folder / "images")
    simclr.main(options(root, out=folder / "run", epochs=2, stop_after=1))
    return folder / "run"


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once, tmp_path / "stopped")


def test_checkpoints_that_cannot_be_resumed(stopped, tmp_path):
    path = stopped / "checkpoint.pt"
    whole = path.read_bytes()
    foreign = tmp_path / "foreign.pt"
    torch.save({"model": torch.ones(3)}, foreign)
    unsafe = tmp_path / "unsafe.pt"
    torch.save({"model": SimpleNamespace()}, unsafe)
    for content, message in [
        (whole[: len(whole) // 2], "is damaged or not a checkpoint"),
        (b"", "is damaged or not a checkpoint"),
        (b"some text", "is damaged or not a checkpoint"),
        (unsafe.read_bytes(), "is damaged or not a checkpoint"),
        (foreign.read_bytes(), "is not a checkpoint of this script"),
    ]:
        path.write_bytes(content)
        with pytest.raises(simclr.UserError, match=message):
            simclr.main(["--resume", str(stopped)])
        assert path.read_bytes() == content
    path.unlink()
    with pytest.raises(simclr.UserError, match="nothing to resume"):
        simclr.main(["--resume", str(stopped)])
    path.write_bytes(whole)
    assert simclr.main(["--resume", str(stopped), "--device", "cpu"]) is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["config"].update(new_option=1),
        lambda state: state.pop("random"),
        lambda state: state["encoder"].popitem(),
    ],
)
def test_a_checkpoint_of_another_version(stopped, change):
    path = stopped / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(simclr.UserError, match=r"does not fit this version \(.*\)$"):
        simclr.main(["--resume", str(stopped), "--device", "cpu"])


def test_batches_that_processes_cannot_share(root):
    config = simclr.make_config({"data": "imagefolder", "root": str(root), "size": 8,
                                 "encoder": "convnet", "batch_size": 9, "knn_k": 5})  # fmt: skip
    data = simclr.load_data(config, CPU, 0)
    with pytest.raises(simclr.UserError, match=r"must be a multiple of .* processes \(2\), got 9"):
        simclr.Run(config, data, simclr_session.World(CPU, rank=1, size=2))


def test_resume_takes_no_new_settings(stopped):
    with pytest.raises(simclr.UserError, match="omit --out, --lr"):
        simclr.main(["--resume", str(stopped), "--out", "x", "--lr", "1"])


def test_resume_takes_no_other_data(root, tmp_path):
    run = tmp_path / "run"
    simclr.main(options(root, out=run, epochs=2, stop_after=1))
    (root / "train" / "red" / "0.png").unlink()
    with pytest.raises(simclr.UserError, match="the data are not those that the run began with"):
        simclr.main(["--resume", str(run), "--device", "cpu"])


def test_a_run_is_not_overwritten(stopped, root):
    before = (stopped / "checkpoint.pt").read_bytes()
    with pytest.raises(simclr.UserError, match="holds a run"):
        simclr.main(options(root, out=stopped))
    assert (stopped / "checkpoint.pt").read_bytes() == before


def test_a_full_disk_keeps_the_last_checkpoint(stopped, monkeypatch):
    before = (stopped / "checkpoint.pt").read_bytes()

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(simclr_session.os, "fsync", full)
    with pytest.raises(simclr.UserError, match=r"cannot write .*No space left.*unchanged"):
        simclr.main(["--resume", str(stopped), "--device", "cpu"])
    assert (stopped / "checkpoint.pt").read_bytes() == before
    assert list(stopped.glob("*.tmp")) == []


def test_a_folder_that_became_read_only(tmp_path, monkeypatch):
    def read_only(*_args, **_options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(simclr.UserError, match=r"cannot write .*Read-only"):
        simclr_session.write_json(tmp_path / "config.json", {})


def test_nan_loss_stops_and_keeps_the_last_checkpoint(stopped, monkeypatch):
    before = (stopped / "checkpoint.pt").read_bytes()

    class NaNLoss(simclr.NTXent):
        def forward(self, *views, **options):
            loss, stats = super().forward(*views, **options)
            return loss * math.nan, stats

    monkeypatch.setattr(simclr, "NTXent", NaNLoss)
    with pytest.raises(simclr.UserError, match="the loss is nan in epoch 2; the checkpoint"):
        simclr.main(["--resume", str(stopped), "--device", "cpu"])
    assert (stopped / "checkpoint.pt").read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(stopped, monkeypatch):
    before = (stopped / "checkpoint.pt").read_bytes()

    def spoil(run, *_args):
        with torch.no_grad():
            next(run.encoder.parameters())[0, 0] = math.nan
        return True

    monkeypatch.setattr(simclr.Run, "train_epoch", spoil)
    with pytest.raises(simclr.UserError, match="the weights are not finite in epoch 2"):
        simclr.main(["--resume", str(stopped), "--device", "cpu"])
    assert (stopped / "checkpoint.pt").read_bytes() == before


def test_an_image_that_breaks_in_the_course_of_training(tmp_path, monkeypatch):
    """The steps before it are saved; once it is repaired, the run goes on as it would have."""
    root = make_image_folder(tmp_path / "images")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = simclr.main(options(root, out=whole, stream=True))
    steps = []

    def step(run, images, make_views=simclr.Run.make_views):
        steps.append(1)
        if len(steps) == 7:
            for path in (root / "train").rglob("*.png"):
                path.rename(path.with_suffix(".kept"))
                path.write_text("no image")
        return make_views(run, images)

    with monkeypatch.context() as patch:
        patch.setattr(simclr.Run, "make_views", step)
        with pytest.raises(simclr.UserError, match=r"cannot read .*the run is saved: .*--resume"):
            simclr.main(options(root, out=broken, stream=True))
    assert checkpoint(broken)["step"] == 2
    for path in (root / "train").rglob("*.kept"):
        path.rename(path.with_suffix(".png"))
    assert simclr.main(["--resume", str(broken), "--device", "cpu", "--workers", "0"]) == expected
    assert_same(checkpoint(broken), checkpoint(whole))


def test_a_test_image_that_breaks_costs_no_epoch(tmp_path, monkeypatch):
    root = make_image_folder(tmp_path / "images")

    def end_epoch(run, end=simclr.Run.end_epoch):
        next((root / "test").rglob("*.png")).write_text("no image")
        return end(run)

    monkeypatch.setattr(simclr.Run, "end_epoch", end_epoch)
    with pytest.raises(simclr.UserError, match=r"cannot read .*the run is saved: .*--resume"):
        simclr.main(options(root, out=tmp_path / "run", stream=True, eval_every=1))
    assert len(checkpoint(tmp_path / "run")["history"]) == 1


def test_interruption_names_the_way_back(stopped, root, tmp_path, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(simclr, "finish", interrupt)
    with pytest.raises(simclr.UserError, match=r"interrupted; .*--resume"):
        simclr.main(["--resume", str(stopped), "--device", "cpu"])
    assert len(checkpoint(stopped)["history"]) == 2
    monkeypatch.setattr(simclr, "begin", interrupt)
    with pytest.raises(simclr.UserError, match="interrupted; nothing had been learnt"):
        simclr.main(options(root, out=tmp_path / "run"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit(root, tmp_path, number, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = simclr.main(options(root, out=whole))
    steps = []

    def step(run, images, make_views=simclr.Run.make_views):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), number)
        return make_views(run, images)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(simclr.Run, "make_views", step)
        with pytest.raises(SystemExit) as stopped:
            simclr.main(options(root, out=parts))
    assert stopped.value.code == 128 + number
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    said = capsys.readouterr().out
    assert f"epoch 2 after 2 of 5 steps ({number.name}); continue with --resume {parts}" in said
    assert simclr.main(["--resume", str(parts), "--device", "cpu", "--workers", "0"]) == expected
    assert_same(checkpoint(parts), checkpoint(whole))


def test_a_second_signal_acts_at_once():
    # A shell starts a background job with SIGINT ignored, and so would this test then run.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with simclr.StopRequest(None) as stop:
            assert not stop
            signal.raise_signal(signal.SIGINT)
            assert stop
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_clock_stops_a_run_in_stages(root, tmp_path, capsys):
    run = tmp_path / "run"
    assert simclr.main(options(root, out=run, minutes=1e-6)) is None
    assert "epoch 1 after 1 of 5 steps (time is up); continue with" in capsys.readouterr().out
    assert not (run / "results.json").exists()
    assert simclr.main(["--resume", str(run), "--device", "cpu", "--workers", "0"]) is not None


def test_a_process_that_is_told_to_end_leaves_a_run_to_resume(tmp_path):
    small = ("--size", 16, "--train-images", 256, "--batch-size", 32, "--epochs", 500)
    arguments = (*small, "--no-baselines", "--device", "cpu", "--out", "run")
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("epoch    1") for line in lines)
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert "(SIGTERM); continue with --resume run" in said
    assert len(checkpoint(tmp_path / "run")["history"]) >= 1


def test_long_epochs_are_saved_within(root, tmp_path, monkeypatch):
    monkeypatch.setattr(simclr, "LOOK_EVERY", 2)
    steps = []
    monkeypatch.setattr(
        simclr,
        "write_atomically",
        lambda path, write: steps.append(write.args[0]["step"]) if path.suffix == ".pt" else None,
    )
    changes = {"save_minutes": 1e-9, "stop_after": 2, "baselines": False, "eval_every": 4}
    simclr.main(options(root, out=tmp_path / "run", **changes))
    assert steps == [0, 2, 4, 0, 2, 4, 0]


def test_tensorboard(root, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    simclr.main(options(root, out=run, epochs=2, tensorboard=True))
    written = events.EventAccumulator(str(run / "tensorboard")).Reload()
    assert {"loss", "accuracy", "knn", "images per second"} <= set(written.Tags()["scalars"])
    losses = [event.value for event in written.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in checkpoint(run)["history"]])


def test_wrong_session():
    for arguments, message in [
        (["--device", "nonesuch"], "--device nonesuch cannot be used"),
        (["--stop-after", "0"], "--stop-after must be at least 1"),
        (["--workers", "-1"], "--workers must be at least 0"),
    ]:
        with pytest.raises(simclr.UserError, match=message):
            simclr.main(arguments)


def run_script(*arguments, cwd):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_command_line_on_the_default_data(tmp_path):
    small = ("--size", 16, "--train-images", 256, "--batch-size", 64, "--epochs", 1)
    done = run_script(*small, "--no-pictures", "--no-baselines", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "SimCLR" in done.stdout.splitlines()[-2]
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("photos-")
    assert (run / "results.json").exists()


def test_command_line_shows_one_line_for_an_error_in_a_worker(root, tmp_path):
    (root / "test" / "red" / "2.png").write_bytes(b"")
    arguments = options(root, out=tmp_path / "run", stream=True, workers=1)
    done = run_script(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: cannot read")
    assert "2.png" in line
