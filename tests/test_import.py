"""What importing costs and touches, seen in fresh interpreters."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "statement",
    [
        "import contrastive_kit",
        "from contrastive_kit import NTXent, InfoNCE, ProjectionHead, which_backend",
        "from contrastive_kit.functional import nt_xent, info_nce",
        "import contrastive_kit.reference, contrastive_kit.evaluation",
        "import contrastive_kit.augment.functional",
    ],
)
def test_the_losses_load_torch_alone(statement):
    """Torch itself may load a package; what this one adds to that is nothing heavy."""
    heavy = "{'kornia', 'torchvision', 'triton', 'matplotlib', 'sklearn', 'skimage', 'PIL'}"
    code = (
        f"import sys, torch\nbefore = set(sys.modules)\n{statement}\n"
        f"print(sorted({heavy} & (set(sys.modules) - before)))"
    )
    assert python(code) == "[]"


def test_using_a_loss_loads_no_more():
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nfrom contrastive_kit import NTXent\n"
        "NTXent()(torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)).backward()\n"
        "print(sorted({'kornia', 'torchvision', 'triton'} & (set(sys.modules) - before)))"
    )
    assert python(code) == "[]"


def test_importing_a_loss_adds_little_to_importing_torch():
    code = (
        "import time, torch\nstart = time.perf_counter()\nfrom contrastive_kit import NTXent\n"
        "print(time.perf_counter() - start)"
    )
    best = min(float(python(code)) for _ in range(3))
    assert best <= 0.15


def test_an_unknown_name_is_an_attribute_error():
    code = (
        "import contrastive_kit\n"
        "try:\n    contrastive_kit.NTXnt\nexcept AttributeError as error:\n    print(error)"
    )
    assert python(code) == "module 'contrastive_kit' has no attribute 'NTXnt'"
