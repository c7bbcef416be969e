"""A run from its settings to its results: it can be stopped anywhere, and be resumed."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from train import pictures
from train.config import Config, Session, UserError, flag, make_config, parse
from train.data import Data, load_data
from train.evaluate import KNN_TEMPERATURE, Scores, features_of, score, table
from train.learner import Learner, build_augment
from train.system import StopRequest, World, about, enter_world, write_atomically, write_json

CHECKPOINT_FORMAT = "contrastive-kit examples/train, version 1"
LOOK_EVERY = 10  # steps; to read a value waits for the device


@dataclass
class Progress:
    """How far a run has come."""

    history: list[dict[str, float]] = field(default_factory=list)  # a row for each epoch
    baselines: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    seconds: float = 0.0  # of training, in the epochs that are complete
    step: int = 0  # of the epoch that is under way
    sums: Tensor = field(default_factory=lambda: torch.zeros(2))  # loss and accuracy of its steps
    times: dict[str, float] = field(default_factory=dict)  # where its seconds went


class Run:
    """What is learned, how far it has come, and the folder that keeps it."""

    def __init__(self, config: Config, data: Data, world: World, folder: Path) -> None:
        self.config, self.data, self.world, self.folder = config, data, world, folder
        self.steps = len(data.train) // config.batch_size  # an incomplete last batch is left out
        self.learner = Learner(
            config, world, classes=len(data.classes), images=len(data.train), steps=self.steps
        )
        self.progress = Progress(sums=torch.zeros(2, device=world.device))
        self.checkpoint, self.saved = folder / "checkpoint.pt", time.monotonic()
        self.way_back = f"continue with --resume {folder}"
        # what tells the data from other data
        self.fingerprint = {
            "classes": data.classes, "train": len(data.train), "test": len(data.test)
        }  # fmt: skip

    def check_finite(self) -> None:
        """Raise if training has diverged, so that no such state is saved."""
        history, step = self.progress.history, self.progress.step
        loss = float(self.progress.sums[0]) if step or not history else history[-1]["loss"]
        if math.isfinite(loss) and self.learner.is_finite():
            return
        what = "weights are not finite" if math.isfinite(loss) else f"loss is {loss}"
        raise UserError(
            f"the {what} in epoch {len(history) + bool(step)}; the checkpoint from before is kept. "
            "Try a lower --lr or a higher --temperature"
        )

    def save(self) -> None:
        """Save the state; all processes call this, and the first one writes."""
        self.check_finite()
        self.learner.stopwatch.add_to(self.progress.times)
        sums = self.world.mean(self.progress.sums).cpu()
        state = {
            "format": CHECKPOINT_FORMAT,
            "config": asdict(self.config),
            "data": self.fingerprint,
            "progress": {**vars(self.progress), "sums": sums},
            **self.learner.state_dict(),
        }
        if self.world.rank == 0:
            write_atomically(self.checkpoint, partial(torch.save, state))
        self.saved = time.monotonic()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what was saved."""
        if state.get("data") != self.fingerprint:
            raise UserError("the data are not those that the run began with (classes or counts)")
        try:
            self.learner.load_state_dict(state)
            self.progress = Progress(*(state["progress"][f.name] for f in fields(Progress)))
            self.progress.sums = self.progress.sums.to(self.world.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise no_checkpoint(self.checkpoint, error) from error


def read_checkpoint(path: Path) -> tuple[Config, dict[str, Any]]:
    """The settings and the state that a run saved, or a UserError that says what is wrong."""
    if not path.is_file():
        raise UserError(f"nothing to resume: {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is {state['format']!r}, not {CHECKPOINT_FORMAT!r}")
        return Config(**state["config"]), state
    except Exception as error:  # what is no checkpoint can fail in any way
        raise no_checkpoint(path, error) from error


def no_checkpoint(path: Path, error: Exception) -> UserError:
    """What to say of a damaged or foreign file."""
    reason = (str(error).splitlines() or [""])[0]
    return UserError(
        f"{path} is damaged or no checkpoint of this version ({type(error).__name__}: {reason})"
    )


def begin(run: Run, session: Session) -> None:
    """What precedes training: a picture of the pairs, and what training is to be compared with."""
    config, data, world = run.config, run.data, run.world
    if world.rank == 0 and session.pictures:
        # a random stream of its own: whether a picture is drawn changes nothing
        augment = build_augment(config, generator=torch.Generator().manual_seed(config.seed))
        pictures.plot_pairs(data, augment, run.folder / "pairs.png")
    if config.baselines:
        # large images as thumbnails, for the sake of memory
        pixels = nn.Sequential(nn.AdaptiveAvgPool2d(min(32, config.size)), nn.Flatten())
        encoders = {"raw pixels": pixels, "random encoder": run.learner.encoder}
        for name, encoder in encoders.items():
            world.say(f"evaluating {name}")
            features = features_of(encoder, data, config, world)
            run.progress.baselines[name] = tuple(score(features, config, linear=True))
    run.save()  # from here on there is something to resume


def train(run: Run, session: Session, stop: StopRequest) -> bool:
    """Train to the end; False if stopped before."""
    config, world, progress = run.config, run.world, run.progress
    writer = None
    if session.tensorboard and world.rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs tensorboard: pip install tensorboard") from error
        writer = SummaryWriter(str(run.folder / "tensorboard"))
    if progress.baselines:
        world.say(table({name: Scores(*row) for name, row in progress.baselines.items()}, config))
    last = config.epochs
    if session.stop_after is not None:
        last = min(last, len(progress.history) + session.stop_after)
    while (epoch := len(progress.history) + 1) <= last:
        try:
            if not train_epoch(run, session, stop):
                where = f"in epoch {epoch} after {progress.step} of {run.steps} steps"
                world.say(f"stopped {where} ({stop.reason}); {run.way_back}")
                return False
            if epoch % config.eval_every == 0 or epoch == config.epochs:
                features = features_of(run.learner.encoder, run.data, config, world)
                progress.history[-1]["knn"] = score(features, config, linear=False).knn
        except UserError as error:  # an image that cannot be read
            if world.size > 1:  # where saving takes all processes
                raise
            run.save()
            raise UserError(f"{error}; the run is saved: {run.way_back}") from None
        run.save()
        report(run, session, writer)
        if epoch < last and world.any(bool(stop)):
            world.say(f"stopped after epoch {epoch} ({stop.reason}); {run.way_back}")
            return False
    if last < config.epochs:
        world.say(f"stopped after epoch {last} of {config.epochs}; {run.way_back}")
    return last == config.epochs


def train_epoch(run: Run, session: Session, stop: StopRequest) -> bool:
    """The rest of an epoch; False if asked to stop before its end."""
    config, world, progress, stopwatch = run.config, run.world, run.progress, run.learner.stopwatch
    epoch = len(progress.history) + 1
    if progress.step == 0:
        progress.times = {}
    # the order follows from the seed and the epoch, so there is nothing of it to save
    order = torch.randperm(
        len(run.data.train), generator=torch.Generator().manual_seed(config.seed + epoch)
    )
    order = order[: run.steps * config.batch_size].view(run.steps, config.batch_size)
    own = order[progress.step :, run.learner.share]
    bar = tqdm(
        run.data.train.batches(own.flatten(), own.shape[1]),
        f"epoch {epoch}", run.steps, initial=progress.step,
        leave=False, disable=True if world.rank else None,
    )  # fmt: skip
    stopwatch.mark("start")
    for (images, labels), index in zip(bar, own, strict=True):
        stopwatch.mark("data")
        progress.sums += run.learner.update(images, labels, index)
        progress.step += 1
        looks = progress.step % LOOK_EVERY == 0
        if looks:
            loss, accuracy = (progress.sums / progress.step).tolist()
            bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.3f}")
        # several processes have to stop at the same step, and ask each other only now and then
        if progress.step < run.steps and (looks or world.size == 1):
            stopped = world.any(bool(stop))
            due = looks and time.monotonic() - run.saved > 60 * session.save_minutes
            if stopped or (looks and world.any(due)):
                run.save()
                stopwatch.mark("start")
            if stopped:
                bar.close()
                return False
    loss, accuracy = (world.mean(progress.sums) / run.steps).tolist()
    stopwatch.add_to(progress.times)
    progress.history.append({"epoch": epoch, "loss": loss, "accuracy": accuracy})
    progress.seconds += sum(progress.times.values())
    progress.step = 0
    progress.sums.zero_()
    run.check_finite()
    return True


def report(run: Run, session: Session, writer: Any) -> None:
    """Say, draw and log the epoch that is complete."""
    config, world, progress = run.config, run.world, run.progress
    row, seconds = progress.history[-1], sum(progress.times.values())
    rate = run.steps * config.batch_size / seconds
    if world.rank == 0 and session.pictures and "knn" in row:
        baselines = {name: scores[0] for name, scores in progress.baselines.items()}
        pictures.plot_curve(progress.history, baselines, config, run.folder / "curve.png")
    if writer is not None:
        extra = {"images per second": rate}
        extra["learning rate"] = run.learner.schedule.get_last_lr()[0]
        for name, value in {**row, **extra}.items():
            writer.add_scalar(name, value, row["epoch"])
    knn = f"kNN {row['knn']:.3f}" if "knn" in row else ""
    world.say(
        f"epoch {row['epoch']:4d}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  "
        f"{knn:9}  {rate:6.0f} images/s  "
        + " ".join(f"{name} {part / seconds:.0%}" for name, part in progress.times.items())
    )


def finish(run: Run, session: Session) -> dict[str, Scores]:
    """The final evaluation, its pictures and files."""
    config, world, progress = run.config, run.world, run.progress
    encoder, head = run.learner.encoder, run.learner.head
    name = "supervised" if config.supervised else "SimCLR"
    world.say(f"evaluating {name}")
    features = features_of(encoder, run.data, config, world)
    scores = {key: Scores(*row) for key, row in progress.baselines.items()}
    scores[name] = score(features, config, linear=True)
    if config.eval_z:
        projected = features_of(nn.Sequential(encoder, head), run.data, config, world)
        scores[f"{name}, z"] = score(projected, config, linear=True)
    if world.rank == 0:
        write_atomically(run.folder / "encoder.pt", partial(torch.save, encoder.state_dict()))
        if session.pictures:
            pictures.plot_neighbors(features, run.data, run.folder / "neighbors.png")
            pictures.plot_map(features, run.data.classes, config.seed, run.folder / "map.png")
        images = config.epochs * run.steps * config.batch_size
        results: dict[str, Any] = {key: value._asdict() for key, value in scores.items()}
        results |= {
            "kNN settings": {"k": config.knn_k, "temperature": KNN_TEMPERATURE},
            "training": {
                "seconds": progress.seconds, "images per second": images / progress.seconds
            },
            "history": progress.history,
        }  # fmt: skip
        write_json(run.folder / "results.json", results)
    world.say(table(scores, config))
    return scores


def new_folder(out: Path | None, config: Config, world: World) -> Path:
    """An empty run folder with its config.json."""
    recipe = Path(config.recipe).stem
    folder = out or Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if world.rank > 0:
        return folder
    if (folder / "checkpoint.pt").exists():
        raise UserError(f"{folder} holds a run: continue it with --resume, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error}") from error
    write_json(folder / "config.json", {**asdict(config), "about": about(world)})
    return folder


def main(argv: Sequence[str] | None = None) -> dict[str, Scores] | None:
    """Run the command line; returns the final scores, None if stopped before the end."""
    started = time.perf_counter()
    given, session = parse(argv)
    stop = StopRequest(session.minutes)
    if session.resume is None:
        config, checkpoint = make_config(given), None
    elif surplus := [*(["out"] if session.out else []), *given]:
        raise UserError(f"--resume keeps the run's settings; omit {', '.join(map(flag, surplus))}")
    else:
        config, checkpoint = read_checkpoint(session.resume / "checkpoint.pt")
    world = enter_world(session.device)
    data = load_data(config, world.device, session.workers)
    folder = session.resume or new_folder(session.out, config, world)
    run = Run(config, data, world, folder)
    world.say(
        f"{config.data}: {len(data.train)} training and {len(data.test)} test images "
        f"of {len(data.classes)} classes, on {world.device}"
        + (f", {world.size} processes" if world.size > 1 else "")
    )
    scores = None
    try:
        if checkpoint is None:
            begin(run, session)
        else:
            run.restore(checkpoint)
        with stop:
            complete = train(run, session, stop)
        if complete:
            scores = finish(run, session)
    except KeyboardInterrupt:
        kept = run.checkpoint.exists()
        what = f"what was saved is kept: {run.way_back}" if kept else "nothing had been learned"
        raise UserError(f"interrupted; {what}") from None
    if world.size > 1:
        torch.distributed.destroy_process_group()
    if stop.signal is not None and not complete:
        sys.exit(128 + stop.signal)
    if complete:
        passed = time.perf_counter() - started
        world.say(f"{passed:.0f} s in all; pictures and results are in {folder}")
    return scores
