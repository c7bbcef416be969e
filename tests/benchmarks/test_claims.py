"""The reproduction of the paper's claims: what is run, what is kept, and what is said of it."""

import dataclasses
import json
import math
import shutil
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from benchmarks import trainer
from benchmarks.claims import plan, report
from benchmarks.claims import run as claims
from benchmarks.harness.report import page

A, B, C = ("a", "h"), ("b", "h"), ("c", "h")
A_ABOVE_B = plan.Claim("a is above b", {A: 1.0, B: -1.0})
A_IS_BEST = plan.Claim("a is best", {A: 1.0}, (B, C))


def section(name, scale="photos"):
    return next(s for s in plan.sections(plan.SCALES[scale]) if s.name == name)


@pytest.mark.parametrize("scale", plan.SCALES.values(), ids=plan.SCALES)
def test_the_trainer_accepts_every_run(scale):
    root = ["--root", "images"] if scale.needs_root else []
    for run in plan.runs(scale, plan.sections(scale)):
        config = trainer.settings([*run.arguments(), *root])
        for name, value in run.settings.items():
            assert config[name] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("scale", plan.SCALES.values(), ids=plan.SCALES)
def test_claims_speak_of_places_that_are_run(scale):
    for s in plan.sections(scale):
        places = {(*cell.label, feature) for cell in s.cells for feature in s.features}
        assert len(places) == len(s.cells) * len(s.features)
        for claim in s.claims:
            assert {*claim.weights, *claim.rivals} <= places
            balance = sum(claim.weights.values()) - bool(claim.rivals)
            assert balance == pytest.approx(0)  # adding a constant to all accuracies does nothing


def test_the_matrix_has_every_transform_and_every_pair():
    augment = [frozenset(c.changes["augment"]) for c in section("augment").cells]
    assert len(set(augment)) == len(augment) == 6 + 15
    assert set().union(*augment) == set(plan.TRANSFORMS)
    best, *_ = section("augment").claims
    assert len(best.rivals) == 14
    assert ("crop", "colour", "h") not in best.rivals


def test_runs_are_made_once_and_the_first_seeds_first():
    scale = plan.SCALES["photos"]
    everything = plan.runs(scale, plan.sections(scale))
    assert len({run.key for run in everything}) == len(everything)
    seeds = [run.settings["seed"] for run in everything]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 1, 2}
    assert [run.settings.get("augment") is None for run in everything[:20]] == [True] * 20
    base = scale.run({}, 0)
    assert [run.settings for run in everything].count(base.settings) == 1
    in_three_sections = [
        s.name for s in plan.sections(scale) if base.key in {r.key for r in plan.runs(scale, [s])}
    ]
    assert in_three_sections == ["batch", "temperature", "encoder"]


def test_a_key_depends_on_every_setting_and_not_on_their_order():
    run = plan.Run({"epochs": 4, "seed": 0})
    assert run.key == plan.Run({"seed": 0, "epochs": 4}).key
    assert len({run.key, plan.Run({"epochs": 5, "seed": 0}).key, plan.Run({"epochs": 4}).key}) == 3


def test_deviation_is_pooled():
    rows = {A: [0.1, 0.3], B: [0.5, 0.6, 0.9], C: [0.7]}
    squares = np.var([0.1, 0.3], ddof=1) + 2 * np.var([0.5, 0.6, 0.9], ddof=1)
    sigma, freedom = report.deviation(rows)
    assert sigma == pytest.approx(math.sqrt(squares / 3))
    assert freedom == 3
    assert report.deviation({A: [0.1], B: [0.2]}) is None
    assert report.deviation({}) is None


def test_verdicts_go_both_ways():
    far, near = [0.80, 0.82, 0.84], [0.70, 0.72, 0.74]
    won = report.judge(A_ABOVE_B, {A: far, B: near})
    assert won["verdict"] == "reproduced"
    assert won["difference"] == pytest.approx(0.10)
    quantile = 2.776  # of Student's t, 97.5 %, 4 degrees of freedom
    assert won["error"] == pytest.approx(quantile * 0.02 * math.sqrt(1 / 3 + 1 / 3), rel=1e-3)
    lost = report.judge(A_ABOVE_B, {A: near, B: far})
    assert lost["verdict"] == "contradicted"
    assert lost["difference"] == pytest.approx(-0.10)
    close = report.judge(A_ABOVE_B, {A: far, B: [0.79, 0.81, 0.83]})
    assert close["verdict"] == "undecided"


def test_the_spread_of_the_whole_section_counts():
    values = {A: [0.80, 0.80], B: [0.79, 0.79]}
    assert report.judge(A_ABOVE_B, values)["verdict"] == "reproduced"
    assert report.judge(A_ABOVE_B, {**values, C: [0.2, 0.4]})["verdict"] == "undecided"


def test_the_best_has_to_beat_the_best_of_the_others():
    values = {A: [0.80, 0.81], B: [0.70, 0.71], C: [0.60, 0.61]}
    assert report.judge(A_IS_BEST, values)["rival"] == B
    assert report.judge(A_IS_BEST, values)["verdict"] == "reproduced"
    values[C] = [0.90, 0.91]
    judged = report.judge(A_IS_BEST, values)
    assert (judged["rival"], judged["verdict"]) == (C, "contradicted")
    assert judged["difference"] == pytest.approx(-0.10)


def test_what_is_missing_is_open():
    assert report.judge(A_IS_BEST, {A: [0.8, 0.9]}) == {
        "claim": "a is best", "verdict": "open", "missing": 2, "of": 3
    }  # fmt: skip
    one_seed = report.judge(A_ABOVE_B, {A: [0.9], B: [0.1]})
    assert one_seed["verdict"] == "open"
    assert "error" not in one_seed


def sentence(judged):
    return page("verdict", judged=judged)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([0.8, 0.82], [0.7, 0.72], "a is above b: reproduced (+10.0, error ± 6.1, 2 seeds)."),
        ([0.7, 0.72], [0.8, 0.82], "the other way round** (-10.0, error ± 6.1, 2 seeds)."),
        ([0.8, 0.82], [0.8, 0.81], "not reproduced: no difference beyond the spread** (+0.5"),
        ([0.8, 0.82], [0.5], "reproduced (+31.0, error ± 22.0, one seed)."),
        ([0.8], [0.7], "a is above b: open, +10.0, with one seed a place and so no spread."),
        ([0.8], [], "a is above b: open, 1 of the 2 accuracies that it needs are missing."),
    ],
)
def test_sentences(a, b, said):
    assert said in sentence(report.judge(A_ABOVE_B, {A: a, B: b}))


def test_a_sentence_names_the_rival():
    judged = report.judge(A_IS_BEST, {A: [0.8, 0.81], B: [0.6, 0.61], C: [0.7, 0.71]})
    assert "+10.0 against c, the best of the others" in sentence(judged)


def summary_of(scores, seeds=2, **changes):
    claims = (A_ABOVE_B,)
    cells = tuple(plan.Cell(label[:-1], {}) for label in (A, B))
    made = plan.Section("head", cells, claims, "Heads", "Which?", ("head",), seeds)
    return report.summary(dataclasses.replace(made, **changes), seeds, scores)


def text_of(section):
    """The page of one section, as it is read back from its file."""
    found = {
        "scale": "photos", "title": "", "base": "", "finished": 1, "planned": 1, "seconds": 0.0,
        "failed": {}, "about": [], "commits": [], "machine": {"processor": "", "cores": 1},
        "sections": [section],
    }  # fmt: skip
    return report.markdown(json.loads(json.dumps(found)), "x.png")


def test_tables_say_what_is_missing():
    rows = [{"linear": 0.5, "knn": 0.4}, {"linear": 0.6, "knn": 0.4}]
    summary = summary_of({A: rows, B: rows[:1]})
    assert (summary["missing"], summary["expected"]) == (1, 4)
    text = text_of(summary)
    assert "1 of 4 accuracies are missing" in text
    assert "| a | 55.0 ± 7.1 | 40.0 ± 0.0 |" in text
    assert "| b | 50.0 (1) | 40.0 (1) |" in text


def test_a_section_without_runs_makes_no_statement():
    text = text_of(summary_of({}))
    assert "No run of this section is finished" in text
    assert "|" not in text
    assert "a is above b" not in text


TRAINER = """
import json, pathlib, sys, time
arguments = sys.argv[1:]
flag = "--resume" if "--resume" in arguments else "--out"
folder = pathlib.Path(arguments[arguments.index(flag) + 1])
with (folder / "commands.txt").open("a") as file:
    file.write(json.dumps(arguments) + chr(10))
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """In the place of the trainer: keeps its command lines, then does what it is told."""

    def make(then=""):
        path = tmp_path / "trainer.py"
        path.write_text(f"{TRAINER}\n{then}\n")
        monkeypatch.setattr(trainer, "command", lambda *options: [sys.executable, path, *options])

    make()
    return make


def commands(folder):
    path = folder / "commands.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_interrupted_run_is_resumed(fake, tmp_path):
    run = tmp_path / "run"
    assert claims.Trainings(1, None).train(["--epochs", "1"], run) is None
    (run / "checkpoint.pt").touch()
    claims.Trainings(1, time.time() + 600, "cpu").train(["--epochs", "1"], run)
    first, second = commands(run)
    assert first == ["--epochs", "1", "--out", str(run), "--no-pictures"]
    assert second[:5] == ["--resume", str(run), "--no-pictures", "--device", "cpu"]
    assert second[5] == "--minutes"
    assert 9.5 < float(second[6]) <= 10
    assert (run / "checkpoint.pt").exists()
    fake('(folder / "results.json").touch()')
    claims.Trainings(1, None).train(["--epochs", "1"], run)
    assert not (run / "checkpoint.pt").exists()


def test_nothing_starts_when_the_time_is_over(fake, tmp_path):
    assert claims.Trainings(1, time.time() - 1).train([], tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_nothing_starts_once_it_is_to_stop(fake, tmp_path):
    trainings = claims.Trainings(1, None)
    trainings.train([], tmp_path / "run")
    trainings.stop()
    assert trainings.train([], tmp_path / "run") is None
    assert len(commands(tmp_path / "run")) == 1


def test_those_that_run_are_told_to_stop(fake, tmp_path):
    """And are no failures, whatever their status."""
    fake("time.sleep(120)")
    trainings = claims.Trainings(1, None)
    wanted = plan.SCALES["photos"].run({}, 0)

    def when_it_runs():
        while not commands(tmp_path / wanted.key):
            time.sleep(0.05)
        trainings.stop()

    thread = threading.Thread(target=when_it_runs)
    thread.start()
    assert trainings.train_all([wanted], tmp_path, [], jobs=1) == {}
    thread.join()


@pytest.mark.parametrize(
    "words", ['sys.exit("no such folder")', 'raise ValueError("no such folder")']
)
def test_a_failed_run_tells_why(fake, tmp_path, words):
    fake(words)
    assert "no such folder" in claims.Trainings(1, None).train([], tmp_path / "run")
    assert "no such folder" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["colours"], "SECTION must be one of"),
        (["--seeds", "0"], "--seeds: must be above 0"),
        (["--minutes", "0"], "must be above 0"),
        (["--scale", "cifar-subset"], "needs --root"),
        (["--root", "x"], "no meaning"),
    ],
)
def test_bad_options(arguments, said, capsys):
    with pytest.raises(SystemExit):
        claims.parse(arguments)
    assert said in capsys.readouterr().err


def make_images(root):
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for i, name in enumerate(("blue", "red")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for j in range(count):
                pixels = rng.integers(0, 120, (8, 8, 3))
                pixels[..., i] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{j}.png")
    return root


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(tmp_path, monkeypatch):
    scale = plan.SCALES["cifar-subset"]
    base = {
        **scale.base, "size": 8, "batch_size": 8, "train_images": 20, "epochs": 1, "knn_k": 3,
    }  # fmt: skip
    monkeypatch.setitem(plan.SCALES, scale.name, dataclasses.replace(scale, base=base))
    arguments = [
        "head", "--scale", scale.name, "--root", str(make_images(tmp_path / "images")),
        "--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--seeds", "1",
        "--threads", "1",
    ]  # fmt: skip
    assert claims.main(arguments) == 0
    found = json.loads((tmp_path / f"{scale.file}.json").read_text())
    assert found["finished"] == 3
    assert found["failed"] == {}
    head = next(s for s in found["sections"] if s["name"] == "head")
    assert head["missing"] == 0
    for place in head["places"]:
        assert 0 <= place["linear"][0] <= 1
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/results.json")}
    assert len(kept) == 3
    assert not list((tmp_path / "runs").glob("*/*.pt"))

    def not_again(*_arguments):
        raise AssertionError("finished runs were started again")

    monkeypatch.setattr(trainer, "command", not_again)
    assert claims.main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    shutil.rmtree(tmp_path / "runs")  # as in another clone, which has the results file alone
    assert claims.main(arguments) == 0
    again = json.loads((tmp_path / f"{scale.file}.json").read_text())
    assert again["kept"] == found["kept"]
    assert again["sections"] == found["sections"]
    page = (tmp_path / f"{scale.file}.md").read_text()
    assert "Projection head" in page
    assert "3 of" in page


def test_the_heat_map_is_a_picture(tmp_path):
    cells = section("augment").cells
    rng = np.random.default_rng(0)
    scores = {(*c.label, "h"): [{"linear": rng.random(), "knn": 0.1}] for c in cells[:-3]}
    summary = report.summary(section("augment"), 2, scores)
    report.heat_map(summary, "made-up numbers", tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        assert min(picture.size) > 400
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
