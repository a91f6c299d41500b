"""All kernels compile for eight targets, within each target's shared memory and registers; no device is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / "benchmarks" / "compile_report.py"
TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"]
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
    command = [sys.executable, REPORT, "--targets", target, "--jobs", "2", "--json", tmp_path / "report.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["failed"]
    assert {row["kernel"] for row in report["kernels"]} == KERNELS


def test_loops_are_told_from_code_that_is_laid_out_of_line():
    spec = importlib.util.spec_from_file_location("compile_report", REPORT)
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    code = report.instructions("""
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   LDL R3, [R1+0x4] ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3) ;
        /*0080*/                   LDL R3, [R1+0x4] ;
        /*0090*/                   BRA `(.L_x_1) ;
""")
    assert [op for op, _ in code] == ["STL", "LDL", "BRA", "BRA", "EXIT", "LDL", "BRA", "BRA", "LDL", "BRA"]
    # Lines 5 and 6 lie behind the loop and belong to it; the last two branch back and do not.
    assert report.in_loops(code) == [False, True, True, True, False, True, True, True, False, False]
