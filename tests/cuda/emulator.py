"""Builds the SIMT emulator with the host compiler and calls its kernels on torch tensors.

Objects are kept in ``build/simt``, named by a hash of what they were made from, so that a second run builds nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "simt"
UNITS = ("machine", "matrix_product", "layer_norm", "attention_forward", "attention_backward")
SHARED_WITH_CUDA = ("interface",)
UNOPTIMIZED = ("python", "probes")
"""Units without a kernel of the project, compiled once for all builds. They are linked last: of an inline function that
several units hold, the linker takes the first."""
SANITIZE = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def missing() -> str | None:
    """Why the emulator cannot be built here; None if it can."""
    if shutil.which(compiler()) is None:
        return f"no host compiler: {compiler()} is not on the PATH"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def closure(source: Path, roots: tuple[Path, ...]) -> list[Path]:
    """``source`` and every file of the project that it includes, directly or not."""
    found, waiting = {}, [source]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found[file] = None
        for name in re.findall(r'^#include "([^"]+)"', file.read_text(), re.MULTILINE):
            waiting += [root / name for root in roots if (root / name).exists()]
    return sorted(found)


def build(flags: tuple[str, ...] = ("-O2",), sources: Path = SOURCES) -> Path:
    """Compile ``csrc/simt``, its attention from ``sources``, and return the path of the module.

    It is a Python module, and has the C interface of the CUDA library as well.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes that run tests, one builds
        return _build(flags, sources)


def _build(flags: tuple[str, ...], sources: Path) -> Path:
    import pybind11

    options = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-missing-field-initializers"]
    options += ["-Werror"]
    python = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]

    def compile_unit(unit: str) -> Path:
        root = sources if unit.startswith("attention") else SOURCES
        roots = root, root / "include"
        source = root / ("cuda" if unit in SHARED_WITH_CUDA else "simt") / f"{unit}.cpp"
        command = [compiler(), *options, *(("-O0",) if unit in UNOPTIMIZED else flags)]
        key = hashlib.sha256(" ".join([*command, sys.implementation.cache_tag]).encode())
        for file in closure(source, roots):
            key.update(file.read_bytes())
        out = BUILD / f"{unit}-{key.hexdigest()[:16]}.o"
        if not out.exists():
            partial = out.with_suffix(f".{os.getpid()}.o")
            includes = [*(f"-I{folder}" for folder in roots), *python]
            subprocess.run([*command, *includes, "-c", source, "-o", partial], check=True)
            partial.rename(out)
        return out

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
        objects = list(pool.map(compile_unit, UNITS + SHARED_WITH_CUDA + UNOPTIMIZED))
    name = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16]
    module = BUILD / name / f"crate_simt{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        partial = module.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler(), "-shared", *flags, *objects, "-o", partial], check=True)
        partial.rename(module)
    return module


def in_bfloat16(folder: Path, widths: tuple[int, ...] = ()) -> Path:
    """A copy of the sources in ``folder`` whose attention is built for bfloat16 alone, and for few widths if given."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    dispatch = sources / "include" / "crate" / "dispatch.h"
    lines = dispatch.read_text().splitlines()
    kept = [n for n in lines if not widths or "case " not in n or any(f"case {width}:" in n for width in widths)]
    text = "\n".join(kept) + "\n"
    assert text.count("by_width.template operator()<fp16>()") == 1
    dispatch.write_text(text.replace("by_width.template operator()<fp16>()", "false"))
    return sources


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("crate_simt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(tensor: Tensor):
    """A 16-bit tensor as numpy sees it; shares its memory."""
    return tensor.contiguous().view(torch.int16).numpy()


def elements(tensor: Tensor | None):
    """A contiguous 16-bit or float32 tensor as numpy sees it; shares its memory."""
    return tensor if tensor is None else tensor.numpy() if tensor.dtype == torch.float32 else words(tensor)


class Kernels:
    """The kernels of one build of the emulator, on torch tensors. Outputs are poisoned before a kernel runs."""

    def __init__(self, module: ModuleType):
        self.module = module

    def attention(self, w, lengths=None, *, scale=None, causal=False, **options):
        """-> o, lse, counters"""
        batch, tokens, heads, width = w.shape
        o = torch.full(w.shape, torch.nan, dtype=w.dtype)
        lse = torch.full((batch, heads, tokens), torch.nan)
        counters = self.module.attention_forward(
            str(w.dtype).removeprefix("torch."), words(w), words(o), lse.numpy(),
            None if lengths is None else lengths.to(torch.int32).numpy(),
            width**-0.5 if scale is None else scale, causal, self.module.Options(**options),
        )  # fmt: skip
        return o, lse, counters

    def attention_backward(self, grad, w, o, lse, lengths=None, *, scale=None, causal=False, **options):
        """-> dw, counters"""
        dw = torch.full(w.shape, torch.nan, dtype=w.dtype)
        counters = self.module.attention_backward(
            str(w.dtype).removeprefix("torch."), words(w), words(grad), words(o), lse.numpy(), words(dw),
            None if lengths is None else lengths.to(torch.int32).numpy(),
            w.shape[-1] ** -0.5 if scale is None else scale, causal, self.module.Options(**options),
        )  # fmt: skip
        return dw, counters
