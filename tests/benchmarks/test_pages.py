"""What is published is what was measured: pages and documents from the committed results."""

import json

import pytest
from jinja2 import UndefinedError

from benchmarks import readme
from benchmarks.__main__ import FILES, main, parse
from benchmarks.claims.plan import SCALES
from benchmarks.harness.machine import RESULTS
from benchmarks.harness.report import not_measured, page

COMMITTED = [
    name
    for name in [*(n for names in FILES.values() for n in names.values())]
    + [scale.file for scale in SCALES.values()]
    if (RESULTS / f"{name}.json").exists()
]


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """All pages once more, from copies of the JSON files."""
    folder = tmp_path_factory.mktemp("results")
    for name in COMMITTED:
        (folder / f"{name}.json").write_text((RESULTS / f"{name}.json").read_text())
    assert main(["report", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_page_is_that_of_its_results(again, name):
    assert (again / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()


def test_the_documents_show_the_committed_figures():
    assert readme.numbers() in readme.PAGE.read_text()
    assert readme.training() in readme.README.read_text()
    assert "| convnet | contrastive-kit | 3 |" in readme.training()


def test_the_chart_of_the_readme_has_the_committed_figures(tmp_path, monkeypatch):
    curves = readme.curves()
    results = json.loads((RESULTS / "loss_cpu.json").read_text())["cases"]
    (case,) = (c for c in results if c["case"].get("n") == 8192 and c.get("memory"))
    for arm in ("contrastive-kit", "eager", "lightly"):
        sizes = [n for n, _ in curves[arm]["ms"]]
        assert sizes == sorted(set(sizes))
        time = case["times"]["forward+backward"]["milliseconds"][arm]["median"]
        assert curves[arm]["ms"][-1] == (8192, time)
        assert curves[arm]["MiB"][-1] == (8192, case["memory"][arm]["extra_mib"])
    assert readme.CHART.is_file()
    monkeypatch.setattr(readme, "CHART", tmp_path / "chart.png")
    readme.draw()
    assert readme.CHART.stat().st_size > 10_000


def flat(value):
    return {"median": value, "q1": value, "q3": value}


@pytest.fixture
def slow():
    """The committed results of the losses, as if ours were slow at the size with targets."""
    results = json.loads((RESULTS / "loss_cpu.json").read_text())
    for c in results["cases"]:
        if c["case"].get("n") == 4096 and c["case"]["allocator"] == "default":
            for timed in c["times"].values():
                timed["times_ours"] = {"eager": flat(0.9), "lightly": flat(9.0)}
            c["absent"] = {"compiled eager": "memory"}
    return results


def test_the_page_names_what_is_slower_and_what_is_absent(slow):
    from benchmarks.losses import markdown

    text = markdown(slow)
    assert "| ≥ 8× | 9.00× [9.00, 9.00] | yes |" in text
    assert "against eager | ≥ 4× | 0.90× [0.90, 0.90] | **no** |" in text
    assert "against compiled eager | ≥ 2.3× | not measured |  |" in text
    assert "- slower than eager: NT-Xent, forward+backward, N = 4096" in text
    assert "slower than lightly" not in text.split("## Where ours")[1]
    assert "compiled eager at N = 4096: memory" in text


def test_an_unfinished_or_quick_page_says_so(slow):
    from benchmarks.losses import markdown

    assert "Incomplete" not in markdown(slow)
    assert "Incomplete" in markdown({**slow, "complete": False})
    assert "too few rounds and sizes to quote" in markdown({**slow, "quick": True})


def test_reasons_are_grouped_by_what_was_left_out():
    cases = [{"case": {"n": n}, "absent": {"peer": "no memory"}} for n in (1, 2)]
    lines = not_measured(cases, lambda _: "loss: ", lambda of: str([c["case"]["n"] for c in of]))
    assert lines == ["loss: peer at [1, 2]: no memory"]


def test_a_page_without_a_figure_is_an_error():
    with pytest.raises(UndefinedError, match="machine"):
        page("steps", dry=False, quick=False, complete=True, losses="")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["steps", "--device", "cuda"], "steps is measured on cpu only"),
        (["correctness"], "correctness is measured on cuda only"),
        (["losses", "--dry"], "--dry needs --device cuda"),
        (["losses", "--quick", "--out", str(RESULTS)], "do not write into"),
        (["everything"], "invalid choice"),
    ],
)
def test_bad_options(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert said in capsys.readouterr().err
