"""Which backend was fastest on this device: what ``crate-kernels tune`` measured and the user's cache folder holds.

A record holds for calls of the same operator, dtype and order of tokens (causal or not), with the same size (N for the
attention operators, d for the others), and with half to twice as many rows as were measured.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from .. import user_cache

FILE = "tune"


def ranking(
    device: torch.device, operator: str, dtype: str, causal: bool, size: int, rows: int
) -> tuple[str, ...] | None:
    """The backends for such a call, fastest first; None if nobody measured one."""
    for record in _records(device):
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
    _records.cache_clear()


def clear(device: torch.device) -> int:
    """Forget what is stored for the device; returns the number of records."""
    content = user_cache.read(FILE)
    count = len(content.pop(user_cache.combination(device), []))
    user_cache.write(FILE, content)
    _records.cache_clear()
    return count


@functools.cache
def _records(device: torch.device) -> tuple[dict[str, Any], ...]:
    """Read once in a process: a call must not wait for a file."""
    return tuple(records(device)) if (user_cache.folder() / f"{FILE}.json").exists() else ()
