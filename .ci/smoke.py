"""What an installed wheel must do: ``python smoke.py [the folder it must come from]``."""

import sys
from importlib.metadata import requires
from pathlib import Path

import torch

import contrastive_kit as ck
from contrastive_kit.evaluation import knn_accuracy

home = Path(ck.__file__).parent
assert home.is_relative_to(sys.argv[1] if len(sys.argv) > 1 else sys.prefix), home
assert (home / "py.typed").is_file()
requirements = [line for line in requires("contrastive-kit") or () if "extra ==" not in line]
needed = {line.split(">")[0] for line in requirements}
assert needed == {"torch", "torchvision", "kornia", "einops"}, needed
assert all(getattr(ck, name) is not None for name in dir(ck))

torch.manual_seed(0)
images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
augment = ck.SimCLRAugment(32, strength=0.5)
encoder = ck.resnet_encoder("resnet18", stem="cifar")
head = ck.ProjectionHead(encoder.out_dim)
z1, z2 = head(encoder(torch.cat(augment(images)))).chunk(2)
labels = torch.arange(16) % 4
losses = [
    ck.NTXent()(z1, z2),
    ck.InfoNCE(symmetric=True)(z1, z2),
    ck.SupCon()(z1, z2, labels=labels),
    ck.SigLIP()(z1, z2),
]
torch.stack(losses).sum().backward()
assert all(loss.isfinite() for loss in losses)
assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
h = encoder(images / 255).detach()
assert knn_accuracy(h, labels, h, labels, k=1).accuracy == 1
print(f"contrastive-kit {ck.__version__} from {home}: {', '.join(f'{x:.3f}' for x in losses)}")
