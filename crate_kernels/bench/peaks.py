"""Measured peaks of the device, for the roofline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from .. import timing
from ..ops.products import LONGEST, multiply


def measure(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool = False) -> dict:
    """Measure the peaks: bytes per second of a large copy, operations per second of a large product in each dtype.

    The data is random, because zeros draw less power and run faster than real data. Exponentials per second are
    measured in cache on the CPU. On CUDA they are computed: 16 per cycle and multiprocessor at the highest clock.
    """
    on_gpu = device.type == "cuda"
    elements = 1 << (16 if quick else 30 if on_gpu else 27)
    # On the CPU ``multiply`` must not split the inner dimension, so it is as small as the channels of a model.
    side = 128 if quick else 8192 if on_gpu else LONGEST
    seconds, rounds = (0.05, (3, 5)) if quick else (2.0, (7, 30))

    def best(run: Callable[[], object]) -> float:
        run()
        return timing.quantiles(timing.measure({"": run}, device, seconds=seconds, rounds=rounds)[""])["p50"]

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
