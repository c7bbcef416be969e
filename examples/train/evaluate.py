"""What was learned: nearest neighbors and a linear classifier on frozen features."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.transforms import v2

from contrastive_kit.distributed import gather_rows
from contrastive_kit.evaluation import extract_features, knn_accuracy, linear_probe
from train.config import Config
from train.data import Data
from train.learner import NORMALIZATION
from train.system import World

KNN_TEMPERATURE = 0.1


class Scores(NamedTuple):
    """Accuracies on the test set, and the penalty that the linear probe chose."""

    knn: float
    linear: float | None = None
    l2: float | None = None


def features_of(encoder: nn.Module, data: Data, config: Config, world: World) -> list[Tensor]:
    """Features and labels of the training set and of the test set, the encoder being frozen."""
    preprocess = nn.Sequential(v2.CenterCrop(config.size), v2.Normalize(*NORMALIZATION))
    frozen = nn.Sequential(preprocess, encoder)
    if world.size > 1:  # without SyncBatchNorm the processes have statistics of their own
        for buffer in encoder.buffers():
            dist.broadcast(buffer, 0)
    result: list[Tensor] = []
    for part in (data.train, data.test):
        own = torch.arange(len(part)).tensor_split(world.size)[world.rank]
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.amp):
            rows = extract_features(frozen, part.batches(own, 512))
        result += [gather_rows(x) if world.size > 1 else x for x in rows]
    return result


def score(features: Sequence[Tensor], config: Config, *, linear: bool) -> Scores:
    """The accuracy of the nearest neighbors, and of a linear classifier."""
    knn = knn_accuracy(*features, k=config.knn_k, temperature=KNN_TEMPERATURE).accuracy
    if not linear:
        return Scores(knn)
    probe = linear_probe(*features)
    return Scores(knn, probe.accuracy, probe.l2)


def table(scores: dict[str, Scores], config: Config) -> str:
    """The scores as text."""
    lines = [f"{'':28}{f'kNN (k={config.knn_k})':>14}{'linear probe':>16}"]
    lines += [f"{name:28}{s.knn:14.3f}{s.linear:16.3f}" for name, s in scores.items()]
    return "\n".join(lines)
