"""What the features of an encoder are worth, without a label in training: for any loop."""

from collections.abc import Iterable

from torch import Tensor, nn

from contrastive_kit.evaluation import extract_features, knn_accuracy, linear_probe

Batches = Iterable[tuple[Tensor, Tensor]]


def feature_quality(
    encoder: nn.Module, train: Batches, test: Batches, k: int = 20
) -> dict[str, float]:
    """Accuracy on `test` of the `k` nearest neighbors in `train`, and of a linear probe.

    Args:
        encoder: from images to features, which it gives without its projection head.
        train: batches of images, uint8 or in [0, 1], and integer labels: a `DataLoader` without
            random views.
        test: the same, of images that are not in `train`.
        k: number of neighbors, at most that of training images.
    """
    bank, queries = extract_features(encoder, train), extract_features(encoder, test)
    return {
        "knn": knn_accuracy(*bank, *queries, k=k).accuracy,
        "probe": linear_probe(*bank, *queries).accuracy,
    }
