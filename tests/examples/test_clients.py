"""Each of examples/clients runs for a few steps, and does what it is there to show."""

import importlib
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist

import photographs


@pytest.fixture(scope="module", autouse=True)
def _few_patches():
    """One patch in sixteen of each photograph: enough for a few steps."""
    patches = photographs.load_patches

    def few(size=32):
        images, labels, test_images, test_labels, names = patches(size)
        return images[::16], labels[::16], test_images[::16], test_labels[::16], names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photographs, "load_patches", few)
        yield


def client(name):
    """A module that a client needs, or a skip that says which is missing."""
    return pytest.importorskip(name, reason=f"the client {name} is not installed")


class TestLightning:
    """Resuming, and several processes."""

    @pytest.fixture
    def fit(self, tmp_path):
        client("pytorch_lightning")
        return partial(fit_a_little, tmp_path)

    @pytest.mark.slow
    def test_a_resumed_run_is_the_same_bit_for_bit(self, fit):
        whole = fit(2)
        first = fit(1)
        torch.rand(3)
        resumed = fit(2, resume=first.checkpoint_callback.best_model_path)
        states = [trainer.lightning_module.state_dict() for trainer in (first, resumed, whole)]
        temperatures = [float(state["loss_fn.logit_scale"]) for state in states]
        assert temperatures[0] != temperatures[1]
        assert [len(t.lightning_module.queue) for t in (first, resumed)] == [192, 384]
        torch.testing.assert_close(states[1], states[2], rtol=0, atol=0)

    def test_features_are_evaluated_after_an_epoch(self, fit):
        metrics = fit(1).callback_metrics
        assert 1 / 16 < metrics["knn"] <= 1
        assert 1 / 16 < metrics["probe"] <= 1
        assert metrics["temperature"] == pytest.approx(0.2, rel=0.1)
        assert metrics["loss"].isfinite()

    @pytest.mark.distributed
    @pytest.mark.slow
    def test_two_processes_have_one_model_and_one_queue(self, tmp_path):
        client("pytorch_lightning")
        # Lightning forks, which only a process without threads survives.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(train_in_two_processes, tmp_path).result()
        assert (tmp_path / "agreed").exists()


def fit_a_little(folder, epochs, batch_size=64, callbacks=(), **options):
    from clients.lightning_simclr import main

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options = {"limit_train_batches": 3, "accelerator": "cpu", **quiet, **options}
    return main(epochs, batch_size, callbacks, default_root_dir=folder, **options)


def train_in_two_processes(folder):
    import pytorch_lightning as pl

    class Agreement(pl.Callback):
        def on_train_end(self, trainer, module):
            queue = module.queue.negatives()
            weights = torch.cat([p.detach().flatten() for p in module.parameters()])
            for own in (queue, weights):
                both = module.all_gather(own)
                assert torch.equal(both[0], both[1])
            assert len(queue) == 3 * 2 * 32
            assert len(queue.unique(dim=0)) == len(queue)
            if trainer.is_global_zero:
                (folder / "agreed").touch()

    fit_a_little(folder, 1, 32, [Agreement()], devices=2, strategy="ddp_fork")


def accelerated(path, batch_size):
    """What the example is worth on this rank, and whether all ranks have the same weights."""
    from clients.accelerate_grad_cache import main

    encoder, quality = main(epochs=1, batch_size=batch_size, chunk_size=24)
    weights = torch.cat([p.detach().flatten() for p in encoder.parameters()])
    all_weights = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(all_weights, weights)
    agreed = all(torch.equal(weights, other) for other in all_weights)
    rank = dist.get_rank()
    (path / f"{rank}.json").write_text(json.dumps({"agreed": agreed, **quality}))


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_trains_through_grad_cache(processes, tmp_path):
    """In processes of their own, as accelerate has one state for the whole of a process."""
    client("accelerate")
    from accelerate import debug_launcher

    debug_launcher(accelerated, (tmp_path, 64 // processes), num_processes=processes)
    results = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert len(results) == processes
    for result in results:
        assert result["agreed"]
        assert 1 / 16 < result["knn"] <= 1
        assert 1 / 16 < result["probe"] <= 1


@pytest.mark.parametrize(
    ("name", "width"),
    [
        pytest.param("vit_tiny_patch16_224", 192, marks=pytest.mark.slow),
        ("convnext_atto", 320),
    ],
)
def test_an_encoder_of_timm_learns(name, width):
    client("timm")
    from clients.timm_encoders import main, timm_encoder

    quality = main(name, epochs=1, batch_size=64)
    assert 1 / 16 < quality["knn"] <= 1
    size = {"img_size": 32} if name.startswith("vit") else {}
    encoder = timm_encoder(name, **size)
    assert encoder.out_dim == width
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, width)


@pytest.mark.slow
def test_two_towers_learn_captions():
    from clients.clip_towers import main

    assert main(steps=40, batch_size=64) > 0.08  # 1 / 48 by chance


class TestSentenceTransformers:
    """A loss in the trainer of sentence-transformers, and its value beside theirs."""

    @pytest.fixture
    def example(self):
        client("sentence_transformers")
        client("datasets")
        return importlib.import_module("clients.sentence_pairs")

    def test_it_learns_to_translate(self, example, tmp_path):
        before, after = example.main(steps=30, out=str(tmp_path))
        assert before < 0.2
        assert after > 0.6

    @pytest.mark.parametrize("columns", [2, 4])
    def test_value_and_gradient_are_those_of_its_multiple_negatives_loss(self, example, columns):
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        torch.manual_seed(0)
        pairs = example.phrases()
        model = example.small_model(pairs).double()
        columns = [[pair[i % 2] for pair in pairs[7 * i : 7 * i + 7]] for i in range(columns)]
        features = [model.preprocess(column) for column in columns]
        found = []
        for loss_fn in (example.InBatchNegatives(model), MultipleNegativesRankingLoss(model)):
            model.zero_grad()
            loss = loss_fn([dict(column) for column in features], None)
            loss.backward()
            found.append((loss.detach(), next(model.parameters()).grad.clone()))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "needs", "options"),
    [
        ("torchvision_loader", "torchvision", {"epochs": 1, "workers": 2}),
        ("torchvision_loader", "torchvision", {"epochs": 1, "workers": 0, "on_device": True}),
        ("webdataset_source", "webdataset", {"steps": 4}),
        ("hf_datasets_source", "datasets", {"epochs": 1}),
    ],
)
def test_a_source_of_images_feeds_a_loop(name, needs, options):
    client(needs)
    example = importlib.import_module(f"clients.{name}")
    losses = example.main(batch_size=64, **options)
    assert len(losses) == 4
    assert losses[0] < math.log(127) + 1
    assert min(losses[1:]) < losses[0]
