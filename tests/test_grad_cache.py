"""GradCache against the plain loop over chunks, whose graph is kept whole; float64 unless said."""

import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from contrastive_kit import GradCache, InfoNCE, NTXent, SimCLRAugment
from contrastive_kit.functional import info_nce, nt_xent

D = 5


class Checkpointed(nn.Module):
    def __init__(self, module, reentrant):
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.reentrant)


class Reassigned(nn.Module):
    """Replaces its buffer instead of writing to it, and the result depends on it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x):
        self.calls = self.calls + 0.1
        return x * self.calls


def encoder(*parts, seed=1):
    torch.manual_seed(seed)
    make = {
        "dropout": lambda: nn.Dropout(0.3),
        "batch norm": lambda: nn.BatchNorm2d(7),
        "spectral norm": lambda: nn.utils.spectral_norm(nn.Conv2d(7, 7, 1)),
        "reassigned buffer": Reassigned,
        "checkpoint": lambda: Checkpointed(nn.Dropout(0.3), reentrant=False),
        "reentrant checkpoint": lambda: Checkpointed(
            nn.Sequential(nn.Conv2d(7, 7, 1), nn.Dropout(0.3)), reentrant=True
        ),
    }
    inner = [make[part]() for part in parts]
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, 2, bias=False), *inner, nn.GELU(), nn.Flatten(), nn.Linear(28, D)
    ).double()


def images(n, n_views=2, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_views, n, 3, 6, 6, dtype=torch.float64, generator=generator).unbind()


def loop(module, views, chunk_size):
    """What GradCache computes, in plain torch: every chunk's graph is kept."""
    chunks = [
        module(torch.cat(chunk)).chunk(len(views))
        for chunk in zip(*(view.split(chunk_size) for view in views), strict=True)
    ]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def assert_same_state(actual, expected, rtol=1e-12):
    """Gradients and buffers, all of them, and the gradients not zero."""
    for (name, a), (_, b) in zip(
        actual.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert b.grad is not None
        assert float(b.grad.norm()) > 1e-9, name
        error = float((a.grad - b.grad).norm() / b.grad.norm())
        assert error <= rtol, f"{name}: {error:.3g}"
    for (name, a), (_, b) in zip(actual.named_buffers(), expected.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)


PARTS = [
    (),
    ("dropout",),
    ("batch norm",),
    ("spectral norm",),
    ("reassigned buffer",),
    ("checkpoint",),
    ("reentrant checkpoint",),
    ("batch norm", "dropout", "spectral norm"),
]


@pytest.mark.parametrize("parts", PARTS, ids=" + ".join)
@pytest.mark.parametrize(("n", "chunk_size"), [(13, 4), (12, 4), (3, 1), (5, 5), (5, 64)])
def test_gradients_buffers_and_random_state_are_those_of_the_loop(parts, n, chunk_size):
    if "batch norm" in parts and chunk_size == 1:
        chunk_size = 2
    views = images(n)
    expected, actual = encoder(*parts), encoder(*parts)
    torch.manual_seed(3)
    expected_loss = nt_xent(*loop(expected, views, chunk_size))
    expected_loss.backward()
    drawn = torch.rand(3)
    torch.manual_seed(3)
    loss = nt_xent(*GradCache(actual, chunk_size=chunk_size).views(*views))
    loss.backward()
    assert torch.equal(torch.rand(3), drawn)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_same_state(actual, expected)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 17),
    chunk_size=st.integers(1, 20),
    n_views=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_without_batch_norm_gradients_are_those_of_the_whole_batch(n, chunk_size, n_views, seed):
    views = images(n, n_views, seed)
    expected, actual = encoder(seed=seed), encoder(seed=seed)
    nt_xent(*expected(torch.cat(views)).chunk(n_views)).backward()
    encode = GradCache(actual, chunk_size=chunk_size)
    for _ in range(2):  # the second call is no longer verified
        actual.zero_grad()
        nt_xent(*encode.views(*views)).backward()
        assert_same_state(actual, expected, rtol=1e-11)


def test_frozen_batch_norm_gives_the_whole_batch_and_changes_nothing():
    views = images(11)
    expected, actual = encoder("batch norm"), encoder("batch norm")
    for module in (expected[1], actual[1]):
        module.running_mean.normal_(generator=torch.Generator().manual_seed(0))
        module.eval()
    nt_xent(*expected(torch.cat(views)).chunk(2)).backward()
    before = actual[1].running_mean.clone()
    nt_xent(*GradCache(actual, chunk_size=3).views(*views)).backward()
    assert_same_state(actual, expected)
    assert torch.equal(actual[1].running_mean, before)


def test_batch_norm_counts_each_chunk_once():
    module = encoder("batch norm")
    nt_xent(*GradCache(module, chunk_size=4).views(*images(13))).backward()
    assert module[1].num_batches_tracked == 4


def test_two_calls_before_one_backward():
    """Each second pass starts from the state of its own call, whatever came in between."""
    views = images(11)
    parts = ("batch norm", "dropout", "spectral norm")
    expected, actual = encoder(*parts), encoder(*parts)
    torch.manual_seed(3)
    nt_xent(*(torch.cat([expected(x) for x in view.split(4)]) for view in views)).backward()
    encode = GradCache(actual, chunk_size=4)
    torch.manual_seed(3)
    nt_xent(*map(encode, views)).backward()
    assert_same_state(actual, expected)


def test_gradients_add_up_over_calls_and_over_backwards():
    views = images(7)
    expected, actual = encoder("batch norm"), encoder("batch norm")
    nt_xent(*loop(expected, views, 3)).backward()
    for parameter in expected.parameters():
        parameter.grad *= 3.5
    encode = GradCache(actual, chunk_size=3)
    loss = nt_xent(*encode.views(*views))
    loss.backward(retain_graph=True)
    loss.backward()
    (1.5 * nt_xent(*encode.views(*views))).backward()
    nt_xent(*loop(expected, views, 3))  # the second batch, for the running statistics
    assert_same_state(actual, expected)


@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [
        (lambda: NTXent(0.2, learnable_temperature=True), {"ids": torch.arange(11) // 2}),
        (lambda: InfoNCE(0.2, learnable_temperature=True, symmetric=True), {}),
    ],
)
def test_the_loss_keeps_its_parameters_arguments_and_statistics(loss_fn, options):
    views = images(11)
    expected, actual = encoder(), encoder()
    expected_loss_fn, actual_loss_fn = loss_fn().double(), loss_fn().double()
    expected_loss, expected_stats = expected_loss_fn(
        *expected(torch.cat(views)).chunk(2), return_stats=True, **options
    )
    expected_loss.backward()
    z = GradCache(actual, chunk_size=4).views(*views)
    loss, stats = actual_loss_fn(*z, return_stats=True, **options)
    loss.backward()
    assert_same_state(actual, expected)
    assert_same_state(actual_loss_fn, expected_loss_fn)
    torch.testing.assert_close(stats, expected_stats, rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_two_towers(frozen):
    image_batch = images(11, 1)[0]
    tokens = torch.randint(0, 50, (11, 6))
    towers = []
    for _ in range(2):
        image_tower = encoder("dropout").requires_grad_(not frozen)
        torch.manual_seed(4)
        text_tower = nn.Sequential(nn.EmbeddingBag(50, 9), nn.Tanh(), nn.Linear(9, D)).double()
        towers.append((image_tower, text_tower))
    (expected_image, expected_text), (image_tower, text_tower) = towers
    torch.manual_seed(3)
    z_image = torch.cat([expected_image(x) for x in image_batch.split(4)])
    info_nce(z_image, expected_text(tokens), symmetric=True).backward()
    torch.manual_seed(3)
    encode_image = GradCache(image_tower, chunk_size=4)
    encode_text = GradCache(text_tower, chunk_size=3)
    z_image = encode_image(image_batch)
    assert z_image.requires_grad is not frozen
    info_nce(z_image, encode_text(tokens), symmetric=True).backward()
    assert_same_state(text_tower, expected_text)
    if frozen:
        assert all(p.grad is None for p in image_tower.parameters())
    else:
        assert_same_state(image_tower, expected_image)


class Outputs(NamedTuple):
    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    best: torch.Tensor
    note: str | None


class Clip(nn.Module):
    """A model of two towers, a scale that does not depend on the batch, and odds and ends."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(5)
        self.kind = kind
        self.image, self.text = nn.Linear(6, D), nn.Linear(4, D)
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, image, *, text, power):
        outputs = Outputs(
            self.image(image),
            self.text(text["tokens"]) ** power,
            self.log_scale.exp(),
            self.image(image).argmax(1),
            None,
        )
        return self.kind(outputs)


@pytest.mark.parametrize(
    "kind", [lambda x: x, Outputs._asdict, list, tuple], ids=["namedtuple", "dict", "list", "tuple"]
)
@pytest.mark.parametrize("power", [2, torch.tensor(2.0)], ids=["number", "scalar tensor"])
def test_any_structure_in_and_out(kind, power):
    image, text = torch.randn(11, 6).double(), {"tokens": torch.randn(11, 4).double()}
    results = []
    for chunk_size in (100, 4):
        model = Clip(kind).double()
        outputs = GradCache(model, chunk_size=chunk_size)(image, text=text, power=power)
        assert type(outputs) is type(kind(Outputs(*"abcde")))
        z_image, z_text, scale, best, note = (
            outputs.values() if isinstance(outputs, dict) else outputs
        )
        assert note is None
        assert scale.shape == ()
        assert not best.requires_grad
        info_nce(z_image, z_text, temperature=1 / scale).backward()
        results.append((model, best))
    assert_same_state(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])


def test_views_of_structured_results():
    views = images(7)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder()

        def forward(self, x):
            z = self.encoder(x)
            return {"z": z, "half": (z / 2, z.sum())}

    model = Pair()
    first, second = GradCache(model, chunk_size=3).views(*views)
    with pytest.raises(RuntimeError, match="a scalar that differs from chunk to chunk"):
        nt_xent(first["z"], second["z"]).backward()
    first, second = GradCache(model, chunk_size=100).views(*views)
    torch.testing.assert_close(first["z"], model.encoder(views[0]))
    torch.testing.assert_close(second["half"][0], model.encoder(views[1]) / 2)


def test_gradients_of_the_arguments():
    views = [view.requires_grad_() for view in images(11)]
    module = encoder().requires_grad_(False)
    expected = torch.autograd.grad(nt_xent(*module(torch.cat(views)).chunk(2)), views)
    nt_xent(*GradCache(module, chunk_size=4).views(*views)).backward()
    for view, grad in zip(views, expected, strict=True):
        torch.testing.assert_close(view.grad, grad, rtol=1e-11, atol=1e-15)


def test_gradient_of_an_argument_without_rows():
    """It belongs to each chunk, and may have a graph of its own behind it."""

    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x * scale

    x = torch.randn(11, D, dtype=torch.float64)
    logs = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for encode, log in zip((Scaled(), GradCache(Scaled(), chunk_size=4)), logs, strict=True):
        encode(x, log.exp()).square().sum().backward()
    torch.testing.assert_close(logs[1].grad, logs[0].grad, rtol=1e-12, atol=0)


def test_results_that_the_loss_leaves_unused():
    (x,) = images(11, 1)
    expected, actual = encoder(), encoder()

    class Both(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            z = self.inner(x)
            return z, z.square()

    expected(x)[:3].square().sum().backward()
    GradCache(Both(actual), chunk_size=4)(x)[1][:3].sum().backward()
    assert_same_state(actual, expected)


def test_without_gradients_nothing_is_kept():
    views = images(7)
    module = encoder("batch norm")
    with torch.no_grad():
        z1, _ = GradCache(module, chunk_size=3).views(*views)
    assert not z1.requires_grad
    assert module[1].num_batches_tracked == 3
    module.eval()
    torch.testing.assert_close(GradCache(module, chunk_size=3)(views[0]), module(views[0]))


class TestMixedPrecision:
    def views(self):
        return [view.float() for view in images(11)]

    def test_autocast_is_replayed_in_a_backward_outside(self):
        """The loop without autocast's cache casts each weight once per chunk, as GradCache does."""
        expected, actual = encoder("dropout").float(), encoder("dropout").float()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            z = loop(expected, self.views(), 4)
        nt_xent(*z).backward()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            z = GradCache(actual, chunk_size=4).views(*self.views())
        assert z[0].dtype == torch.bfloat16
        nt_xent(*z).backward()
        assert_same_state(actual, expected, rtol=1e-6)
        full = encoder("dropout").float()
        torch.manual_seed(3)
        nt_xent(*loop(full, self.views(), 4)).backward()
        with pytest.raises(AssertionError):  # or the comparison above would see no autocast
            assert_same_state(actual, full, rtol=1e-4)

    def test_a_backward_inside_autocast(self):
        expected, actual = encoder().float(), encoder().float()
        nt_xent(*expected(torch.cat(self.views())).chunk(2)).backward()
        with torch.autocast("cpu", torch.bfloat16):
            nt_xent(*GradCache(actual, chunk_size=4).views(*self.views())).backward()
        assert_same_state(actual, expected, rtol=0.05)

    def test_weights_cast_in_the_first_pass_do_not_stay_without_gradient(self):
        module = encoder().float()
        with torch.autocast("cpu", torch.bfloat16):
            GradCache(module, chunk_size=4).views(*self.views())
            z = module(self.views()[0])
        z.sum().backward()
        assert all(p.grad is not None for p in module.parameters())

    def test_autocast_of_the_backward_does_not_reach_the_second_pass(self):
        expected, actual = encoder().float(), encoder().float()
        nt_xent(*loop(expected, self.views(), 4)).backward()
        loss = nt_xent(*GradCache(actual, chunk_size=4).views(*self.views()))
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        # autograd itself casts nothing here but the products of the backward
        assert_same_state(actual, expected, rtol=0.05)

    def test_grad_scaler(self):
        expected, actual = encoder().float(), encoder().float()
        steps = []
        for module in (expected, actual):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            encode = GradCache(module, chunk_size=4 if module is actual else 100)
            scaler.scale(nt_xent(*encode.views(*self.views()))).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            steps.append(module)
        assert_same_state(actual, expected, rtol=1e-5)
        for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b)


class Augmenting(nn.Module):
    """From images to two embeddings each; the views exist for one chunk at a time."""

    def __init__(self, generator):
        super().__init__()
        self.augment = SimCLRAugment(6, blur=False, generator=generator)
        self.encoder = encoder().float()

    def forward(self, x):
        return self.encoder(torch.cat(self.augment(x))).chunk(2)


@pytest.mark.parametrize("own_generator", [True, False])
def test_augmentation_inside_the_encoder_is_repeated(own_generator):
    x = torch.randint(0, 256, (11, 3, 12, 12), dtype=torch.uint8)
    generators = [torch.Generator().manual_seed(7) if own_generator else None for _ in range(2)]
    expected, actual = map(Augmenting, generators)
    torch.manual_seed(3)
    z = [torch.cat(parts) for parts in zip(*map(expected, x.split(4)), strict=True)]
    nt_xent(*z).backward()
    torch.manual_seed(3)
    nt_xent(*GradCache(actual, chunk_size=4)(x)).backward()
    assert_same_state(actual.encoder, expected.encoder, rtol=1e-5)
    if own_generator:
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_random_numbers_that_are_not_repeated_raise_and_leave_no_gradient():
    class Foreign(nn.Module):
        def forward(self, x):
            return x * random.Random().uniform(0.5, 1.5)

    module = nn.Sequential(encoder(), Foreign())
    z = GradCache(module, chunk_size=4).views(*images(11))
    with pytest.raises(RuntimeError, match="gives other embeddings than the first"):
        nt_xent(*z).backward()
    assert all(p.grad is None for p in module.parameters())


def test_an_error_in_the_second_pass_leaves_the_state_alone():
    class Fails(nn.Module):
        def forward(self, x):
            torch.rand(1)
            if torch.is_grad_enabled():
                raise KeyError("on purpose")
            return x

    module = nn.Sequential(encoder("batch norm"), Fails())
    loss = nt_xent(*GradCache(module, chunk_size=4).views(*images(11)))
    state, mean = torch.get_rng_state(), module[0][1].running_mean.clone()
    with pytest.raises(KeyError):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module[0][1].running_mean, mean)
    assert module[0][1].num_batches_tracked == 3


def test_compiled_encoder():
    views = images(11)
    expected, actual = encoder(), encoder()
    nt_xent(*expected(torch.cat(views)).chunk(2)).backward()
    compiled = torch.compile(actual, backend="aot_eager")
    nt_xent(*GradCache(compiled, chunk_size=4).views(*views)).backward()
    assert_same_state(actual, expected, rtol=1e-11)


class _Held:
    """A saved tensor that counts while it lives."""

    bytes_now = bytes_at_most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        self.size = tensor.numel() * tensor.element_size()
        _Held.bytes_now += self.size
        _Held.bytes_at_most = max(_Held.bytes_at_most, _Held.bytes_now)

    def __del__(self):
        _Held.bytes_now -= self.size


def saved_bytes(step):
    _Held.bytes_now = _Held.bytes_at_most = 0
    with torch.autograd.graph.saved_tensors_hooks(_Held, lambda held: held.tensor):
        step()
    return _Held.bytes_at_most


def test_activations_of_one_chunk_at_a_time():
    """Sixteen chunks need no more than one chunk does, but for the arguments and the loss."""
    views = images(64)
    module = encoder("batch norm", "dropout")

    def step(encode, batch):
        nt_xent(*encode(*batch)).backward()

    whole = saved_bytes(lambda: step(lambda a, b: module(torch.cat([a, b])).chunk(2), views))
    chunk = saved_bytes(
        lambda: step(lambda a, b: module(torch.cat([a, b])).chunk(2), [view[:4] for view in views])
    )
    cached = saved_bytes(lambda: step(GradCache(module, chunk_size=4).views, views))
    arguments = sum(view.numel() for view in views) * 8
    embeddings = [torch.randn(64, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = saved_bytes(lambda: nt_xent(*embeddings).backward())
    assert cached <= chunk + arguments + loss
    assert cached - arguments - loss < (whole - loss) / 5


def test_training_at_sixteen_times_the_chunk_follows_the_uncached_curve():
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(15, 2, 64, 3, 6, 6, dtype=torch.float64, generator=generator)
    batches[:, 1] = batches[:, 0] + 0.3 * batches[:, 1]
    curves = []
    for chunk_size in (64, 4):
        module = encoder()
        encode = GradCache(module, chunk_size=chunk_size)
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        curve = []
        for views in batches:
            loss = nt_xent(*encode.views(*views), temperature=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve, dtype=torch.float64))
    whole, cached = curves
    assert whole[-1] < whole[0] - 0.3
    torch.testing.assert_close(cached, whole, rtol=1e-8, atol=0)


class Constant(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.result = result

    def forward(self, x):
        return self.result(x)


X = torch.randn(7, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), TypeError, "at least one tensor of N rows, got none"),
        ((3, torch.tensor(1.0)), TypeError, "at least one tensor of N rows, got none"),
        ((X, X[:6]), ValueError, r"one number of rows.*\(7, 3\), \(6, 3\)"),
        ((X[:0],), ValueError, r"at least 1.*\(0, 3\)"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        GradCache(nn.Identity(), chunk_size=4)(*arguments)


@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        ((), TypeError, "at least one tensor"),
        ((X, [1.0]), TypeError, r"views\[1\] must be a tensor, got list"),
        ((X, X[:6]), ValueError, r"views\[1\] must have the shape.*\(7, 3\).*got \(6, 3\)"),
        ((X, X.double()), ValueError, r"views\[1\] .*float32.*got .*float64"),
        ((X, X.to("meta")), ValueError, r"views\[1\] .*cpu; got .*meta"),
    ],
)
def test_wrong_views(views, error, message):
    with pytest.raises(error, match=message):
        GradCache(nn.Identity(), chunk_size=4).views(*views)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x: x[:1], ValueError, r"one row for each of 4 rows, got shape \(1, 3\)"),
        (lambda x: x.sum(), TypeError, "encoder must return a tensor, or a tuple"),
        (lambda x: "z", TypeError, "encoder must return a tensor, or a tuple"),
    ],
)
def test_wrong_results(result, error, message):
    with pytest.raises(error, match=message):
        GradCache(Constant(result), chunk_size=4)(X)


def test_wrong_rows_for_views():
    with pytest.raises(ValueError, match=r"one row for each of 8 rows, got shape \(4, 3\)"):
        GradCache(Constant(lambda x: x[::2]), chunk_size=4).views(X, X)


def test_results_without_gradient():
    z = GradCache(Constant(lambda x: x * 2), chunk_size=4)(X)
    with pytest.raises(RuntimeError, match=r"encoder must return results with a gradient"):
        z.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": lambda x: x}, TypeError, "encoder must be a torch.nn.Module, got function"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an integer, got 2.0"),
        ({"chunk_size": True}, TypeError, "chunk_size must be an integer, got True"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        GradCache(**{"encoder": nn.Identity(), "chunk_size": 4, **options})


@pytest.mark.filterwarnings("ignore:Using backward")
def test_only_backward_into_all_parameters():
    module = encoder()
    loss = nt_xent(*GradCache(module, chunk_size=4).views(*images(11)))
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    with pytest.raises(RuntimeError, match="omit create_graph=True"):
        loss.backward(create_graph=True)
    views = [view.requires_grad_() for view in images(11)]
    loss = nt_xent(*GradCache(module, chunk_size=4).views(*views))
    with pytest.raises(RuntimeError, match=r"call backward\(\) without inputs="):
        torch.autograd.grad(loss, views)
    assert all(p.grad is None for p in module.parameters())


def test_a_reused_batch_is_noticed():
    """A loader that writes the next batch into the same memory would change the second pass."""
    views = images(11)
    loss = nt_xent(*GradCache(encoder(), chunk_size=4).views(*views))
    views[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_repr():
    assert repr(GradCache(encoder(), chunk_size=4)) == "GradCache(Sequential, chunk_size=4)"


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, D)).double()


def one_process(n):
    """Two views, and the gradient of one direction of CLIP's loss over all rows."""
    generator = torch.Generator().manual_seed(5)
    views = [torch.randn(n, 12, generator=generator).double() for _ in range(2)]
    model = linear_model()
    a, b = (F.normalize(model(view), dim=1) for view in views)
    F.cross_entropy(a @ b.T / 0.1, torch.arange(n)).backward()
    return views, [parameter.grad for parameter in model.parameters()]


def rank_main(rank, size, store):
    """One of two processes: DDP in several guises, and fully_shard, against one process."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from contrastive_kit.distributed import gather_rows

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    n = 12
    views, expected = one_process(n)

    def loss(z1, z2, offset):
        columns = gather_rows(F.normalize(z2, dim=1))
        logits = F.normalize(z1, dim=1) @ columns.T / 0.1
        targets = torch.arange(len(z1)) + offset
        return F.cross_entropy(logits, targets, reduction="sum") * size / n

    def mine(first):
        """The rows of this rank, and where they begin."""
        begin, end = [(0, first), (first, n)][rank]
        return [view[begin:end] for view in views], begin

    def counted(ddp):
        reductions = []

        def hook(state, bucket):
            reductions.append(bucket.index())
            return allreduce_hook(None, bucket)

        ddp.register_comm_hook(None, hook)
        return reductions

    def check(parameters, times=1.0):
        for parameter, want in zip(parameters, expected, strict=True):
            grad = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(grad, times * want, rtol=1e-11, atol=1e-14)

    for first in (6, 7, 10):  # chunks of 3: 2 and 2, 3 and 2, 4 and 1
        for options in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
            ddp = DistributedDataParallel(linear_model(), **options)
            reductions = counted(ddp)
            encode = GradCache(ddp, chunk_size=3)
            local, offset = mine(first)
            for step in range(3):
                ddp.zero_grad()
                loss(*encode.views(*local), offset).backward()
                check(ddp.parameters())
                assert len(reductions) == step + 1, "one reduction a step"

    def ours(**options):
        return NTXent(0.2, learnable_temperature=True, **options).double()

    whole, whole_loss = linear_model(), ours()
    whole_loss(*whole(torch.cat(views)).chunk(2)).backward()
    for first in (6, 10):
        ddp = DistributedDataParallel(linear_model())
        loss_fn = DistributedDataParallel(ours(gather_distributed=True))
        encode = GradCache(ddp, chunk_size=3)
        local, _ = mine(first)
        for _ in range(2):
            ddp.zero_grad()
            loss_fn.zero_grad()
            loss_fn(*encode.views(*local)).backward()
            assert_same_state(ddp.module, whole, rtol=1e-11)
            assert_same_state(loss_fn.module, whole_loss, rtol=1e-11)

    local, offset = mine(6)
    ddp = DistributedDataParallel(linear_model())
    reductions = counted(ddp)
    encode = GradCache(ddp, chunk_size=3)
    with ddp.no_sync():
        loss(*encode.views(*local), offset).backward()
    assert not reductions
    loss(*encode.views(*local), offset).backward()
    check(ddp.parameters(), times=2)
    assert len(reductions) == 1

    model = linear_model()
    inside = nn.Sequential(DistributedDataParallel(model[:3]), DistributedDataParallel(model[3:]))
    reductions = [counted(part) for part in inside]
    loss(*GradCache(inside, chunk_size=4).views(*local), offset).backward()
    check(inside.parameters())
    assert [len(part) for part in reductions] == [1, 1]

    with pytest.raises(ValueError, match="static_graph"):
        GradCache(DistributedDataParallel(linear_model(), static_graph=True), chunk_size=3)

    sharded = linear_model()
    mesh = init_device_mesh("cpu", (size,))
    for part in (sharded[1], sharded[3], sharded):
        fully_shard(part, mesh=mesh)
    encode = GradCache(sharded, chunk_size=4)
    shards, reduced_before = list(sharded.parameters()), []
    hook = sharded.register_forward_pre_hook(
        lambda *_: reduced_before.append(any(shard.grad is not None for shard in shards))
    )
    for times in (1, 2):
        loss(*encode.views(*local), offset).backward()
        check(sharded.parameters(), times)
        if times == 1:
            assert reduced_before == [False] * 4, "no gradient before that of the last chunk"
            hook.remove()

    dist.barrier()
    dist.destroy_process_group()
    print("done", flush=True)


@pytest.mark.distributed
def test_two_processes_reduce_once_and_give_the_gradient_of_one(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, Path(__file__), str(rank), "2", tmp_path / "store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert output.endswith("done\n")


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
