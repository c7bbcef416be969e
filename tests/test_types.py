"""What a type checker makes of calls in the code of a user."""

import inspect
from pathlib import Path

import pytest

from contrastive_kit import functional
from contrastive_kit.losses import _signatures

ROOT = Path(__file__).parents[1]

# A line that ends in "# wrong" must be an error, and no other.
CALLS = """
import torch
from torch import Tensor
from typing_extensions import assert_type

from contrastive_kit import InfoNCE, NTXent, SigLIP, SupCon
from contrastive_kit.functional import info_nce, nt_xent, siglip, sup_con
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

assert_type(NTXent()(z1, z2, z1), Tensor)
assert_type(NTXent()(z1, z2, return_stats=True), tuple[Tensor, ContrastiveStats])
assert_type(InfoNCE()(z1, z2, z1), Tensor)
assert_type(InfoNCE()(z1, z2, return_stats=flag), Tensor | tuple[Tensor, ContrastiveStats])
assert_type(SupCon()(z1, z2, labels=labels), Tensor)
assert_type(SigLIP()(z1, z2), Tensor)
assert_type(SigLIP()(z1, z2, return_stats=True), tuple[Tensor, ContrastiveStats])
assert_type(NTXent().reduction, str)

nt_xent(z1, z2, symmetric=True)  # wrong
info_nce(z1, z2, decoupled=True)  # wrong
sup_con(z1, z2)  # wrong
siglip(z1, z2, hardness=0.5)  # wrong
NTXent()(z1)  # wrong
InfoNCE()(z1, z2, None, labels)  # wrong
SigLIP()(z1, z2, labels=labels)  # wrong
"""


def test_calls_of_losses_have_types(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api", reason="needs mypy")
    monkeypatch.chdir(ROOT)  # with the settings and the cache of the package's own check
    snippet = tmp_path / "calls.py"
    snippet.write_text(CALLS)
    report, problem, _ = api.run([str(snippet)])
    assert not problem
    found = {int(line.split(":")[1]) for line in report.splitlines() if ": error: " in line}
    lines = enumerate(CALLS.splitlines(), 1)
    assert found == {number for number, line in lines if line.endswith("# wrong")}, report


def test_keywords_are_those_of_the_functions():
    """The overloads list again what the functions take; only type checkers read them."""
    apart = {"z1", "z2", "more_views", "views", "query", "key", "negatives", "labels"}
    for function, keywords in (
        (functional.nt_xent, _signatures.NTXentKeywords),
        (functional.info_nce, _signatures.InfoNCEKeywords),
        (functional.sup_con, _signatures.SupConKeywords),
        (functional.siglip, _signatures.SigLIPKeywords),
    ):
        taken = set(inspect.signature(function).parameters) - apart - {"return_stats"}
        assert set(keywords.__annotations__) == taken
