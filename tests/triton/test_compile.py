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
TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
if EVERY_TARGET in os.environ:
    TARGETS += ["sm_86", "gfx90a"]  # the instructions and the shared memory of sm_89 and of gfx942
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
def test_kernels_compile_and_fit(tmp_path):
    # A separate process: kernels defined under TRITON_INTERPRET=1 cannot be compiled. One call for all targets,
    # because every process of the report imports torch and Triton first.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "crate_kernels.bench.compile_report", "--targets", *TARGETS, "--jobs", "2"]
    command += ["--json", tmp_path / "report.json", "--budget", BUDGET]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["failed"]
    for target in TARGETS:
        assert {row["kernel"] for row in report["kernels"] if row["target"] == target} == KERNELS
