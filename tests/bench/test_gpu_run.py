"""The script for GPU runs: stages that fail, hang or are missing; its summary and its files; a complete dry run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_run.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["gpu_run"] = module  # dataclasses looks up the module of a class
    specification.loader.exec_module(module)
    yield module
    del sys.modules["gpu_run"]


def test_a_failing_hanging_or_missing_stage_does_not_stop_the_rest(script, tmp_path, capsys):
    def stages(out, dry, commit):
        def python(code):
            return [sys.executable, "-c", code]

        write = f"import pathlib; p = pathlib.Path({str(out / 'results' / 'x')!r}); p.mkdir(parents=True);"
        return [
            script.Stage("fails", "a.log", 9, python("print('first'); raise SystemExit(3)")),
            script.Stage("hangs", "a.log", 1, python("import time; print('waiting', flush=True); time.sleep(60)")),
            script.Stage("missing", "a.log", 1, ["no-such-program"], "it is not here"),
            script.Stage(
                "passes", "a.log", 9, python(write + "(p / 'operators.json').write_text('{}'); print('done')")
            ),
        ]

    assert script.main([str(tmp_path), "--total", "12"], stages) == 1
    summary = {line["stage"]: line for line in json.loads((tmp_path / "summary.json").read_text())}
    assert summary["fails"]["outcome"] == "failed (3)"
    assert summary["hangs"] | {"seconds": 0} == {
        "stage": "hangs",
        "outcome": "out of time",
        "seconds": 0,
        "last": "waiting",
    }
    assert summary["missing"]["last"] == "it is not here"
    assert summary["passes"]["outcome"] == "passed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.log", "operators.json", "summary.json"]
    assert "first" in (tmp_path / "a.log").read_text()
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("passes")


def test_the_stages_fit_into_the_time_of_a_run(script, tmp_path):
    for dry in (False, True):
        stages = script.stages(tmp_path, dry, "abc")
        assert sum(stage.limit for stage in stages if not stage.optional) <= script.TOTAL
        assert [stage.name for stage in stages if stage.optional] == ["tune"]
        files = {stage.log for stage in stages} | {"operators.json", "models.json", "summary.json"}
        assert len(files) <= 8
        assert {"build", "selftest", "tests-cuda", "tests-triton", "tests-ops", "operators", "models"} <= {
            s.name for s in stages
        }


def test_dry_run_of_one_stage(script, tmp_path):
    assert script.main([str(tmp_path), "--dry-run", "--stages", "environment"]) == 0
    assert "subspace_attention" in (tmp_path / "environment.log").read_text()
