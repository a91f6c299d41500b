"""The self-test that runs before the automatic choice uses a kernel. CPU kernels replace the GPU's here."""

import json
import types

import pytest
import torch

from crate_kernels import ops, selftest, user_cache
from crate_kernels.cli import main
from crate_kernels.ops.ista_step.op import operator
from tests.ops.oracle import skip_without

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def an_untested_device(tmp_path, monkeypatch):
    skip_without("cpu")
    monkeypatch.setenv(user_cache.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(selftest, "TESTED", {"cpu": ("cpu",)})
    monkeypatch.setattr(selftest, "_failures", {})
    operator.forget()
    yield
    operator.forget()


@pytest.fixture
def broken(monkeypatch):
    """A CPU kernel of ista_step whose results are one percent off."""
    right = operator.implementations["cpu"]
    wrong = types.SimpleNamespace(**vars(right))
    wrong.forward = lambda *arguments: 1.01 * right.forward(*arguments)
    monkeypatch.setitem(operator.implementations, "cpu", wrong)


def call():
    operator.forget()
    return ops.ista_step(torch.ones(2, 8), torch.eye(8))


def chosen():
    call()
    return list(operator._plans.values())[-1].backend


@pytest.mark.parametrize("name", ops.OPERATORS)
@pytest.mark.parametrize("autocast", [False, True])
def test_right_kernels_pass(name, autocast):
    assert selftest.known_answer(name, "cpu", CPU, torch.bfloat16 if autocast else torch.float32, autocast) is None


def test_a_kernel_is_tested_once_and_taken(monkeypatch):
    tests = []
    right = selftest.known_answer
    monkeypatch.setattr(selftest, "known_answer", lambda *given: tests.append(given) or right(*given))
    assert [chosen(), chosen()] == ["cpu", "cpu"]
    assert tests == [("ista_step", "cpu", CPU, torch.float32, False)]
    assert user_cache.read("selftest") == {user_cache.combination(CPU): {"ista_step, cpu, float32": None}}


def test_a_wrong_kernel_is_passed_by_with_one_warning(broken, recwarn):
    assert [chosen(), chosen()] == ["eager", "eager"]
    (warning,) = recwarn.list
    assert "ista_step" in str(warning.message)
    assert "budget" in str(warning.message)
    with pytest.raises(AssertionError):  # an explicit request runs the kernel without the self-test
        torch.testing.assert_close(ops.ista_step(torch.ones(2, 8), torch.eye(8), backend="cpu"), call())


def test_a_kernel_that_fails_to_run_is_passed_by(monkeypatch, recwarn):
    def fail(*_):
        raise OSError("no such instruction")

    failing = types.SimpleNamespace(**vars(operator.implementations["cpu"]))
    failing.forward = fail
    monkeypatch.setitem(operator.implementations, "cpu", failing)
    assert chosen() == "eager"
    assert "no such instruction" in str(recwarn.list[0].message)


def test_the_environment_variable_skips_the_test(broken, monkeypatch):
    monkeypatch.setenv(selftest.ENVIRONMENT_VARIABLE, "0")
    assert chosen() == "cpu"


def test_a_traced_call_takes_an_earlier_result_and_runs_no_test():
    def backends_of(graph_of):
        graphs = []
        torch._dynamo.reset()
        torch.compile(graph_of, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)(
            torch.ones(2, 8), torch.eye(8)
        )
        return [node.args[-1] for node in graphs[0].graph.nodes if "ista_step" in str(node.target)]

    assert backends_of(ops.ista_step) == ["eager"]
    assert not user_cache.read("selftest")
    call()
    assert backends_of(ops.ista_step) == ["cpu"]


def test_a_cache_that_cannot_be_read_or_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "selftest.json").write_text("not JSON")
    assert chosen() == "cpu"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(user_cache.ENVIRONMENT_VARIABLE, str(tmp_path / "file"))
    assert chosen() == "cpu"


def test_random_numbers_and_gradient_mode_are_left_alone():
    state = torch.get_rng_state()
    with torch.no_grad():
        assert chosen() == "cpu"
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_command_prints_a_table_and_its_exit_code_tells_a_failure(broken, capsys, monkeypatch):
    monkeypatch.setattr(ops, "OPERATORS", ("ista_step",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["selftest"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ista_step, cpu, float32 ") and "FAILED: output: error" in line for line in lines)
    assert any(line.startswith("ista_step, eager, bfloat16, autocast ") and line.endswith("passed") for line in lines)
    assert any(line.startswith("ista_step, cuda, float32 ") and "cannot run" in line for line in lines)
    content = json.loads((user_cache.folder() / "selftest.json").read_text())
    assert content[user_cache.combination(CPU)]["ista_step, cpu, float32"]
