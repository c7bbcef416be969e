"""Which room may import which: the arrows of CONTRIBUTING.md, read from the syntax trees."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "contrastive_kit"
ROOMS = {
    "reference": set(),
    "_checks": {"_dtypes"},
    "_dtypes": set(),
    "_gpu": set(),
    "ops": {"reference", "_checks", "_dtypes", "_gpu", "ops"},
    "distributed": set(),
    "losses": {"_checks", "_dtypes", "ops", "losses", "distributed"},
    "functional": {"losses"},
    "heads": {"_checks"},
    "encoders": set(),
    "queue": {"_checks", "ops", "distributed"},
    "evaluation": {"_dtypes", "_checks"},
    "grad_cache": {"_replay", "_checks"},
    "_replay": set(),
    "metrics": {"_checks", "ops"},
    "augment": {"augment", "_checks", "_gpu"},
    "preview": {"augment"},
    "_version": set(),
    "__init__": {"_version"},
}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Modules imported by a file, but for those only the type checker sees."""
    tree = ast.parse(path.read_text())
    hidden = [
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    ]
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module
            yield from (
                f"{base}.{alias.name}" if base == "contrastive_kit" else base
                for alias in node.names
            )


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_follow_the_arrows(path):
    used = {m.split(".")[1] for m in imports(path) if m.startswith("contrastive_kit.")}
    assert used <= ROOMS[room(path)]


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_a_backend_knows_the_problem_and_neither_the_table_nor_another_backend(backend):
    known = {"problem", "pairs", "registered", "statistics", "unit_rows", "differentiable_once"}
    known.add(backend)
    for path in (PACKAGE / "ops" / backend).glob("*.py"):
        used = {m.split(".")[2] for m in imports(path) if m.startswith("contrastive_kit.ops.")}
        assert used <= known, path


def test_the_reference_imports_torch_only():
    assert {m.split(".")[0] for m in imports(PACKAGE / "reference.py")} == {"torch"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_runtime_dependencies_are_the_declared_ones(path):
    standard = __import__("sys").stdlib_module_names
    outside = {m.split(".")[0] for m in imports(path)} - set(standard)
    allowed = {"contrastive_kit", "torch", "torchvision", "kornia", "einops", "triton"}
    if path.name == "preview.py":
        allowed |= {"PIL", "numpy"}  # a command line tool, which says so when they are missing
    assert outside <= allowed
