"""Tile sizes and launch options of the Triton kernels: a short table per kernel, one row per class of shapes.

A row of a table is chosen if elements are no larger than its ``size``, operand rows are no wider than its ``width``,
there are at least ``rows`` rows, and a program may use at least ``shared`` bytes of shared memory. The first such row
counts. Nothing is measured at import or at run time. Results of ``crate-kernels tune`` on this device replace a row.
``override`` (or the environment variable, as JSON) replaces single options for experiments::

    CRATE_KERNELS_TRITON='{"attention_forward": {"BLOCK_M": 128, "num_warps": 8}}'
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

from .. import tuned
from . import launch

ENVIRONMENT_VARIABLE = "CRATE_KERNELS_TRITON"

ANY = 1 << 30
AMD, CONSUMER, AMPERE, HOPPER = 0, 96 * 1024, 160 * 1024, 200 * 1024
"""Shared memory: A100 has 163 KiB, Hopper and data-center Blackwell 227, other NVIDIA GPUs 99, AMD GPUs 64.

NVIDIA GPUs get three stages. With two stages, each iteration would wait for the copy that the previous one has just
issued.
"""

ROWS = ((449, 128), (385, 64), (321, 128), (257, 64), (65, 128), (0, 64))
"""(tokens, rows of a tile): tiles of 128 rows halve the reads of ``w``. They are not used if half of the last tile were
padding."""


def _tiles(block_m: int, block_n: int, warps: int, stages: int, **more) -> dict:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages, **more}


def _attention(block_m: int, block_n: int, warps: int, stages: int, **more) -> dict:
    """Tiles of attention. CUT is the smallest width of the tile with the last tokens; BLOCK_N means that it is not cut.
    On Hopper a cut tile of 16 or 32 tokens is a ``wgmma`` with a short side, which no hardware has run yet.
    """
    return _tiles(block_m, block_n, warps, stages, CUT=16, **more)


# (size, width, rows, shared, options)
TABLE = {
    "attention_forward": (
        # wgmma takes at least 64 rows. Chained products with sides under 64 have been miscompiled, so narrow heads get
        # 32 rows, which mma.sync multiplies. The same holds for tf32 and for the backward.
        (2, 32, 0, HOPPER, _attention(32, 64, 4, 3)),
        # With up to 128 registers per thread a multiprocessor holds 16 warps, with up to 168 it holds 12. mma.sync
        # keeps
        # operands in registers: with 128 its loop would spill.
        *((2, 64, n, HOPPER, _attention(rows, 64, rows // 16, 3, maxnreg=128)) for n, rows in ROWS),
        (2, 64, 0, CONSUMER, _attention(64, 64, 4, 3, maxnreg=168)),
        *((2, 64, n, AMD, _attention(rows, 64, rows // 16, 2)) for n, rows in ROWS),
        (2, 128, 0, HOPPER, _attention(64, 64, 4, 3)),
        # At most as many columns as rows. Otherwise Triton splits mma.sync by columns, and each sum goes through
        # memory.
        (2, 128, 0, CONSUMER, _attention(128, 64, 8, 3)),
        (2, 128, 0, AMD, _attention(64, 64, 4, 2)),
        (2, 256, 0, CONSUMER, _attention(32, 32, 8, 3)),
        (2, 256, 0, AMD, _attention(32, 32, 8, 2)),
        (4, 64, 0, HOPPER, _attention(32, 32, 4, 3)),
        (4, 64, 0, CONSUMER, _attention(64, 32, 8, 3)),
        (4, 64, 0, AMD, _attention(64, 32, 8, 2)),
        (4, 256, 0, 0, _attention(32, 16, 8, 1)),
    ),
    "attention_delta": ((4, 256, 0, 0, {"BLOCK_M": 64, "num_warps": 4}),),
    "attention_backward": (
        (2, 32, 0, HOPPER, _attention(32, 32, 4, 3)),
        # Five products per tile: sides of at least 64, if there is enough memory (Hopper, Blackwell).
        (2, 64, 65, HOPPER, _attention(128, 64, 8, 3)),
        (2, 64, 0, HOPPER, _attention(64, 64, 4, 3)),
        # mma.sync keeps whole operand tiles in registers. More than 32 keys at a time would spill.
        (2, 64, 0, CONSUMER, _attention(64, 32, 4, 3)),
        (2, 64, 0, AMD, _attention(64, 32, 4, 2)),
        (2, 128, 65, HOPPER, _attention(128, 64, 8, 2)),  # three stages would spill
        (2, 128, 0, 0, _attention(32, 32, 4, 2)),
        (2, 256, 0, 0, _attention(32, 32, 8, 1)),
        (4, 64, 0, CONSUMER, _attention(32, 32, 8, 1)),
        (4, 64, 0, AMD, _attention(32, 32, 4, 1)),  # four warps have 512 registers a thread
        (4, 256, 0, 0, _attention(32, 16, 8, 1)),
    ),
    # Two programs per multiprocessor with three tiles in flight each hide the latency of memory.
    "decoding": (
        (2, 64, 0, CONSUMER, _tiles(0, 128, 4, 3)),
        (2, 128, 0, CONSUMER, _tiles(0, 64, 4, 3)),
        (4, 64, 0, CONSUMER, _tiles(0, 64, 4, 3)),
        (4, 128, 0, 0, _tiles(0, 32, 4, 2)),
        (4, 256, 0, 0, _tiles(0, 16, 4, 2)),
    ),
    "fold_norm": ((4, ANY, 0, 0, {"BLOCK_K": 128, "BLOCK_N": 16, "num_warps": 4}),),
    "product": (
        # The largest tile whose epilogues fit the registers. A wider tile (256 columns) spills.
        (2, ANY, 4096, AMPERE, _tiles(128, 128, 8, 3, BLOCK_K=64)),
        (2, ANY, 4096, 0, _tiles(128, 128, 8, 3, BLOCK_K=32)),
        # Few rows get more programs with fewer rounds each, because nothing else hides the latency of a round.
        (2, ANY, 0, HOPPER, _tiles(64, 64, 4, 3, BLOCK_K=128)),
        (2, ANY, 0, CONSUMER, _tiles(64, 64, 4, 3, BLOCK_K=64)),
        (2, ANY, 0, AMD, _tiles(64, 64, 4, 3, BLOCK_K=32)),
        # Float32 without tensor cores.
        (4, ANY, 0, 0, _tiles(64, 64, 4, 2, BLOCK_K=32)),
    ),
}

_overrides: dict[str, dict] = json.loads(os.environ.get(ENVIRONMENT_VARIABLE) or "{}")
_trial: tuple[tuple[str, str], ...] = ()
"""(kernel, options as JSON) with which ``trial`` replaces those of the table."""
_asked: set[tuple[str, torch.dtype, int, int]] | None = None
"""The set in which ``asked`` collects the calls of ``configuration``."""


_Function = TypeVar("_Function", bound=Callable)
_caches: list = []


def once(function: _Function) -> _Function:
    """Decorate a function of a kind of launch. Its result is cached for each kind, until ``override`` changes options.

    The caller must not change the result. The result contains everything that a launch needs beyond its tensors.
    """

    @functools.lru_cache(maxsize=512)
    def cached(trial, *arguments):
        return function(*arguments)

    @functools.wraps(function)
    def call(*arguments):
        return cached(_trial, *arguments)

    _caches.append(cached)
    return call


def forget() -> None:
    """Drop the results of all functions that :func:`once` decorates."""
    for cached in _caches:
        cached.cache_clear()


def configuration(kernel: str, device: torch.device, dtype: torch.dtype, rows: int, width: int) -> dict:
    """Launch options of ``kernel`` on ``device`` for an operand of ``rows`` rows of ``width`` elements of ``dtype``."""
    if _asked is not None:
        _asked.add((kernel, dtype, rows, width))
    tried = dict(_trial).get(kernel)
    options = tuned.launch_options(device, kernel, dtype, rows, width) if tried is None else json.loads(tried)
    return (options or shipped(kernel, device, dtype, rows, width)) | _overrides.get(kernel, {})


def shipped(kernel: str, device: torch.device, dtype: torch.dtype, rows: int, width: int) -> dict:
    """The options that the table has for such a launch."""
    size, memory = dtype.itemsize, launch.shared_memory(device)
    for most_size, most_width, least_rows, least_memory, options in TABLE[kernel]:
        if size <= most_size and width <= most_width and rows >= least_rows and memory >= least_memory:
            return dict(options)
    raise AssertionError(f"no configuration of {kernel} for {rows} rows of {width} elements of {size} bytes")


def candidates(kernel: str, device: torch.device, dtype: torch.dtype, rows: int, width: int) -> list[dict]:
    """The options to try for such a launch: all options in the table for such operands on any device, the shipped ones
    first, and variants of these with one stage more or less and with half or twice the warps."""
    first = shipped(kernel, device, dtype, rows, width)
    found = [first]
    for most_size, most_width, _, _, options in TABLE[kernel]:
        if dtype.itemsize <= most_size and width <= most_width:
            found.append(options)
    if "num_stages" in first:
        found += [first | {"num_stages": n} for n in (first["num_stages"] - 1, first["num_stages"] + 1) if n > 0]
    if "num_warps" in first:
        found += [first | {"num_warps": n} for n in (first["num_warps"] // 2, 2 * first["num_warps"]) if n > 0]
    return [options for index, options in enumerate(found) if options not in found[:index]]


@contextlib.contextmanager
def trial(options: Mapping[str, dict]) -> Iterator[None]:
    """Inside, some kernels have these launch options, instead of those of the table and the user's cache.

    Results of :func:`once` that were computed with the same options stay cached.
    """
    global _trial
    previous, _trial = _trial, tuple((kernel, json.dumps(chosen)) for kernel, chosen in options.items())
    try:
        yield
    finally:
        _trial = previous


@contextlib.contextmanager
def asked() -> Iterator[set[tuple[str, torch.dtype, int, int]]]:
    """Collect (kernel, dtype, rows, width) of all launches whose options are looked up inside."""
    global _asked
    forget()
    previous, _asked = _asked, set()
    try:
        yield _asked
    finally:
        _asked = previous


@contextlib.contextmanager
def override(kernel: str, **options) -> Iterator[None]:
    """Replace launch options of ``kernel`` inside the ``with`` block."""
    if kernel not in TABLE:
        raise ValueError(f"unknown kernel {kernel!r}; accepted are {', '.join(TABLE)}")
    previous = _overrides.get(kernel)
    _overrides[kernel] = (previous or {}) | options
    forget()
    try:
        yield
    finally:
        if previous is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = previous
        forget()
