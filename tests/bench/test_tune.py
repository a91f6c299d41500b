"""``crate-kernels tune``: what it stores, and that the automatic choice uses it."""

import pytest
import torch

from crate_kernels import ops, user_cache
from crate_kernels.bench import tune
from crate_kernels.cli import main
from crate_kernels.ops import tuned
from crate_kernels.ops.ista_step.op import operator
from tests.ops.oracle import skip_without

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def an_empty_cache(tmp_path, monkeypatch):
    skip_without("cpu")
    monkeypatch.setenv(user_cache.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    tuned._loaded.clear()
    operator.forget()
    yield
    tuned._loaded.clear()
    operator.forget()


def record(order, size=8, rows=4):
    shape = dict(operator="ista_step", dtype="float32", causal=False, size=size, rows=rows)
    return shape | dict(order=order, seconds={name: {"forward": 1e-3, "both": 2e-3} for name in order})


def chosen(rows, width=8):
    operator.forget()
    ops.ista_step(torch.ones(rows, width), torch.eye(width))
    (plan,) = operator._plans.values()
    return plan.backend


def test_the_automatic_choice_follows_the_order_for_like_calls():
    assert chosen(4) == "cpu"
    tuned.store(CPU, [record(["eager", "cpu"])])
    assert [chosen(rows) for rows in (1, 2, 4, 8, 9)] == ["cpu", "eager", "eager", "eager", "cpu"]
    assert chosen(4, width=16) == "cpu"
    tuned.store(CPU, [record(["cpu", "eager"])])  # a new record of the same call replaces the old one
    assert chosen(4) == "cpu"
    assert len(tuned.records(CPU)) == 1


def test_records_of_another_version_count_for_nothing():
    tuned.store(CPU, [record(["eager"])])
    content = user_cache.read(tuned.FILE)
    user_cache.write(tuned.FILE, {"another combination": content.popitem()[1]})
    tuned._loaded.clear()
    assert chosen(4) == "cpu"


def test_the_command_measures_shows_and_clears(capsys):
    assert main(["tune", "--model", "crate_tiny", "--image-size", "32", "--batch", "1", "--seconds", "0.001"]) == 0
    out = capsys.readouterr().out
    for name in tune.BLOCKS:
        assert f"{name} float32" in out
    assert "triton is not measured" in out
    stored = {r["operator"]: r for r in tuned.records(CPU)}
    assert set(stored) == set(tune.BLOCKS)
    assert stored["crate_layer"]["size"] == 5  # four patches and the class token
    assert stored["ista_step"]["size"] == stored["ista_step"]["shape"]["dim"]
    for found in stored.values():
        assert sorted(found["order"]) == ["cpu", "eager"]
        both = [found["seconds"][name] for name in found["order"]]
        assert both[0]["forward"] * both[0]["both"] <= both[1]["forward"] * both[1]["both"]
    assert main(["tune", "--show"]) == 0
    assert "crate_layer float32" in capsys.readouterr().out
    assert main(["tune", "--clear"]) == 0
    assert "forgot 5 records" in capsys.readouterr().out
    assert not tuned.records(CPU)


def test_a_backend_with_wrong_results_is_not_ranked(monkeypatch):
    right = operator.implementations["cpu"]
    wrong = type("Wrong", (), {"forward": lambda *a: 1.01 * right.forward(*a), "backward": right.backward,
                               "why_not": right.why_not})  # fmt: skip
    monkeypatch.setitem(operator.implementations, "cpu", wrong)
    operator.forget()
    case = tune.Case("ista_step", "tiny", 1, 20, 2, 16)
    found = tune.measure(case, CPU, torch.float32, 1e-3)
    assert found["order"] == ["eager"]
    assert "budget" in found["left_out"]["cpu"]
