"""The compiled libraries of the package: plain C interfaces, loaded with ctypes.

The build writes ``_cpu.so``, ``_cuda.so`` and ``_build.json`` into the package. The JSON file records for which targets
each library was built, or why it was not built. The libraries use no headers of torch or Python, so one build works
with every version of both.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
UNBUILT = "the package was not installed with `pip install`"


class Missing(Exception):
    """The reason why a library cannot be used, as one sentence for the user."""


def record() -> dict[str, dict]:
    """The record of the build, by library; ``{}`` if the package was never built.
    Each entry has ``missing`` (the reason, or None) and the targets of the build.
        Each entry holds ``missing`` (the reason, or None) and what the library was built for.
    """
    try:
        return json.loads((PACKAGE / "_build.json").read_text())
    except FileNotFoundError:
        return {}


def report() -> dict[str, str]:
    """Library -> one sentence: compiler, instruction sets or architectures, and why a part is missing."""
    built = record()
    if not built:
        return {name: f"not built: {UNBUILT}" for name in ("cpu", "cuda")}
    texts = {}
    for name, entry in built.items():
        if entry["missing"]:
            texts[name] = f"not built: {entry['missing']}"
            continue
        names = ", ".join(entry.get("instruction_sets") or entry["architectures"])
        left_out = [f"without {part}: {reason}" for part, reason in entry["left_out"].items()]
        texts[name] = "; ".join([f"built with {entry['compiler']} for {names}", *left_out])
    return texts


def load(name: str, interface: int, functions: dict[str, tuple]) -> ctypes.CDLL:
    """Open the library ``name`` and declare its ``functions``.

    ``functions`` maps a function's name without the prefix ``crate_<name>_`` to ``(result type, *argument types)``.
    Raises ``Missing`` if there is no library, or if its interface number differs from ``interface``.
    """
    path = PACKAGE / f"_{name}.so"
    if not path.exists():
        reason = record().get(name, {}).get("missing") or UNBUILT
        raise Missing(f"the {name} library was not built: {reason}")
    return open_library(path, name, interface, functions)


def open_library(path: Path, name: str, interface: int, functions: dict[str, tuple]) -> ctypes.CDLL:
    """Like ``load``, for a library at another path."""
    try:
        library = ctypes.CDLL(str(path))
        built = getattr(library, f"crate_{name}_interface")()
        if built != interface:
            raise Missing(f"{path} has interface {built}, the package needs {interface}: run `pip install` again")
        for function, (result, *arguments) in functions.items():
            symbol = getattr(library, f"crate_{name}_{function}")
            symbol.restype, symbol.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise Missing(f"the {name} library does not load: {error}") from None
    return library
