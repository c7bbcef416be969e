"""The draw: its distribution against torchvision's samplers, its independence, its edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from contrastive_kit import SimCLRAugment
from contrastive_kit.augment.parameters import N_UNIFORMS, unpack
from contrastive_kit.augment.recipe import Recipe

N = 4000
# Fixed seeds: a test that fails once in a thousand runs does so always or never.
LEVEL = 1e-3


def draw(height=224, width=224, n=N, views=1, **options):
    return unpack(draw_table(Recipe(views=views, **options), n, height, width))


def draw_table(recipe, n, height=224, width=224, seed=0):
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(recipe.views, n, N_UNIFORMS, generator=generator)
    return recipe.table(uniforms, height=height, width=width)


def torchvision_boxes(height, width, scale, ratio):
    image = torch.empty(3, height, width)
    crops = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(N)]
    return torch.tensor(crops)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (224, 224, (0.08, 1.0), (3 / 4, 4 / 3)),
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        (375, 500, (0.2, 1.0), (3 / 4, 4 / 3)),
        (40, 100, (0.5, 1.0), (0.5, 1.2)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(height, width, scale, ratio):
    ours = draw(height, width, scale=scale, ratio=ratio).box[0].double()
    theirs = torchvision_boxes(height, width, scale, ratio).double()
    features = {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "bottom": lambda b: height - b[:, 0] - b[:, 2],
        "right": lambda b: width - b[:, 1] - b[:, 3],
    }
    for name, feature in features.items():
        p = stats.ks_2samp(feature(ours).numpy(), feature(theirs).numpy()).pvalue
        assert p > LEVEL, name
    whole = [(boxes[:, 2] == height).double().mean().item() for boxes in (ours, theirs)]
    assert whole[0] == pytest.approx(whole[1], abs=0.03)


def test_the_ks_test_notices_another_crop():
    ours = draw(scale=(0.12, 1.0)).box[0]
    theirs = torchvision_boxes(224, 224, (0.08, 1.0), (3 / 4, 4 / 3))
    areas = [(b[:, 2] * b[:, 3]).double().numpy() for b in (ours, theirs)]
    assert stats.ks_2samp(*areas).pvalue < LEVEL


@pytest.mark.parametrize(("height", "width"), [(20, 200), (200, 20), (7, 100), (100, 9), (1, 50)])
def test_fallback_is_torchvisions(height, width):
    options = {"scale": (1.0, 1.0), "ratio": (3 / 4, 4 / 3)}
    box = draw(height, width, n=5, **options).box[0]
    expected = torchvision_boxes(height, width, *options.values())[0].float()
    assert torch.equal(box, expected.expand(5, 4))
    ragged = draw(torch.full((5,), float(height)), torch.full((5,), float(width)), 5, **options)
    assert torch.equal(ragged.box[0], box)


def test_whole_image_when_asked():
    box = draw(31, 31, n=50, scale=(1.0, 1.0), ratio=(1.0, 1.0)).box[0]
    assert torch.equal(box, torch.tensor([[0.0, 0, 31, 31]]).expand(50, 4))


def test_scalars_are_uniform():
    p = draw()
    bounds = {
        "brightness": (0.2, 1.6),
        "contrast": (0.2, 1.6),
        "saturation": (0.2, 1.6),
        "hue": (-0.2, 0.4),
        "sigma": (0.1, 1.9),
    }
    for name, (low, length) in bounds.items():
        values = getattr(p, name)[0].numpy()
        assert stats.kstest(values, stats.uniform(low, length).cdf).pvalue > LEVEL, name


def test_gates():
    p = draw(solarize=0.3)
    for name, expected in {
        "flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.3,
    }.items():  # fmt: skip
        gate = getattr(p, name)
        assert set(gate.unique().tolist()) == {0.0, 1.0}
        assert stats.binomtest(int(gate.sum()), N, expected).pvalue > LEVEL, name
    for probability in (0.0, 1.0):
        gate = draw(flip=probability, blur=(probability,)).flip
        assert (gate == probability).all()


def test_all_24_orders_are_equally_likely():
    order = draw().order[0].long()
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(N, 4))
    counts = (order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > LEVEL


def test_columns_views_and_samples_are_independent():
    table = draw_table(Recipe(solarize=0.5), N)
    names = [0, 2, 4, 5, 6, 10, 11, 12, 13, 14, 15, 16, 17]
    columns = torch.cat([table[0, :, names], table[1, :, names]], dim=1).double()
    correlation = torch.corrcoef(columns.T).abs()
    correlation.fill_diagonal_(0)
    # A crop's top and height depend on each other; nothing else may.
    for view in (0, len(names)):
        correlation[view, view + 1] = correlation[view + 1, view] = 0
    assert correlation.max() < 4.5 / N**0.5
    assert len(table.flatten(0, 1).unique(dim=0)) == 2 * N


def test_probabilities_do_not_shift_the_stream():
    base, never = draw(), draw(flip=0.0, jitter=1.0, blur=0.0, grayscale=1.0)
    for name in ("box", "order", "hue", "sigma", "contrast"):
        assert torch.equal(getattr(base, name), getattr(never, name))


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    seed=st.integers(0, 2**31),
    low=st.floats(0.01, 1.0),
)
def test_boxes_lie_inside(height, width, seed, low):
    table = draw_table(Recipe(scale=(low, 1.0), views=1), 64, height, width, seed)
    top, left, tall, wide = unpack(table).box.unbind(-1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (tall >= 1).all()
    assert (wide >= 1).all()
    assert (top + tall <= height).all()
    assert (left + wide <= width).all()
    assert (unpack(table).box == unpack(table).box.round()).all()


def test_the_largest_uniform_stays_inside():
    last = 1 - 2**-24
    table = Recipe().table(torch.full((1, 1, N_UNIFORMS), last), height=4001, width=4099)
    top, left, tall, wide = unpack(table).box[0, 0]
    assert top + tall <= 4001
    assert left + wide <= 4099


def test_numbers_of_a_step_do_not_move():
    """A step to come takes unused ones, so that the views of a seed stay what they are."""
    images = torch.zeros(5, 3, 30, 40)
    augment = SimCLRAugment(64, solarize=0.5, generator=torch.Generator().manual_seed(4))
    tables = augment.draw(images), augment.draw(images)
    generator = torch.Generator().manual_seed(4)
    for table in tables:
        u = torch.rand(2, 5, 64, generator=generator)
        assert torch.equal(augment.recipe.table(u, height=30, width=40), table)
        p = unpack(table)
        assert torch.equal(p.order, u[..., 20:24].argsort(dim=-1).float())
        for number, gate, probability in (
            (26, p.flip, 0.5),
            (27, p.jitter, 0.8),
            (32, p.grayscale, 0.2),
            (33, p.blur, 0.5),
            (35, p.solarize, 0.5),
        ):
            assert torch.equal(gate, (u[..., number] < probability).float())
        torch.testing.assert_close(p.hue, u[..., 31] * 0.4 - 0.2)
        u[..., 36:] = torch.rand(2, 5, 28)
        assert torch.equal(augment.recipe.table(u, height=30, width=40), table)


def test_fields_are_views_of_the_table():
    table = draw_table(Recipe(), 3)
    unpack(table).hue.fill_(0.25)
    assert (table[..., 13] == 0.25).all()
    with pytest.raises(ValueError, match="18 columns"):
        unpack(table[..., :5])


def test_number_of_views_must_fit():
    with pytest.raises(ValueError, match="blur must be one probability or one for each of the 2"):
        Recipe(blur=(0.1, 0.2, 0.3))
