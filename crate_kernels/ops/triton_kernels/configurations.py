"""Tile sizes and launch options of the Triton kernels: a short table per kernel, one row per class of shapes.

A row is taken if elements are no larger than its ``size``, operand rows no wider than its ``width``, there are at least
``rows`` rows, and the device has at least ``shared`` bytes of shared memory for one program; the first such row wins.
Nothing is measured at import or at run time. What ``crate-kernels tune`` has measured on the device at hand replaces a
row. ``override`` (or the environment variable, as JSON) replaces single options for experiments::

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
"""Shared memory: A100 has 163 KiB, Hopper and data-center Blackwell 227, other NVIDIA parts 99, AMD 64.

NVIDIA parts get three stages: with two, the copy that one iteration issues is waited for at the start of the next.
"""

ROWS = ((449, 128), (385, 64), (321, 128), (257, 64), (65, 128), (0, 64))
"""(tokens, rows of a tile): tiles of 128 rows halve the reads of ``w``; not where half of the last would be padding."""


def _tiles(block_m: int, block_n: int, warps: int, stages: int, **more) -> dict:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages, **more}


def _attention(block_m: int, block_n: int, warps: int, stages: int, **more) -> dict:
    """Tiles of attention. CUT: the least width of the tile that holds the last tokens; BLOCK_N leaves it uncut.

    On Hopper a cut tile of 16 or 32 tokens is a ``wgmma`` with a short side, and no hardware has run it yet.
    """
    return _tiles(block_m, block_n, warps, stages, CUT=16, **more)


# (size, width, rows, shared, options)
TABLE = {
    "attention_forward": (
        # wgmma takes 64 rows at least; chained with sides under 64 it has been miscompiled, so narrow heads get
        # 32 rows, which mma.sync multiplies. The same holds for tf32 and in the backward.
        (2, 32, 0, HOPPER, _attention(32, 64, 4, 3)),
        # Up to 128 registers a thread leave room for 16 warps a multiprocessor, up to 168 for 12. mma.sync holds
        # operands in registers: with 128 its loop would spill.
        *((2, 64, n, HOPPER, _attention(rows, 64, rows // 16, 3, maxnreg=128)) for n, rows in ROWS),
        (2, 64, 0, CONSUMER, _attention(64, 64, 4, 3, maxnreg=168)),
        *((2, 64, n, AMD, _attention(rows, 64, rows // 16, 2)) for n, rows in ROWS),
        (2, 128, 0, HOPPER, _attention(64, 64, 4, 3)),
        # No more columns than rows, or Triton spreads the warps of mma.sync over columns and each sum over memory.
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
        # Five products a tile: every side of 64 or more where there is memory for it (Hopper, Blackwell).
        (2, 64, 65, HOPPER, _attention(128, 64, 8, 3)),
        (2, 64, 0, HOPPER, _attention(64, 64, 4, 3)),
        # mma.sync holds whole operand tiles in registers: 32 keys at a time, or they spill.
        (2, 64, 0, CONSUMER, _attention(64, 32, 4, 3)),
        (2, 64, 0, AMD, _attention(64, 32, 4, 2)),
        (2, 128, 65, HOPPER, _attention(128, 64, 8, 2)),  # a third stage would spill
        (2, 128, 0, 0, _attention(32, 32, 4, 2)),
        (2, 256, 0, 0, _attention(32, 32, 8, 1)),
        (4, 64, 0, CONSUMER, _attention(32, 32, 8, 1)),
        (4, 64, 0, AMD, _attention(32, 32, 4, 1)),  # four warps have 512 registers a thread
        (4, 256, 0, 0, _attention(32, 16, 8, 1)),
    ),
    # Two programs a multiprocessor, three tiles of each on their way, cover the latency of memory.
    "decoding": (
        (2, 64, 0, CONSUMER, _tiles(0, 128, 4, 3)),
        (2, 128, 0, CONSUMER, _tiles(0, 64, 4, 3)),
        (4, 64, 0, CONSUMER, _tiles(0, 64, 4, 3)),
        (4, 128, 0, 0, _tiles(0, 32, 4, 2)),
        (4, 256, 0, 0, _tiles(0, 16, 4, 2)),
    ),
    "fold_norm": ((4, ANY, 0, 0, {"BLOCK_K": 128, "BLOCK_N": 16, "num_warps": 4}),),
    "product": (
        # The largest tile whose epilogues fit registers; a wider one (256 columns) spills them.
        (2, ANY, 4096, AMPERE, _tiles(128, 128, 8, 3, BLOCK_K=64)),
        (2, ANY, 4096, 0, _tiles(128, 128, 8, 3, BLOCK_K=32)),
        # Few rows: more programs, and fewer rounds of each, since nothing else hides a round's latency.
        (2, ANY, 0, HOPPER, _tiles(64, 64, 4, 3, BLOCK_K=128)),
        (2, ANY, 0, CONSUMER, _tiles(64, 64, 4, 3, BLOCK_K=64)),
        (2, ANY, 0, AMD, _tiles(64, 64, 4, 3, BLOCK_K=32)),
        # Float32 outside the tensor cores.
        (4, ANY, 0, 0, _tiles(64, 64, 4, 2, BLOCK_K=32)),
    ),
}

_overrides: dict[str, dict] = json.loads(os.environ.get(ENVIRONMENT_VARIABLE) or "{}")
_trial: tuple[tuple[str, str], ...] = ()
"""(kernel, options as JSON) that ``trial`` puts in the place of the table's."""
_asked: set[tuple[str, torch.dtype, int, int]] | None = None
"""Where ``asked`` collects the calls of ``configuration``."""


_Function = TypeVar("_Function", bound=Callable)
_caches: list = []


def once(function: _Function) -> _Function:
    """Decorate a function of one kind of launch: its result is kept for each kind, until ``override`` changes options.

    The result must not be changed. It is what a launch needs beyond its tensors, so a call computes none of it twice.
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
    """What the table has for such a launch."""
    size, memory = dtype.itemsize, launch.shared_memory(device)
    for most_size, most_width, least_rows, least_memory, options in TABLE[kernel]:
        if size <= most_size and width <= most_width and rows >= least_rows and memory >= least_memory:
            return dict(options)
    raise AssertionError(f"no configuration of {kernel} for {rows} rows of {width} elements of {size} bytes")


def candidates(kernel: str, device: torch.device, dtype: torch.dtype, rows: int, width: int) -> list[dict]:
    """The options worth trying for such a launch: those of the table for such operands on any device, the shipped ones
    first, and these with one stage more or less and with half or twice the warps."""
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
    """Inside, the launch options of some kernels are these, whatever the table and the user's cache hold.

    What :func:`once` has computed under the same options stays cached.
    """
    global _trial
    previous, _trial = _trial, tuple((kernel, json.dumps(chosen)) for kernel, chosen in options.items())
    try:
        yield
    finally:
        _trial = previous


@contextlib.contextmanager
def asked() -> Iterator[set[tuple[str, torch.dtype, int, int]]]:
    """Collects (kernel, dtype, rows, width) of all launches whose options are looked up inside."""
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
