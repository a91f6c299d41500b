"""The CPU kernels in a separate program: random shapes, types and strides, with one to four threads.

The program runs under the compiler's sanitizers for this processor, and in an emulator for ARM.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "neon": []}
FLAGS["avx512"] = [*FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS["amx"] = [*FLAGS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]

SANITIZERS = {
    "address and undefined behavior": (
        "amx",
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    ),
    "threads": ("avx2", ["-fsanitize=thread"]),
}


def build_command(compiler, isa, program, *flags):
    return [
        compiler, "-std=c++17", "-fno-math-errno", *flags, *FLAGS[isa], f"-I{SOURCES}", f"-DCRATE_ISA={isa}",
        f"-DCRATE_ISAS=CRATE_EACH({isa})", str(SOURCES / "kernels.cpp"), str(SOURCES / "library.cpp"),
        str(Path(__file__).with_name("fuzz.cpp")), "-pthread", "-o", str(program),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SANITIZERS)
def test_random_calls_touch_no_foreign_memory_and_do_not_race(name, tmp_path):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    fastest, sanitizer = SANITIZERS[name]
    for isa in (fastest, "avx512", "avx2") if platform.machine() in ("x86_64", "AMD64") else ("neon",):
        program = tmp_path / "fuzz"
        command = build_command(COMPILER, isa, program, "-O1", "-g1", *sanitizer)
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode and isa != "avx2":  # an older compiler
            continue
        assert built.returncode == 0, built.stderr[-3000:]
        done = subprocess.run([str(program), isa, "60"], capture_output=True, text=True, timeout=600)
        if done.returncode != 77:  # 77: the processor does not run this set
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.startswith(f"{isa}: 60 rounds")
            return
    pytest.skip("the processor runs none of the instruction sets")


@pytest.mark.slow
def test_neon_computes_the_equations_in_an_emulator(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs the Debian packages g++-aarch64-linux-gnu and qemu-user-static")
    program = tmp_path / "fuzz"
    built = subprocess.run(build_command(compiler, "neon", program, "-O2", "-static"), capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    done = subprocess.run([emulator, str(program), "neon", "20"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "neon: 20 rounds\n"
