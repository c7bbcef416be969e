"""What is learned, and how: models, views, optimizers, and one update."""

import pytest
import torch
from trainer import assert_same, settings

from contrastive_kit.augment.parameters import unpack
from train import learner
from train.config import UserError, make_config
from train.data import load_data
from train.evaluate import features_of, score
from train.learner import (
    Learner,
    build_augment,
    build_model,
    build_optimizer,
    share_statistics,
    warmup_cosine,
)
from train.system import World

WORLD = World(torch.device("cpu"))


def test_learning_rate_schedule():
    factors = [warmup_cosine(step, 10, 110) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.001


def test_normalization_and_biases_are_not_decayed():
    config = make_config({"batch_size": 512})
    model = build_model(config, 2)
    decayed, free = build_optimizer(config, model).param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert decayed["lr"] == pytest.approx(2 * config.lr)
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def peak_lr(**given):
    config = make_config(given)
    return build_optimizer(config, build_model(config, 2)).param_groups[0]["lr"]


def test_both_rules_of_the_learning_rate_agree_at_batch_4096_alone():
    """T29."""
    pytest.importorskip("timm")
    linear = {"recipe": "imagenet_resnet50", "root": "x", "encoder": "convnet"}
    root = {**linear, "lr_rule": "sqrt", "lr": 0.075}
    assert peak_lr(**linear) == pytest.approx(4.8)
    assert peak_lr(**root) == pytest.approx(4.8)
    assert peak_lr(**linear, batch_size=256) == pytest.approx(0.3)
    assert peak_lr(**root, batch_size=256) == pytest.approx(1.2)


def test_lars_adapts_weights_and_leaves_biases_and_normalization_to_sgd():
    """T28: the first step, from the formula in the recipe."""
    pytest.importorskip("timm")
    config = make_config({"optimizer": "lars", "lr": 0.5, "weight_decay": 0.01})
    layer = torch.nn.Linear(5, 3).double()
    optimizer = build_optimizer(config, layer)
    weight, bias = (p.detach().clone() for p in (layer.weight, layer.bias))
    layer(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    gradient = layer.weight.grad
    trust = 0.001 * weight.norm() / (gradient.norm() + 0.01 * weight.norm() + 1e-8)
    expected = weight - 0.5 * trust * (gradient + 0.01 * weight)
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.bias.detach(), bias - 0.5 * layer.bias.grad)


def test_the_width_of_the_convnet():
    config = make_config({"width": 48})
    encoder, head = build_model(config, 2)
    assert encoder(torch.rand(2, 3, 24, 24)).shape == (2, 8 * 48)
    assert head(torch.rand(2, 8 * 48)).shape == (2, 128)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder": "alexnet"}, "name must be one of .*; got 'alexnet'"),
        ({"head_layers": 0, "head_dim": 3}, "out_dim must equal in_dim"),
    ],
)
def test_wrong_models(given, message):
    with pytest.raises(UserError, match=message):
        build_model(make_config(given), 2)


def test_group_norm_knows_no_other_images():
    model = build_model(make_config({"norm": "group"}), 2).train()
    images = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)


def count(params):
    """How many of the views are cropped, flipped, …."""
    drawn = unpack(params)
    return {
        "crop": int((drawn.box[..., 2:] < 31).any(-1).sum()),
        "flip": int(drawn.flip.sum()),
        "jitter": int(drawn.jitter.sum()),
        "gray": int(drawn.grayscale.sum()),
        "blur": int(drawn.blur.sum()),
    }


@pytest.mark.parametrize("left_out", [None, "crop", "flip", "jitter", "gray", "blur"])
def test_each_transform_can_be_left_out(left_out):
    """And T47: the two views of an image differ."""
    names = ("crop", "flip", "jitter", "gray", "blur")
    config = make_config({"augment": tuple(n for n in names if n != left_out), "size": 32})
    augment = build_augment(config, generator=torch.Generator().manual_seed(0))
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    (first, second), params = augment(images, return_params=True)
    assert not torch.equal(first, second)
    drawn = count(params)
    for name in names:
        assert (drawn[name] == 0) == (name == left_out), name
    nothing = build_augment(make_config({"augment": ()}))
    for view in nothing(images):
        torch.testing.assert_close(view, images / 255)


@pytest.fixture
def small(root):
    config = make_config(settings(root))
    return config, learner_of(config), load_data(config, WORLD.device, 0)


def learner_of(config, world=WORLD):
    return Learner(config, world, classes=3, images=42, steps=5)


def test_both_views_go_through_the_encoder_in_one_forward(small):
    """T26, and T49: training mode in training, evaluation mode in evaluation."""
    config, learns, data = small
    calls = []
    learns.encoder.register_forward_hook(lambda m, x, _: calls.append((m.training, len(x[0]))))
    learns.update(data.train.images[:8], data.train.labels[:8], torch.arange(8))
    assert calls == [(True, 16)]
    calls.clear()
    before = {key: value.clone() for key, value in learns.encoder.state_dict().items()}
    features_of(learns.encoder, data, config, WORLD)
    assert calls == [(False, 42), (False, 15)]
    assert_same(dict(learns.encoder.state_dict()), before)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "NTXent(temperature=0.5)"),
        ({"loss": "decoupled", "temperature": 0.2}, "NTXent(temperature=0.2, decoupled=True)"),
        (
            {"loss": "sogclr", "gamma": 0.5},
            "SogCLR(temperature=0.5, num_images=42, gamma=0.5)",
        ),
    ],
)
def test_the_loss_that_the_settings_name(root, options, expected):
    assert repr(learner_of(make_config(settings(root, **options))).loss_fn) == expected


def test_the_images_of_a_step_are_remembered(root):
    config = make_config(settings(root, loss="sogclr"))
    learns, data = learner_of(config), load_data(config, WORLD.device, 0)
    index = torch.tensor([3, 41, 7, 8, 20, 30, 2, 11])
    learns.update(data.train.images[index], data.train.labels[index], index)
    known = learns.loss_fn.log_normalizer > -torch.inf
    assert known.nonzero().flatten().tolist() == index.sort().values.tolist()


def test_knn_of_the_features_of_normalized_images(small):
    config, learns, data = small
    scores = score(features_of(learns.encoder, data, config, WORLD), config, linear=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in learner.NORMALIZATION)
    learns.encoder.eval()
    with torch.no_grad():
        h = [learns.encoder((p.images / 255 - mean) / std) for p in (data.train, data.test)]
    near = torch.nn.functional.normalize(h[1]) @ torch.nn.functional.normalize(h[0]).T
    top = near.topk(5)
    votes = torch.zeros(15, 3)
    for i in range(15):
        for j in range(5):
            votes[i, data.train.labels[top.indices[i, j]]] += (top.values[i, j] / 0.1).exp()
    assert 0.3 < scores.knn < 1
    assert scores.knn == pytest.approx((votes.argmax(1) == data.test.labels).float().mean().item())


def test_batches_that_processes_cannot_share(root):
    config = make_config(settings(root, batch_size=9))
    with pytest.raises(UserError, match=r"must be a multiple of .* processes \(2\), got 9"):
        learner_of(config, World(WORLD.device, rank=1, size=2))


def test_processes_on_gpus_share_the_statistics_of_their_batches():
    """T26."""
    model = build_model(make_config({}), 2)
    shared = share_statistics(model, World(torch.device("cuda", 0), rank=1, size=2))
    kinds = [type(m) for m in shared.modules() if "Norm" in type(m).__name__]
    assert kinds == [torch.nn.SyncBatchNorm] * 6
    assert shared.state_dict().keys() == model.state_dict().keys()


def test_without_gpus_the_user_is_told_that_they_do_not(capsys):
    model = build_model(make_config({}), 2)
    assert share_statistics(model, World(WORLD.device, rank=0, size=2)) is model
    assert "--norm group" in capsys.readouterr().out
