"""Our modules before and after Kornia's own, against Kornia's of the same kind in their place.

What follows a crop has to draw its parameters for the size after it. Kornia's containers know that
size from the parameters of the crop alone.
"""

import kornia.augmentation as K
import pytest
import torch

from contrastive_kit.augment import (
    ColorJitter,
    GaussianBlur,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
    SimCLRAugment,
    SimCLRView,
)

SIZE = (24, 32)
# Ours and Kornia's in its place.
PAIRS = {
    "crop": (lambda: RandomResizedCrop(SIZE), lambda: K.RandomResizedCrop(SIZE)),
    "view": (
        lambda: SimCLRView(SimCLRAugment(SIZE, views=1, blur=False, jitter=0, grayscale=0)),
        lambda: K.RandomResizedCrop(SIZE),
    ),
    "flip": (RandomHorizontalFlip, K.RandomHorizontalFlip),
    "jitter": (
        lambda: ColorJitter(0.8, 0.8, 0.8, 0.2),
        lambda: K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=1.0),
    ),
    "grayscale": (RandomGrayscale, K.RandomGrayscale),
    "blur": (lambda: GaussianBlur(3), lambda: K.RandomGaussianBlur((3, 3), (0.1, 2.0))),
    "solarize": (RandomSolarize, K.RandomSolarize),
}
KORNIA = {
    "erasing": lambda: K.RandomErasing(p=1.0),
    "affine": lambda: K.RandomAffine(30.0, translate=(0.1, 0.2), p=1.0),
    "rotation": lambda: K.RandomRotation(20.0, p=1.0),
    "perspective": lambda: K.RandomPerspective(p=1.0),
    "resized crop": lambda: K.RandomResizedCrop((16, 20)),
    "crop": lambda: K.RandomCrop((20, 22)),
    "flip": lambda: K.RandomHorizontalFlip(p=1.0),
    "jitter": lambda: K.ColorJitter(0.3, 0.3, 0.3, 0.1, p=1.0),
    "blur": lambda: K.RandomGaussianBlur((3, 3), (0.5, 1.0), p=1.0),
    "elastic": lambda: K.RandomElasticTransform((9, 9), (4.0, 4.0), p=1.0),
}
RESIZING = ("crop", "view")


def run(first, second, images):
    """The images after both, and what each of them drew, the second from a seed of its own."""
    draw = second.forward_parameters

    def seeded(shape):
        torch.manual_seed(1)
        return draw(shape)

    second.forward_parameters = seeded
    pipeline = K.AugmentationSequential(first, second, data_keys=["input"])
    result = pipeline(images)
    return result, *(item.data for item in pipeline._params), pipeline


@pytest.mark.parametrize("theirs", KORNIA)
@pytest.mark.parametrize("ours", PAIRS)
def test_what_follows_draws_as_after_kornias(ours, theirs):
    images = torch.ones(5, 3, 96, 88)
    module, counterpart = (make() for make in PAIRS[ours])
    result, _, drawn, pipeline = run(module, KORNIA[theirs](), images)
    expected, _, wanted, _ = run(counterpart, KORNIA[theirs](), images)
    assert drawn.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(drawn[name], wanted[name]), name
    if ours in RESIZING:
        # Of a white image nothing is left to see but the geometry of what followed.
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(pipeline(images, params=pipeline._params), result)


@pytest.mark.parametrize("theirs", KORNIA)
@pytest.mark.parametrize("ours", PAIRS)
def test_ours_follow_as_kornias_do(ours, theirs):
    images = torch.rand(5, 3, 96, 88)
    module, counterpart = (make() for make in PAIRS[ours])
    result, _, drawn, _ = run(KORNIA[theirs](), module, images)
    expected, _, wanted, _ = run(KORNIA[theirs](), counterpart, images)
    assert result.shape == expected.shape
    assert torch.equal(drawn["forward_input_shape"], wanted["forward_input_shape"])
    box = drawn["table"][:, :4] if ours == "view" else drawn.get("box")
    if box is not None:
        height, width = drawn["forward_input_shape"][-2:]
        assert (box[:, :2] >= 0).all()
        assert (box[:, 0] + box[:, 2]).max() <= height
        assert (box[:, 1] + box[:, 3]).max() <= width


@pytest.mark.parametrize("ours", RESIZING)
def test_geometry_of_what_follows(ours):
    """The share that is erased, and the point that stays where it is under a rotation."""
    erasing = K.RandomErasing(scale=(0.1, 0.3), p=1.0)
    result = K.AugmentationSequential(PAIRS[ours][0](), erasing, data_keys=["input"])(
        torch.ones(64, 3, 96, 88)
    )
    share = (result[:, 0] < 0.5).double().mean(dim=(1, 2))
    assert share.min() > 0.05
    assert share.max() < 0.35
    rotation = K.RandomRotation(30.0, p=1.0)
    pipeline = K.AugmentationSequential(PAIRS[ours][0](), rotation, data_keys=["input"])
    pipeline(torch.ones(4, 3, 96, 88))
    center = torch.tensor([(SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2, 1.0])
    torch.testing.assert_close(
        rotation.transform_matrix @ center, center.expand(4, 3), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("ours", RESIZING)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda *m: K.AugmentationSequential(*m, data_keys=["input"]),
        K.ImageSequential,
        lambda *m: K.AugmentationSequential(K.ImageSequential(*m[:1]), m[1], data_keys=["input"]),
        lambda *m: K.VideoSequential(*m, data_format="BTCHW"),
    ],
    ids=["augmentation", "image", "nested", "video"],
)
def test_in_every_container(wrap, ours):
    pipeline = wrap(PAIRS[ours][0](), K.RandomErasing(scale=(0.1, 0.3), p=1.0))
    shape = (6, 2, 3) if isinstance(pipeline, K.VideoSequential) else (12, 3)
    result = pipeline(torch.ones(*shape, 96, 88))
    assert result.shape == (*shape, *SIZE)
    assert ((result < 0.5).double().mean(dim=(-1, -2)) < 0.35).all()


@pytest.mark.parametrize("ours", RESIZING)
def test_an_empty_batch(ours):
    pipeline = K.AugmentationSequential(
        PAIRS[ours][0](), K.RandomHorizontalFlip(), data_keys=["input"]
    )
    assert pipeline(torch.empty(0, 3, 96, 88)).shape == (0, 3, *SIZE)
