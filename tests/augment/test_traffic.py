"""What makes the views fast, guarded without a clock: bytes moved and operations launched."""

import kornia
import kornia.augmentation as K
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_kit import SimCLRAugment
from contrastive_kit.augment import CIFAR

VIEWS = {"view", "expand", "slice", "select", "unsqueeze", "permute", "transpose", "t", "unbind"}
VIEWS |= {"split", "squeeze", "as_strided", "alias", "detach", "_unsafe_view", "empty"}


# Bounds for small and for large views. Before 0.9 Kornia works on the drawn samples alone, and
# moves less.
OLD = tuple(map(int, kornia.__version__.split(".")[:2])) < (0, 9)
SMALL, LARGE = (1.0, 0.7) if OLD else (0.8, 0.6)

CALLS = 8


class Traffic(TorchDispatchMode):
    """Bytes that each operation reads and writes."""

    def __init__(self):
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket.__name__ not in VIEWS:
            self.operations += 1
            for part in (*args, *kwargs.values(), result):
                if isinstance(part, torch.Tensor):
                    self.bytes += part.numel() * part.element_size()
        return result


def traffic(call, views):
    """Bytes and operations a view, over calls enough that no single draw decides."""
    call()
    with Traffic() as counted:
        for _ in range(CALLS):
            call()
    return counted.bytes / (CALLS * views), counted.operations / (CALLS * views)


@pytest.mark.parametrize(
    ("size", "source", "budget_mb"), [(32, 32, 1.2), (96, 256, 9), (224, 256, 48)]
)
def test_views_move_a_fraction_of_what_kornia_moves(size, source, budget_mb):
    batch = 32
    images = torch.randint(0, 256, (batch, 3, source, source), dtype=torch.uint8)
    blur = size // 10 // 2 * 2 + 1
    pipeline = K.AugmentationSequential(
        K.RandomResizedCrop((size, size)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        *([K.RandomGaussianBlur((blur, blur), (0.1, 2.0), p=0.5)] if size >= 64 else []),
        data_keys=["input"],
    )
    augment = SimCLRAugment(size)
    ours, _ = traffic(lambda: augment(images), 2 * batch)
    theirs, _ = traffic(lambda: pipeline(images.float() / 255), batch)
    print(f"{size}: ours {ours / 1e6:.2f} MB, kornia {theirs / 1e6:.2f} MB a view")
    assert ours < budget_mb * 1e6
    assert ours < (SMALL if size < 64 else LARGE) * theirs


def test_small_views_share_their_operations():
    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)
    augment = SimCLRAugment(32, recipe=CIFAR)
    _, operations = traffic(lambda: augment(images), 256)
    assert operations < 8
