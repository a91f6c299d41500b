"""The timer: interleaved rounds over several functions, quantiles, and ratios taken round by round.

Every round times each function once, in shuffled order, so that other load or a falling clock rate affects all of them.
A ratio is the median over rounds of the ratios within one round. On CUDA the samples are device events, the L2 cache is
overwritten before each short sample, and a function that launches many small kernels is replayed as a CUDA graph.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

SHORTEST_SAMPLE = 1e-3
"""Shortest sample in seconds. On the CPU, faster calls are repeated within a sample, so that a sample is much longer
than the resolution of the clock."""


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, interpolated linearly."""
    ordered = sorted(values)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8)}


def paired_ratio(baseline: Sequence[float], samples: Sequence[float]) -> dict[str, float]:
    """Quantiles of ``baseline / samples``, round by round. Above 1 means faster than the baseline."""
    return quantiles([b / s for b, s in zip(baseline, samples, strict=True)])


def measure(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 100),
    cold: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of every function, one value per round.

    Args:
        runs: name -> function. Each has already run once.
        seconds: time limit; the least number of rounds always runs.
        rounds: smallest and largest number of rounds.
        cold: overwrite the L2 cache before each sample (CUDA).
    """
    if not runs:
        return {}
    sample = functools.partial(_cuda_round, cold=cold) if device.type == "cuda" else _cpu_round(runs)
    found: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    start = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for name, value in sample({name: runs[name] for name in order}).items():
            found[name].append(value)
    return found


def medians(runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds per call of every function over ``rounds`` rounds, after two warm-up calls of each."""
    for run in (*runs.values(), *runs.values()):
        run()
    samples = measure(runs, device, seconds=0, rounds=(rounds, rounds))
    return {name: statistics.median(values) for name, values in samples.items()}


def _cpu_round(runs: Mapping[str, Callable]) -> Callable[[Mapping[str, Callable]], dict[str, float]]:
    calls = {}
    for name, run in runs.items():
        seconds: list[float] = []
        while len(seconds) < 3 and sum(seconds) < 10 * SHORTEST_SAMPLE:  # one stall of the machine decides nothing
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        calls[name] = max(1, round(SHORTEST_SAMPLE / max(min(seconds), 1e-7)))

    def sample(ordered: Mapping[str, Callable]) -> dict[str, float]:
        found = {}
        for name, run in ordered.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            found[name] = (time.perf_counter() - start) / calls[name]
        return found

    return sample


def _cuda_round(ordered: Mapping[str, Callable], cold: bool) -> dict[str, float]:
    events = {}
    for name, run in ordered.items():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            _flush_buffer().zero_()
        begin.record()
        run()
        end.record()
        events[name] = begin, end
    torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) * 1e-3 for name, (begin, end) in events.items()}


@functools.cache
def _flush_buffer() -> torch.Tensor:
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(4 * size, dtype=torch.int8, device="cuda")


def as_graph(run: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """The replay of ``run`` as a CUDA graph and True, or ``run`` and False if it cannot be captured.

    The current stream must be a side stream. The forward of any backward in ``run`` must have run on it.
    """
    try:
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call allocates in addition to what was allocated before; None if torch does not count them
    (CPU)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
