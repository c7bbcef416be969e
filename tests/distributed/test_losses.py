"""Losses over processes: after DDP's mean, value and gradients of one process on the whole batch.

The oracle is the formula of ``contrastive_kit.reference`` on the concatenated batch, in one
process and in float64.
"""

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from budgets import VALUE, assert_within, gradient_budget
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from worlds import TIME_OUT

from contrastive_kit import InfoNCE, NTXent, reference
from contrastive_kit.distributed import average_gradient
from contrastive_kit.functional import info_nce, nt_xent, siglip, sup_con

TEMPERATURE = 0.2
LOSSES = {
    "nt_xent": (2, {}),
    "nt_xent of three views": (3, {}),
    "nt_xent, ids": (2, {"ids": True}),
    "nt_xent of three views, ids, weights": (3, {"ids": True, "sample_weight": True}),
    "nt_xent, decoupled": (2, {"decoupled": True}),
    "nt_xent, decoupled, hardness": (2, {"decoupled": True, "hardness": 0.7}),
    "nt_xent, label smoothing": (2, {"label_smoothing": 0.1, "ids": True}),
    "nt_xent, weights": (2, {"sample_weight": True}),
    "nt_xent, hardness": (3, {"hardness": 0.5, "ids": True}),
    "nt_xent, prior, margin": (3, {"positive_prior": 0.1, "margin": 0.2, "ids": True}),
    "nt_xent, false negatives": (3, {"false_negative_margin": 0.05, "ids": True}),
    "info_nce": (2, {}),
    "info_nce, ids, weights": (2, {"ids": True, "sample_weight": True}),
    "info_nce, label smoothing": (2, {"label_smoothing": 0.2, "ids": True}),
    "info_nce, hardness": (2, {"hardness": 0.5}),
    "clip": (2, {"symmetric": True}),
    "clip, ids, weights": (2, {"symmetric": True, "ids": True, "sample_weight": True}),
    "clip, label smoothing": (2, {"symmetric": True, "label_smoothing": 0.1}),
    "clip, prior": (2, {"symmetric": True, "positive_prior": 0.1, "hardness": 0.5, "ids": True}),
    "clip, false negatives": (2, {"symmetric": True, "false_negative_margin": 0.1}),
    "clip, hardness": (2, {"symmetric": True, "hardness": 0.5, "ids": True}),
}
SOME = ["nt_xent", "nt_xent of three views, ids, weights", "info_nce", "clip, ids, weights"]


def function_of(name):
    return nt_xent if name.startswith("nt_xent") else info_nce


def module_of(name):
    return NTXent if name.startswith("nt_xent") else InfoNCE


def share_of(rank, size, unequal):
    """Sizes of the batches of all ranks, and the part of the whole that is this rank's."""
    counts = [4 + (3 * r % 5 if unequal else 0) for r in range(size)]
    return counts, slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def extras(options, n):
    """Ids, of which some are equal across ranks, and weights, of which one is 0, for n images."""
    options = dict(options)
    if options.pop("ids", False):
        options["ids"] = torch.arange(n) * 3 % max(2, n - 3) - 2
    if options.pop("sample_weight", False):
        options["sample_weight"] = torch.rand(n, dtype=torch.float64)
        options["sample_weight"][1] = 0
    return options


def per_image(options):
    return {k: v for k, v in options.items() if k in ("ids", "sample_weight")}


def oracle(name, views, temperature, options):
    """Losses of every anchor of the whole batch, and their mean."""
    options = dict(options)
    weights, ids = options.pop("sample_weight", None), options.pop("ids", None)
    if name.startswith("nt_xent"):
        formula = reference.nt_xent
        if options.pop("decoupled", False):
            formula = reference.decoupled_nt_xent
        losses = formula(torch.stack(tuple(views)), temperature, ids, **options)
    else:
        ids = torch.arange(len(views[0])) if ids is None else ids
        both = options.pop("symmetric", False)
        losses = reference.info_nce(*views, temperature, ids, **options)
        if both:
            back = reference.info_nce(views[1], views[0], temperature, ids, **options)
            losses = torch.stack([losses, back])
    if weights is None:
        return losses, losses.mean()
    return losses * weights, reference.weighted_mean(losses, weights)


def mean_over_ranks(x, size):
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / size


def check_function(rank, size, name, unequal, backend):
    n_views, options = LOSSES[name]
    counts, mine = share_of(rank, size, unequal)
    options = extras(options, sum(counts))
    own = {**options, **{k: v[mine] for k, v in per_image(options).items()}}
    whole = torch.randn(n_views, sum(counts), 5, dtype=torch.float64)
    views = whole.clone().requires_grad_()
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    losses, mean = oracle(name, views, temperature, options)
    expected = torch.autograd.grad(mean, (views, temperature))
    expected_of_sum = torch.autograd.grad(oracle(name, views, TEMPERATURE, options)[0].sum(), views)

    call = partial(function_of(name), gather_distributed=True, backend=backend, **own)
    z = [v.clone().requires_grad_() for v in whole[:, mine]]
    tau = temperature.detach().clone().requires_grad_()
    loss = call(*z, temperature=tau)
    *dz, d_tau = torch.autograd.grad(loss, (*z, tau))
    budget = gradient_budget(torch.float64, TEMPERATURE)
    assert_within(mean_over_ranks(loss, size), mean, VALUE[torch.float64])
    # What the other ranks add to the gradient of an embedding arrived through the gather.
    assert_within(torch.stack(dz) / size, expected[0][:, mine], budget)
    assert_within(mean_over_ranks(d_tau, size), expected[1], 10 * budget)

    each = call(*z, temperature=TEMPERATURE, reduction="none")
    assert_within(each, losses[..., mine], VALUE[torch.float64])
    total = call(*z, temperature=TEMPERATURE, reduction="sum")
    assert_within(total, losses[..., mine].sum(), VALUE[torch.float64])
    dz = torch.autograd.grad(total, z)
    assert_within(torch.stack(dz), expected_of_sum[0][:, mine], budget)
    if not unequal and "sample_weight" not in options:
        assert_within(loss, losses[..., mine].mean(), VALUE[torch.float64])


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_functions(world, name, unequal):
    world.run(check_function, name, unequal, "tiled")


@pytest.mark.parametrize("name", SOME)
def test_the_reference_backend(pair, name):
    pair.run(check_function, name, True, "reference")


class Step(nn.Module):
    """An encoder and its loss in one module, as DDP wants a learnable temperature."""

    def __init__(self, loss, dtype):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        self.loss = loss

    def forward(self, views, **options):
        return self.loss(*(self.encoder(v) for v in views), **options)


def training_problem(rank, size, name, unequal, dtype):
    """The step, its inputs, and what one process finds for the parameters on the whole batch."""
    n_views, options = LOSSES[name]
    counts, mine = share_of(rank, size, unequal)
    options = extras(options, sum(counts))
    images = torch.randn(n_views, sum(counts), 6, dtype=torch.float64).to(dtype)
    fixed = {k: v for k, v in options.items() if k not in per_image(options)}
    loss = module_of(name)(
        TEMPERATURE, learnable_temperature=True, gather_distributed=True, **fixed
    )
    step = Step(loss, dtype)
    if dtype == torch.float64:
        loss.logit_scale.data = loss.logit_scale.double()
    single = Step(None, dtype).double()
    single.encoder.load_state_dict(step.encoder.state_dict())
    logit_scale = step.loss.logit_scale.detach().double().requires_grad_()
    embeddings = [single.encoder(v.double()) for v in images]
    value = oracle(name, embeddings, (-logit_scale).exp(), options)[1]
    value.backward()
    expected = {f"encoder.{k}": v.grad for k, v in single.encoder.named_parameters()}
    expected["loss.logit_scale"] = logit_scale.grad
    inputs = {k: v[mine] for k, v in per_image(options).items()}
    return step, images[:, mine], inputs, value, expected


BUDGET = {torch.float64: 1e-13, torch.float32: 1e-6}


def assert_gradients(named_parameters, expected, dtype, prefix=""):
    found = {prefix + name: p.grad for name, p in named_parameters}
    for name, grad in found.items():
        full = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        # The gradient of one number is a difference of large sums: relative to the largest.
        scale = max(float(expected[name].norm()), 0.1)
        error = float((full.double() - expected[name]).norm()) / scale
        assert error <= BUDGET[dtype], (name, error)
    return set(found)


def check_ddp(rank, size, name, unequal, dtype):
    step, views, options, value, expected = training_problem(rank, size, name, unequal, dtype)
    ddp = DistributedDataParallel(step)
    loss = ddp(views, **options)
    loss.backward()
    assert_within(mean_over_ranks(loss, size), value, VALUE[dtype])
    assert assert_gradients(step.named_parameters(), expected, dtype) == set(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", SOME)
def test_parameters_under_ddp(world, name, unequal, dtype):
    world.run(check_ddp, name, unequal, dtype)


def check_loss_in_a_ddp_of_its_own(rank, size, name):
    step, views, options, _, expected = training_problem(rank, size, name, True, torch.float64)
    encoder, loss = DistributedDataParallel(step.encoder), DistributedDataParallel(step.loss)
    loss(*encoder(views.flatten(0, 1)).view(*views.shape[:2], -1), **options).backward()
    assert_gradients(step.named_parameters(), expected, torch.float64)


@pytest.mark.parametrize("name", SOME)
def test_the_loss_in_a_ddp_of_its_own(several, name):
    several.run(check_loss_in_a_ddp_of_its_own, name)


def check_fsdp(rank, size, name):
    step, views, options, _, expected = training_problem(rank, size, name, True, torch.float64)
    mesh = init_device_mesh("cpu", (size,))
    for layer in (step.encoder[0], step.encoder[2], step.encoder):
        fully_shard(layer, mesh=mesh)
    # A 0-dim parameter cannot be sharded.
    loss = DistributedDataParallel(step.loss)
    loss(*step.encoder(views.flatten(0, 1)).view(*views.shape[:2], -1), **options).backward()
    assert_gradients(step.encoder.named_parameters(), expected, torch.float64, "encoder.")
    assert_gradients(step.loss.named_parameters(), expected, torch.float64, "loss.")


@pytest.mark.parametrize("name", SOME)
def test_parameters_under_fully_shard(several, name):
    several.run(check_fsdp, name)


def check_fsdp_of_everything(rank, size, name):
    """The line of the documents, for a model that holds its loss."""
    step, views, options, _, expected = training_problem(rank, size, name, True, torch.float64)
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(step, mesh=mesh, ignored_params=set(step.loss.parameters()))
    step(views, **options).backward()
    assert_gradients(step.named_parameters(), expected, torch.float64)


@pytest.mark.parametrize("name", SOME)
def test_fully_shard_of_a_model_that_holds_the_loss(pair, name):
    pair.run(check_fsdp_of_everything, name)


def check_sharded_scale(rank, size):
    """What torch proposes, a scale of one dimension, ends in an error that writes the line."""
    loss_fn = NTXent(learnable_temperature=True)
    loss_fn.logit_scale = torch.nn.Parameter(loss_fn.logit_scale.detach().view(1))
    fully_shard(loss_fn, mesh=init_device_mesh("cpu", (size,)))
    z = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"ignored_params=set\(loss_fn.parameters\(\)\)"):
        NTXent.forward(loss_fn, z, z)


def test_a_sharded_scale_is_refused(pair):
    pair.run(check_sharded_scale)


def check_without_gathering(rank, size):
    """The oracle of these tests tells a wrong gradient from a right one."""
    step, views, options, _, expected = training_problem(rank, size, "clip", False, torch.float64)
    step.loss.gather_distributed = False
    DistributedDataParallel(step)(views, **options).backward()
    with pytest.raises(AssertionError):
        assert_gradients(step.named_parameters(), expected, torch.float64)


def check_temperature_outside_ddp(rank, size, name):
    """A forgotten DDP around the loss does not let the temperatures of the processes drift."""
    step, views, options, _, expected = training_problem(rank, size, name, True, torch.float64)
    encoder = DistributedDataParallel(step.encoder)
    z = encoder(views.flatten(0, 1)).view(*views.shape[:2], -1)
    step.loss(*z, **options).backward(retain_graph=True)
    assert_gradients(step.named_parameters(), expected, torch.float64)
    # The function leaves it to its caller.
    logit_scale = step.loss.logit_scale.detach().clone().requires_grad_()
    fixed = {k: v for k, v in LOSSES[name][1].items() if k not in ("ids", "sample_weight")}
    call = partial(function_of(name), *z.detach(), gather_distributed=True, **options, **fixed)
    for prepare, right in ((lambda x: x, False), (average_gradient, True)):
        (grad,) = torch.autograd.grad(call(temperature=(-prepare(logit_scale)).exp()), logit_scale)
        error = float((grad - expected["loss.logit_scale"]).abs())
        assert (error < 1e-13) == right, (error, right)


def test_the_comparison_can_fail(several):
    several.run(check_without_gathering)


@pytest.mark.parametrize("name", SOME)
def test_a_learnable_temperature_outside_ddp(several, name):
    several.run(check_temperature_outside_ddp, name)


def check_stats(rank, size, symmetric):
    counts, mine = share_of(rank, size, False)
    z = torch.randn(2, sum(counts), 3, dtype=torch.float64)
    for call in (nt_xent, partial(info_nce, symmetric=symmetric)):
        loss, expected = call(*z, temperature=TEMPERATURE, return_stats=True)
        own, stats = call(
            *z[:, mine], temperature=TEMPERATURE, return_stats=True, gather_distributed=True
        )
        assert_within(mean_over_ranks(own, size), loss, 1e-13)
        for field, x, y in zip(stats._fields, stats, expected, strict=True):
            torch.testing.assert_close(mean_over_ranks(x, size), y, msg=field)


@pytest.mark.parametrize("symmetric", [False, True])
def test_statistics_are_those_of_the_own_anchors(several, symmetric):
    several.run(check_stats, symmetric)


def check_subgroups(rank, size):
    """Two groups: each is a world of its own, and DDP's mean is that over both."""
    groups = [dist.new_group([r for r in range(size) if r % 2 == odd]) for odd in (0, 1)]
    members = [r for r in range(size) if r % 2 == rank % 2]
    z = torch.randn(size, 2, 3, 4, dtype=torch.float64)
    losses, _ = oracle("nt_xent", torch.cat([z[r] for r in members], 1), TEMPERATURE, {})
    loss_fn = NTXent(TEMPERATURE, gather_distributed=True, process_group=groups[rank % 2])
    loss = loss_fn(*z[rank])
    place = members.index(rank)
    assert_within(loss, losses[:, 3 * place : 3 * place + 3].mean(), 1e-13)


def test_subgroups(several):
    several.run(check_subgroups)


def check_one_row_each(rank, size):
    z = torch.randn(2, size, 3, dtype=torch.float64)
    loss = nt_xent(*z[:, rank : rank + 1], temperature=TEMPERATURE, gather_distributed=True)
    assert_within(mean_over_ranks(loss, size), oracle("nt_xent", z, TEMPERATURE, {})[1], 1e-13)


def test_one_row_on_each_process_is_enough(several):
    several.run(check_one_row_each)


def check_one_row_alone(rank, size):
    z = torch.randn(1, 3)
    for call in (nt_xent, info_nce):
        with pytest.raises(ValueError, match="must have at least 2 rows"):
            call(z, z, gather_distributed=True)


def check_zero_weights(rank, size):
    z = torch.randn(2, 3, 4, requires_grad=True)
    weights = torch.ones(3) if rank == 0 else torch.zeros(3)
    loss = nt_xent(*z, sample_weight=weights, gather_distributed=True)
    assert (loss == 0) == (rank > 0)
    loss = nt_xent(*z, sample_weight=torch.zeros(3), gather_distributed=True)
    assert loss == 0
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


def test_weights_may_all_be_zero_on_a_process_or_on_all(several):
    several.run(check_zero_weights)


def check_extreme_temperature(rank, size):
    counts, mine = share_of(rank, size, True)
    z = torch.randn(2, sum(counts), 5, dtype=torch.float64)
    views = z.clone().requires_grad_()
    mean = oracle("nt_xent", views, 0.005, {})[1]
    (expected,) = torch.autograd.grad(mean, views)
    own = z[:, mine].clone().requires_grad_()
    loss = nt_xent(*own, temperature=0.005, gather_distributed=True)
    (grad,) = torch.autograd.grad(loss, own)
    assert_within(mean_over_ranks(loss, size), mean, 1e-10)
    assert float((grad / size - expected[:, mine]).norm()) <= 1e-10 * float(expected.norm())


def test_a_low_temperature(several):
    several.run(check_extreme_temperature)


def check_compiled(rank, size, name):
    n_views, options = LOSSES[name]
    call = partial(function_of(name), temperature=TEMPERATURE, gather_distributed=True)
    compiled = torch.compile(call, backend="aot_eager")
    counts, mine = [3 + r for r in range(size)], slice(0, 3 + rank)
    own = extras(options, sum(counts))
    own = {**own, **{k: v[mine] for k, v in per_image(own).items()}}
    z = [torch.randn(3 + rank, 5, requires_grad=True) for _ in range(n_views)]
    eager, fast = call(*z, **own), compiled(*z, **own)
    torch.testing.assert_close(fast, eager)
    expected = torch.autograd.grad(eager, z)
    torch.testing.assert_close(torch.autograd.grad(fast, z), expected)


def check_compiled_step(rank, size):
    """DDP, a learnable temperature and several views in one compiled step."""
    step, views, options, _, expected = training_problem(
        rank, size, "nt_xent of three views, ids, weights", False, torch.float64
    )
    ddp = DistributedDataParallel(step)
    torch.compile(ddp, backend="aot_eager")(views, **options).backward()
    assert_gradients(step.named_parameters(), expected, torch.float64)


@pytest.mark.slow
def test_a_step_under_compile(pair):
    pair.run(check_compiled_step)


@pytest.mark.slow
def test_under_compile(pair):
    pair.run(check_compiled, "clip, ids, weights")


def check_half_precision(rank, size, dtype):
    """The gradient of a half-precision embedding is rounded once, at the end."""
    counts, mine = share_of(rank, size, False)
    z = torch.randn(2, sum(counts), 8, dtype=torch.float64).to(dtype)
    views = z.double().requires_grad_()
    mean = oracle("clip", views, TEMPERATURE, {"symmetric": True})[1]
    (expected,) = torch.autograd.grad(mean, views)
    own = z[:, mine].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(*own, temperature=TEMPERATURE, symmetric=True, gather_distributed=True)
    assert loss.dtype == torch.float32
    assert_within(mean_over_ranks(loss, size), mean, VALUE[dtype])
    (grad,) = torch.autograd.grad(loss, own)
    assert_within(grad / size, expected[:, mine], gradient_budget(dtype, TEMPERATURE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(several, dtype):
    several.run(check_half_precision, dtype)


def check_disagreement(rank, size):
    z = torch.randn(3, 4)
    odd = rank == size - 1
    ids = torch.arange(3)
    mistakes = [
        lambda: nt_xent(*[z] * (3 if odd else 2), gather_distributed=True),
        lambda: nt_xent(z, z, ids=ids if odd else None, gather_distributed=True),
        lambda: nt_xent(z, z, ids=ids.int() if odd else ids, gather_distributed=True),
        lambda: info_nce(z, z, sample_weight=z[:, 0] if odd else None, gather_distributed=True),
        lambda: nt_xent(
            z, z, sample_weight=torch.ones(3).requires_grad_(odd), gather_distributed=True
        ).backward(),
        lambda: info_nce(z, z, symmetric=odd, gather_distributed=True),
        lambda: info_nce(*[z[:, :3] if odd else z] * 2, gather_distributed=True),
        lambda: info_nce(*[z.double() if odd else z] * 2, gather_distributed=True),
    ]
    for mistake in mistakes:
        with pytest.raises(ValueError, match=r"rows alike in all but their number, got rank 0"):
            mistake()


def test_processes_that_disagree_get_an_error_each(several):
    several.run(check_disagreement)


LABELS = torch.arange(3) // 2
DISAGREEMENTS = {
    "nt_xent": [
        {"temperature": (0.1, 0.2)},
        {"decoupled": (False, True)},
        {"label_smoothing": (0.0, 0.1)},
        {"hardness": (0.0, 0.5)},
        {"reduction": ("mean", "sum")},
    ],
    "info_nce": [{"temperature": (0.1, 0.2)}, {"hardness": (0.0, 0.5)}],
    "sup_con": [{"temperature": (0.1, 0.2)}, {"variant": ("out", "in")}],
    "siglip": [{"temperature": (0.1, 0.2)}, {"logit_bias": (-10.0, -9.0)}],
}


def gathered(name, z, **options):
    if name == "sup_con":
        options["labels"] = LABELS[: len(z)]
    function = {"nt_xent": nt_xent, "info_nce": info_nce, "sup_con": sup_con, "siglip": siglip}
    return function[name](z, z.flip(0), gather_distributed=True, **options)


def check_settings(rank, size, name):
    z, odd = torch.randn(3, 4), rank == size - 1
    refused = partial(pytest.raises, ValueError)
    for case in DISAGREEMENTS[name]:
        ((option, values),) = case.items()
        with refused(match=f"rank {size - 1}: .*{name} of .*{option} {values[1]}"):
            gathered(name, z, **{option: values[odd]})
    with refused(match=f"rank {size - 1}: .*torch.bfloat16/torch.bfloat16, temperature"):
        gathered(name, z.bfloat16() if odd else z)
    other = "siglip" if name != "siglip" else "info_nce"
    with refused(match=f"rank {size - 1}: .*{other} of"):
        gathered(other if odd else name, z, temperature=0.1)
    # What may differ: the value of a tensor, which would have to be waited for.
    gathered(name, z, temperature=torch.tensor(0.1 + 0.1 * odd))


@pytest.mark.parametrize("name", list(DISAGREEMENTS))
def test_losses_and_options_must_be_those_of_the_others(several, name):
    several.run(check_settings, name)


def check_empty(rank, size, name, compiled):
    z, odd = torch.randn(3, 4), rank == size - 1
    call = torch.compile(gathered, backend="eager") if compiled else gathered
    message = r"no empty dimension, got shape \(0, 4\)"
    start = time.monotonic()
    with pytest.raises(Exception, match=message if odd else f"rank {size - 1}: ValueError: .*"):
        call(name, z[:0] if odd else z)
    assert time.monotonic() - start < TIME_OUT / 3
    assert gathered(name, z).isfinite()


@pytest.mark.parametrize("name", list(DISAGREEMENTS))
def test_an_empty_batch_on_one_process_is_an_error_on_all(several, name):
    several.run(check_empty, name, False)


def test_an_empty_batch_is_an_error_under_compile_too(pair):
    pair.run(check_empty, "nt_xent", True)


def check_bad_labels(rank, size):
    z = torch.randn(3, 4)
    labels = LABELS if rank else LABELS[:2]
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\)"):
        sup_con(z, labels=labels, gather_distributed=True)


def test_any_mistake_of_one_process_is_an_error_on_all(several):
    several.run(check_bad_labels)


def check_narrow_ids(rank, size, dtype):
    z1, z2 = torch.randn(2, 4, 3)
    ids = torch.tensor([0, 1, 1, 2])
    for loss in (
        lambda ids: nt_xent(z1, z2, ids=ids, label_smoothing=0.1, gather_distributed=True),
        lambda ids: siglip(z1, z2, ids=ids, gather_distributed=True),
        lambda ids: sup_con(z1, z2, labels=ids, variant="in", gather_distributed=True),
    ):
        assert torch.equal(loss(ids.to(dtype)), loss(ids))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_ids_of_any_width(pair, dtype):
    pair.run(check_narrow_ids, dtype)


def test_options_that_make_no_sense(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    z = torch.randn(4, 3)
    for call in (nt_xent, info_nce):
        with pytest.raises(ValueError, match="process_group is used only with gather_distributed"):
            call(z, z, process_group=object())
        with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2.*init_process_group\(\)"):
            call(z, z, gather_distributed=True)
    for module in (NTXent, InfoNCE):
        with pytest.raises(ValueError, match="process_group is used only with gather_distributed"):
            module(process_group=object())
    assert "gather_distributed=True" in repr(NTXent(gather_distributed=True))


def check_explicit_negatives(rank, size):
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match="let NegativeQueue gather"):
        info_nce(z, z, z, gather_distributed=True)


def test_explicit_negatives_are_not_gathered(world):
    world.run(check_explicit_negatives)


def test_one_row_in_all_is_refused_as_ever(alone):
    alone.run(check_one_row_alone)
