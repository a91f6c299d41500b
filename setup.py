"""The CUDA extension. Everything else about the package is in pyproject.toml.

Without nvcc the package installs in pure Python and says so. ``CRATE_KERNELS_FORCE_BUILD=1`` makes that an error,
``CRATE_KERNELS_SKIP_CUDA=1`` does not even look. ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS`` and ``NVCC_THREADS`` are
honoured as in torch's own extensions. Whether a GPU is present is never asked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
TORCH_TARGET = (2, 11)  # the stable ABI the extension asks for: the oldest torch it runs with
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


class Missing(Exception):
    """Why the extension cannot be built."""


class Toolchain:
    """nvcc, torch's headers and libraries, and cuBLASLt; ``Missing`` names the first that is not there."""

    def __init__(self):
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        self.nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
        if self.nvcc is None:
            raise Missing("nvcc is not on the PATH and CUDA_HOME is not set")
        found = re.search(
            r"release (\d+)\.(\d+)", subprocess.run([self.nvcc, "--version"], capture_output=True, text=True).stdout
        )
        if found is None:
            raise Missing(f"{self.nvcc} --version names no release")
        self.version = tuple(map(int, found.groups()))
        try:
            import torch
        except ImportError:
            raise Missing("torch is not importable here: install with --no-build-isolation") from None
        if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_TARGET:
            raise Missing(f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_TARGET))}")
        if torch.version.cuda is None:
            raise Missing("this torch is built without CUDA")
        if int(torch.version.cuda.split(".")[0]) != self.version[0]:
            raise Missing(
                f"nvcc {'.'.join(map(str, self.version))} and torch's CUDA {torch.version.cuda} differ in major version"
            )
        self.torch = Path(torch.__file__).parent
        # cuBLASLt comes with the CUDA toolkit, or with the wheel torch depends on.
        toolkit = Path(self.nvcc).resolve().parents[1]
        wheel = self.torch.parent / "nvidia" / f"cu{self.version[0]}"
        roots = [toolkit, *([Path(home)] if home else []), wheel, Path("/usr/local/cuda")]
        self.cublas = next((r for r in roots if (r / "include" / "cublasLt.h").exists()), None)
        if self.cublas is None:
            raise Missing(f"cublasLt.h is in none of {', '.join(str(r / 'include') for r in roots)}")
        libraries = [r / lib for r in (self.cublas, wheel, *roots) for lib in ("lib64", "lib")]
        pattern = f"libcublasLt.so.{self.version[0]}"
        self.cublas_library = next((d / pattern for d in libraries if (d / pattern).exists()), None)
        if self.cublas_library is None:
            raise Missing(f"{pattern} was not found beside {self.cublas / 'include' / 'cublasLt.h'}")


def architectures() -> list[tuple[str, bool]]:
    """``TORCH_CUDA_ARCH_LIST`` as [("90", with PTX), ...]."""
    names = (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES).replace(" ", ";").split(";")
    found = []
    for name in filter(None, names):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if match is None:
            raise Missing(f"TORCH_CUDA_ARCH_LIST: cannot read {name!r}; expected entries such as 8.0 or 9.0+PTX")
        major, minor, suffix, ptx = match.groups()
        if int(major) >= 8:  # the kernels need what sm_80 introduced
            found.append((f"{major}{minor}{suffix}", ptx is not None))
    if not found:
        raise Missing("TORCH_CUDA_ARCH_LIST names no architecture of compute capability 8.0 or more")
    return found


class BuildCuda(build_ext):
    """Compiles ``csrc/cuda`` with nvcc, a few sources at a time, and links ``crate_kernels._C``."""

    def run(self):
        if enabled("CRATE_KERNELS_SKIP_CUDA"):
            print("crate_kernels: CRATE_KERNELS_SKIP_CUDA is set; installing in pure Python")
            return
        try:
            self.toolchain, self.architectures = Toolchain(), architectures()
        except Missing as reason:
            if enabled("CRATE_KERNELS_FORCE_BUILD"):
                raise SystemExit(f"crate_kernels: the CUDA extension cannot be built: {reason}") from None
            print(f"crate_kernels: {reason}; installing in pure Python, without the CUDA backend", file=sys.stderr)
            return
        super().run()

    def build_extension(self, extension: Extension):
        tools = self.toolchain
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)

        flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xptxas=-v", "-DUSE_CUDA"]
        flags += [f"--threads={os.environ.get('NVCC_THREADS', '1')}"]
        flags += [f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"]
        flags += [f'-DCRATE_TORCH_TARGET="{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"']
        flags += [f'-DCRATE_CUDA_VERSION="{tools.version[0]}.{tools.version[1]}"']
        built = [f"sm_{a}" for a, _ in self.architectures] + [f"compute_{a}" for a, ptx in self.architectures if ptx]
        flags += [f'-DCRATE_ARCHITECTURES="{" ".join(built)}"']
        flags += [f"-I{d}" for d in (SOURCES, SOURCES / "include")]
        # After nvcc's own headers, so that a wheel's CUDA headers of another minor version do not displace them.
        system = (tools.torch / "include", tools.cublas / "include", sysconfig.get_path("include"))
        flags += [f"-isystem={d}" for d in system]
        codes = []
        for name, ptx in self.architectures:
            codes += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
            if ptx:
                codes += ["-gencode", f"arch=compute_{name},code=compute_{name}"]

        def compile_source(source: str) -> Path:
            out = objects / f"{Path(source).name}.o"
            command = [tools.nvcc, *flags, *codes, "-c", source, "-o", str(out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            (objects / f"{Path(source).name}.log").write_text(done.stdout)  # what ptxas says of every kernel
            if done.returncode:
                raise SystemExit(f"crate_kernels: {' '.join(command)}\n{done.stdout}")
            return out

        with ThreadPoolExecutor(
            int(os.environ.get("MAX_JOBS") or min(len(extension.sources), os.cpu_count() or 1))
        ) as pool:
            compiled = list(pool.map(compile_source, extension.sources))
        libraries = [f"-L{tools.torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-lc10"]
        libraries += [f"-L{tools.cublas_library.parent}", f"-Xlinker=-l:{tools.cublas_library.name}"]
        subprocess.run(
            [tools.nvcc, "-shared", "-cudart=shared", *map(str, compiled), *libraries, "-o", str(target)], check=True
        )


setup(
    ext_modules=[
        Extension("crate_kernels._C", sorted(map(str, [*SOURCES.glob("cuda/*.cu"), *SOURCES.glob("cuda/*.cpp")])))
    ],
    cmdclass={"build_ext": BuildCuda},
)
