"""What the package remembers about a user's devices between runs: small JSON files in the user's cache folder.

``CRATE_KERNELS_CACHE`` names the folder; without it, it is ``crate_kernels`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from .version import __version__

ENVIRONMENT_VARIABLE = "CRATE_KERNELS_CACHE"


def folder() -> Path:
    """The folder; it need not exist."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crate_kernels"


@functools.cache
def combination(device: torch.device) -> str:
    """What a result on ``device`` holds for: device, driver, torch, Triton, and the package with its kernels."""
    if device.type == "cuda":
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
        hardware = f"{torch.cuda.get_device_name(device)}, driver {driver}"
    else:
        hardware = device.type
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    package = f"crate_kernels {__version__} ({_kernels()})"
    return f"{hardware}; torch {torch.__version__}; triton {triton}; {package}"


@functools.cache
def _kernels() -> str:
    """A short digest of everything that computes: a development install changes it without changing its version."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted([*package.glob("_*.so"), *(package / "ops").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read(name: str) -> dict[str, Any]:
    """The content of ``name.json``; empty if there is none, or none that can be read."""
    try:
        content = json.loads((folder() / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(name: str, content: dict[str, Any]) -> None:
    """Replace ``name.json`` in one step. A folder that cannot be written is no error: nothing is remembered then."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder(), prefix=f"{name}.")
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, folder() / f"{name}.json")
