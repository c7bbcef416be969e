"""SimCLR with a queue of negatives as a PyTorch Lightning module, on one device or several.

    cd examples && python -m clients.lightning_simclr

Views are made on the device, for a whole batch at once, in `on_after_batch_transfer`: the loader
has only to decode. The learned temperature and the queue are in the module's state, so that a
checkpoint of Lightning holds them.
"""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl  # with the package "lightning": import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import photographs
from clients.feature_quality import feature_quality
from contrastive_kit import InfoNCE, NegativeQueue, ProjectionHead, SimCLRAugment, resnet_encoder


class SimCLR(pl.LightningModule):
    """Encoder, head, views and loss; one step of training."""

    def __init__(self, size: int = 32, queue_size: int = 1024, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = resnet_encoder("resnet18")
        self.head = ProjectionHead(self.encoder.out_dim)
        self.augment = SimCLRAugment(size, strength=0.5, generator=torch.Generator())
        # On several devices each process compares its pairs with those of all.
        self.loss_fn = InfoNCE(
            0.2,
            symmetric=True,
            in_batch_negatives=True,
            learnable_temperature=True,
            gather_distributed=True,
        )
        self.queue = NegativeQueue(128, queue_size, gather_distributed=True)

    def on_train_epoch_start(self) -> None:
        """The order of the images follows from the epoch, so that a resumed run sees the same."""
        torch.manual_seed(self.current_epoch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Put two random views of the images in their place, when training."""
        if not self.trainer.training:
            return batch
        # And the views from the step; on each rank others.
        self.augment.generator.manual_seed(self.global_step)
        images, _ = batch
        return self.augment(images)

    def training_step(self, views: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of the two views of a batch."""
        z1, z2 = self.head(self.encoder(torch.cat(views))).chunk(2)
        loss, stats = self.loss_fn(z1, z2, negatives=self.queue(z2), return_stats=True)
        self.log_dict({"loss": loss, "accuracy": stats.accuracy}, prog_bar=True, sync_dist=True)
        self.log("temperature", self.loss_fn.temperature)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The temperature is among the parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class FeatureQuality(pl.Callback):
    """Log kNN and probe accuracy of `module.encoder` after every few epochs.

    Every process evaluates the whole of both sets, so that none waits for another.
    """

    def __init__(self, train: DataLoader, test: DataLoader, every: int = 1) -> None:
        self.train, self.test, self.every = train, test, every

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate in evaluation mode, which `extract_features` sees to."""
        if (trainer.current_epoch + 1) % self.every == 0:
            quality = feature_quality(module.encoder, self.train, self.test)
            module.log_dict(quality, prog_bar=True, sync_dist=True)


def main(
    epochs: int = 10,
    batch_size: int = 256,
    callbacks: Sequence[pl.Callback] = (),
    resume: str | None = None,
    **trainer_options: Any,
) -> pl.Trainer:
    """Train, evaluate after each epoch, and leave a checkpoint in runs/lightning."""
    pl.seed_everything(0)
    images, labels, test_images, test_labels, _ = photographs.load_patches(32)
    train = TensorDataset(images, labels)
    # The iterator of a loader draws a number, in a resumed run earlier than in another: from a
    # generator of its own, so that `on_train_epoch_start` decides the order of the images.
    loader = DataLoader(
        train,
        batch_size,
        sampler=RandomSampler(train),
        drop_last=True,
        generator=torch.Generator(),
    )
    quality = FeatureQuality(
        DataLoader(train, 512), DataLoader(TensorDataset(test_images, test_labels), 512)
    )
    options = {"default_root_dir": "runs/lightning", "log_every_n_steps": 1, **trainer_options}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[quality, *callbacks], **options)
    trainer.fit(SimCLR(), loader, ckpt_path=resume)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    main()
