"""The settings of examples/simclr.py: what there is, the recipes, and the command line."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"
TRANSFORMS = ("crop", "flip", "jitter", "gray", "blur", "solarize")


class UserError(Exception):
    """Something that the user can put right; shown as one line, without a traceback."""


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of Config; `least` and `above` are bounds, with and without equality."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Config:
    """What defines a run. Each field is a key of a recipe and an option of the command line."""

    recipe: str = option("photos", "name or path of a TOML file that gives the other values")
    data: str = option("photos", "what to train on", choices=("photos", "cifar10", "imagefolder"))
    root: str | None = option(None, "imagefolder: has train/ and test/; cifar10: download folder")
    size: int = option(32, "side of the views in pixels", least=8)
    load_size: int | None = option(
        None, "imagefolder: side that images are kept at [size; from 64 pixels up, 8/7 of it]"
    )
    stream: bool = option(False, "imagefolder: decode in each epoch even if all fits in memory")
    train_images: int | None = option(
        None, "train on this many, drawn with the seed [all]", least=2
    )
    augment: tuple[str, ...] = option(
        ("crop", "flip", "jitter", "gray"), "transforms that make a view", choices=TRANSFORMS
    )
    strength: float = option(0.5, "strength of the colour jitter", least=0)
    crop_min: float = option(0.08, "least area of a crop, as a part of the image", above=0, most=1)
    gray: float = option(0.2, "probability of losing the colour", least=0, most=1)
    encoder: str = option("convnet", "convnet (four layers) or a torchvision ResNet")
    width: int | None = option(
        None, "channels of the convnet's first layer, a multiple of 16 [32]", least=16
    )
    stem: str | None = option(
        None, "of a ResNet [cifar up to 64 pixels]", choices=("cifar", "imagenet")
    )
    norm: str = option(
        "batch", "normalisation; group has no batch statistics", choices=("batch", "group")
    )
    head_layers: int = option(2, "layers of the projection head", choices=(0, 1, 2, 3))
    head_hidden: int | None = option(None, "width of its hidden layers [that of h]", least=1)
    head_dim: int | None = option(None, "size of z [128; of h without a head]", least=1)
    supervised: bool = option(False, "train with the labels instead, as a comparison")
    temperature: float = option(0.2, "temperature of NT-Xent", above=0)
    epochs: int = option(10, "length of the schedule", least=1)
    batch_size: int = option(256, "images per step, over all processes", least=2)
    chunk_size: int | None = option(
        None, "images per process that are encoded at a time, by GradCache [all]", least=1
    )
    optimizer: str = option("adamw", "optimiser", choices=("adamw", "sgd", "lars"))
    lr: float = option(2e-3, "learning rate before --lr-rule", above=0)
    lr_rule: str = option(
        "linear", "peak: lr · batch / 256, or lr · √batch", choices=("linear", "sqrt")
    )
    weight_decay: float = option(1e-2, "not applied to biases and normalisation", least=0)
    warmup_epochs: float | None = option(
        None, "linear warm-up, then a cosine to zero [a tenth of --epochs]", least=0
    )
    amp: bool = option(False, "bfloat16 autocast")
    channels_last: bool = option(False, "memory format of views and weights")
    compile: bool = option(False, "torch.compile of encoder and head")
    baselines: bool = option(True, "evaluate raw pixels and the random encoder too")
    eval_every: int = option(2, "epochs between kNN evaluations", least=1)
    eval_z: bool = option(False, "evaluate z too, at the end")
    knn_k: int = option(20, "neighbours of the kNN evaluation", least=1)
    seed: int = option(0, "of initial weights, order and augmentation", least=0, most=2**32 - 1)


RECIPE_OF_DATA = {
    "photos": "photos",
    "cifar10": "cifar10_resnet18",
    "imagefolder": "imagefolder_resnet18",
}
ONLY_FOR = {
    "root": ("cifar10", "imagefolder"),
    "load_size": ("imagefolder",),
    "stream": ("imagefolder",),
}


def flag(name: str) -> str:
    """The command-line option of a field."""
    return f"--{name.replace('_', '-')}"


def read_recipe(name: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe, on top of those of the recipe that it names as its `base`."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    path = Path(os.path.abspath(path))
    if path in above:
        raise UserError(f"{path} is its own base")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
        raise UserError(
            f"--recipe must be a .toml file or one of {known}; got {name} ({error.strerror})"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no TOML file: {error}") from error
    unknown = sorted(
        set(values) - {f.name for f in fields(Config) if f.name != "recipe"} - {"base"}
    )
    if unknown:
        raise UserError(f"{path} has keys that are no settings: {', '.join(unknown)}")
    base = values.pop("base", None)
    for f in fields(Config):
        if f.name in values:
            values[f.name] = checked_type(f, values[f.name], f"{f.name} in {path}")
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"base in {path} must be of type str, got {base!r}")
    if base.endswith(".toml"):
        base = str(path.parent / base)
    return {**read_recipe(base, (*above, path)), **values}


def kind(f: Any) -> type:
    """The type of a field's values, None apart."""
    if f.name == "augment":
        return tuple
    expected: type = f.type if isinstance(f.type, type) else get_args(f.type)[0]
    return expected


def checked_type(f: Any, value: Any, name: str) -> Any:
    """A value of a recipe in the type of its field."""
    expected = kind(f)
    if expected is float and type(value) is int:
        value = float(value)
    if expected is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not expected:
        raise UserError(f"{name} must be of type {expected.__name__}, got {value!r}")
    return value


def check_range(config: Config) -> None:
    """Raise for a value outside the bounds or the choices of its field."""
    for f in fields(config):
        value, bounds = getattr(config, f.name), f.metadata
        if value is None:
            continue
        for each in value if isinstance(value, tuple) else (value,):
            if "choices" in bounds and each not in bounds["choices"]:
                choices = ", ".join(map(str, bounds["choices"]))
                raise UserError(f"{flag(f.name)} must be one of {choices}; got {each}")
        if "least" in bounds and not bounds["least"] <= value < math.inf:
            raise UserError(f"{flag(f.name)} must be at least {bounds['least']}, got {value}")
        if "above" in bounds and not bounds["above"] < value < math.inf:
            raise UserError(f"{flag(f.name)} must be above {bounds['above']}, got {value}")
        if "most" in bounds and value > bounds["most"]:
            raise UserError(f"{flag(f.name)} must be at most {bounds['most']}, got {value}")


def make_config(given: dict[str, Any]) -> Config:
    """A recipe, overridden by what the user gave, checked and completed."""
    recipe = given.get("recipe") or RECIPE_OF_DATA.get(given.get("data", "photos"), "photos")
    values = read_recipe(recipe)
    if given.get("data", values.get("data")) != values.get("data"):
        values.pop("root", None)  # it was the other data set's
    config = Config(**{**values, **given, "recipe": recipe})
    config = replace(config, root=absolute(config.root))
    check_range(config)
    for name, data_sets in ONLY_FOR.items():
        if name in given and config.data not in data_sets:
            raise UserError(f"{flag(name)} has no meaning with --data {config.data}")
    if config.warmup_epochs is None:
        config = replace(config, warmup_epochs=config.epochs / 10)
    if config.warmup_epochs >= config.epochs:
        raise UserError(
            f"--warmup-epochs must be below --epochs ({config.epochs}), got {config.warmup_epochs}"
        )
    config = complete_encoder(config, given)
    if config.head_layers < 2 and config.head_hidden is not None:
        if "head_hidden" in given:
            raise UserError("--head-hidden has no meaning below --head-layers 2")
        config = replace(config, head_hidden=None)
    if config.supervised and (config.eval_z or config.chunk_size):
        raise UserError("--eval-z and --chunk-size have no meaning with --supervised")
    if config.data == "cifar10" and config.size != 32:
        raise UserError(f"--size must be 32 with --data cifar10, got {config.size}")
    return complete_image_folder(config) if config.data == "imagefolder" else config


def complete_encoder(config: Config, given: dict[str, Any]) -> Config:
    """Check and fill in what only one kind of encoder has."""
    convnet = config.encoder == "convnet"
    without_meaning = "stem" if convnet else "width"
    if getattr(config, without_meaning) is not None:
        if without_meaning in given:
            raise UserError(f"--{without_meaning} has no meaning with --encoder {config.encoder}")
        config = replace(config, **{without_meaning: None})  # it was the recipe's
    if convnet:
        width = config.width or 32
        if width % 16:
            raise UserError(f"--width must be a multiple of 16, got {width}")
        return replace(config, width=width)
    return replace(config, stem=config.stem or ("cifar" if config.size <= 64 else "imagenet"))


def absolute(path: str | None) -> str | None:
    """The same place from any folder: the run may be resumed from another one."""
    return None if path is None else os.path.abspath(os.path.expanduser(path))


def complete_image_folder(config: Config) -> Config:
    """Check and fill in what only an image folder has."""
    if config.root is None:
        raise UserError("--data imagefolder needs --root, a folder with train/ and test/")
    if config.load_size is None:
        kept = config.size if config.size < 64 else round(config.size * 8 / 7)
        return replace(config, load_size=kept)
    if config.load_size < config.size:
        raise UserError(
            f"--load-size must be at least --size ({config.size}), got {config.load_size}"
        )
    return config


@dataclass(frozen=True)
class Session:
    """What concerns this call of the script, and not what is learnt."""

    out: Path | None = field(
        default=None, metadata={"help": "new run folder [runs/RECIPE-DATE-TIME]"}
    )
    resume: Path | None = field(
        default=None, metadata={"help": "run folder to continue, with its settings"}
    )
    stop_after: int | None = option(None, "stop after so many epochs, to be resumed", least=1)
    minutes: float | None = option(None, "stop after so many minutes, to be resumed", above=0)
    save_minutes: float = option(10.0, "minutes between checkpoints in long epochs", above=0)
    device: str | None = option(None, "torch device [cuda if there is one]")
    workers: int | None = option(None, "processes that decode images [cores, up to 16]", least=0)
    pictures: bool = option(True, "draw the pictures")
    tensorboard: bool = option(False, "write the curves for TensorBoard too")


def parse(argv: Sequence[str] | None) -> tuple[dict[str, Any], Session]:
    """What the user gave: the settings of the run, and those of this session."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate SimCLR.", argument_default=argparse.SUPPRESS
    )
    for title, kinds in (
        ("session", Session),
        ("run; values in brackets are defaults, of photos", Config),
    ):
        group = parser.add_argument_group(title)
        for f in fields(kinds):
            name, text = flag(f.name), f.metadata["help"]
            if kind(f) is bool:
                group.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
            elif kind(f) is tuple:
                text += f" [{' '.join(f.default)}]"
                group.add_argument(name, nargs="*", choices=f.metadata["choices"], help=text)
            else:
                text += f" [{f.default}]" if f.default is not None else ""
                choices = f.metadata.get("choices")
                group.add_argument(name, type=kind(f), choices=choices, help=text)
    given = vars(parser.parse_args(argv))
    if "augment" in given:
        given["augment"] = tuple(given["augment"])
    own = {f.name: given.pop(f.name) for f in fields(Session) if f.name in given}
    session = Session(**own)
    check_range(session)
    return given, session
