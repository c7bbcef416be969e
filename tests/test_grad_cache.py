"""GradCache against the plain loop over chunks, whose graph is kept whole; float64 unless said."""

import random
import weakref
from collections import UserDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
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
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, image, *, text, power):
        outputs = Outputs(
            self.image(image),
            self.text(text["tokens"]) ** power,
            self.logit_scale.exp(),
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
    with pytest.raises(ValueError, match=r"only what is the same for each chunk; got tensor\("):
        GradCache(model, chunk_size=3).views(*views)
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
        on_purpose = False

        def forward(self, x):
            torch.rand(1)
            if self.on_purpose:
                raise KeyError("on purpose")
            return x

    module = nn.Sequential(encoder("batch norm"), Fails())
    loss = nt_xent(*GradCache(module, chunk_size=4).views(*images(11)))
    module[1].on_purpose = True
    module.eval()
    state, mean = torch.get_rng_state(), module[0][1].running_mean.clone()
    with pytest.raises(KeyError):
        loss.backward()
    assert not any(part.training for part in module.modules())
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


class Watched(nn.Module):
    """Keeps a tensor for its backward, and counts those of them that are in memory at once."""

    now = most = 0

    def forward(self, x):
        kept = 2 * x
        Watched.now += kept.numel()
        Watched.most = max(Watched.most, Watched.now)
        weakref.finalize(kept, self.freed, kept.numel())
        return kept * kept

    @staticmethod
    def freed(numbers):
        Watched.now -= numbers


def test_activations_of_one_chunk_at_a_time():
    views = images(64)
    module = nn.Sequential(encoder("batch norm", "dropout"), Watched())
    most = []
    for encode in (lambda *x: module(torch.cat(x)).chunk(2), GradCache(module, chunk_size=4).views):
        Watched.now = Watched.most = 0
        nt_xent(*encode(*views)).backward()
        most.append(Watched.most)
        assert Watched.now == 0
    assert most == [2 * 64 * D, 2 * 4 * D]


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


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda x: {"z": x, "n": len(x)}, "got 4 and 3"),
        (lambda x: (x, x.mean()), r"got tensor\(.*\) and tensor\("),
        (lambda x: (x, f"{len(x)} rows"), "got '4 rows' and '3 rows'"),
    ],
)
def test_results_of_the_batch_that_differ_from_chunk_to_chunk(result, got):
    with pytest.raises(ValueError, match=f"only what is the same for each chunk; {got}"):
        GradCache(Constant(result), chunk_size=4)(X)
    with torch.no_grad(), pytest.raises(ValueError, match=got):
        GradCache(Constant(result), chunk_size=4)(X)


def test_results_of_another_structure_for_each_chunk():
    with pytest.raises(ValueError, match="one structure of tensors for all chunks"):
        GradCache(Constant(lambda x: (x, ["name"] * len(x))), chunk_size=4)(X)


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


@pytest.mark.parametrize("parts", [(), ("batch norm", "dropout")], ids=" + ".join)
def test_gradients_by_every_call_of_autograd(parts):
    views = [view.requires_grad_() for view in images(11)]
    expected, actual = encoder(*parts), encoder(*parts)
    unused = nn.Parameter(torch.zeros(2))
    torch.manual_seed(3)
    weights = list(expected.parameters())
    want = torch.autograd.grad(nt_xent(*loop(expected, views, 4)), [*weights, *views])
    weights = list(actual.parameters())
    encode = GradCache(actual, chunk_size=4)

    def loss():
        torch.manual_seed(3)
        return nt_xent(*encode.views(*views))

    def check(found, expected):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)

    check(torch.autograd.grad(loss(), [*weights, *views]), want)
    *found, nothing = torch.autograd.grad(loss(), [*weights, unused], allow_unused=True)
    assert nothing is None
    check(found, want[: len(weights)])
    found = torch.autograd.grad(loss(), [unused, weights[0]], materialize_grads=True)
    check(found, [torch.zeros(2), want[0]])
    loss().backward(inputs=[weights[-1]])
    check([weights[-1].grad], [want[len(weights) - 1]])
    assert all(x.grad is None for x in [*weights[:-1], *views])


def test_second_derivatives():
    x, results = images(11, 1)[0], []
    for chunk_size in (4, 100):
        module = encoder("dropout").eval()
        z = GradCache(module, chunk_size=chunk_size)(x)
        weights = list(module.parameters())
        grads = torch.autograd.grad((z @ z.T).logsumexp(1).sum(), weights, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), weights))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_modes_of_the_first_pass_are_those_of_the_second():
    views = images(11)
    parts = ("batch norm", "dropout")
    expected, actual = encoder(*parts), encoder(*parts)
    encode = GradCache(actual, chunk_size=4)
    nt_xent(*encode.views(*views)).backward()  # it verifies, and later calls do not
    actual.load_state_dict(expected.state_dict())
    actual.zero_grad()
    torch.manual_seed(3)
    nt_xent(*loop(expected, views, 4)).backward()
    torch.manual_seed(3)
    loss = nt_xent(*encode.views(*views))
    actual.eval()
    loss.backward()
    assert_same_state(actual, expected)
    assert not any(module.training for module in actual.modules())


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_changed_before_the_backward_are_noticed(frozen):
    module = encoder()
    module[0].requires_grad_(not frozen)
    encode = GradCache(module, chunk_size=4)
    nt_xent(*encode.views(*images(11))).backward()
    loss = nt_xent(*encode.views(*images(11)))
    module.zero_grad()
    with torch.no_grad():
        module[0].weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="has changed between the call and its backward"):
        loss.backward()
    assert all(p.grad is None for p in module.parameters())


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("backward_inside", [False, True])
def test_cached_parametrizations(backward_inside):
    views = images(11)
    expected, actual = encoder(), encoder()
    for module in (expected, actual):
        parametrize.register_parametrization(module[0], "weight", Halved())
    nt_xent(*loop(expected, views, 4)).backward()
    encode = GradCache(actual, chunk_size=4)
    with parametrize.cached():
        loss = nt_xent(*encode.views(*views))
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert_same_state(actual, expected)


def test_a_user_dict_is_split_like_a_dict():
    """Tokenizers return one."""

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(4)
            self.embed = nn.EmbeddingBag(50, D).double()

        def forward(self, x):
            assert type(x) is UserDict
            return self.embed(x["ids"]) * x["mask"].sum(1, keepdim=True)

    batch = UserDict(ids=torch.randint(0, 50, (11, 6)), mask=torch.rand(11, 6).double())
    expected, actual = Text(), Text()
    expected(batch).square().sum().backward()
    GradCache(actual, chunk_size=4)(batch).square().sum().backward()
    assert_same_state(actual, expected)
    assert len(batch["ids"]) == 11


def test_hooks_see_the_gradient_of_the_whole_batch_once():
    views = images(11)
    expected, actual = encoder(), encoder()
    nt_xent(*loop(expected, views, 4)).backward()
    seen = []
    actual[0].weight.register_hook(lambda grad: seen.append(grad.clone()))
    actual[0].weight.register_post_accumulate_grad_hook(lambda x: seen.append(x.grad.clone()))
    nt_xent(*GradCache(actual, chunk_size=4).views(*views)).backward()
    assert len(seen) == 2
    for grad in seen:
        torch.testing.assert_close(grad, expected[0].weight.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("with_graph", [True, False])
def test_an_encoder_that_writes_into_its_argument_is_told_so(with_graph):
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    writes = pytest.raises(RuntimeError, match="encoder must not write into its arguments")
    with torch.set_grad_enabled(with_graph), writes:
        GradCache(module, chunk_size=4)(X.clone())
    module = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True))
    GradCache(module, chunk_size=4)(X).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_small_differences_between_the_passes_are_noticed(dtype):
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = random.Random(0)

        def forward(self, x):
            noise = [self.generator.uniform(-1, 1) for _ in range(x.numel())]
            size = 0.05 if dtype == torch.bfloat16 else 1e-3
            return x * (1 + size * torch.tensor(noise, dtype=x.dtype).view_as(x))

    module = nn.Sequential(encoder(), Foreign()).to(dtype)
    (x,) = images(11, 1)
    z = GradCache(module, chunk_size=4)(x.to(dtype))
    with pytest.raises(RuntimeError, match="gives other embeddings than the first"):
        z.float().square().sum().backward()


def test_it_is_a_module():
    module = encoder("batch norm")
    model = nn.ModuleDict({"encode": GradCache(module, chunk_size=np.int64(4)), "loss": NTXent()})
    model.eval()
    assert not module[1].training
    assert list(model.state_dict()) == [f"encode.encoder.{name}" for name in module.state_dict()]
    assert "chunk_size=4" in repr(model)


def test_a_reused_batch_is_noticed():
    """A loader that writes the next batch into the same memory would change the second pass."""
    views = images(11)
    loss = nt_xent(*GradCache(encoder(), chunk_size=4).views(*views))
    views[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
