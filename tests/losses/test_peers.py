"""The losses against the published implementations of others, value and gradient.

Conventions, as found in lightly 1.6, pytorch-metric-learning 2.9 and open_clip 3.3. All of them
average over anchors as we do, so the factor is 1 wherever none is noted:

* lightly ``NTXentLoss`` normalizes; with a memory bank it is InfoNCE with shared negatives, which
  get no gradient.
* pytorch-metric-learning ``NTXentLoss`` normalizes, and averages over positive pairs. With more
  than two views the denominator of a pair leaves the other positives out, unlike L_out: it is
  SupCon "pairwise", but for the mean, in which an anchor counts as often as it has positives.
* info-nce-pytorch ``InfoNCE`` normalizes; its negatives replace those of the batch, as ours do.
* open_clip ``ClipLoss`` takes normalized embeddings and 1 / temperature.
* lightly ``DCLLoss`` normalizes; one logsumexp over the negatives of both views, as equation 6.
* pytorch-metric-learning ``SupConLoss`` normalizes, and averages over the anchors whose loss is
  above 0: those with a positive, as we do, but also not those whose loss has come down to 0. It
  is 0 for a batch of one label. Its mean of positives divides by their number plus 1e-38.
* open_clip ``SigLipLoss`` takes normalized embeddings, 1 / temperature and the bias.
* ``label_smoothing`` is compared with torch's own cross entropy and ``hardness`` with the authors'
  estimator in test_options.py, L_out with the authors' code, which is no package, in
  test_supcon.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from contrastive_kit import NegativeQueue
from contrastive_kit.functional import (
    info_nce,
    nt_xent,
    siglip,
    similarity_distillation,
    sup_con,
)

SIZES = [(2, 3), (3, 1), (63, 60), (252, 130)]
TEMPERATURES = [1.0, 0.1, 0.05]


def lightly_losses():
    return pytest.importorskip("lightly.loss", reason="lightly is not installed")


def metric_losses():
    return pytest.importorskip(
        "pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed"
    )


def open_clip_losses():
    return pytest.importorskip("open_clip.loss", reason="open_clip_torch is not installed")


def views(n, d, count=2):
    return [torch.randn(n, d, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def assert_same(ours, theirs, inputs, *, factor=1.0, rtol=1e-10, atol=1e-13):
    """``theirs`` is ``factor`` times ``ours``, and so are the gradients of ``inputs``."""
    torch.testing.assert_close(theirs, factor * ours, rtol=rtol, atol=atol)
    for g_ours, g_theirs in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(g_theirs, factor * g_ours, rtol=rtol, atol=atol)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_nt_xent_is_that_of_lightly(n, d, temperature):
    theirs = lightly_losses().NTXentLoss(temperature)
    z1, z2 = views(n, d)
    assert_same(nt_xent(z1, z2, temperature=temperature), theirs(z1, z2), (z1, z2))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES[:-1])
def test_nt_xent_is_that_of_pytorch_metric_learning(n, d, temperature):
    theirs = metric_losses().NTXentLoss(temperature)
    z1, z2 = views(n, d)
    labels = torch.arange(n).repeat(2)
    assert_same(
        nt_xent(z1, z2, temperature=temperature),
        theirs(torch.cat([z1, z2]), labels),
        (z1, z2),
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES[:-1])
def test_info_nce_is_the_one_sided_loss_of_pytorch_metric_learning(n, d, temperature):
    losses = metric_losses()
    theirs = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature), symmetric=False)
    query, key = views(n, d)
    assert_same(info_nce(query, key, temperature=temperature), theirs(query, key), (query, key))


@pytest.mark.parametrize("mode", ["of the batch", "unpaired", "paired"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_info_nce_is_that_of_info_nce_pytorch(n, d, temperature, mode):
    peer = pytest.importorskip("info_nce", reason="info-nce-pytorch is not installed")
    inputs, options = views(n, d), {}
    if mode != "of the batch":
        shape = (5, d) if mode == "unpaired" else (n, 5, d)
        inputs.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))
        options = {"negative_mode": mode}
    theirs = peer.InfoNCE(temperature, **options)(*inputs)
    assert_same(info_nce(*inputs, temperature=temperature), theirs, inputs)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_symmetric_info_nce_is_the_loss_of_open_clip(n, d, temperature):
    theirs = open_clip_losses().ClipLoss()
    image, text = views(n, d)
    assert_same(
        info_nce(image, text, temperature=temperature, symmetric=True),
        theirs(F.normalize(image, dim=1), F.normalize(text, dim=1), 1 / temperature),
        (image, text),
    )


def test_a_learnable_temperature_gets_the_gradient_it_gets_from_open_clip():
    theirs = open_clip_losses().ClipLoss()
    image, text = views(63, 60)
    logit_scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    assert_same(
        info_nce(image, text, temperature=(-logit_scale).exp(), symmetric=True),
        theirs(F.normalize(image, dim=1), F.normalize(text, dim=1), logit_scale.exp()),
        (image, text, logit_scale),
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_info_nce_with_a_queue_is_lightly_with_a_memory_bank(temperature):
    theirs = lightly_losses().NTXentLoss(temperature, memory_bank_size=(50, 19))
    query, key = views(7, 19)
    queue = F.normalize(torch.randn(50, 19, dtype=torch.float64), dim=1)
    # A copy: the bank takes in the keys after each call that trains.
    theirs.memory_bank.bank = queue.clone()
    assert_same(
        info_nce(query, key, queue, temperature=temperature), theirs(query, key), (query, key)
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_decoupled_nt_xent_is_the_dcl_of_lightly(n, d, temperature):
    theirs = lightly_losses().DCLLoss(temperature)
    z1, z2 = views(n, d)
    assert_same(nt_xent(z1, z2, temperature=temperature, decoupled=True), theirs(z1, z2), (z1, z2))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_sup_con_is_that_of_pytorch_metric_learning(n_views, temperature):
    theirs = metric_losses().SupConLoss(temperature)
    z = views(23, 20, n_views)
    labels = torch.arange(23) // 3 % 7
    labels[5] = -1  # alone with its label: without a positive if there is one view
    assert_same(
        sup_con(*z, labels=labels, temperature=temperature),
        theirs(torch.cat(z), labels.repeat(n_views)),
        z,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_pairwise_sup_con_is_the_nt_xent_of_pytorch_metric_learning(n_views, temperature):
    theirs = metric_losses().NTXentLoss(temperature)
    z = views(23, 20, n_views)
    labels = torch.arange(23) // 3 % 7
    labels[5] = -1
    positives = n_views * (labels[:, None] == labels[None, :]).sum(1) - 1
    assert len(positives.unique()) > 1
    assert_same(
        sup_con(
            *z,
            labels=labels,
            temperature=temperature,
            variant="pairwise",
            sample_weight=positives.double(),
        ),
        theirs(torch.cat(z), labels.repeat(n_views)),
        z,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_pairwise_sup_con_with_keys_is_that_of_pytorch_metric_learning(temperature):
    theirs = metric_losses().NTXentLoss(temperature)
    query, key = views(13, 20)[0], views(29, 20)[0]
    labels, key_labels = torch.arange(13) % 5, torch.arange(29) % 11 % 7
    positives = (labels[:, None] == key_labels[None, :]).sum(1)
    assert_same(
        sup_con(
            query,
            labels=labels,
            keys=key,
            key_labels=key_labels,
            temperature=temperature,
            variant="pairwise",
            sample_weight=positives.double(),
        ),
        theirs(query, labels, ref_emb=key, ref_labels=key_labels),
        (query, key),
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sup_con_with_keys_is_that_of_pytorch_metric_learning(temperature):
    theirs = metric_losses().SupConLoss(temperature)
    query, key = views(13, 20)[0], views(29, 20)[0]
    labels, key_labels = torch.arange(13) % 5, torch.arange(29) % 11 % 7
    assert_same(
        sup_con(query, labels=labels, keys=key, key_labels=key_labels, temperature=temperature),
        theirs(query, labels, ref_emb=key, ref_labels=key_labels),
        (query, key),
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sup_con_with_a_queue_is_the_cross_batch_memory_of_pytorch_metric_learning(temperature):
    """Keys go into the memory first; queries, which do not, are compared with all of it."""
    losses = metric_losses()
    theirs = losses.CrossBatchMemory(losses.SupConLoss(temperature), 20, memory_size=30)
    queue = NegativeQueue(20, 30, labels=True).double()
    of_keys = torch.arange(14) >= 6
    for _ in range(5):
        query, key = views(6, 20)[0], views(8, 20)[0]
        labels = torch.randint(0, 5, (14,))
        queue(key, labels[of_keys])
        assert_same(
            sup_con(
                query,
                labels=labels[:6],
                keys=queue.negatives(),
                key_labels=queue.labels(),
                temperature=temperature,
            ),
            theirs(torch.cat([query, key]), labels, enqueue_mask=of_keys),
            (query,),
        )
    assert len(queue) == 30


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_siglip_is_that_of_open_clip(n, d, temperature):
    theirs = open_clip_losses().SigLipLoss()
    image, text = views(n, d)
    logit_scale = torch.tensor(math.log(1 / temperature), dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    assert_same(
        siglip(image, text, temperature=(-logit_scale).exp(), logit_bias=bias),
        theirs(F.normalize(image, dim=1), F.normalize(text, dim=1), logit_scale.exp(), bias),
        (image, text, logit_scale, bias),
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), [(2, 3), (63, 60)])
def test_similarity_distillation_is_that_of_open_clip(n, d, temperature):
    theirs = open_clip_losses().DistillClipLoss()
    image, text = views(n, d)
    of_teacher = [F.normalize(x, dim=1).detach() for x in views(n, 2 * d + 1)]
    logit_scale = torch.tensor(math.log(1 / temperature), dtype=torch.float64, requires_grad=True)
    assert_same(
        similarity_distillation(
            image,
            text,
            *of_teacher,
            temperature=(-logit_scale).exp(),
            teacher_temperature=0.05,
            symmetric=True,
        ),
        theirs(
            F.normalize(image, dim=1),
            F.normalize(text, dim=1),
            logit_scale.exp(),
            *of_teacher,
            20.0,
        )[1],
        (image, text, logit_scale),
    )


@pytest.mark.parametrize("subject", ["value", "gradient"])
def test_the_comparison_can_fail(subject):
    z1, z2 = views(5, 4)
    ours, copy = (nt_xent(z1, z2, temperature=0.5) for _ in range(2))
    wrong = copy + 1e-6 if subject == "value" else copy + 1e-6 * (copy - copy.detach())
    with pytest.raises(AssertionError):
        assert_same(ours, wrong, (z1, z2))
