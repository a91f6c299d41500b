"""``setup.py`` and ``csrc/CMakeLists.txt`` build the CUDA library, or record why they did not."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from crate_kernels.bench import compile_report, cuda_report
from crate_kernels.ops import cuda_kernels, libraries

ROOT = Path(__file__).parents[2]
TOOLS = ("nvcc", "cmake", "ninja", "c++")


def setup(build: Path, **environment):
    folders = ["--build-lib", build / "lib", "--build-temp", build / "temp"]
    cleared = ("CRATE_KERNELS_SKIP_CUDA", "CRATE_KERNELS_FORCE_BUILD", "TORCH_CUDA_ARCH_LIST")
    inherited = {name: value for name, value in os.environ.items() if name not in cleared}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env={**inherited, "CRATE_KERNELS_SKIP_CPU": "1", **environment},
        capture_output=True,
        text=True,
    )


def record(build: Path) -> dict:
    return json.loads((build / "lib" / "crate_kernels" / "_build.json").read_text())["cuda"]


def without(tmp_path: Path, absent: str) -> dict[str, str]:
    """An environment in which every tool but one is found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        if tool != absent:
            (folder / tool).write_text("#!/bin/sh\nexit 1\n")
            (folder / tool).chmod(0o755)
    return {"PATH": str(folder), "CUDA_HOME": "", "CUDA_PATH": "", "CUDACXX": "", "CXX": ""}


@pytest.mark.parametrize("absent", TOOLS)
def test_without_a_tool_the_install_succeeds_and_records_the_reason(tmp_path, absent):
    done = setup(tmp_path, **without(tmp_path, absent))
    assert done.returncode == 0, done.stderr
    reason = f"{'a C++ compiler' if absent == 'c++' else absent} was not found"
    assert f"{reason}; installing without the cuda library" in done.stderr
    assert record(tmp_path) == {"missing": reason}
    assert not list(tmp_path.rglob("*.so"))


def test_a_build_that_fails_is_recorded(tmp_path):
    done = setup(tmp_path, **without(tmp_path, ""))
    assert done.returncode == 0, done.stderr
    assert record(tmp_path)["missing"].startswith("the build failed: ")


def test_a_forced_build_fails_with_the_reason(tmp_path):
    done = setup(tmp_path, CRATE_KERNELS_FORCE_BUILD="1", **without(tmp_path, "nvcc"))
    assert done.returncode != 0
    assert "the cuda library cannot be built: nvcc was not found" in done.stderr


def test_a_library_that_is_not_wanted_is_removed_from_an_earlier_build(tmp_path):
    stale = tmp_path / "lib" / "crate_kernels" / "_cuda.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    done = setup(tmp_path, CRATE_KERNELS_SKIP_CUDA="1", CRATE_KERNELS_FORCE_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert record(tmp_path) == {"missing": "CRATE_KERNELS_SKIP_CUDA was set"}
    assert not stale.exists()


def test_a_wheel_ships_nothing_of_an_earlier_build(tmp_path):
    earlier = tmp_path / "build-lib" / "crate_kernels"
    earlier.mkdir(parents=True)
    (earlier / "_cuda.so").touch()
    (earlier / "removed_since.py").touch()
    folders = {"build": ("build-base", "build-lib", "build-temp"), "egg_info": ("egg-base",)}
    (tmp_path / "egg-base").mkdir()
    (tmp_path / "setup.cfg").write_text(
        "".join(f"[{c}]\n" + "".join(f"{f} = {tmp_path / f}\n" for f in options) for c, options in folders.items())
    )
    environment = {"DIST_EXTRA_CONFIG": str(tmp_path / "setup.cfg")}
    environment |= {"CRATE_KERNELS_SKIP_CUDA": "1", "CRATE_KERNELS_SKIP_CPU": "1"}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", tmp_path, "-b", tmp_path / "wheel"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")  # without a library it runs everywhere
    names = zipfile.ZipFile(built).namelist()
    assert {"_build.json", "__init__.py", "nn.py"} <= {n.split("crate_kernels/")[-1] for n in names}
    assert not [name for name in names if name.endswith((".so", "removed_since.py"))]


@pytest.mark.parametrize("listed", ["Hopper", "9", "8.0,9.0", "8.0;sm_90"])
def test_an_unreadable_architecture_is_an_error(tmp_path, listed):
    done = setup(tmp_path, TORCH_CUDA_ARCH_LIST=listed)
    assert done.returncode != 0
    assert f"TORCH_CUDA_ARCH_LIST: cannot read {listed!r}" in done.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    # The largest part of CI's time on this backend: both architectures in one build.
    build = tmp_path_factory.mktemp("library")
    done = setup(build, CRATE_KERNELS_FORCE_BUILD="1", TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX")
    assert done.returncode == 0, done.stderr
    (build / "log").write_text(done.stdout)
    return build


@pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}")
class TestWithNvcc:
    def test_the_record_names_compiler_and_architectures(self, build):
        assert record(build)["architectures"] == ["sm_80", "sm_90", "compute_90"]
        assert re.fullmatch(r"\S+ [\d.]+, nvcc [\d.]+", record(build)["compiler"])

    def test_no_kernel_spills(self, build):
        used = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", (build / "log").read_text()
        )
        # Two directions, seven widths, two formats, two sizes; LayerNorm forward for four pairs of formats and backward
        # for three formats; one reduction.
        assert len(used) == 2 * (2 * 7 * 2 * 2 + 4 + 3 + 1)
        assert set(used) == {("0", "0", "0")}

    def test_machine_code_within_its_budget(self, build):
        """After a change that is meant, ``python -m crate_kernels.bench.compile_report --cuda LIBRARY`` with
        ``--write-budget tests/cuda/budget.json`` writes the file anew."""
        pytest.importorskip("triton", reason="its package holds the disassembler")
        library = build / "lib" / "crate_kernels" / "_cuda.so"
        rows = cuda_report.rows(library, ["sm_90"])  # sm_80 has the same loops
        assert len(rows) == 2 * 7 * 2 * 2 + 4 + 3 + 1
        assert not [fault for row in rows for fault in compile_report.faults(row)]
        allowed = json.loads((Path(__file__).parent / "budget.json").read_text())
        assert not compile_report.over_budget(rows, allowed, cuda_report.version(library))
        # Two heads of CRATE-B/16 fit a multiprocessor.
        (head,) = (r for r in rows if (r["kernel"], r["case"]) == ("attention_forward", "bfloat16 p=64 N=197"))
        assert (head["num_warps"], head["shared"], head["blocks"]) == (7, 62784, 2)

    def test_it_needs_neither_torch_nor_python(self, build):
        library = build / "lib" / "crate_kernels" / "_cuda.so"
        symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
        assert not re.search(r" U .*(torch|c10|Py|cuda[A-Z]|cublas)", symbols)
        assert set(re.findall(r" T (\w+)", symbols)) == {
            f"crate_cuda_{name}" for name in ("interface", *cuda_kernels.FUNCTIONS)
        }

    def test_it_loads_and_knows_its_shapes(self, build):
        path = build / "lib" / "crate_kernels" / "_cuda.so"
        library = libraries.open_library(path, "cuda", cuda_kernels.INTERFACE, cuda_kernels.FUNCTIONS)
        assert [library.crate_cuda_attention_shared_bytes(backward, 64, 197) for backward in (0, 1)] == [62784, 88192]
        assert library.crate_cuda_attention_shared_bytes(0, 64, 273) == 0
        assert library.crate_cuda_attention_forward(*4 * [None], 64, 64, 64, 1, 4, 1, 24, 0, 0.1, False, None) == 1
        assert b"no kernel was built" in library.crate_cuda_error()
