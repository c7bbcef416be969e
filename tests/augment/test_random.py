"""A generator of one's own: in pickles, in workers, on ranks and under torch.compile."""

import copy
import io
import pickle

import kornia
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from contrastive_kit import SimCLRAugment
from contrastive_kit.augment import (
    ColorJitter,
    GaussianBlur,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
    SimCLRView,
)

MODULES = {
    "augment": lambda **o: SimCLRAugment(8, **o),
    "channels last": lambda **o: SimCLRAugment(8, memory_format=torch.channels_last, **o),
    "crop": lambda **o: RandomResizedCrop(8, **o),
    "flip": RandomHorizontalFlip,
    "jitter": lambda **o: ColorJitter(0.8, 0.8, 0.8, 0.2, **o),
    "grayscale": lambda **o: RandomGrayscale(p=0.5, **o),
    "blur": lambda **o: GaussianBlur(3, **o),
    "solarize": RandomSolarize,
    "view": lambda **o: SimCLRView(SimCLRAugment(8, views=1, **o)),
}
COPIES = {
    **{
        f"pickle {protocol}": lambda m, p=protocol: pickle.loads(pickle.dumps(m, protocol=p))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "deepcopy": copy.deepcopy,
}


def save_and_load(module):
    buffer = io.BytesIO()
    torch.save({"module": module}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)["module"]


COPIES["save"] = save_and_load


def batch(module, images):
    views = module(images)
    return torch.cat(views) if isinstance(views, tuple) else views


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "default"])
@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("name", MODULES)
def test_copies_by_every_protocol(name, make_copy, own):
    images = torch.rand(3, 3, 12, 12)
    options = {"generator": torch.Generator().manual_seed(5)} if own else {}
    module = MODULES[name](**options)
    batch(module, images)
    twin = COPIES[make_copy](module)
    torch.manual_seed(0)
    expected = batch(module, images)
    torch.manual_seed(0)
    actual = batch(twin, images)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last) == (name == "channels last")
    assert repr(twin) == repr(module)


@pytest.mark.parametrize("make_copy", COPIES)
def test_copies_that_shared_a_generator_share_one(make_copy):
    generator = torch.Generator().manual_seed(1)
    pair = torch.nn.ModuleList(SimCLRAugment(8, generator=generator) for _ in range(2))
    one, two = COPIES[make_copy](pair)
    assert one.generator is two.generator
    assert one.generator is not generator
    assert torch.equal(one.generator.get_state(), generator.get_state())


class Tables(Dataset):
    """The parameters that a view of each item is made of."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.augment = SimCLRAugment(8, generator=generator)
        self.crop = RandomResizedCrop(8, generator=generator)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image = torch.zeros(1, 3, 90, 90)
        _, table = self.augment(image, return_params=True)
        return torch.cat(
            (table[:, 0].flatten(), self.crop.forward_parameters(image.shape)["box"][0])
        )


def epochs(seed, context, **options):
    torch.manual_seed(seed)
    loader = DataLoader(
        Tables(3), batch_size=1, num_workers=2, multiprocessing_context=context, **options
    )
    return torch.cat([row for _ in range(2) for row in loader])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_and_epochs_draw_numbers_of_their_own(context, persistent):
    tables = epochs(0, context, persistent_workers=persistent)
    assert tables[:, :36].unique(dim=0).shape[0] == 12
    assert tables[:, 36:].unique(dim=0).shape[0] == 12
    if context == "fork":
        assert torch.equal(epochs(0, context, persistent_workers=persistent), tables)
        assert not torch.equal(epochs(1, context, persistent_workers=persistent), tables)


def test_a_spawned_process_reads_the_module():
    """By the pickler of multiprocessing, which sends tensors by a handle that may be gone."""
    from multiprocessing.reduction import ForkingPickler

    module = SimCLRAugment(8, generator=torch.Generator())
    assert b"torch.multiprocessing" not in bytes(ForkingPickler.dumps(module))


def on_rank(monkeypatch, rank):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)


@pytest.mark.parametrize("name", MODULES)
def test_ranks_make_views_of_their_own_by_one_seed(name, monkeypatch):
    images = torch.rand(6, 3, 20, 20)
    views = []
    for rank in (0, 1, 2, 2):
        on_rank(monkeypatch, rank)
        generator = torch.Generator().manual_seed(3)
        module = MODULES[name](generator=generator)
        views.append((batch(module, images), batch(module, images)))
        if rank == 2:
            generator.manual_seed(3)
            assert torch.equal(batch(module, images), views[-1][0]), "seeded anew, it repeats"
    monkeypatch.undo()
    alone = MODULES[name](generator=torch.Generator().manual_seed(3))
    assert torch.equal(batch(alone, images), views[0][0])
    assert all(map(torch.equal, views[2], views[3]))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(views[one][0], views[other][0])
    assert not torch.equal(*views[1])


def test_every_rank_draws_the_table_of_the_whole_batch(monkeypatch):
    images = torch.rand(6, 3, 20, 20)
    tables = []
    for rank in (0, 1):
        on_rank(monkeypatch, rank)
        augment = SimCLRAugment(8, generator=torch.Generator().manual_seed(3))
        tables.append([augment.draw(images), augment.draw(images)])
    assert all(map(torch.equal, *tables))
    assert not torch.equal(*tables[0])


OLD = tuple(map(int, kornia.__version__.split(".")[:2])) < (0, 9)


@pytest.mark.parametrize("name", ["augment", "crop", "jitter", "view"])
def test_fullgraph_compile_draws_as_eager_does(name):
    if OLD and name != "augment":
        pytest.skip("Kornia's bases compile without a graph break since 0.9")
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(7)
    module = MODULES[name](generator=generator)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    inputs = [torch.rand(n, 3, 12, 12) for n in (4, 4, 6)]
    actual = [batch(compiled, images) for images in inputs]
    generator.manual_seed(7)
    for images, views in zip(inputs, actual, strict=True):
        torch.testing.assert_close(views, batch(module, images), atol=1e-5, rtol=0)


def test_a_compiled_module_sees_another_generator():
    torch._dynamo.reset()
    augment = SimCLRAugment(8, generator=torch.Generator().manual_seed(7))
    compiled = torch.compile(augment, fullgraph=True, backend="eager")
    images = torch.rand(2, 3, 12, 12)
    compiled(images)
    augment.generator = torch.Generator().manual_seed(8)
    views = batch(compiled, images)
    augment.generator.manual_seed(8)
    torch.testing.assert_close(views, batch(augment, images), atol=1e-5, rtol=0)


def test_the_operator_is_sound():
    augment = SimCLRAugment(8, generator=torch.Generator())
    torch.library.opcheck(
        torch.ops.contrastive_kit.uniforms.default,
        (augment._source.number, [2, 3], False),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("name", MODULES)
def test_what_is_no_generator(name):
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got int"):
        MODULES[name](generator=0)
