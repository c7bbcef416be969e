"""What every test gets: a fixed seed, poisoned uninitialized memory, and honest GPU skips."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core: read when torch loads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

_EMPTY = torch.empty
_EMPTY_LIKE = torch.empty_like
_NEW_EMPTY = torch.Tensor.new_empty


def _poison(tensor):
    if tensor.is_floating_point() and not tensor.requires_grad:
        tensor.fill_(float("nan"))
    return tensor


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def interpreter_patches_once_a_launch():
    """Triton's interpreter also patches its language at each call of a function within a kernel.

    That is a third of its time, and changes nothing after the first call of a launch.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # Triton 3.5 launches in another way
        yield
        return
    function = interpreter.InterpretedFunction
    launch, patched = function.run, set()

    def run(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        modules = id(self.fn.__globals__)
        if modules not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(modules)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "run", run)
        patch.setattr(function, "__call__", call)
        yield


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Uninitialized floats are NaN, so that a result which reads them cannot look right."""
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(_EMPTY(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(_EMPTY_LIKE(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(_NEW_EMPTY(*a, **k)))


# A worker that takes one of these last works alone at the end.
LONG_FILES = {
    "test_processes.py",
    "test_cifar10_script.py",
    "test_claims.py",
    "test_gpu_script.py",
    "test_clients.py",
    "test_gather.py",
    "test_integration.py",
    "test_learner.py",
    "test_losses.py",
    "test_run.py",
    "test_triton.py",
    "test_triton_aot.py",
}


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest; skip what cannot run here.

    GPU tests are skipped with their reason, or fail where CK_REQUIRE_CUDA says a GPU is owed.

    Tests that take every backend on CPU tensors reach "triton" in the interpreter's process, which
    tests/ops/test_triton.py starts.
    """
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            reason = "backend 'triton' takes CPU tensors in Triton's interpreter only"
            item.add_marker(pytest.mark.skip(reason=reason))
    if torch.cuda.is_available() or os.environ.get("CK_REQUIRE_CUDA") == "1":
        return
    # Torch 2.9 asks the driver for the current device when a fake CUDA tensor is indexed; later
    # releases replace that by nothing, with this function.
    asks = not hasattr(torch._C, "_ensureCUDADeviceGuardSet")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
        elif asks and item.get_closest_marker("indexes_fakes"):
            reason = "this torch indexes fake CUDA tensors only where there is a CUDA device"
            item.add_marker(pytest.mark.skip(reason=reason))
