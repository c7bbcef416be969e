"""What importing costs and touches, seen in fresh interpreters."""

import json
import subprocess
import sys

import pytest

import contrastive_kit

# Torch itself may load one of them; what this package adds to that is nothing heavy.
HEAVY = {
    "kornia", "torchvision", "triton", "matplotlib", "sklearn", "skimage", "PIL", "sympy",
    "torch._dynamo", "torch._inductor",
}  # fmt: skip

STEPS = [
    "import contrastive_kit",
    "contrastive_kit.losses, contrastive_kit.augment, contrastive_kit.metrics",
    "from contrastive_kit import NTXent, InfoNCE, ProjectionHead, which_backend",
    "from contrastive_kit.functional import nt_xent, info_nce",
    "import contrastive_kit.reference, contrastive_kit.evaluation",
    "import contrastive_kit.augment.functional",
    "NTXent()(torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)).backward()",
    "info_nce(torch.randn(4, 3), torch.randn(4, 3), symmetric=True)",
]


@pytest.fixture(scope="module")
def loaded():
    """The modules that each step loads, in one interpreter: the first to need one is its cause."""
    code = (
        "import json, sys, torch\nresult = []\n"
        f"for step in {STEPS!r}:\n"
        "    before = set(sys.modules)\n    exec(step)\n"
        "    result.append(sorted(set(sys.modules) - before))\n"
        "print(json.dumps(result))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(STEPS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("step", STEPS)
def test_the_losses_load_and_use_torch_alone(loaded, step):
    assert HEAVY & set(loaded[step]) == set()


def test_importing_a_loss_adds_little_to_importing_torch(loaded):
    added = [name for step in STEPS[:4] for name in loaded[step]]
    assert "contrastive_kit.losses.ntxent" in added
    assert len(added) <= 60


@pytest.mark.parametrize("module", [contrastive_kit, contrastive_kit.augment])
def test_what_an_editor_offers_is_what_there_is(module):
    names = dir(module)
    assert set(module.__all__) <= set(names)
    assert [name for name in names if name.startswith("_")] in ([], ["__version__"])
    assert all(getattr(module, name) is not None for name in names)


def test_an_unknown_name_is_an_attribute_error():
    words = "module 'contrastive_kit' has no attribute 'NTXnt'"
    with pytest.raises(AttributeError, match=words):
        _ = contrastive_kit.NTXnt
