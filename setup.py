"""Builds the compiled libraries through ``csrc/CMakeLists.txt``. Everything else is in pyproject.toml.

``_cpu.so`` needs a C++ compiler. ``_cuda.so`` also needs nvcc. Without these the package still installs, and
``crate_kernels/_build.json`` records the reason. ``CRATE_KERNELS_FORCE_BUILD=1`` makes a missing library an error.
``CRATE_KERNELS_SKIP_CPU=1`` and ``CRATE_KERNELS_SKIP_CUDA=1`` leave a library out. ``CXX``, ``CUDA_HOME``,
``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS`` and ``NVCC_THREADS`` have the same meaning as for torch's extensions.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit("crate_kernels needs setuptools 77 or newer: upgrade it, or install without --no-build-isolation")

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARIES = [name for name in ("cpu", "cuda") if Path("csrc", name).exists()]
variable = os.environ.get


class Missing(Exception):
    """The reason why a library cannot be built."""


def tool(name: str, *candidates: str | None) -> str:
    found = next(filter(None, map(shutil.which, filter(None, candidates))), None)
    if found is None:
        raise Missing(f"{name} was not found")
    return found


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, file=sys.stderr if done.returncode else sys.stdout)
    if done.returncode:
        error = re.search(r"(?i).*(error|fatal).*(\n+ .*)?", done.stdout)  # CMake prints the text in the next line
        raise Missing(f"the build failed: {' '.join((error[0] if error else str(command[0])).split())}")


class BuildLibraries(build_ext):
    def run(self):
        if not re.fullmatch(r"(\d+\.\d[af]?(\+PTX)?[ ;]*)+", listed := variable("TORCH_CUDA_ARCH_LIST") or "8.0"):
            sys.exit(f"crate_kernels: TORCH_CUDA_ARCH_LIST: cannot read {listed!r}; write it as in '8.0;9.0+PTX'")
        package = Path("." if self.inplace else self.build_lib, "crate_kernels")
        package.mkdir(parents=True, exist_ok=True)
        record = {name: self.library(name, package / f"_{name}.so") for name in LIBRARIES}
        (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def library(self, name: str, target: Path) -> dict:
        """Build ``target``. Return what it was built for, or the reason why it was not built."""
        target.unlink(missing_ok=True)
        if variable(skip := f"CRATE_KERNELS_SKIP_{name.upper()}", "0") not in ("", "0"):
            return {"missing": f"{skip} was set"}
        try:
            options = {"CRATE_LIBRARY": name, "CRATE_SITE_PACKAGES": sysconfig.get_path("purelib")}
            if name == "cuda":
                home = variable("CUDA_HOME") or variable("CUDA_PATH") or ""
                options["CMAKE_CUDA_COMPILER"] = tool("nvcc", variable("CUDACXX"), f"{home}/bin/nvcc", "nvcc")
            tool("a C++ compiler", variable("CXX"), "c++", "g++", "clang++")
            options["CMAKE_MAKE_PROGRAM"] = tool("ninja", "ninja")
            cmake, folder = tool("cmake", "cmake"), Path("build/csrc" if self.inplace else self.build_temp, name)
            run(cmake, "-S", "csrc", "-B", folder, "-GNinja", *(f"-D{k}={v}" for k, v in options.items()))
            run(cmake, "--build", folder, "--parallel", variable("MAX_JOBS") or str(os.cpu_count() or 1))
        except Missing as reason:
            if variable("CRATE_KERNELS_FORCE_BUILD", "0") not in ("", "0"):
                sys.exit(f"crate_kernels: the {name} library cannot be built: {reason}")
            print(f"crate_kernels: {reason}; installing without the {name} library", file=sys.stderr)
            return {"missing": str(reason)}
        shutil.copy(folder / target.name, target)
        return json.loads((folder / "record.json").read_text())


class Wheel(bdist_wheel):
    """One wheel for every Python, because the libraries do not use Python."""

    def run(self):
        built = Path(self.get_finalized_command("build").build_lib)
        shutil.rmtree(built, ignore_errors=True)  # otherwise the wheel would contain files of an earlier build
        self.run_command("build")
        self.root_is_pure = not list(built.glob("crate_kernels/_*.so"))
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setuptools.setup(
    ext_modules=[setuptools.Extension(f"crate_kernels._{name}", [], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
