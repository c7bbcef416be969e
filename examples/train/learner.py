"""What is learned, and how: encoder and head, views, loss, and an update of the weights."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kit import (
    GradCache,
    NTXent,
    ProjectionHead,
    SimCLRAugment,
    SogCLR,
    resnet_encoder,
)
from train.config import Config, UserError
from train.system import Stopwatch, World

NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of ImageNet


def small_convnet(width: int) -> nn.Module:
    """Four 3x3 convolutions, for the photographs: enough to learn from, quick on a CPU."""
    widths = [3, width, 2 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = []
    for before, after, stride in zip(widths, widths[1:], (2, 2, 2, 1), strict=False):
        layers += [
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        ]
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder.out_dim = 8 * width  # as of resnet_encoder
    return encoder


def use_group_norm(module: nn.Module) -> None:
    """Put group normalization in the place of batch normalization: no sample sees another."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(16, child.num_features))
        use_group_norm(child)


def build_model(config: Config, classes: int) -> nn.Sequential:
    """Encoder and projection head (or classifier, if supervised), with random weights."""
    try:
        if config.encoder == "convnet":
            encoder = small_convnet(config.width)
        else:
            encoder = resnet_encoder(config.encoder, stem=config.stem)
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


def share_statistics(model: nn.Sequential, world: World) -> nn.Sequential:
    """Normalize by the batch of all processes: by its own, a process could tell its images."""
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    world.say(
        "each process normalizes by its own images, since SyncBatchNorm needs CUDA; "
        "--norm group has no batch statistics"
    )
    return model


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


def build_loss(config: Config, images: int, *, gather_distributed: bool) -> nn.Module:
    """The loss of a data set of so many images."""
    if config.loss == "sogclr":
        return SogCLR(
            images,
            config.temperature,
            gamma=config.gamma,
            gather_distributed=gather_distributed,
        )
    return NTXent(
        config.temperature,
        decoupled=config.loss == "decoupled",
        gather_distributed=gather_distributed,
    )


def build_optimizer(
    config: Config, module: nn.Module, *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum or LARS, the learning rate scaled to the batch."""
    parameters = list(module.parameters())
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
    return Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)


def warmup_cosine(step: int, warmup: float, total: int) -> float:
    """Factor of the peak learning rate at `step`, 0 … total - 1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Learner:
    """Updates a network from batches of images, each process from its share of every batch."""

    MODULES = ("encoder", "head", "optimizer", "schedule", "loss_fn")

    def __init__(
        self, config: Config, world: World, *, classes: int, images: int, steps: int
    ) -> None:
        """Random weights, for a data set of so many images, in epochs of so many steps."""
        self.config, self.world, self.stopwatch = config, world, Stopwatch(world.device)
        share, rest = divmod(config.batch_size, world.size)
        if rest:
            raise UserError(
                f"--batch-size must be a multiple of the number of processes ({world.size}), "
                f"got {config.batch_size}"
            )
        self.share = slice(world.rank * share, (world.rank + 1) * share)
        torch.manual_seed(config.seed)
        model = build_model(config, classes).to(world.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        cuda = world.device.type == "cuda"
        if world.size > 1 and config.norm == "batch":
            model = share_statistics(model, world)
        self.encoder, self.head = model
        self.optimizer = build_optimizer(config, model, fused=cuda)
        warmup, total = config.warmup_epochs * steps, config.epochs * steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warmup_cosine(step, warmup, total)
        )
        if config.compile:
            model.compile()
        self.network = model
        if world.size > 1:
            self.network = nn.parallel.DistributedDataParallel(
                model, device_ids=[world.device.index] if cuda else None
            )
        if config.chunk_size is not None:
            self.network = GradCache(self.network, chunk_size=config.chunk_size)
        self.augment = build_augment(
            config,
            normalize=NORMALIZATION,
            # on the CPU, where the same seed gives the same views for any device
            generator=torch.Generator().manual_seed(config.seed + 1),
            # what the first convolution makes of them under autocast anyway
            dtype=torch.bfloat16 if config.amp else torch.float32,
            memory_format=torch.channels_last if config.channels_last else torch.contiguous_format,
        )
        loss_fn = build_loss(config, images, gather_distributed=world.size > 1)
        self.loss_fn = loss_fn.to(world.device)

    def update(self, images: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """One step on the images of this process; returns loss and accuracy, without gradient.

        The index (B,) tells where each image is in the data set.
        """
        self.encoder.train()
        self.head.train()
        # random numbers for the whole batch, whatever the number of processes
        whole = images[:1].expand(self.config.batch_size, -1, -1, -1)
        params = self.augment.draw(whole)[:, self.share]
        views = self.augment(images, params=params, concat=True)
        self.stopwatch.mark("views")
        loss, accuracy = self.loss(views, labels, index)
        self.optimizer.zero_grad()
        loss.backward()
        self.stopwatch.mark("encoder")
        self.optimizer.step()
        self.schedule.step()
        self.stopwatch.mark("update")
        return torch.stack([loss.detach(), accuracy])

    def loss(self, views: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy. Both views go through the encoder in one forward pass.

        With a pass for each, the statistics of batch normalization would tell the views apart.
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
        known = {"index": index.to(z[0].device)} if self.config.loss == "sogclr" else {}
        loss, stats = self.loss_fn(*z, **known, return_stats=True)
        return loss, stats.accuracy

    def is_finite(self) -> bool:
        """Whether all weights are."""
        weights = [*self.encoder.parameters(), *self.head.parameters()]
        return bool(torch.stack([p.isfinite().all() for p in weights]).all())

    def state_dict(self) -> dict[str, Any]:
        """Enough to go on as if there had been no break."""
        cuda = self.world.device.type == "cuda"
        return {
            "views": self.augment.generator.get_state(),
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.world.device) if cuda else None,
            **{name: getattr(self, name).state_dict() for name in self.MODULES},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name in self.MODULES:
            getattr(self, name).load_state_dict(state[name])
        self.augment.generator.set_state(state["views"])
        torch.set_rng_state(state["cpu"])
        if state["cuda"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.world.device)
