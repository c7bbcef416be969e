"""Settings: their recipes, the command line, and what is wrong with them."""

import math
from pathlib import Path

import pytest

from train.config import RECIPES, Config, UserError, arguments, make_config, parse


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"root": "x"}, "--root has no meaning with --data photos"),
        ({"stream": True}, "--stream has no meaning with --data photos"),
        ({"stem": "cifar"}, "--stem has no meaning with --encoder convnet"),
        ({"encoder": "resnet18", "width": 32}, "--width has no meaning with --encoder resnet18"),
        ({"head_layers": 1, "head_hidden": 9}, "--head-hidden has no meaning with --head-layers 1"),
        ({"supervised": True, "eval_z": True}, "--eval-z has no meaning with --supervised"),
        ({"supervised": True, "loss": "sogclr"}, "--loss has no meaning with --supervised"),
        ({"gamma": 0.5}, "--gamma has no meaning with --loss ntxent"),
        ({"loss": "sogclr", "gamma": 1.5}, "--gamma: must be at most 1, got 1.5"),
        ({"loss": "nt_xent"}, "--loss: invalid choice: 'nt_xent'"),
        ({"data": "imagefolder"}, "--data imagefolder needs --root"),
        ({"data": "cifar10", "size": 64}, "--size must be 32"),
        ({"width": 40}, "--width must be a multiple of 16, got 40"),
        ({"epochs": 3, "warmup_epochs": 3.0}, "--warmup-epochs must be below --epochs"),
        ({"data": "imagefolder", "root": "x", "load_size": 100}, "--load-size must be at least"),
        ({"temperature": 0.0}, "--temperature: must be above 0, got 0.0"),
        ({"lr": math.nan}, "--lr: must be above 0, got nan"),
        ({"lr": math.inf}, "--lr: must be above 0, got inf"),
        ({"epochs": 0}, "--epochs: must be at least 1, got 0"),
        ({"epochs": "x"}, "--epochs: invalid int value: 'x'"),
        ({"seed": 2**32}, "--seed: must be at most 4294967295"),
        ({"crop_min": 1.5}, "--crop-min: must be at most 1, got 1.5"),
        ({"optimizer": "adam"}, "--optimizer: invalid choice: 'adam'"),
        ({"augment": ["crop", "cut"]}, "--augment: invalid choice: 'cut'"),
        ({"workers": -1}, "--workers: must be at least 0"),
        ({"epoch": 3}, "unrecognized arguments: --epoch=3"),
    ],
)
def test_wrong_settings(given, message):
    with pytest.raises(UserError, match=message):
        make_config(parse(arguments(given))[0])


def test_recipes_are_complete_and_have_their_published_settings():
    names = {path.stem for path in RECIPES.glob("*.toml")}
    assert names >= {"photos", "cifar10_resnet18", "cifar10_resnet18_1000", "imagenet_resnet50"}
    for name in names:
        config = make_config({"recipe": name, "root": "somewhere"} if name != "photos" else {})
        assert config.recipe == name
    assert make_config({}) == Config(warmup_epochs=1.0, width=32)
    cifar = make_config({"recipe": "cifar10_resnet18"})
    assert (cifar.stem, cifar.temperature, cifar.batch_size) == ("cifar", 0.5, 512)
    assert (cifar.strength, cifar.width, cifar.amp) == (0.5, None, True)
    assert "blur" not in cifar.augment
    longer = make_config({"recipe": "cifar10_resnet18_1000"})
    assert (longer.epochs, longer.lr, longer.temperature) == (1000, 0.03, 0.5)
    paper = make_config({"recipe": "imagenet_resnet50", "root": "x", "epochs": 1000})
    assert (paper.optimizer, paper.weight_decay, paper.temperature) == ("lars", 1e-6, 0.1)
    assert (paper.epochs, paper.warmup_epochs, paper.load_size) == (1000, 10, 256)


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "common.toml").write_text('base = "cifar10_resnet18"\nepochs = 3\nlr = 0.5\n')
    recipe = tmp_path / "own.toml"
    recipe.write_text('base = "common.toml"\nlr = 1\naugment = ["crop"]\nchannels_last = false\n')
    config = make_config({"recipe": str(recipe), "batch_size": 64, "amp": False})
    assert (config.encoder, config.epochs, config.lr) == ("resnet18", 3, 1.0)
    assert (config.augment, config.channels_last) == (("crop",), False)
    assert (config.batch_size, config.amp) == (64, False)
    given, _ = parse(["--recipe", str(recipe), "--augment", "crop", "blur", "--no-amp"])
    assert make_config(given).augment == ("crop", "blur")
    assert make_config(parse(["--augment"])[0]).augment == ()


def test_a_recipe_on_other_data():
    given = {"recipe": "cifar10_resnet18", "data": "imagefolder", "root": "images"}
    config = make_config(given)
    assert (config.encoder, config.load_size) == ("resnet18", 32)
    assert config.root == str(Path.cwd() / "images")  # a run may be resumed from another folder
    with pytest.raises(UserError, match="needs --root"):
        make_config({"recipe": "cifar10_resnet18", "data": "imagefolder"})
    # what the recipe says of an encoder is dropped with the encoder, without a complaint
    assert make_config({**given, "encoder": "convnet"}).stem is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "wrong.toml: unrecognized arguments: --epoch=3"),
        ('out = "x"', "wrong.toml: unrecognized arguments: --out=x"),
        ('recipe = "photos"', "wrong.toml: .* `base`"),
        ("base = 3", "wrong.toml: .* `base`"),
        ("epochs = true", "wrong.toml: .*--epochs"),
        ("epochs = 3.5", "wrong.toml: .*--epochs: invalid int value: '3.5'"),
        ("epochs = 0", "wrong.toml: .*--epochs: must be at least 1"),
        ("amp = 1", "wrong.toml: .*--amp"),
        ("epochs = ", "wrong.toml: "),
        ('base = "nonesuch"', "--recipe must be a .toml file or one of .*photos.*; got nonesuch"),
    ],
)
def test_wrong_recipes(tmp_path, text, message):
    recipe = tmp_path / "wrong.toml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=message):
        make_config({"recipe": str(recipe)})


@pytest.mark.parametrize("base", ["{folder}/second.toml", "../{name}/second.toml"])
def test_recipes_in_a_circle(tmp_path, base):
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(f'base = "{base.format(folder=tmp_path, name=tmp_path.name)}"')
    second.write_text(f'base = "{first}"')
    with pytest.raises(UserError, match=r"first.toml is its own base"):
        make_config({"recipe": str(first)})
