"""Which backend was fastest on this device: what ``crate-kernels tune`` measured and the user's cache folder holds.

A record holds for calls of the same operator, dtype and order of tokens (causal or not), with the same size (N for the
attention operators, d for the others), and with half to twice as many rows as were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import user_cache

FILE = "tune"


def ranking(
    device: torch.device, operator: str, dtype: str, causal: bool, size: int, rows: int
) -> tuple[str, ...] | None:
    """The backends for such a call, fastest first; None if nobody measured one."""
    load(device.type, device.index)
    for record in _loaded[device.type, device.index]:
        same = (record["operator"], record["dtype"], record["causal"], record["size"])
        if same == (operator, dtype, causal, size) and record["rows"] <= 2 * rows and rows <= 2 * record["rows"]:
            return tuple(record["order"])
    return None


def records(device: torch.device) -> list[dict[str, Any]]:
    """What is stored for the device, and for the versions at hand."""
    found = user_cache.read(FILE).get(user_cache.combination(device), [])
    return [record for record in found if isinstance(record, dict)]


def store(device: torch.device, found: list[dict[str, Any]]) -> None:
    """Add records; they replace those of the same call. Calls from now on follow them."""

    def key(record: Mapping[str, Any]) -> tuple:
        return tuple(record[name] for name in ("operator", "dtype", "causal", "size", "rows"))

    merged = {key(record): record for record in [*records(device), *found]}
    content = user_cache.read(FILE)
    content[user_cache.combination(device)] = list(merged.values())
    user_cache.write(FILE, content)
    _loaded.clear()


def clear(device: torch.device) -> int:
    """Forget what is stored for the device; returns the number of records."""
    content = user_cache.read(FILE)
    count = len(content.pop(user_cache.combination(device), []))
    user_cache.write(FILE, content)
    _loaded.clear()
    return count


_loaded: dict[tuple[str, int | None], tuple[dict[str, Any], ...]] = {}
"""The records of each device, read once in a process: a call must not wait for a file."""


@torch.compiler.assume_constant_result
def load(kind: str, index: int | None) -> bool:
    """Read the records of a device if nobody has. A traced call runs this function while it is traced."""
    if (kind, index) not in _loaded:
        exist = (user_cache.folder() / f"{FILE}.json").exists()
        _loaded[kind, index] = (
            tuple(records(torch.device(kind if index is None else f"{kind}:{index}"))) if exist else ()
        )
    return True
