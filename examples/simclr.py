"""SimCLR from start to finish: data, two views, encoder, head, NT-Xent, evaluation.

    python examples/simclr.py                                  # photos: two minutes on a CPU
    python examples/simclr.py --recipe cifar10_resnet18        # 100 epochs, on a GPU
    python examples/simclr.py --data imagefolder --root PATH   # PATH/train/CLASS/*.jpg, PATH/test/…
    python examples/simclr.py --resume runs/RUN                # continue an interrupted run
    torchrun --nproc-per-node 8 examples/simclr.py --recipe imagenet_resnet50 --root PATH

A recipe is a file in examples/recipes or of your own; each of its values is an option of the
command line too (--help). The default data need no download: patches of photographs that ship
inside scikit-image and scikit-learn. The task is to tell which photograph an unseen patch comes
from; training patches are cut from the left half of each photograph, test patches from the right.

A run folder holds config.json (settings, versions, seed, commit), pairs.png (what the augmentation
does), curve.png, neighbours.png and map.png (what was learnt), checkpoint.pt (everything that
--resume needs), encoder.pt and results.json.

This file is the model, the training and the evaluation. Beside it are the settings
(simclr_settings.py), the data (simclr_data.py), the pictures (simclr_pictures.py), and what has to
do with processes, signals and files (simclr_session.py).
"""

import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch loads: threads that wait asleep. Where other programs use the same cores,
# threads that wait busily make a step several times slower.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from simclr_data import Data, load_data
from simclr_pictures import plot_curve, plot_map, plot_neighbours, plot_pairs
from simclr_session import (
    StopRequest,
    Stopwatch,
    World,
    about,
    enter_world,
    write_atomically,
    write_json,
)
from simclr_settings import Config, Session, UserError, flag, make_config, parse
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from contrastive_kit import GradCache, NTXent, ProjectionHead, SimCLRAugment, resnet_encoder
from contrastive_kit.augment.simclr import IMAGENET_NORMALIZATION
from contrastive_kit.evaluation import extract_features, knn_accuracy, linear_probe

KNN_TEMPERATURE = 0.1
CHECKPOINT_FORMAT = "contrastive-kit examples/simclr.py, version 2"
LOOK_EVERY = 10  # steps; to read a value waits for the device


def small_convnet(width: int) -> nn.Module:
    """Four 3x3 convolutions, for the photographs: enough to learn from, quick on a CPU."""
    layers: list[nn.Module] = []
    for i, (out, stride) in enumerate([(1, 2), (2, 2), (4, 2), (8, 1)]):
        channels = 3 if i == 0 else width * out // 2
        layers += [
            nn.Conv2d(channels, width * out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width * out),
            nn.ReLU(inplace=True),
        ]
    encoder: Any = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder.out_dim = 8 * width
    return encoder


def use_group_norm(module: nn.Module) -> None:
    """Put group normalisation in the place of batch normalisation: no sample sees another."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(16, child.num_features))
        use_group_norm(child)


def share_statistics(model: nn.Sequential, world: World) -> nn.Sequential:
    """Normalise by the batch of all processes: by its own, a process could tell its images."""
    if world.device.type == "cuda":
        synchronised: nn.Sequential = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return synchronised
    world.say(
        "each process normalises by its own images, since SyncBatchNorm needs CUDA; "
        "--norm group has no batch statistics"
    )
    return model


def build_model(config: Config, classes: int) -> nn.Sequential:
    """Encoder and projection head (or classifier, if supervised), with random weights."""
    try:
        encoder: Any
        if config.encoder == "convnet":
            encoder = small_convnet(config.width or 32)
        else:
            stem: Any = config.stem
            encoder = resnet_encoder(config.encoder, stem=stem)
        if config.norm == "group":
            use_group_norm(encoder)
        if config.supervised:
            return nn.Sequential(encoder, nn.Linear(encoder.out_dim, classes))
        head = ProjectionHead(
            encoder.out_dim,
            config.head_hidden,
            config.head_dim or (encoder.out_dim if config.head_layers == 0 else 128),
            layers=config.head_layers,
            batch_norm=config.norm == "batch",
        )
        return nn.Sequential(encoder, head)
    except ValueError as error:
        raise UserError(str(error)) from error


def build_augment(config: Config, **options: Any) -> SimCLRAugment:
    """The views of the paper, less the transforms that the settings leave out."""
    used = set(config.augment)
    whole = (1.0, 1.0)
    return SimCLRAugment(
        config.size,
        views=1 if config.supervised else 2,
        strength=config.strength,
        scale=(config.crop_min, 1.0) if "crop" in used else whole,
        ratio=(3 / 4, 4 / 3) if "crop" in used else whole,
        flip=0.5 if "flip" in used else 0.0,
        jitter=0.8 if "jitter" in used else 0.0,
        grayscale=config.gray if "gray" in used else 0.0,
        blur="blur" in used,
        solarize=0.2 if "solarize" in used else 0.0,
        **options,
    )


def build_optimizer(
    config: Config, modules: Iterable[nn.Module], *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum or LARS, the learning rate scaled to the batch."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    scale = config.batch_size / 256 if config.lr_rule == "linear" else math.sqrt(config.batch_size)
    lr = config.lr * scale
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=fused)
    try:
        from timm.optim import Lars
    except ImportError as error:
        raise UserError("--optimizer lars needs timm: pip install timm") from error
    # a group without weight decay is left out of the adaptation too
    optimizer: torch.optim.Optimizer = Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)
    return optimizer


def warmup_cosine(step: int, warmup: float, total: int) -> float:
    """Factor of the peak learning rate at `step`, 0 … total - 1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Scores(NamedTuple):
    """Accuracies on the test set, and the penalty that the linear probe chose."""

    knn: float
    linear: float | None = None
    l2: float | None = None


def features_of(encoder: nn.Module, data: Data, config: Config, world: World) -> list[Tensor]:
    """Features and labels of the training set and of the test set, the encoder being frozen."""
    preprocess = nn.Sequential(v2.CenterCrop(config.size), v2.Normalize(*IMAGENET_NORMALIZATION))
    frozen = nn.Sequential(preprocess, encoder)
    world.share_buffers(encoder)
    result: list[Tensor] = []
    for part in (data.train, data.test):
        own = torch.arange(len(part))[world.rank :: world.size]
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.amp):
            rows = extract_features(frozen, part.batches(own, 512))
        result += [world.interleave(x, len(part)) for x in rows]
    return result


def score(features: Sequence[Tensor], config: Config, *, linear: bool) -> Scores:
    """The accuracy of the nearest neighbours, and of a linear classifier."""
    knn = knn_accuracy(*features, k=config.knn_k, temperature=KNN_TEMPERATURE).accuracy
    if not linear:
        return Scores(knn)
    probe = linear_probe(*features)
    return Scores(knn, probe.accuracy, probe.l2)


def raw_pixels(config: Config) -> nn.Module:
    """Pixels as features; large images as thumbnails, for the sake of memory."""
    shrink = nn.AdaptiveAvgPool2d(32) if config.size > 32 else nn.Identity()
    return nn.Sequential(shrink, nn.Flatten())


def table(scores: dict[str, Scores], config: Config) -> str:
    """The scores as text."""
    lines = [f"{'':28}{f'kNN (k={config.knn_k})':>14}{'linear probe':>16}"]
    lines += [f"{name:28}{s.knn:14.3f}{s.linear:16.3f}" for name, s in scores.items()]
    return "\n".join(lines)


class Run:
    """Everything that changes in the course of training, and can be saved and restored."""

    MODULES = ("encoder", "head", "optimizer", "schedule")

    def __init__(self, config: Config, data: Data, world: World) -> None:
        self.config, self.data, self.world = config, data, world
        self.steps = len(data.train) // config.batch_size  # an incomplete last batch is left out
        if config.batch_size % world.size:
            raise UserError(
                f"--batch-size must be a multiple of the number of processes ({world.size}), "
                f"got {config.batch_size}"
            )
        share = config.batch_size // world.size
        self.own = slice(world.rank * share, (world.rank + 1) * share)

        torch.manual_seed(config.seed)
        model = build_model(config, len(data.classes)).to(world.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if world.size > 1 and config.norm == "batch":
            model = share_statistics(model, world)
        self.encoder, self.head = model
        self.optimizer = build_optimizer(config, model, fused=world.device.type == "cuda")
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: warmup_cosine(
                step, (config.warmup_epochs or 0) * self.steps, config.epochs * self.steps
            ),
        )
        if config.compile:
            model.compile()
        self.network: Any = model
        if world.size > 1:
            local = [world.device.index] if world.device.type == "cuda" else None
            self.network = nn.parallel.DistributedDataParallel(model, device_ids=local)
        if config.chunk_size is not None:
            self.network = GradCache(self.network, chunk_size=config.chunk_size)

        # on the CPU, where the same seed gives the same order and the same views for any device
        self.order = torch.Generator().manual_seed(config.seed)
        self.views = torch.Generator().manual_seed(config.seed + 1)
        self.augment = build_augment(
            config,
            normalize=IMAGENET_NORMALIZATION,
            generator=self.views,
            # what the first convolution makes of them under autocast anyway
            dtype=torch.bfloat16 if config.amp else torch.float32,
            memory_format=torch.channels_last if config.channels_last else torch.contiguous_format,
        )
        self.criterion = NTXent(config.temperature, gather_distributed=world.size > 1)
        self.history: list[dict[str, float]] = []
        self.baselines: dict[str, Scores] = {}
        self.step = 0  # of the epoch that is under way
        self.sums = torch.zeros(2, device=world.device)  # loss and accuracy of its steps
        self.epoch_order = self.order.get_state()
        self.stopwatch = Stopwatch(world.device)
        self.seconds = 0.0  # of training, over all sessions
        self.started: float | None = None

    def make_views(self, images: Tensor) -> Tensor:
        """All views of this process's images, view by view.

        The random numbers are those of the whole batch, whatever the number of processes.
        """
        whole = images[:1].expand(self.config.batch_size, -1, -1, -1)
        params = self.augment.draw(whole)[:, self.own]
        views: Tensor = self.augment(images, params=params, concat=True)
        return views

    def forward(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy. Both views go through the encoder in one forward pass.

        With a pass for each, the statistics of batch normalisation would tell the views apart.
        """
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.amp):
            if self.config.supervised:
                z = (self.network(views),)
            elif self.config.chunk_size is not None:
                z = self.network.views(*views.chunk(2))
            else:
                z = self.network(views).chunk(2)
        self.stopwatch.mark("encoder")
        z[0].register_hook(lambda _: self.stopwatch.mark("loss"))  # when its backward is done
        if self.config.supervised:
            accuracy = (z[0].argmax(dim=1) == labels).float().mean()
            return F.cross_entropy(z[0].float(), labels), accuracy
        loss, stats = self.criterion(*z, return_stats=True)
        return loss, stats.accuracy

    def train_epoch(self, stop: StopRequest, save: "Saver") -> bool:
        """The rest of an epoch; False if asked to stop before its end."""
        self.encoder.train()
        self.head.train()
        config, epoch = self.config, len(self.history) + 1
        self.epoch_order = self.order.get_state()
        order = torch.randperm(len(self.data.train), generator=self.order)
        order = order[: self.steps * config.batch_size].view(self.steps, config.batch_size)
        own = order[self.step :, self.own]
        batches = self.data.train.batches(own.flatten(), own.shape[1])
        hidden = True if self.world.rank else None
        progress = tqdm(
            batches, f"epoch {epoch}", self.steps, initial=self.step, leave=False, disable=hidden
        )
        self.started = time.perf_counter()
        self.stopwatch.mark("start")
        for images, labels in progress:
            self.stopwatch.mark("data")
            views = self.make_views(images)
            self.stopwatch.mark("views")
            loss, accuracy = self.forward(views, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.stopwatch.mark("encoder")
            self.optimizer.step()
            self.schedule.step()
            self.sums += torch.stack([loss.detach(), accuracy])
            self.step += 1
            self.stopwatch.mark("update")
            looks = self.step % LOOK_EVERY == 0
            if looks:
                loss_so_far, accuracy_so_far = (self.sums / self.step).tolist()
                progress.set_postfix(loss=f"{loss_so_far:.3f}", acc=f"{accuracy_so_far:.3f}")
            # several processes have to stop at the same step, and ask each other only now and then
            if self.step < self.steps and (looks or self.world.size == 1):
                stopped = self.world.any(bool(stop))
                if stopped or (looks and self.world.any(save.is_due())):
                    save(self)
                if stopped:
                    progress.close()
                    return False
        return True

    def end_epoch(self) -> dict[str, float]:
        """The means of a complete epoch, which join the history."""
        loss, accuracy = (self.world.mean(self.sums) / self.steps).tolist()
        row = {"epoch": len(self.history) + 1, "loss": loss, "accuracy": accuracy}
        self.history.append(row)
        self.seconds, self.started = self.seconds_so_far(), None
        self.step = 0
        self.sums.zero_()
        return row

    def seconds_so_far(self) -> float:
        """The time that training took, evaluations apart."""
        return self.seconds + (time.perf_counter() - self.started if self.started else 0.0)

    def check_finite(self) -> None:
        """Raise if training has diverged, so that no such state is saved."""
        loss = float(self.sums[0]) if self.step else self.history[-1]["loss"] if self.history else 0
        weights = [
            p.isfinite().all() for p in (*self.encoder.parameters(), *self.head.parameters())
        ]
        if math.isfinite(loss) and bool(torch.stack(weights).all()):
            return
        epoch = len(self.history) + (1 if self.step else 0)
        what = "weights are not finite" if math.isfinite(loss) else f"loss is {loss}"
        raise UserError(
            f"the {what} in epoch {epoch}; the checkpoint from before is kept. "
            "Try a lower --lr or a higher --temperature"
        )

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, enough to go on as if there had been no break."""
        cuda = self.world.device.type == "cuda"
        return {
            "history": self.history,
            "baselines": {name: tuple(scores) for name, scores in self.baselines.items()},
            "seconds": self.seconds_so_far(),
            "step": self.step,
            "sums": self.world.mean(self.sums).cpu(),
            "random": {
                "default": torch.get_rng_state(),
                "device": torch.cuda.get_rng_state(self.world.device) if cuda else None,
                "order": self.epoch_order if self.step else self.order.get_state(),
                "views": self.views.get_state(),
            },
            **{name: getattr(self, name).state_dict() for name in self.MODULES},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        try:
            for name in self.MODULES:
                getattr(self, name).load_state_dict(state[name])
            torch.set_rng_state(state["random"]["default"])
            if state["random"]["device"] is not None and self.world.device.type == "cuda":
                torch.cuda.set_rng_state(state["random"]["device"], self.world.device)
            self.order.set_state(state["random"]["order"])
            self.views.set_state(state["random"]["views"])
            self.seconds = state["seconds"]
            self.step = state["step"]
            self.sums = state["sums"].to(self.world.device)
            self.history = state["history"]
            self.baselines = {name: Scores(*scores) for name, scores in state["baselines"].items()}
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise misfit(error) from error


class Saver:
    """Writes the checkpoint of a run, at the end of each epoch and now and then within one."""

    def __init__(self, folder: Path, data: Data, config: Config, session: Session) -> None:
        self.path, self.config = folder / "checkpoint.pt", config
        self.fingerprint = {
            "classes": data.classes, "train": len(data.train), "test": len(data.test)
        }  # fmt: skip
        self.seconds, self.last = 60 * session.save_minutes, time.monotonic()

    def is_due(self) -> bool:
        """Whether the last checkpoint is as old as one may become."""
        return time.monotonic() - self.last > self.seconds

    def __call__(self, run: Run) -> None:
        """Save the state; all processes call this, and the first one writes."""
        run.check_finite()
        state = {
            "format": CHECKPOINT_FORMAT,
            "config": asdict(self.config),
            "data": self.fingerprint,
            **run.state(),
        }
        if run.world.rank == 0:
            write_atomically(self.path, partial(torch.save, state))
        self.last = time.monotonic()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that a Saver saved, or a UserError that says what is wrong with the file."""
    if not path.is_file():
        raise UserError(f"nothing to resume: {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no checkpoint can fail to load in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this script ({CHECKPOINT_FORMAT})")
    return state


def misfit(error: Exception) -> UserError:
    """A checkpoint of this script that another version wrote, or that somebody changed."""
    reason = " ".join(str(error).split())
    return UserError(f"the checkpoint does not fit this version ({type(error).__name__}: {reason})")


def begin(run: Run, folder: Path, session: Session) -> None:
    """What precedes training: a picture of the pairs, and what training is to be compared with."""
    config, data, world = run.config, run.data, run.world
    if world.rank == 0 and session.pictures:
        chosen = torch.linspace(0, len(data.train) - 1, 10).long()
        # a random stream of its own: whether a picture is drawn changes nothing
        augment = build_augment(config, generator=torch.Generator().manual_seed(config.seed))
        images, _ = next(data.train.batches(chosen, len(chosen)))
        plot_pairs(images.float() / 255, augment(images), folder / "pairs.png")
    if config.baselines:
        for name, encoder in [("raw pixels", raw_pixels(config)), ("random encoder", run.encoder)]:
            world.say(f"evaluating {name}")
            features = features_of(encoder, data, config, world)
            run.baselines[name] = score(features, config, linear=True)


def train(run: Run, folder: Path, session: Session, stop: StopRequest, save: Saver) -> bool:
    """Train to the end; False if stopped before."""
    config, world = run.config, run.world
    writer = open_tensorboard(folder) if session.tensorboard and world.rank == 0 else None
    if run.baselines:
        world.say(table(run.baselines, config))
    first = len(run.history)
    while (epoch := len(run.history) + 1) <= config.epochs:
        if session.stop_after is not None and epoch > first + session.stop_after:
            world.say(f"stopped after epoch {epoch - 1} of {config.epochs}; {way_back(folder)}")
            return False
        steps, started = run.steps - run.step, time.perf_counter()
        try:
            complete = run.train_epoch(stop, save)
        except UserError as error:
            raise saved_at(error, run, folder, save) from None
        if not complete:
            world.say(
                f"stopped in epoch {epoch} after {run.step} of {run.steps} steps "
                f"({stop.reason}); {way_back(folder)}"
            )
            return False
        row = run.end_epoch()
        rate = steps * config.batch_size / (time.perf_counter() - started)
        run.check_finite()
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            try:
                features = features_of(run.encoder, run.data, config, world)
            except UserError as error:
                raise saved_at(error, run, folder, save) from None
            row["knn"] = score(features, config, linear=False).knn
        save(run)
        shares = run.stopwatch.shares()
        if world.rank == 0 and session.pictures and "knn" in row:
            baselines = {name: scores.knn for name, scores in run.baselines.items()}
            plot_curve(run.history, baselines, config, folder / "curve.png")
        if writer is not None:
            for name in row.keys() - {"epoch"}:
                writer.add_scalar(name, row[name], epoch)
            writer.add_scalar("images per second", rate, epoch)
            writer.add_scalar("learning rate", run.schedule.get_last_lr()[0], epoch)
        world.say(
            f"epoch {epoch:4d}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  "
            + (f"kNN {row['knn']:.3f}  " if "knn" in row else " " * 11)
            + f"{rate:6.0f} images/s  "
            + " ".join(f"{name} {share:.0%}" for name, share in shares.items())
        )
        if epoch < config.epochs and world.any(bool(stop)):
            world.say(f"stopped after epoch {epoch} ({stop.reason}); {way_back(folder)}")
            return False
    return True


def finish(run: Run, folder: Path, session: Session) -> dict[str, Scores]:
    """The final evaluation, its pictures and files."""
    config, world = run.config, run.world
    name = "supervised" if config.supervised else "SimCLR"
    world.say(f"evaluating {name}")
    features = features_of(run.encoder, run.data, config, world)
    scores = {**run.baselines, name: score(features, config, linear=True)}
    if config.eval_z:
        projected = features_of(nn.Sequential(run.encoder, run.head), run.data, config, world)
        scores[f"{name}, z"] = score(projected, config, linear=True)
    if world.rank == 0:
        write_atomically(folder / "encoder.pt", partial(torch.save, run.encoder.state_dict()))
        if session.pictures:
            plot_neighbours(features, run.data, folder / "neighbours.png")
            plot_map(features[2], features[3], run.data.classes, config.seed, folder / "map.png")
        results: dict[str, Any] = {key: value._asdict() for key, value in scores.items()}
        results["kNN settings"] = {"k": config.knn_k, "temperature": KNN_TEMPERATURE}
        results["training"] = {
            "seconds": run.seconds,
            "images per second": config.epochs * run.steps * config.batch_size / run.seconds,
        }
        results["history"] = run.history
        write_json(folder / "results.json", results)
    world.say(table(scores, config))
    return scores


def saved_at(error: UserError, run: Run, folder: Path, save: Saver) -> UserError:
    """Save a run that met an image it cannot read; processes cannot, since it takes them all."""
    if run.world.size > 1:
        return error
    save(run)
    return UserError(f"{error}; the run is saved: {way_back(folder)}")


def way_back(folder: Path) -> str:
    """How to go on."""
    return f"continue with --resume {folder}"


def open_tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard's files into the run folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"))


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


def prepare(given: dict[str, Any], session: Session) -> tuple[Config, dict[str, Any] | None]:
    """The settings, and the checkpoint to go on from if there is one."""
    if session.resume is None:
        return make_config(given), None
    surplus = [*(["out"] if session.out else []), *given]
    if surplus:
        raise UserError(f"--resume keeps the run's settings; omit {', '.join(map(flag, surplus))}")
    checkpoint = read_checkpoint(session.resume / "checkpoint.pt")
    try:
        return Config(**checkpoint["config"]), checkpoint
    except (KeyError, TypeError) as error:
        raise misfit(error) from error


def main(argv: Sequence[str] | None = None) -> dict[str, Scores] | None:
    """Run the command line; returns the final scores, None if stopped before the end."""
    started = time.perf_counter()
    given, session = parse(argv)
    stop = StopRequest(session.minutes)
    config, checkpoint = prepare(given, session)
    world = enter_world(session.device)
    data = load_data(config, world.device, session.workers)
    run = Run(config, data, world)
    folder = session.resume or new_folder(session.out, config, world)
    save = Saver(folder, data, config, session)
    world.say(
        f"{config.data}: {len(data.train)} training and {len(data.test)} test images "
        f"of {len(data.classes)} classes, on {world.device}"
        + (f", {world.size} processes" if world.size > 1 else "")
    )
    scores = None
    try:
        if checkpoint is None:
            begin(run, folder, session)
            save(run)  # from here on there is something to resume
        elif checkpoint.get("data") != save.fingerprint:
            raise UserError("the data are not those that the run began with (classes or counts)")
        else:
            run.restore(checkpoint)
        with stop:
            complete = train(run, folder, session, stop, save)
        if complete:
            scores = finish(run, folder, session)
    except KeyboardInterrupt:
        kept = (
            f"what was saved is kept: {way_back(folder)}"
            if save.path.exists()
            else "nothing had been learnt"
        )
        raise UserError(f"interrupted; {kept}") from None
    world.leave()
    if stop.signal is not None and not complete:
        sys.exit(128 + stop.signal)
    if complete:
        passed = time.perf_counter() - started
        world.say(f"{passed:.0f} s in all; pictures and results are in {folder}")
    return scores


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
