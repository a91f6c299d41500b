"""Result files, regressions, the tables and plots rendered from them, and the README's committed table."""

import copy
import json
import random
import re
from pathlib import Path

import pytest

from crate_kernels import timing
from crate_kernels.bench import command, dispatch, report, results

from . import sample
from .test_measure import parsed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True)
    (folder / "operators.json").write_text(json.dumps(sample.operators()))
    (folder / "models.json").write_text(json.dumps(sample.models()))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text(
        "before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n"
    )
    (tmp_path / "README.md").write_text("# x\n<!-- bench:begin -->\n<!-- bench:end -->\ny\n")
    (tmp_path / "crate_kernels" / "ops").mkdir(parents=True)
    return tmp_path


def test_report_holds_the_results_figures(checkout):
    pytest.importorskip("matplotlib")
    written = report.render(checkout / "benchmarks" / "results", checkout)
    docs, readme = (checkout / "docs" / "benchmarks.md").read_text(), (checkout / "README.md").read_text()
    assert docs.startswith("before\n")
    assert docs.endswith("after\n")
    assert "old" not in docs
    assert report.NO_GPU in docs
    assert report.NO_GPU in readme
    assert "| CRATE-T | 1.50× (1.33×) | 1.80× (1.60×) | 1.50× (1.33×) | 16.1 / 48.4 |" in readme
    assert "8 (7.84–8.16), 1.25×" in docs  # eager, against 10 ms
    assert "62 % (product)" in docs
    assert "no kernel yet" in docs
    assert "1.33×" in docs.partition("not faster")[2]  # 8 ms against SDPA's 6
    pictures = [path for path in written if path.suffix == ".svg"]
    assert {path.stem for path in pictures} == {"models", "roofline", "bound", "length"}
    before = {path: path.read_bytes() for path in written}
    report.render(checkout / "benchmarks" / "results", checkout)
    assert before == {path: path.read_bytes() for path in written}  # the same results, the same bytes


def test_outside_a_checkout_the_report_is_a_page_of_its_own(checkout, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    folder = checkout / "benchmarks" / "results"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command.run(parsed("--report", "--results", folder)) == 0
    page = (folder / "benchmarks.md").read_text()
    assert "CRATE-T" in page
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (folder / picture).is_file()
    assert not list((tmp_path / "elsewhere").iterdir())
    with pytest.raises(ValueError, match="run it in the root of a checkout"):
        command.run(parsed("--dispatch", "--results", folder))
    with pytest.raises(ValueError, match="holds no result files"):
        command.run(parsed("--dispatch", "--results", tmp_path / "elsewhere"))


def test_quick_results_and_foreign_files_are_refused(checkout):
    path = checkout / "benchmarks" / "results" / "cpu" / "models.json"
    path.write_text(json.dumps(sample.models() | {"quick": True}))
    with pytest.raises(ValueError, match="quick run"):
        report.render(checkout / "benchmarks" / "results", checkout)
    path.write_text('{"something": 1}')
    with pytest.raises(ValueError, match="is not a result file"):
        results.read(path)


def test_readme_table_is_what_the_committed_results_render():
    readme = (ROOT / "README.md").read_text()
    expected = report.between(
        readme, report.README_MARKERS, report.readme_text(results.read_all(ROOT / "benchmarks" / "results"))
    )
    if expected is None:
        pytest.skip("README.md has no benchmark markers")
    assert readme == expected, "run `crate-kernels bench --report`"


def test_docs_hold_what_the_committed_results_render():
    docs = (ROOT / "docs" / "benchmarks.md").read_text()
    expected = report.between(
        docs, report.DOCS_MARKERS, report.docs_text(results.read_all(ROOT / "benchmarks" / "results"))
    )
    assert docs == expected, "run `crate-kernels bench --report`"


# -- regressions -------------------------------------------------------------------------------------------------------


def noisy(seed, factor=None):
    """Records of 20 cases whose rounds scatter by some percent; one of them slowed down by ``factor``."""
    chance, records = random.Random(seed), []
    for case in range(20):
        slow = factor if factor and case == 7 else 1.0
        samples = [0.01 * slow * chance.gauss(1.0, 0.03) for _ in range(25)]
        record = sample.operator("eager", 1.0, tokens=100 + case)
        records.append(record | {"seconds": timing.quantiles(samples)})
    return records


@pytest.mark.parametrize("seed", range(5))
def test_regressions_finds_a_planted_slowdown_and_no_noise(seed):
    assert results.slower(noisy(seed), noisy(seed + 100)) == []
    (found,) = results.slower(noisy(seed), noisy(seed + 100, factor=1.15))
    assert found["record"]["shape"]["tokens"] == 107
    assert found["ratio"] == pytest.approx(1.15, abs=0.05)


def test_relative_regressions_forgive_a_slower_machine(tmp_path, capsys):
    old = sample.operators()
    new = copy.deepcopy(old)
    for record in new["records"]:
        if "seconds" in record:
            record["seconds"] = {p: 2 * v for p, v in record["seconds"].items()}
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, content in zip(paths, (old, new), strict=True):
        results.write(path, content)
    with pytest.raises(ValueError, match=r"--compare: no result file \S*absent\.json"):
        command.run(parsed("--compare", paths[0], tmp_path / "absent.json"))
    assert command.run(parsed("--compare", *paths)) == 1
    assert "2.00x slower" in capsys.readouterr().out
    assert command.run(parsed("--compare", *paths, "--relative")) == 0
    new["records"][1]["speedup"] = {p: v / 1.5 for p, v in new["records"][1]["speedup"].items()}
    results.write(paths[1], new)
    assert command.run(parsed("--compare", *paths, "--relative")) == 1
    assert "1.50x slower" in capsys.readouterr().out


# -- the table for the automatic choice -------------------------------------------------------------------------------


def test_dispatch_table_is_empty_without_gpu_results(checkout):
    path = dispatch.write(checkout / "benchmarks" / "results", checkout)
    module: dict = {}
    exec(path.read_text(), module)
    assert module["ORDER"] == {}
    assert module["SOURCES"] == ()


def test_dispatch_table_puts_the_measured_fastest_first(checkout):
    content = sample.operators()
    content["environment"] = content["environment"] | {"capability": "sm_90"}
    content["records"] = [
        sample.operator(name, seconds, tokens=tokens, direction=direction)
        for direction in dispatch.DIRECTIONS
        for tokens, times in ((197, (1, 2, 9)), (1024, (3, 2, 9)), (4096, (3, 2, 9)))
        for name, seconds in zip(("cuda", "triton", "eager"), times, strict=True)
    ]
    folder = checkout / "benchmarks" / "results" / "a-device"
    folder.mkdir()
    results.write(folder / "operators.json", content)
    module: dict = {}
    exec(dispatch.write(checkout / "benchmarks" / "results", checkout).read_text(), module)
    assert module["SOURCES"] == ("benchmarks/results/a-device/operators.json",)
    assert module["ORDER"] == {
        ("sm_90", "subspace_attention", "float32", False): (
            (449, float("inf"), ("cuda", "triton", "eager")),
            (float("inf"), float("inf"), ("triton", "cuda", "eager")),
        )
    }
