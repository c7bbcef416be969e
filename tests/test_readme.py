"""README.md is true: its loop runs, its tables compare equal values, its links lead somewhere."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision

from contrastive_kit import InfoNCE, NTXent, SigLIP, SupCon

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_loop_runs_as_pasted(tmp_path, monkeypatch, capsys):
    (loop,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    data = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8).numpy()
    fake = SimpleNamespace(data=data)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, download: fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert loop.count("range(100)") == 1
    assert len(loop.splitlines()) < 30
    exec(compile(loop.replace("range(100)", "range(2)"), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"epoch 1: other view found \d+\.\d%", lines[1])
    assert "conv1.weight" in torch.load(tmp_path / "encoder.pt")


def rows_of(library):
    """The two columns of the table that begins with a library's name."""
    table = README.split(f"| {library} | here |\n|---|---|\n")[1].split("\n\n")[0]
    return [re.findall(r"`(.*?)`", line)[:2] for line in table.splitlines()]


def lightly():
    loss = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    return {"lightly": SimpleNamespace(loss=loss)}


def metric_learning():
    reason = "pytorch-metric-learning is not installed"
    return {"losses": pytest.importorskip("pytorch_metric_learning.losses", reason=reason)}


def info_nce_pytorch():
    return vars(pytest.importorskip("info_nce", reason="info-nce-pytorch is not installed"))


def open_clip():
    return vars(pytest.importorskip("open_clip.loss", reason="open_clip_torch is not installed"))


def sentence_transformers():
    """Its formulas: cross entropy of scaled cosines, which its models compute from texts."""

    def cosines(scale):
        a, b = (F.normalize(z, dim=1) for z in (Z["anchors"], Z["positives"]))
        return scale * a @ b.T

    def ranking(model, scale):
        return F.cross_entropy(cosines(scale), torch.arange(7))

    def symmetric(model, scale):
        return (ranking(model, scale) + F.cross_entropy(cosines(scale).T, torch.arange(7))) / 2

    return {
        "model": None,
        "MultipleNegativesRankingLoss": ranking,
        "MultipleNegativesSymmetricRankingLoss": symmetric,
    }


def sup_contrast():
    """The authors' formula, over all pairs: features (N, V, D), mean over all anchors."""

    class SupConLoss:
        def __init__(self, temperature):
            self.temperature = temperature

        def __call__(self, features, labels=None):
            n, v, _ = features.shape
            labels = torch.arange(n) if labels is None else labels
            z = F.normalize(features, dim=2).transpose(0, 1).flatten(0, 1)
            labels = labels.repeat(v)
            itself = torch.eye(n * v, dtype=torch.bool)
            logits = (z @ z.T / self.temperature).masked_fill(itself, -torch.inf)
            positive = (labels[:, None] == labels) & ~itself
            log_probability = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~positive, 0)
            return -(log_probability.sum(1) / positive.sum(1)).mean()

    return {"SupConLoss": SupConLoss}


generator = torch.Generator().manual_seed(1)
Z = {
    name: torch.randn(7, 5, dtype=torch.float64, generator=generator)
    for name in ("z1", "z2", "anchors", "positives")
}
Z["negatives"] = torch.randn(7, 3, 5, dtype=torch.float64, generator=generator)
Z["features"] = torch.stack([Z["z1"], Z["z2"]], 1)
OURS = {"InfoNCE": InfoNCE, "NTXent": NTXent, "SigLIP": SigLIP, "SupCon": SupCon}
LIBRARIES = {
    "lightly": lightly,
    "pytorch-metric-learning": metric_learning,
    "info-nce-pytorch": info_nce_pytorch,
    "open_clip": open_clip,
    "sentence-transformers": sentence_transformers,
    "SupContrast": sup_contrast,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_both_columns_of_a_migration_table_have_the_same_value(library):
    labels = torch.tensor([0, 1, 0, 1, 2, 2, 0])
    names = {**LIBRARIES[library](), **Z, "labels": labels, "F": F, "torch": torch}
    rows = rows_of(library)
    assert len(rows) == 2
    for before, after in rows:
        expected = eval(before, dict(names))
        torch.testing.assert_close(eval(after, {**names, **OURS}), expected, rtol=1e-6, atol=0)


def test_links_are_absolute_and_lead_to_files_that_are_there():
    project = (ROOT / "pyproject.toml").read_text()
    (repository,) = re.findall(r'^Repository = "(.*)"$', project, re.MULTILINE)
    links = re.findall(r"\]\((.*?)\)", README)
    assert all(link.startswith("https://") for link in links), links
    here = [re.sub(r".*?/main/", "", link) for link in links if repository.split("/", 3)[3] in link]
    assert len(here) > 10
    assert all((ROOT / path).is_file() for path in here), here
