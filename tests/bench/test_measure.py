"""Clocks, the correctness check, and the suites from end to end on tiny shapes."""

import json
import time

import pytest
import torch

from crate_kernels import cli, ops, timing
from crate_kernels.bench import cases, command, cost, models, operators, peaks

CPU = torch.device("cpu")
PEAKS = cost.Peaks(1e10, 1e11, 1e9)
TINY = {case.operator: case for case in cases.cases(CPU, quick=True)}


def test_quantiles_interpolate():
    assert timing.quantiles([3, 1, 2]) == {"p20": pytest.approx(1.4), "p50": 2, "p80": pytest.approx(2.6)}
    assert timing.quantiles([5.0]) == {"p20": 5, "p50": 5, "p80": 5}


def test_paired_ratios_ignore_what_slows_a_whole_round():
    # The machine was ten times slower in the second round; both implementations felt it.
    assert timing.paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == {"p20": 2, "p50": 2, "p80": 2}


def test_rounds_are_interleaved_and_the_slower_call_measures_slower():
    seen = []

    def call(name, seconds):
        return lambda: (seen.append(name), time.sleep(seconds))

    found = timing.measure({"slow": call("slow", 0.006), "fast": call("fast", 0.002)}, CPU, seconds=0, rounds=(5, 5))
    assert {len(v) for v in found.values()} == {5}
    rounds = seen[-10:]  # after the calls that choose the repeats of a sample
    assert all({*rounds[i : i + 2]} == {"slow", "fast"} for i in range(0, 10, 2))
    assert timing.quantiles(found["slow"])["p50"] > timing.quantiles(found["fast"])["p50"] >= 0.002


def test_measured_peaks_are_positive():
    found = peaks.measure(CPU, [torch.float32], quick=True)
    assert found["copy"] > 0
    assert found["product"]["float32"] > 0
    assert found["exponentials"] > 0


# -- the gate ----------------------------------------------------------------------------------------------------------


def forgets_a_token(w):
    o = ops.subspace_attention(w, backend="eager")
    return torch.cat([o[:, :-1], torch.zeros_like(o[:, -1:])], dim=1)


def wrong_gradient(w):
    o = ops.subspace_attention(w, backend="eager")
    return 2 * o - o.detach()


def nan(w):
    return ops.subspace_attention(w, backend="eager") * float("nan")


@pytest.mark.parametrize("wrong", [forgets_a_token, wrong_gradient, nan])
def test_a_wrong_implementation_is_refused_and_not_timed(wrong):
    case = TINY["subspace_attention"]
    calls = {"reference": case.call("reference"), "good": case.call("eager"), "wrong": wrong}
    records = list(operators.run_case(case, CPU, torch.float32, PEAKS, implementations=calls, seconds=0, rounds=(2, 2)))
    mine = [r for r in records if r["implementation"] == "wrong"]
    assert len(mine) == 1
    assert mine[0]["refused"]
    assert "seconds" not in mine[0]
    assert {r["direction"] for r in records if r["implementation"] == "good"} == set(cost.DIRECTIONS)


def test_a_wrong_step_behind_a_relu_is_refused():
    case = TINY["ista_step"]
    leaves = case.tensors(CPU, torch.float32)

    def unfinished(x, weight):
        return torch.relu(x + 0.1 * (x @ weight) - 0.01)  # without x Wᵀ W

    def stopped(x, weight):
        return ops.ista_step(x, weight.detach(), backend="eager") + 0 * weight.sum()

    passed, records = operators.gated(case, {"unfinished": unfinished, "stopped": stopped}, leaves)
    assert not passed
    assert "output" in records["unfinished"]["refused"]
    assert "gradient 2" in records["stopped"]["refused"]


def test_a_wrong_model_is_refused():
    master = models.build("tiny", quick=True)
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    for task in models.TASKS:
        found = models.implementations(master, task, CPU, torch.float32, {models.REFERENCE, models.OURS})
        found["wrong"] = models.implementations(
            models.build("tiny", quick=True), task, CPU, torch.float32, {models.OURS}
        )[models.OURS]
        with torch.no_grad():
            found["wrong"].model.blocks[1].ista.weight.mul_(1.01)
        passed, records = models.judged(found, task, images, targets, torch.float32)
        assert set(passed) == {models.REFERENCE, models.OURS}
        assert records["wrong"]["refused"]


# -- suites ----------------------------------------------------------------------------------------------------------


def test_saved_bytes_of_both_models():
    master = models.build("tiny", quick=True)
    saved = {
        r["implementation"]: r["bytes_per_token_channel"]
        for r in models.saved_records(master, {}, CPU, torch.float32, master.config["image_size"])
    }
    # Four tensors of the tokens' size in float32, and a few scalars a row, which weigh much at so small a width.
    assert 16 <= saved[models.OURS] < 18
    assert saved[models.REFERENCE] > 2 * saved[models.OURS]


def parsed(*words):
    parser = cli.argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*map(str, words)])


def test_command_measures_what_it_is_asked_for(tmp_path, capsys):
    common = ["--device", "cpu", "--quick", "--results", tmp_path]
    assert (
        command.run(
            parsed(*common, "--suite", "operators", "--operators", "ista_block", "--implementations", "reference,eager")
        )
        == 0
    )
    content = json.loads((tmp_path / "cpu" / "operators.json").read_text())
    assert {(r["implementation"], r["direction"]) for r in content["records"]} == {
        (c, d) for c in ("reference", "eager") for d in cost.DIRECTIONS
    }
    for record in content["records"]:
        assert 0 < record["seconds"]["p20"] <= record["seconds"]["p50"] <= record["seconds"]["p80"]
        assert record["share_of_budget"] <= 1
    assert content["environment"]["versions"]["torch"] == torch.__version__
    assert command.run(parsed(*common, "--suite", "models", "--implementations", "crate_kernels")) == 0
    records = json.loads((tmp_path / "cpu" / "models.json").read_text())["records"]
    assert {r["task"] for r in records} == {*models.TASKS, "saved for backward", "memory by length"}
    assert "CRATE" in capsys.readouterr().out


def test_check_only_times_and_writes_nothing(tmp_path, capsys):
    words = ["--device", "cpu", "--quick", "--check-only", "--suite", "operators", "--implementations", "eager"]
    assert command.run(parsed(*words, "--results", tmp_path)) == 0
    assert not list(tmp_path.iterdir())
    assert "of the budget" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--dtype", "int8"], ["--suite", "operators", "--operators", "nothing"]])
def test_unknown_names_are_refused(words, tmp_path):
    with pytest.raises((ValueError, SystemExit)):
        command.run(parsed("--device", "cpu", "--quick", "--results", tmp_path, *words))


def test_results_are_written_where_the_user_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--device",
        "cpu",
        "--quick",
        "--suite",
        "operators",
        "--operators",
        "ista_step",
        "--implementations",
        "eager",
    ]
    assert command.run(parsed(*words)) == 0
    path = tmp_path / "benchmarks" / "results" / "cpu" / "operators.json"
    assert f"wrote {path.relative_to(tmp_path)}" in capsys.readouterr().out
    assert json.loads(path.read_text())["records"]


def test_a_checked_model_without_a_budget_has_a_line():
    record = dict(model="CRATE-T", batch=1, task="forward", implementation=models.VIT, check="finite")
    assert command.line(record) == "CRATE-T batch 1 · forward · timm ViT: finite"
    assert command.line(record | {"share_of_budget": 0.5}).endswith("finite (50 % of the budget)")
