"""A report of versions, and of the backends that can run here or why not: ``python -m crate_kernels.collect_env``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys

import torch

from . import ops
from .ops import backends, cpu_kernels, libraries
from .ops.products import FASTER_WITH_ONEDNN
from .ops.subspace_attention import cached
from .terminal import count
from .version import __version__


def example_inputs(operator: str, device: torch.device, dtype: torch.dtype) -> tuple:
    """Small example inputs for an operator's ``why_not``."""
    d, heads = 128, 2
    matrix, vector = torch.empty(d, d, device=device, dtype=dtype), torch.empty(d, device=device, dtype=dtype)
    tokens = torch.empty(1, 16, d, device=device, dtype=dtype)
    return {
        "subspace_attention": (tokens.unflatten(-1, (heads, -1)), None, None, 0.125, False),
        "subspace_cross_attention": (tokens.unflatten(-1, (heads, -1)), tokens.unflatten(-1, (heads, -1)), None),
        "ista_step": (tokens[0], matrix),
        "overcomplete_ista": (tokens[0], torch.cat([matrix] * 4, dim=1), None),
        "mssa_block": (tokens, vector, vector, matrix, matrix, vector, None, heads, 0.125, False, 1.0, 1e-5),
        "ista_block": (tokens[0], vector, vector, matrix),
        "crate_layer": (
            tokens, vector, vector, matrix, matrix, vector, vector, vector, matrix, None, None,
            heads, 0.125, False, 1.0, 0.1, 0.1, 1e-5, 1e-5,
        ),
    }[operator]  # fmt: skip


def backend_report(device: torch.device | None = None) -> dict[str, dict[str, str]]:
    """Operator -> backend -> ``"yes"`` or the reason why not, for a bfloat16 call on ``device`` (CUDA if available)."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        operator: {
            backend: backends.why_not(
                importlib.import_module(f"{ops.__name__}.{operator}.op").operator.implementations,
                backend,
                *example_inputs(operator, device, torch.bfloat16),
            )
            or "yes"
            for backend in backends.BACKENDS
        }
        for operator in (*ops.OPERATORS, "subspace_cross_attention")
    }
    return found | {"cached_subspace_attention": _cached_report(device, torch.bfloat16)}


def _cached_report(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The same for ``cached_subspace_attention``, which is Triton's kernel or stock PyTorch."""
    reason = "the package triton is not installed"
    if cached.TRITON:
        from .ops.triton_kernels.decoding import why_not

        w = torch.empty(1, 1, 2, 64, device=device, dtype=dtype)
        reason = why_not(w, w) or "yes"
    own = {"eager": "yes", "triton": reason}
    return {backend: own.get(backend, "runs eager instead") for backend in backends.BACKENDS}


def report() -> str:
    """The whole report as text."""
    versions = {"crate_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "timm", "torchvision", "safetensors", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    lines = [f"{name:14} {version}" for name, version in versions.items()]
    machine = f"{count(os.cpu_count() or 1, 'core')}, {count(torch.get_num_threads(), 'thread')}"
    lines.append(f"{'platform':14} {platform.platform()}, {machine}")
    library = "oneDNN" if FASTER_WITH_ONEDNN else "torch's own choice"
    lines.append(f"{'CPU products':14} float32 from {library} ({torch.backends.cpu.get_cpu_capability()})")
    lines.append(f"{'CUDA':14} torch built for {torch.version.cuda or 'none'}; " + _devices())
    lines.extend(f"{f'{name} library':14} {text}" for name, text in libraries.report().items())
    lines.append(f"{'cpu kernels':14} {cpu_kernels.MISSING or f'run with {cpu_kernels.ISA}'}")
    lines.append(f"{'requested':14} {backends.requested_backend() or 'automatic choice'}")
    for operator, reasons in backend_report().items():
        lines.append(f"\n{operator}")
        lines.extend(f"  {backend:10} {reason}" for backend, reason in reasons.items())
    return "\n".join(lines)


def _devices() -> str:
    if not torch.cuda.is_available():
        return "no device visible"
    return ", ".join(
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand ``crate-kernels info`` takes no arguments."""


def run(args: argparse.Namespace | None = None) -> int:
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(run())
