"""The overhead suite: host time of one CRATE layer with so few tokens that the computation takes almost no time.

Every implementation computes the same layer on one thread, in turn. The suite measures the CPU time of the thread,
which other processes disturb little. The important number is the ratio to the reference equations in plain torch. A
ratio up to 1 means that the package needs no more host time than the code that it replaces.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..nn import CrateBlock, prepare_for_inference
from ..ops import use_backend

WIDTH, HEADS, TOKENS = 32, 2, 5
CALLS = 30
"""Calls per sample. A call takes about as long as reading the clock a hundred times."""
PLAIN = "plain torch"


class Reference(nn.Module):
    """The equations of a layer in the form of the public code, with the parameters of a :class:`CrateBlock`."""

    def __init__(self, block: CrateBlock):
        super().__init__()
        self.block = block

    def forward(self, z: Tensor) -> Tensor:
        """``z (B, N, d)`` -> ``(B, N, d)``."""
        linear = nn.functional.linear
        block, mssa, weight = self.block, self.block.mssa, self.block.ista.weight
        w = mssa.projection(block.mssa_norm(z)).unflatten(-1, (mssa.heads, -1)).transpose(1, 2)
        o = ((w @ w.transpose(-1, -2) * mssa.scale).softmax(-1) @ w).transpose(1, 2).flatten(2)
        x = block.ista_norm(mssa.output(o) + z)
        reconstruction = linear(linear(x, weight), weight.T)
        step_size, lambd = block.ista.step_size, block.ista.lambd
        return torch.relu(x + step_size * (linear(x, weight.T) - reconstruction) - step_size * lambd)


def implementations() -> dict[str, tuple[Callable, str | None, bool]]:
    """Name -> module, backend (None: the automatic choice), and whether it has gradients."""
    torch.manual_seed(0)
    block = CrateBlock(WIDTH, HEADS, WIDTH // HEADS)

    def fresh() -> CrateBlock:
        return copy.deepcopy(block)

    return {
        PLAIN: (Reference(fresh()), None, True),
        "reference": (fresh(), "reference", True),
        "eager": (fresh(), "eager", True),
        "crate_kernels": (fresh(), None, True),
        "crate_kernels prepared": (prepare_for_inference(fresh()), None, False),
        "plain torch, compiled": (torch.compile(Reference(fresh()), dynamic=False), None, True),
        "crate_kernels, compiled": (torch.compile(fresh(), dynamic=False), None, True),
    }


def measure(seconds: float = 2.0, compiled: bool = True) -> Iterator[dict]:
    """Records of ``task``, ``implementation``, ``microseconds`` per layer and their ``ratio`` to plain torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        z = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
        expected = None
        for task in ("forward", "forward + backward"):
            calls = {}
            for name, (module, backend, differentiable) in implementations().items():
                if (task == "forward" or differentiable) and (compiled or "compiled" not in name):
                    calls[name] = _call(module, backend, z, task)
            outputs = {name: call() for name, call in calls.items()}
            expected = outputs[PLAIN]
            for name, out in outputs.items():
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
            times = _interleaved(calls, seconds)
            for name, value in times.items():
                yield dict(
                    task=task, implementation=name, microseconds=1e6 * value, ratio=value / times[PLAIN]
                )  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def _call(module: Callable, backend: str | None, z: Tensor, task: str) -> Callable[[], Tensor]:
    leaf = z.clone().requires_grad_(task != "forward")
    ones = torch.ones_like(z)

    def forward() -> Tensor:
        with torch.no_grad():
            return module(leaf)

    def both() -> Tensor:
        out = module(leaf)
        out.backward(ones)
        return out.detach()

    call = forward if task == "forward" else both
    if backend is None:
        return call

    def requested() -> Tensor:
        with use_backend(backend):
            return call()

    return requested


def _interleaved(calls: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Seconds of one call: the lower quartile over interleaved rounds."""
    for call in calls.values():
        for _ in range(CALLS):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(samples[PLAIN]) < 5:
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            samples[name].append((time.thread_time() - start) / CALLS)
    return {name: sorted(values)[len(values) // 4] for name, values in samples.items()}


def table(records: list[dict]) -> str:
    """The records as a Markdown table: microseconds of a layer, and the ratio to plain torch."""
    lines = ["| host time of a layer | forward | | forward + backward | |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(r["implementation"] for r in records):
        cells = [name]
        for task in ("forward", "forward + backward"):
            found = [r for r in records if r["implementation"] == name and r["task"] == task]
            cells += [f"{found[0]['microseconds']:.0f} µs", f"{found[0]['ratio']:.2f}"] if found else ["–", "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
