"""The losses inside torch: compile, autocast, functional transforms, copies."""

import copy
import pickle

import pytest
import torch

from contrastive_kit import InfoNCE, NTXent, SigLIP, SupCon
from contrastive_kit.functional import (
    info_nce,
    nt_xent,
    siglip,
    similarity_distillation,
    sup_con,
)

LOSSES = {
    "number as temperature": lambda a, b, t: nt_xent(a, b, temperature=0.2) + 0 * t,
    "nt_xent": lambda a, b, t: nt_xent(a, b, temperature=t),
    "three views": lambda a, b, t: nt_xent(a, b, a + b, temperature=t),
    "ids": lambda a, b, t: nt_xent(a, b, temperature=t, ids=torch.arange(len(a)) // 2),
    "stats": lambda a, b, t: (
        sum(nt_xent(a, b, temperature=t, return_stats=True)[1], 0)
        + nt_xent(a, b, temperature=t, return_stats=True)[0]
    ),
    "one tensor for both views": lambda a, b, t: nt_xent(a, a, temperature=t) + b.sum(),
    "clip": lambda a, b, t: info_nce(a, b, temperature=t, symmetric=True),
    "queue": lambda a, b, t: info_nce(a, b, b.detach().flip(0), temperature=t),
    "per query": lambda a, b, t: info_nce(a, b, torch.stack([b, -b], 1), temperature=t),
    "prior and margin": lambda a, b, t: info_nce(
        a, b, temperature=t, symmetric=True, positive_prior=0.1, hardness=0.5, margin=0.2
    ),
    "false negatives left out": lambda a, b, t: (
        nt_xent(a, b, temperature=t, false_negative_margin=0.1)
        + info_nce(a, b, temperature=t, symmetric=True, false_negative_margin=0.0)
    ),
    "negatives of every kind": lambda a, b, t: info_nce(
        a,
        b,
        torch.cat([b.flip(0), a])[1:],
        temperature=t,
        symmetric=True,
        in_batch_negatives=True,
        query_negatives=True,
        key_negatives=True,
        ids=torch.arange(len(a)) // 2,
        negative_ids=torch.arange(2 * len(a) - 1),
    ),
    "per query beside the batch": lambda a, b, t: info_nce(
        a,
        b,
        torch.stack([b, -b], 1),
        temperature=t,
        in_batch_negatives=True,
        ids=torch.arange(len(a)),
        negative_ids=torch.zeros(len(a), 2, dtype=torch.int64),
    ),
    "weights and smoothing": lambda a, b, t: nt_xent(
        a,
        b,
        temperature=t,
        ids=torch.arange(len(a)) // 2,
        sample_weight=torch.arange(len(a)) / 2,
        label_smoothing=0.1,
    ),
    "hardness": lambda a, b, t: info_nce(a, b, temperature=t, symmetric=True, hardness=0.5),
    "sup_con": lambda a, b, t: sup_con(a, b, labels=torch.arange(len(a)) // 2, temperature=t),
    "sup_con stats": lambda a, b, t: sum(
        sup_con(a, b, labels=torch.arange(len(a)) // 2, temperature=t, return_stats=True)[1],
        sup_con(a, b, labels=torch.arange(len(a)) // 2, temperature=t),
    ),
    "sup_con in": lambda a, b, t: sup_con(
        a, b, labels=torch.arange(len(a)) // 2, temperature=t, variant="in"
    ),
    "sup_con pairwise": lambda a, b, t: sup_con(
        a, b, labels=torch.arange(len(a)) // 2, temperature=t, variant="pairwise"
    ),
    "sup_con keys": lambda a, b, t: sup_con(
        a,
        labels=torch.arange(len(a)) // 2,
        keys=b,
        key_labels=torch.arange(len(a)) % 3,
        temperature=t,
        symmetric=True,
    ),
    "sup_con keys pairwise": lambda a, b, t: sup_con(
        a,
        labels=torch.arange(len(a)) // 2,
        keys=torch.cat([a, b]),
        key_labels=torch.arange(2 * len(a)) % 3,
        temperature=t,
        variant="pairwise",
    ),
    "sup_con multi-hot": lambda a, b, t: sup_con(
        a, b, labels=torch.arange(len(a))[:, None] % torch.arange(2, 5), temperature=t
    ),
    "siglip labels": lambda a, b, t: siglip(
        a,
        torch.cat([a, b]),
        labels=torch.arange(len(a)) // 2,
        z2_labels=torch.arange(2 * len(a)) // 3,
        balance_positives=True,
        temperature=t,
        logit_bias=-10 * t,
    ),
    "siglip labels of both": lambda a, b, t: siglip(
        a, b, labels=torch.arange(len(a)) // 2, temperature=t, return_stats=True
    )[0],
    "distillation": lambda a, b, t: similarity_distillation(
        a, b, a.flip(1)[:, 1:], b.flip(1)[:, 1:], temperature=t, symmetric=True
    ),
    "siglip": lambda a, b, t: siglip(a, b, temperature=t, logit_bias=-10 * t),
    "reference": lambda a, b, t: nt_xent(a, b, temperature=t, backend="reference"),
}


# "sup_con stats" also calls what "sup_con" does, "weights and smoothing" has ids, and a test below
# has numbers.
COMPILED_ELSEWHERE = ("sup_con", "ids", "number as temperature")
# One for each op; AOTAutograd's part depends on the ops alone, whose opcheck goes through it too.
THROUGH_AOT = ("nt_xent", "queue", "sup_con pairwise", "siglip")


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in COMPILED_ELSEWHERE])
def test_compiles_to_one_graph_at_every_size(name):
    torch.compiler.reset()
    loss_fn = LOSSES[name]
    backend = "aot_eager" if name in THROUGH_AOT else "eager"
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for n in (5, 8, 33, 6):
        a, b = torch.randn(2, n, 7, requires_grad=True).unbind(0)
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        temperature = torch.tensor(0.2, requires_grad=True)
        inputs = (a, b, temperature)
        expected = loss_fn(*inputs)
        expected_grads = torch.autograd.grad(expected, inputs)
        actual = compiled(*inputs)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, inputs), expected_grads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "module",
    [
        NTXent(learnable_temperature=True),
        InfoNCE(0.02, symmetric=True, learnable_temperature=True),
    ],
    ids=["NTXent", "InfoNCE"],
)
def test_a_learnable_module_trains_compiled_as_it_does_eagerly(module):
    torch.compiler.reset()
    a, b = torch.randn(2, 9, 6, dtype=torch.float64).unbind(0)
    results = []
    for compiled in (False, True):
        loss_fn = copy.deepcopy(module).double()
        call = torch.compile(loss_fn, fullgraph=True, backend="aot_eager") if compiled else loss_fn
        optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.05)
        for _ in range(6):
            optimizer.zero_grad()
            call(a, b).backward()
            optimizer.step()
        results.append((call(a, b).detach(), loss_fn.logit_scale.detach()))
    torch.testing.assert_close(results[1], results[0])
    assert abs(results[0][1] - module.logit_scale) > 1e-3


@pytest.mark.parametrize("module", [SigLIP(), SupCon(learnable_temperature=True, variant="in")])
def test_other_modules_compile_to_one_graph(module):
    torch.compiler.reset()
    a, b = torch.randn(2, 9, 6).unbind(0)
    options = {"labels": torch.arange(9) // 2} if isinstance(module, SupCon) else {}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(module(a, b, **options), list(module.parameters()))
    actual = torch.autograd.grad(compiled(a, b, **options), list(module.parameters()))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("loss_fn", [nt_xent, info_nce, siglip])
def test_the_numbers_of_a_loss_may_be_symbols(loss_fn):
    """With dynamic=True a number is one, also a default."""
    torch.compiler.reset()
    a, b = (torch.randn(9, 6, requires_grad=True) for _ in range(2))
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    actual, expected = compiled(a, b), loss_fn(a, b)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (a, b)), torch.autograd.grad(expected, (a, b))
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nt_xent", "clip", "weights and smoothing", "sup_con", "siglip"])
def test_compiles_with_inductor(name):
    torch.compiler.reset()
    a, b = (torch.randn(33, 7, requires_grad=True) for _ in range(2))
    temperature = torch.tensor(0.2, requires_grad=True)
    loss_fn = LOSSES[name]
    actual = torch.compile(loss_fn, fullgraph=True)(a, b, temperature)
    expected = loss_fn(a, b, temperature)
    torch.testing.assert_close(actual, expected)
    inputs = (a, b, temperature)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs)
    )


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, name):
    a, b = torch.randn(2, 33, 17).unbind(0)
    a.requires_grad_()
    temperature = torch.tensor(0.05)
    expected = LOSSES[name](a, b, temperature)
    (expected_grad,) = torch.autograd.grad(expected, a)
    with torch.autocast("cpu", dtype):
        actual = LOSSES[name](a, b, temperature)
    assert torch.equal(actual, expected)
    assert torch.equal(torch.autograd.grad(actual, a)[0], expected_grad)


@pytest.mark.parametrize(
    "name",
    [
        "nt_xent",
        "clip",
        "queue",
        "weights and smoothing",
        "sup_con",
        "sup_con in",
        "sup_con pairwise",
        "sup_con keys",
        "siglip",
        "siglip labels",
        "distillation",
    ],
)
def test_functional_gradient(name):
    a, b = torch.randn(2, 9, 5).unbind(0)
    temperature = torch.tensor(0.3)
    wanting = a.clone().requires_grad_()
    expected = torch.autograd.grad(LOSSES[name](wanting, b, temperature), wanting)[0]
    actual = torch.func.grad(LOSSES[name])(a, b, temperature)
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_batches_of_batches():
    batches = torch.randn(3, 2, 9, 5)
    expected = torch.stack([nt_xent(*views) for views in batches])
    actual = torch.func.vmap(lambda views: nt_xent(views[0], views[1]))(batches)
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_temperatures():
    a, b = torch.randn(2, 9, 5).unbind(0)
    temperatures = torch.tensor([0.1, 0.5])
    expected = torch.stack([nt_xent(a, b, temperature=t) for t in temperatures])
    actual = torch.func.vmap(lambda t: nt_xent(a, b, temperature=t))(temperatures)
    torch.testing.assert_close(actual, expected)


def test_modules_copy_and_pickle():
    a, b = torch.randn(2, 9, 5).unbind(0)
    modules = (
        NTXent(0.3, decoupled=True, hardness=0.5),
        InfoNCE(learnable_temperature=True, label_smoothing=0.1),
        SigLIP(0.2),
    )
    for module in modules:
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(a, b), module(a, b))
            assert repr(twin) == repr(module)


def test_second_order_training_is_refused_not_ignored():
    """A gradient penalty over the loss must not silently lose its curvature."""
    a = torch.randn(9, 5, requires_grad=True)
    b = torch.randn(9, 5)
    loss = nt_xent(a, b, decoupled=True)
    (grad,) = torch.autograd.grad(loss, a, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        (loss + grad.square().sum()).backward()


def test_float32_matmul_precision_is_followed_and_left_alone():
    before = torch.get_float32_matmul_precision()
    nt_xent(torch.randn(4, 3), torch.randn(4, 3))
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    "make",
    [SigLIP, NTXent, lambda: InfoNCE(learnable_temperature=True)],
    ids=["SigLIP", "NTXent", "InfoNCE"],
)
def test_a_module_made_on_the_device_meta_can_be_printed(make):
    """As whole models are before their weights are loaded."""
    with torch.device("meta"):
        module = make()
        shown = repr(module)
    learnable = any(True for _ in module.parameters())
    assert ("temperature=?" in shown) == learnable
    assert repr(module.to_empty(device="cpu")).count("?") == 0


class WithLabels(torch.nn.Module):
    def __init__(self, variant):
        super().__init__()
        self.loss_fn = SupCon(variant=variant)

    def forward(self, a, b, labels):
        return self.loss_fn(a, b, labels=labels)


class WithQueue(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loss_fn = InfoNCE()

    def forward(self, a, b, queue):
        return self.loss_fn(a, b, queue)


EXPORTED = {
    "NTXent": NTXent(),
    "NTXent, reference": NTXent(backend="reference"),
    "NTXent, learnable, smoothing": NTXent(learnable_temperature=True, label_smoothing=0.1),
    "NTXent, hardness": NTXent(hardness=0.5),
    "CLIP": InfoNCE(symmetric=True, learnable_temperature=True),
    "queue": WithQueue(),
    "SigLIP": SigLIP(),
    "SigLIP, reference": SigLIP(backend="reference"),
    "SupCon, out": WithLabels("out"),
    "SupCon, in": WithLabels("in"),
}


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in EXPORTED), ("NTXent", True), ("SigLIP", True)]
)
def test_exports_for_any_batch_size(name, strict):
    """Both modes: the default one runs Python, in which ``len`` would fix the size."""
    module = EXPORTED[name]
    n, k = torch.export.Dim("n", min=2, max=4096), torch.export.Dim("k", min=2, max=4096)
    # What the strict mode makes of any autograd.Function has no gradient, and torch 2.9 exports
    # none for a size that varies.
    gradients = not strict and not torch.__version__.startswith("2.9.")

    def inputs(size):
        z = [torch.randn(size, 5, requires_grad=gradients) for _ in range(2)]
        extra = {"queue": torch.randn(2 * size, 5), "SupCon": torch.arange(size) // 2}
        return (*z, *(x for key, x in extra.items() if name.startswith(key)))

    sizes = ({0: n}, {0: n}, {0: k if name == "queue" else n})
    example = inputs(6)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(
            module, example, dynamic_shapes=sizes[: len(example)], strict=strict
        )
    for size in (6, 11):
        x = inputs(size)
        actual, expected = program.module()(*x), module(*x)
        torch.testing.assert_close(actual.detach(), expected.detach())
        if gradients:
            torch.testing.assert_close(
                torch.autograd.grad(actual, x[:2]), torch.autograd.grad(expected, x[:2])
            )


@pytest.mark.parametrize("loss_fn", [NTXent(), InfoNCE(symmetric=True), SigLIP()])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit_trace_is_refused(loss_fn):
    """It would keep the batch size of its example without a word."""
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace .*; use torch\.export or torch"):
        torch.jit.trace(loss_fn, tuple(torch.randn(2, 6, 4)))


@pytest.mark.parametrize("what", ["embeddings", "temperature", "negatives", "logit_bias"])
def test_forward_mode_is_refused_with_the_way_out(what):
    a, b, q = torch.randn(3, 6, 4)
    calls = {
        "embeddings": lambda x: nt_xent(a, x),
        "temperature": lambda x: info_nce(a, b, temperature=x[0, 0].exp()),
        "negatives": lambda x: info_nce(a, b, x),
        "logit_bias": lambda x: siglip(a, b, logit_bias=x[0, 0]),
    }
    name = "z2" if what == "embeddings" else what
    for derivative in (
        lambda f: torch.func.jvp(f, (q,), (b,)),
        lambda f: torch.func.jacfwd(f)(q),
    ):
        with pytest.raises(NotImplementedError, match=rf"{name} .*contrastive_kit\.reference"):
            derivative(calls[what])
