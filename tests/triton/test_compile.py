"""All kernels compile for eight targets, within each target's shared memory and registers; no device is needed.

``budget.json`` holds what the loops of each kernel may cost under one version of Triton. After a change that is meant,
``python -m crate_kernels.bench.compile_report --write-budget tests/triton/budget.json`` writes it anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BUDGET = Path(__file__).parent / "budget.json"
EVERY_TARGET = "CRATE_KERNELS_EVERY_TARGET"
twin = pytest.mark.skipif(EVERY_TARGET not in os.environ, reason=f"compiled like its twin; {EVERY_TARGET}=1 runs it")
# sm_86 has the instructions and the shared memory of sm_89, gfx90a those of gfx942.
TARGETS = [pytest.param("sm_86", marks=twin), pytest.param("gfx90a", marks=twin)]
TARGETS += ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
KERNELS = {
    "forward",
    "backward",
    "delta",
    "product",
    "fold_norm",
    "layer_norm_backward",
    "row_statistics",
    "decode",
    "merge",
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_and_fit(target, tmp_path):
    # Apart, because kernels defined under TRITON_INTERPRET=1 cannot be compiled any more.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "crate_kernels.bench.compile_report", "--targets", target, "--jobs", "2"]
    command += ["--json", tmp_path / "report.json", "--budget", BUDGET]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["failed"]
    assert {row["kernel"] for row in report["kernels"]} == KERNELS
