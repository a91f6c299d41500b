"""Clocks: interleaved rounds over all contenders, quantiles, paired ratios, and the ceilings of the device.

Every round times each contender once, in a shuffled order, so that a busy spell or a falling clock touches all of
them; a ratio is the median over rounds of ratios taken within one round. On CUDA the samples are device events, the
L2 cache is overwritten before each short sample, and what launches many small kernels is replayed as a CUDA graph.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from ..ops.products import LONGEST, multiply

SHORTEST_SAMPLE = 1e-3
"""Seconds; on the CPU faster calls are repeated within a sample, far above the clock's resolution."""


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, interpolated linearly."""
    ordered = sorted(values)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8)}


def paired_ratio(baseline: Sequence[float], samples: Sequence[float]) -> dict[str, float]:
    """Quantiles of ``baseline / samples`` round by round: above 1 means faster than the baseline."""
    return quantiles([b / s for b, s in zip(baseline, samples, strict=True)])


def measure(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 100),
    cold: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of every contender, one value a round.

    Args:
        runs: contender -> call; they have run once already.
        seconds: when the minimum of ``rounds`` is done, stop after so long.
        rounds: least and most rounds.
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


def _cpu_round(runs: Mapping[str, Callable]) -> Callable[[Mapping[str, Callable]], dict[str, float]]:
    calls = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(SHORTEST_SAMPLE / max(time.perf_counter() - start, 1e-7)))

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
    """``run`` as a CUDA graph's replay and True, or itself and False where it cannot be captured.

    The stream that is current must be a side stream, and the forward of any backward in ``run`` must have run on it.
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
    """Bytes that one call allocates above what was allocated before it; None where torch does not count (CPU)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# -- ceilings --------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool = False) -> dict:
    """Measured now: bytes per second of a large copy, operations per second of a large product in each dtype.

    Random data: zeros draw less power and run faster than anything real. Exponentials are measured on the CPU (in
    cache) and, on CUDA, computed: 16 a cycle and multiprocessor at the highest clock.
    """
    on_gpu = device.type == "cuda"
    elements = 1 << (16 if quick else 30 if on_gpu else 27)
    # On the CPU no longer than the sums that ``multiply`` leaves whole, as those over a model's channels are.
    side = 128 if quick else 8192 if on_gpu else LONGEST
    seconds, rounds = (0.05, (3, 5)) if quick else (2.0, (7, 30))

    def best(run: Callable[[], object]) -> float:
        run()
        return quantiles(measure({"": run}, device, seconds=seconds, rounds=rounds)[""])["p50"]

    source = torch.empty(elements, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    found: dict = {"copy": 2 * elements / best(functools.partial(target.copy_, source)), "product": {}}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = best(functools.partial(multiply, a, b))
        found["product"][str(dtype).removeprefix("torch.")] = 2 * side**3 / product
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        clock = getattr(properties, "clock_rate", 0) * 1e3
        found["exponentials"] = 16 * properties.multi_processor_count * clock or None
        found["exponentials_are"] = "computed: 16 a cycle and multiprocessor at the highest clock"
    else:
        x, out = torch.randn(2, 1 << 15)
        found["exponentials"] = x.numel() / best(lambda: torch.exp(x, out=out))
        found["exponentials_are"] = "measured: torch.exp of a float32 tensor in cache"
    return found
