"""``setup.py``: with nvcc it builds an extension that loads, registers its operators and spills nothing; without, the
package installs in pure Python and says so."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")


def setup(build: Path, **environment):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        build / "lib",
        "--build-temp",
        build / "temp",
    ]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def without_nvcc(tmp_path) -> dict[str, str]:
    return {"PATH": str(tmp_path), "CUDA_HOME": "", "CUDA_PATH": ""}


def test_without_nvcc_the_install_succeeds_and_says_so(tmp_path):
    done = setup(tmp_path, **without_nvcc(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "nvcc is not on the PATH" in done.stderr
    assert "pure Python" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_nvcc_a_forced_build_fails_with_the_reason(tmp_path):
    done = setup(tmp_path, CRATE_KERNELS_FORCE_BUILD="1", **without_nvcc(tmp_path))
    assert done.returncode != 0
    assert "cannot be built: nvcc is not on the PATH" in done.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    # The largest part of CI's time on this backend: both architectures in one build.
    build = tmp_path_factory.mktemp("extension")
    done = setup(build, CRATE_KERNELS_FORCE_BUILD="1", TORCH_CUDA_ARCH_LIST="8.0;9.0", MAX_JOBS="2")
    assert done.returncode == 0, done.stderr
    return build


@pytest.mark.skipif(NVCC is None or torch.version.cuda is None, reason="needs nvcc and a torch built with CUDA")
class TestWithNvcc:
    def test_an_unreadable_architecture_is_named(self, tmp_path):
        done = setup(tmp_path, CRATE_KERNELS_FORCE_BUILD="1", TORCH_CUDA_ARCH_LIST="hopper")
        assert done.returncode != 0
        assert "cannot read 'hopper'" in done.stderr

    def test_no_kernel_spills(self, build):
        kernels = 0
        for log in (build / "temp").rglob("*.log"):
            for stack, stores, loads in re.findall(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log.read_text()
            ):
                kernels += 1
                assert (stack, stores, loads) == ("0", "0", "0"), log.read_text()
        # Two directions, seven widths, two formats, two sizes; two LayerNorm kernels in two formats; one reduction.
        assert kernels == 2 * (2 * 7 * 2 * 2 + 2 * 2 + 1)

    def test_it_loads_and_registers_its_operators(self, build):
        # In a process of its own, beside the package's sources, as an installed package would have it.
        extension = next((build / "lib").rglob("_C*.so"))
        program = f"""
import importlib.util, sys, torch
from crate_kernels.ops import cuda_kernels
spec = importlib.util.spec_from_file_location("crate_kernels._C", {str(extension)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.architectures == "sm_80 sm_90", module.architectures
assert module.torch_target == "2.11"
operators = torch.ops.crate_cuda
from tests.cuda.library import schemas
for schema in schemas():
    name = schema.split("(")[0]
    assert str(getattr(operators, name).default._schema) == "crate_cuda::" + schema, name
assert operators.attention_shared_bytes(False, True, 64, 197) == 62784
assert operators.attention_shared_bytes(True, True, 64, 273) == 0
for name in ("attention_forward", "attention_backward", "layer_norm_forward", "layer_norm_backward", "product"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("crate_cuda::" + name, "CUDA"), name
"""
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
