"""What a type checker makes of calls in the code of a user."""

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest

import contrastive_kit
from contrastive_kit import functional
from contrastive_kit.losses import _signatures
from contrastive_kit.ops import BACKENDS, BackendName

ROOT = Path(__file__).parents[1]

# A line that ends in "# wrong" must be an error, and no other.
CALLS = """
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import assert_type

import contrastive_kit as ck
from contrastive_kit import InfoNCE, NTXent, ProjectionHead, SigLIP, SupCon, resnet_encoder
from contrastive_kit import NTXnt  # wrong
from contrastive_kit.functional import info_nce, nt_xent, siglip
from contrastive_kit.functional import similarity_distillation, sup_con
from contrastive_kit.losses import ContrastiveStats

z1, z2, labels = torch.randn(4, 3), torch.randn(4, 3), torch.arange(4)
flag = len(z1) > 2

assert_type(nt_xent(z1, z2, z1, temperature=0.1, hardness=0.2), Tensor)
assert_type(nt_xent(z1, z2, return_stats=True), tuple[Tensor, ContrastiveStats])
assert_type(nt_xent(z1, z2, return_stats=flag), Tensor | tuple[Tensor, ContrastiveStats])
assert_type(info_nce(z1, z2, z1, symmetric=False), Tensor)
assert_type(info_nce(z1, z2, z1, in_batch_negatives=True, negative_ids=labels), Tensor)
assert_type(info_nce(z1, z2, ids=labels, return_stats=True), tuple[Tensor, ContrastiveStats])
assert_type(sup_con(z1, labels=labels, variant="in"), Tensor)
assert_type(sup_con(z1, labels=labels, return_stats=True), tuple[Tensor, ContrastiveStats])
assert_type(siglip(z1, z2, logit_bias=0.0), Tensor)
assert_type(siglip(z1, z2, return_stats=True), tuple[Tensor, ContrastiveStats])

assert_type(similarity_distillation(z1, z2, z1, z2, reduction="none"), Tensor)

assert_type(NTXent()(z1, z2, z1), Tensor)
assert_type(NTXent()(z1, z2, return_stats=True), tuple[Tensor, ContrastiveStats])
assert_type(InfoNCE()(z1, z2, z1), Tensor)
assert_type(InfoNCE()(z1, z2, return_stats=flag), Tensor | tuple[Tensor, ContrastiveStats])
assert_type(SupCon()(z1, z2, labels=labels), Tensor)
assert_type(SigLIP()(z1, z2), Tensor)
assert_type(SigLIP()(z1, z2, return_stats=True), tuple[Tensor, ContrastiveStats])
assert_type(NTXent().reduction, Literal["mean", "sum", "none"])
assert_type(nt_xent(z1, z2, reduction=NTXent().reduction), Tensor)

assert_type(resnet_encoder("resnet18").out_dim, int)
assert_type(ProjectionHead(512)(resnet_encoder("resnet18")(z1)), Tensor)
assert_type(ck.losses.NTXent()(z1, z2), Tensor)
assert_type(ck.metrics.uniformity(z1), Tensor)
assert_type(ck.augment.SimCLRAugment(32)(z1), tuple[Tensor, ...])

nt_xent(z1, z2, symmetric=True)  # wrong
info_nce(z1, z2, decoupled=True)  # wrong
sup_con(z1, z2)  # wrong
siglip(z1, z2, hardness=0.5)  # wrong
NTXent()(z1)  # wrong
InfoNCE()(z1, z2, None, labels)  # wrong
SigLIP()(z1, z2, negatives=labels)  # wrong
nt_xent(z1, z2, reduction="average")  # wrong
NTXent(backend="cuda")  # wrong
SupCon(variant="both")  # wrong
ck.lossses  # wrong
ck.augment.RandomCrop  # wrong
"""

# Each public name is one that a type checker knows too.
NAMES = "import contrastive_kit as ck\n" + "".join(f"ck.{name}\n" for name in dir(contrastive_kit))

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_calls_in_the_code_of_a_user_have_types(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api", reason="needs mypy")
    monkeypatch.chdir(ROOT)  # with the settings and the cache of the package's own check
    code = {"calls.py": CALLS, "names.py": NAMES}
    code |= {f"readme{i}.py": example for i, example in enumerate(EXAMPLES)}
    assert len(code) > 2
    wrong = set()
    for name, text in code.items():
        (tmp_path / name).write_text(text)
        lines = enumerate(text.splitlines(), 1)
        wrong |= {(name, number) for number, line in lines if line.endswith("# wrong")}
    report, problem, _ = api.run([str(tmp_path / name) for name in code])
    assert not problem
    # Torch gives no types to Tensor.backward and Tensor.split, which only --strict minds.
    error = r'^(.*):(\d+)(?::\d+)?: error: (?!Call to untyped function "(?:backward|split)")'
    places = re.findall(error, report, re.MULTILINE)
    assert {(Path(name).name, int(number)) for name, number in places} == wrong, report


def test_the_backends_that_may_be_named_are_those_there_are():
    assert get_args(BackendName) == ("auto", *BACKENDS)


def test_choices_of_the_losses_are_literals():
    """So that a checker and an editor know the words; a loss added later too."""
    for name in functional.__all__:
        for parameter in inspect.signature(getattr(functional, name)).parameters.values():
            assert parameter.annotation is not str, (name, parameter)


def test_keywords_are_those_of_the_functions():
    """The overloads list again what the functions take; only type checkers read them."""
    apart = {"z1", "z2", "more_views", "views", "query", "key", "negatives", "return_stats"}
    for function, keywords in (
        (functional.nt_xent, _signatures.NTXentKeywords),
        (functional.info_nce, _signatures.InfoNCEKeywords),
        (functional.sup_con, _signatures.SupConKeywords),
        (functional.siglip, _signatures.SigLIPKeywords),
    ):
        taken = set(inspect.signature(function).parameters) - apart
        named = {"labels"} if function is functional.sup_con else set()  # without a default
        assert set(keywords.__annotations__) == taken - named
