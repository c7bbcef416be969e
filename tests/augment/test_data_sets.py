"""SimCLRAugment as the transform of a data set: one image in, a tuple of views out."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from contrastive_kit import SimCLRAugment

PIXELS = torch.randint(0, 256, (3, 21, 34), dtype=torch.uint8, generator=torch.manual_seed(0))
AS_ARRAY = PIXELS.permute(1, 2, 0).numpy()
SOURCES = {
    "PIL": Image.fromarray(AS_ARRAY.copy()),
    "tensor": PIXELS,
    "tv_tensor": tv_tensors.Image(PIXELS),
    "array": AS_ARRAY,
    "array of floats": AS_ARRAY.astype(np.float32) / 255,
    "array read backwards": AS_ARRAY[::-1].copy()[::-1],
}


def seeded(size=17, **options):
    return SimCLRAugment(size, generator=torch.Generator().manual_seed(3), **options)


@pytest.mark.parametrize("source", SOURCES)
def test_views_of_one_image_are_those_of_a_batch_of_one(source):
    image = SOURCES[source]
    batch = PIXELS[None].float() / 255 if "floats" in source else PIXELS[None]
    expected = seeded(views=3)(batch)
    views, params = seeded(views=3)(image, return_params=True)
    assert isinstance(views, tuple)
    assert len(views) == 3
    for view, of_batch in zip(views, expected, strict=True):
        assert view.shape == (3, 17, 17)
        assert torch.equal(view, of_batch[0])
    assert torch.equal(seeded(views=3)(image, concat=True), torch.stack(views))
    again = seeded(views=3)(image, params=params)
    assert all(torch.equal(view, same) for view, same in zip(views, again, strict=True))
    assert torch.equal(seeded(views=3).draw(image), params)
    assert seeded().which_backend(image).name == "cpu"


def test_a_list_of_pictures_is_a_batch():
    pictures = [SOURCES["PIL"], AS_ARRAY[:, :20], PIXELS]
    tensors = [PIXELS, PIXELS[:, :, :20], PIXELS]
    views, expected = seeded()(pictures), seeded()(tensors)
    assert all(torch.equal(view, same) for view, same in zip(views, expected, strict=True))


def test_an_array_is_not_changed_and_not_shared():
    image = AS_ARRAY.astype(np.float32) / 255
    image.setflags(write=False)
    before = image.copy()
    seeded(strength=1.0)(image)
    assert (image == before).all()


def test_views_of_a_tv_tensor_go_on_through_a_pipeline():
    pipeline = v2.Compose(
        [v2.ToImage(), v2.Resize(30), seeded(), v2.Normalize((0.5,) * 3, (0.25,) * 3)]
    )
    views = pipeline(SOURCES["PIL"])
    resized = v2.Resize(30)(tv_tensors.Image(PIXELS))
    for view, expected in zip(views, seeded()(resized.as_subclass(torch.Tensor)), strict=True):
        assert isinstance(view, tv_tensors.Image)
        torch.testing.assert_close(view.as_subclass(torch.Tensor), (expected - 0.5) / 0.25)


class Pictures(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.transform(SOURCES["PIL"]), index


def test_workers_of_a_loader_draw_views_of_their_own():
    """No view of a picture twice, in an epoch and the next; of the same seed the same views."""

    def epochs(seed):
        augment = seeded()
        data = Pictures(v2.Compose([v2.Resize(20), augment]))
        loader = DataLoader(
            data,
            batch_size=3,
            num_workers=2,
            multiprocessing_context="fork",
            generator=torch.Generator().manual_seed(seed),
        )
        batches = [batch for _ in range(2) for batch in loader]
        assert [batch[1].tolist() for batch in batches[:4]] == torch.arange(12).view(4, 3).tolist()
        return torch.cat([torch.cat(views) for views, _ in batches])

    views = epochs(5)
    assert views.shape == (48, 3, 17, 17)
    assert len(views.flatten(1).unique(dim=0)) == 48
    assert torch.equal(views, epochs(5))
