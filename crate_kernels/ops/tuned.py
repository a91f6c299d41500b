"""The fastest backend on this device, as ``crate-kernels tune`` measured it and stored it in the user's cache folder.

A record of backends holds for calls with the same operator, dtype, causality and size (N for the attention operators, d
for the others), and with half to twice the measured number of rows. A record of launch options holds for launches of
the same Triton kernel and dtype with rows of the same width. It holds for the same number of rows or, in a matrix
product and in decoding, for half to twice as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import user_cache

FILE = "tune"
LAUNCHES = "launches"
"""The file of launch options."""
SIMILAR = ("product", "decoding")
"""Kernels whose options do not depend on the exact number of rows."""


def ranking(
    device: torch.device, operator: str, dtype: str, causal: bool, size: int, rows: int
) -> tuple[str, ...] | None:
    """The backends for such a call, fastest first; None without a measurement."""
    load(device.type, device.index)
    for record in _loaded[device.type, device.index]:
        same = (record["operator"], record["dtype"], record["causal"], record["size"])
        if same == (operator, dtype, causal, size) and record["rows"] <= 2 * rows and rows <= 2 * record["rows"]:
            return tuple(record["order"])
    return None


def launch_options(
    device: torch.device, kernel: str, dtype: torch.dtype, rows: int, width: int
) -> dict[str, Any] | None:
    """The fastest launch options of a Triton kernel for such operands; None without a measurement."""
    place = device.type, device.index
    if place not in _launches:
        exist = (user_cache.folder() / f"{LAUNCHES}.json").exists() and device.type != "meta"
        _launches[place] = tuple(records(device, LAUNCHES)) if exist else ()
    for record in _launches[place]:
        if (record["kernel"], record["dtype"], record["width"]) != (kernel, str(dtype).removeprefix("torch."), width):
            continue
        near = record["rows"] <= 2 * rows and rows <= 2 * record["rows"]
        if near if kernel in SIMILAR else record["rows"] == rows:
            return dict(record["options"])
    return None


def records(device: torch.device, file: str = FILE) -> list[dict[str, Any]]:
    """The stored records for the device and for the installed versions."""
    found = user_cache.read(file).get(user_cache.combination(device), [])
    return [record for record in found if isinstance(record, dict)]


KEYS = {FILE: ("operator", "dtype", "causal", "size", "rows"), LAUNCHES: ("kernel", "dtype", "rows", "width")}
"""File -> the fields that identify a record."""


def store(device: torch.device, found: list[dict[str, Any]], file: str = FILE) -> None:
    """Add records. They replace earlier records of the same call. All later calls use them."""

    def key(record: Mapping[str, Any]) -> tuple:
        return tuple(record[name] for name in KEYS[file])

    merged = {key(record): record for record in [*records(device, file), *found]}
    content = user_cache.read(file)
    content[user_cache.combination(device)] = list(merged.values())
    user_cache.write(file, content)
    forget()


def clear(device: torch.device) -> int:
    """Delete the stored records of the device; return their number."""
    count = 0
    for file in KEYS:
        content = user_cache.read(file)
        count += len(content.pop(user_cache.combination(device), []))
        user_cache.write(file, content)
    forget()
    return count


def forget() -> None:
    """Read the files again at the next call."""
    _loaded.clear()
    _launches.clear()


_loaded: dict[tuple[str, int | None], tuple[dict[str, Any], ...]] = {}
"""The records of each device, read once per process, because a call must not wait for a file."""
_launches: dict[tuple[str, int | None], tuple[dict[str, Any], ...]] = {}
"""The same for launch options."""


@torch.compiler.assume_constant_result
def load(kind: str, index: int | None) -> bool:
    """Read the records of a device if this has not happened yet. In a traced call this function runs during tracing."""
    if (kind, index) not in _loaded:
        exist = (user_cache.folder() / f"{FILE}.json").exists()
        _loaded[kind, index] = (
            tuple(records(torch.device(kind if index is None else f"{kind}:{index}"))) if exist else ()
        )
    return True
