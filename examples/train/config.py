"""The settings of a run: the fields of two dataclasses are the options of one argparse parser.

A recipe is read by the same parser, as if its values stood on the command line: types, choices and
bounds are checked in one place.
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"
BOUNDS = {
    "at_least": lambda value, bound: bound <= value < math.inf,
    "above": lambda value, bound: bound < value < math.inf,
    "at_most": lambda value, bound: value <= bound,
}
TRANSFORMS = ("crop", "flip", "jitter", "gray", "blur", "solarize")


class UserError(Exception):
    """Something that the user can put right; shown as one line, without a traceback."""


def option(default: Any, help: str, **checks: Any) -> Any:
    """A field with its help, in which brackets say what None stands for, and what it may be."""
    return field(default=default, metadata={"help": help, **checks})


@dataclass(frozen=True)
class Config:
    """What defines a run. Each field is a key of a recipe and an option of the command line."""

    recipe: str = option("photos", "name or path of a TOML file that gives the other values")
    data: str = option("photos", "what to train on", choices=("photos", "cifar10", "imagefolder"))
    root: str | None = option(None, "imagefolder: has train/ and test/; cifar10: download folder")
    size: int = option(32, "side of the views in pixels", at_least=8)
    load_size: int | None = option(None, "imagefolder: side to load [size; 8/7 of it from 64 up]")
    stream: bool = option(False, "imagefolder: decode in each epoch even if all fits in memory")
    train_images: int | None = option(
        None, "train on so many, drawn with the seed [all]", at_least=2
    )
    augment: tuple[str, ...] = option(TRANSFORMS[:4], "what makes a view", choices=TRANSFORMS)
    strength: float = option(0.5, "strength of the color jitter", at_least=0)
    crop_min: float = option(
        0.08, "least area of a crop, as a part of the image", above=0, at_most=1
    )
    gray: float = option(0.2, "probability of losing the color", at_least=0, at_most=1)
    encoder: str = option("convnet", "convnet (four layers) or a torchvision ResNet")
    width: int | None = option(None, "convnet: first channels, a multiple of 16 [32]", at_least=16)
    stem: str | None = option(None, "ResNet: [cifar to 64 pixels]", choices=("cifar", "imagenet"))
    norm: str = option("batch", "group has no batch statistics", choices=("batch", "group"))
    head_layers: int = option(2, "layers of the projection head", choices=(0, 1, 2, 3))
    head_hidden: int | None = option(None, "width of its hidden layers [that of h]", at_least=1)
    head_dim: int | None = option(None, "size of z [128; of h without a head]", at_least=1)
    supervised: bool = option(False, "train with the labels instead, as a comparison")
    loss: str = option(
        "ntxent",
        "ntxent, the same without the positive in its denominator, or with running normalizers",
        choices=("ntxent", "decoupled", "sogclr"),
    )
    temperature: float = option(0.2, "temperature of the loss", above=0)
    gamma: float = option(0.9, "sogclr: weight of a batch in its normalizers", above=0, at_most=1)
    epochs: int = option(10, "length of the schedule", at_least=1)
    batch_size: int = option(256, "images per step, over all processes", at_least=2)
    chunk_size: int | None = option(None, "images a process encodes at a time [all]", at_least=1)
    optimizer: str = option("adamw", "optimizer", choices=("adamw", "sgd", "lars"))
    lr: float = option(2e-3, "learning rate before --lr-rule", above=0)
    lr_rule: str = option("linear", "lr · batch / 256, or lr · √batch", choices=("linear", "sqrt"))
    weight_decay: float = option(1e-2, "not applied to biases and normalization", at_least=0)
    warmup_epochs: float | None = option(
        None, "before the cosine [a tenth of --epochs]", at_least=0
    )
    amp: bool = option(False, "bfloat16 autocast")
    channels_last: bool = option(False, "memory format of views and weights")
    compile: bool = option(False, "torch.compile of encoder and head")
    baselines: bool = option(True, "evaluate raw pixels and the random encoder too")
    eval_every: int = option(2, "epochs between kNN evaluations", at_least=1)
    eval_z: bool = option(False, "evaluate z too, at the end")
    knn_k: int = option(20, "neighbors of the kNN evaluation", at_least=1)
    seed: int = option(
        0, "of initial weights, order and augmentation", at_least=0, at_most=2**32 - 1
    )


@dataclass(frozen=True)
class Session:
    """What concerns this call of the command, and not what is learned."""

    out: Path | None = option(None, "new run folder [runs/RECIPE-DATE-TIME]")
    resume: Path | None = option(None, "run folder to continue, with its settings")
    stop_after: int | None = option(None, "stop after so many epochs, to be resumed", at_least=1)
    minutes: float | None = option(None, "stop after so many minutes, to be resumed", above=0)
    save_minutes: float = option(10.0, "minutes between checkpoints in long epochs", above=0)
    device: str | None = option(None, "torch device [cuda if there is one]")
    workers: int | None = option(None, "processes that decode images [cores, up to 16]", at_least=0)
    pictures: bool = option(True, "draw the pictures")
    tensorboard: bool = option(False, "write the curves for TensorBoard too")


def flag(name: str) -> str:
    """The command-line option of a field."""
    return f"--{name.replace('_', '-')}"


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as they are written on the command line."""
    texts = []
    for name, value in settings.items():
        if isinstance(value, bool):
            texts.append(flag(name if value else f"no_{name}"))
        elif isinstance(value, list | tuple):
            texts += [flag(name), *map(str, value)]
        else:
            texts.append(f"{flag(name)}={value}")
    return texts


class Parser(argparse.ArgumentParser):
    """Reads the options that are there, without their defaults; raises what is wrong."""

    def __init__(self, *groups: type) -> None:
        super().__init__(
            "python examples/train", argument_default=argparse.SUPPRESS, allow_abbrev=False
        )
        for options in groups:
            group = self.add_argument_group(options.__name__.lower(), options.__doc__)
            for f in fields(options):
                default, text = f.default, f.metadata["help"]
                if isinstance(default, bool):
                    how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
                else:
                    how = {"type": reader(f), "choices": f.metadata.get("choices")}
                    text += "" if default is None else f" [{default}]"
                if isinstance(default, tuple):
                    how["nargs"] = "*"
                group.add_argument(flag(f.name), help=text, **how)

    def error(self, message: str) -> NoReturn:
        """Raise where argparse would print and exit."""
        raise UserError(message)


def reader(f: Any) -> Any:
    """A function from text to the type of a field, which refuses what is out of its bounds."""
    kind = next(kind for kind in (*get_args(f.type), f.type) if isinstance(kind, type))

    def read(text: str) -> Any:
        value = kind(text)
        for bound, holds in BOUNDS.items():
            if bound in f.metadata and not holds(value, f.metadata[bound]):
                limit = f"{bound.replace('_', ' ')} {f.metadata[bound]}"
                raise argparse.ArgumentTypeError(f"must be {limit}, got {text}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid float value"
    return read


def parse(argv: Sequence[str] | None = None) -> tuple[dict[str, Any], Session]:
    """What the user gave: the settings of the run, and those of this session."""
    given = vars(Parser(Session, Config).parse_args(argv))
    own = {f.name: given.pop(f.name) for f in fields(Session) if f.name in given}
    return given, Session(**own)


def read_recipe(name: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe, on top of those of the recipe that it names as its `base`."""
    path = Path(os.path.abspath(name if name.endswith(".toml") else RECIPES / f"{name}.toml"))
    if path in above:
        raise UserError(f"{path} is its own base")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        base = values.pop("base", None)
        if "recipe" in values or not isinstance(base, str | None):
            raise UserError("the recipe to begin with is `base`, a text")
        values = vars(Parser(Config).parse_args(arguments(values)))
    except OSError as error:
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
        raise UserError(
            f"--recipe must be a .toml file or one of {known}; got {name} ({error.strerror})"
        ) from error
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: {error}") from error
    if base is not None:
        base = str(path.parent / base) if base.endswith(".toml") else base
        values = {**read_recipe(base, (*above, path)), **values}
    return values


def make_config(given: Mapping[str, Any]) -> Config:
    """A recipe, overridden by what the user gave, completed and checked."""
    usual = {"cifar10": "cifar10_resnet18", "imagefolder": "imagefolder_resnet18"}
    recipe = given.get("recipe") or usual.get(given.get("data", "photos"), "photos")
    values = read_recipe(recipe)
    if given.get("data", values.get("data")) != values.get("data"):
        values.pop("root", None)  # it was the other data set's
    config = complete(Config(**{**values, **given, "recipe": recipe}), given)
    if config.data == "imagefolder" and config.root is None:
        raise UserError("--data imagefolder needs --root, a folder with train/ and test/")
    if config.data == "cifar10" and config.size != 32:
        raise UserError(f"--size must be 32 with --data cifar10, got {config.size}")
    if config.load_size is not None and config.load_size < config.size:
        raise UserError(f"--load-size must be at least --size, got {config.load_size}")
    if config.width is not None and config.width % 16:
        raise UserError(f"--width must be a multiple of 16, got {config.width}")
    if not config.warmup_epochs < config.epochs:
        raise UserError(f"--warmup-epochs must be below --epochs, got {config.warmup_epochs}")
    return config


def complete(config: Config, given: Mapping[str, Any]) -> Config:
    """Fill in what follows from other settings, and take out what those leave without meaning.

    Of the latter the user hears who gave it; a recipe may have been meant for the other case.
    """
    convnet, folder = config.encoder == "convnet", config.data == "imagefolder"
    idle = {
        "root": config.data == "photos" and "--data photos",
        "load_size": not folder and f"--data {config.data}",
        "stream": not folder and f"--data {config.data}",
        "stem": convnet and "--encoder convnet",
        "width": not convnet and f"--encoder {config.encoder}",
        "head_hidden": config.head_layers < 2 and f"--head-layers {config.head_layers}",
        "eval_z": config.supervised and "--supervised",
        "chunk_size": config.supervised and "--supervised",
        "loss": config.supervised and "--supervised",
        "gamma": config.loss != "sogclr" and f"--loss {config.loss}",
    }
    for name, cause in idle.items():
        if cause and given.get(name):
            raise UserError(f"{flag(name)} has no meaning with {cause}")
        config = replace(config, **({name: getattr(Config, name)} if cause else {}))
    values: dict[str, Any] = {"warmup_epochs": config.epochs / 10}
    if convnet:
        values["width"] = 32
    else:
        values["stem"] = "cifar" if config.size <= 64 else "imagenet"
    if folder:
        values["load_size"] = config.size if config.size < 64 else round(config.size * 8 / 7)
    missing = {name: value for name, value in values.items() if getattr(config, name) is None}
    # a run may be resumed from another folder
    root = config.root and os.path.abspath(os.path.expanduser(config.root))
    return replace(config, root=root, augment=tuple(config.augment), **missing)
