"""Every kernel under AddressSanitizer and UBSan: global buffers are heap blocks of exactly their size, so an access
beyond one is an error. The results are those of the ordinary build, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from . import emulator, sanitized


def runtime() -> str:
    """The sanitizer's library, to be loaded before Python; a bare name if the compiler has none."""
    command = [emulator.compiler(), "-print-file-name=libasan.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def execute(module: Path, out: Path) -> subprocess.CompletedProcess:
    # pybind11 keeps what it registers for the life of the process: leaks are not looked for.
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, Path(sanitized.__file__), module, out], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def sanitizers():
    reason = emulator.missing()
    if reason is None and not Path(runtime()).is_absolute():
        reason = f"{emulator.compiler()} has no AddressSanitizer"
    if reason:
        pytest.skip(reason)


def test_every_kernel_runs_clean(sanitizers, simt, tmp_path):
    # sanitized.py runs bfloat16 alone. Both types are instances of the same templates.
    sources = emulator.in_bfloat16(tmp_path, sanitized.WIDTHS)
    done = execute(emulator.build(emulator.SANITIZE, sources), tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr[-4000:]
    expected, got = sanitized.run(simt.module), np.load(tmp_path / "out.npz")
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert np.array_equal(got[name].view(np.uint8), value.view(np.uint8)), name
