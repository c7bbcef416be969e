"""The encoders against torchvision's networks, with sizes that are worked out by hand."""

import pytest
import torch
import torchvision

from contrastive_kit import resnet_encoder


@pytest.mark.parametrize(
    ("name", "out_dim"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)]
)
@pytest.mark.parametrize(("stem", "first"), [("imagenet", 49), ("cifar", 9)])
def test_size(name, out_dim, stem, first):
    encoder = resnet_encoder(name, stem=stem)
    whole = torchvision.models.get_model(name)
    classifier = 1000 * out_dim + 1000
    expected = sum(p.numel() for p in whole.parameters()) - classifier - 3 * 64 * (49 - first)
    assert encoder.out_dim == out_dim
    assert sum(p.numel() for p in encoder.parameters()) == expected


def test_imagenet_stem_is_torchvisions_pooled_feature():
    encoder = resnet_encoder("resnet18").eval()
    whole = torchvision.models.resnet18()
    missing = whole.load_state_dict(encoder.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert missing.unexpected_keys == []
    pooled = torch.nn.Sequential(*list(whole.eval().children())[:-1], torch.nn.Flatten())
    images = torch.rand(2, 3, 70, 65)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), pooled(images))


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("cifar", 32)])
def test_stem_keeps_or_quarters_the_resolution(stem, side):
    """T48: the cifar stem is a 3x3 convolution of stride 1, and there is no max-pool."""
    encoder = resnet_encoder("resnet18", stem=stem)
    sides = []
    encoder.layer1.register_forward_pre_hook(lambda _, x: sides.append(x[0].shape[-2:]))
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, 512)
    assert sides == [(side, side)]


def test_cifar_stem_is_initialized_like_torchvisions_convolutions():
    weight = resnet_encoder("resnet18", stem="cifar").conv1.weight
    assert weight.shape == (64, 3, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_pretrained_weights_are_loaded(monkeypatch):
    saved = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_args, **_options: saved
    )
    encoder = resnet_encoder("resnet18", weights="IMAGENET1K_V1")
    assert all(torch.equal(value, saved[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg11", {}, "name must be one of .*resnet18.*; got 'vgg11'"),
        ("fcn_resnet50", {}, "name must be one of .*; got 'fcn_resnet50'"),
        ("resnet18", {"stem": "mnist"}, "stem must be 'imagenet' or 'cifar', got 'mnist'"),
        ("resnet18", {"stem": "cifar", "weights": "DEFAULT"}, "weights must be None with stem"),
        (
            "resnet18",
            {"weights": "NONE"},
            "weights must be None or one of IMAGENET1K_V1.*; got 'NONE'",
        ),
    ],
)
def test_wrong_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        resnet_encoder(name, **options)
