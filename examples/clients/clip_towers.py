"""CLIP: an image tower and a text tower that learn which caption belongs to which image.

    cd examples && python -m clients.clip_towers

Images are shapes that are drawn here, captions their words. Towers of your own, those of open_clip
or of transformers for one, take the place of the two small ones; the loop stays. Then classes that
no label was ever given for are told by their names: the zero-shot accuracy.
"""

import math

import torch
from torch import Tensor, nn

from contrastive_kit import InfoNCE, resnet_encoder

COLORS = {"red": (1, 0, 0), "green": (0, 0.7, 0), "blue": (0, 0, 1), "gray": (0.5, 0.5, 0.5)}
SHAPES = ("disc", "square", "ring", "cross")
PLACES = ("left", "middle", "right")
WORDS = ("a", *COLORS, *SHAPES, *PLACES)


def tokens(caption: str) -> Tensor:
    """Numbers of the words."""
    return torch.tensor([WORDS.index(word) for word in caption.split()])


def draw(color: str, shape: str, place: str, size: int = 32) -> Tensor:
    """An image (3, size, size) in [0, 1], a little different each time."""
    radius = size * (0.16 + 0.08 * torch.rand(()))
    center = size * (PLACES.index(place) + 0.7 + 0.6 * torch.rand(())) / 3
    y = torch.arange(size)[:, None] - size * (0.3 + 0.4 * torch.rand(()))
    x = torch.arange(size) - center
    inside = {
        "disc": x.square() + y.square() < radius**2,
        "square": torch.maximum(x.abs(), y.abs()) < radius,
        "ring": ((x.square() + y.square()).sqrt() - radius).abs() < radius / 4,
        "cross": (torch.minimum(x.abs(), y.abs()) < radius / 4)
        & (torch.maximum(x.abs(), y.abs()) < radius),
    }[shape]
    noise = 0.8 + 0.2 * torch.rand(3, size, size)
    return torch.where(inside, torch.tensor(COLORS[color])[:, None, None], noise)


def batch_of(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens (B, 4), and the number of each caption, which some images share."""
    picks = [torch.randint(len(x), (size,)) for x in (COLORS, SHAPES, PLACES)]
    said = [
        (list(COLORS)[c], SHAPES[s], PLACES[p]) for c, s, p in torch.stack(picks, dim=1).tolist()
    ]
    images = torch.stack([draw(*words) for words in said])
    captions = torch.stack([tokens("a " + " ".join(words)) for words in said])
    return images, captions, (picks[0] * len(SHAPES) + picks[1]) * len(PLACES) + picks[2]


def main(steps: int = 150, batch_size: int = 128, dim: int = 64) -> float:
    """Train, and tell the zero-shot accuracy among the 48 captions on new images."""
    torch.manual_seed(0)
    trunk = resnet_encoder("resnet18")
    image_tower = nn.Sequential(trunk, nn.Linear(trunk.out_dim, dim, bias=False))
    text_tower = nn.EmbeddingBag(len(WORDS), dim)
    loss_fn = InfoNCE(symmetric=True, learnable_temperature=True)  # both directions, 0.07 at first
    parameters = [*image_tower.parameters(), *text_tower.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    for step in range(steps):
        images, captions, caption_ids = batch_of(batch_size)
        # Images of equal caption are not negatives of each other.
        loss, stats = loss_fn(
            image_tower(images), text_tower(captions), ids=caption_ids, return_stats=True
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            temperature = math.exp(-loss_fn.logit_scale.item())
            print(f"step {step}  loss {loss:.3f}  found {stats.accuracy:.1%}  τ {temperature:.3f}")

    image_tower.eval()
    names = [f"a {c} {s} {p}" for c in COLORS for s in SHAPES for p in PLACES]
    with torch.no_grad():
        images, _, caption_ids = batch_of(256)
        classes = nn.functional.normalize(text_tower(torch.stack([tokens(n) for n in names])))
        guesses = (image_tower(images) @ classes.T).argmax(dim=1)
    accuracy = (guesses == caption_ids).float().mean().item()
    print(f"zero-shot accuracy among {len(names)} captions: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
