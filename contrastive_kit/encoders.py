"""Encoders: torchvision's ResNets, cut at the average pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torchvision
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    class Encoder(nn.Module):
        """What a type checker knows of an encoder: images (N, 3, H, W) to features (N, out_dim).

        There is no such class at run time.
        """

        out_dim: int

        def __call__(self, images: Tensor) -> Tensor:
            """The features of the images."""
            ...


def resnet_encoder(
    name: str,
    *,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    weights: str | None = None,
) -> Encoder:
    """Build a torchvision ResNet that ends at its average pool.

    The module is torchvision's own with the classifier replaced by the identity, so its state
    dict has torchvision's keys, less ``fc.*``.

    Args:
        name: A torchvision model of the ResNet family: ``"resnet18"`` … ``"resnet152"``,
            ``"wide_resnet50_2"``, ``"resnext50_32x4d"``, ….
        stem: ``"imagenet"`` is torchvision's (7x7 convolution with stride 2, then a max-pool).
            ``"cifar"`` is a 3x3 convolution with stride 1 and no max-pool, for images of about 32
            pixels (SimCLR, appendix B.9); an 18-layer network loses several points without it.
        weights: Name of pretrained torchvision weights to start from, e.g. ``"DEFAULT"`` or
            ``"IMAGENET1K_V2"`` (downloaded on first use); None starts at random. Only with the
            imagenet stem.

    Returns:
        A module from images (N, 3, H, W) to features (N, ``out_dim``), with the attribute
        ``out_dim`` (512 for ResNet-18 and -34, 2048 for the deeper ones).

    Raises:
        ValueError: ``name`` is not in the ResNet family, ``stem`` or ``weights`` are unknown, or
            ``weights`` are asked for with the cifar stem, whose first convolution they do not fit.

    Example:
        >>> import torch
        >>> from contrastive_kit import resnet_encoder
        >>> encoder = resnet_encoder("resnet18", stem="cifar")
        >>> encoder.out_dim, encoder(torch.rand(2, 3, 32, 32)).shape
        (512, torch.Size([2, 512]))
    """
    models = torchvision.models
    family = models.resnet.__name__
    known = [n for n in models.list_models() if models.get_model_builder(n).__module__ == family]
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}; got {name!r}")
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
    if weights is not None and stem == "cifar":
        raise ValueError(f"weights must be None with stem='cifar', got {weights!r}")
    if weights is not None and weights not in models.get_model_weights(name).__members__:
        choices = ", ".join(models.get_model_weights(name).__members__)
        raise ValueError(f"weights must be None or one of {choices}; got {weights!r}")

    encoder: Any = models.get_model(name, weights=weights)
    encoder.out_dim = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    module: Encoder = encoder
    return module
