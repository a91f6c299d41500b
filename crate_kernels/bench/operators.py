"""The operator suite: every backend and baseline on every shape, forward, backward and both."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import agreement, timing
from . import cost
from .cases import Case

GRAPH_BELOW = 2e-3
"""Seconds. On CUDA, if an implementation is faster than this, all are timed as replayed graphs with a cold L2 cache, so
that launches and a warm cache do not count."""


def run_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    peak_rates: cost.Peaks | None,
    *,
    implementations: Mapping[str, Callable[..., Tensor]] | None = None,
    only: Sequence[str] | None = None,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (7, 60),
    check_only: bool = False,
) -> Iterator[dict]:
    """One record for each implementation and direction. An implementation that cannot run or is wrong has a reason, no
    time.

    Args:
        peak_rates: of this device, in ``dtype``; None with ``check_only``.
        implementations: name -> call. None takes :meth:`Case.implementations`. ``speedup`` is relative to
            ``reference``.
        only: leave out all other implementations.
        seconds, rounds: see :func:`timing.measure`, for each direction.
        check_only: stop after the correctness check.
    """
    calls = case.implementations(device) if implementations is None else implementations
    calls = {name: call for name, call in calls.items() if only is None or name in only}
    leaves = [t.requires_grad_() for t in case.tensors(device, dtype)]
    passed, records = gated(case, calls, leaves)
    base = dict(operator=case.operator, family=case.family, shape=case.shape(), dtype=str(dtype).removeprefix("torch."))
    for name, record in records.items():
        if name not in passed or check_only:
            yield base | {"implementation": name} | record
    if check_only:
        return
    for direction in case.directions:
        runs = {name: prepared(call, leaves, direction) for name, call in passed.items()}
        yield from _timed(case, base, direction, runs, records, device, dtype, peak_rates, seconds, rounds)
        del runs
        gc.collect()


def gated(
    case: Case, calls: Mapping[str, Callable[..., Tensor]], leaves: list[Tensor]
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, dict]]:
    """Check every implementation on these inputs -> the calls to time, and a record for each."""
    part = [t.detach() for t in case.judged(leaves)] if case.operator == "subspace_attention" else leaves
    reference_call = case.call("reference")
    grad = _output_gradient(case, leaves)
    exact = _run(reference_call, [t.detach().double() for t in part], case.judged([grad])[0].double(), case)
    reference = _run(reference_call, part, case.judged([grad])[0], case)
    passed: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    kinks = case.operator in ("ista_step", "ista_block", "overcomplete_ista", "crate_layer")
    for name, call in calls.items():
        try:
            got = _run(call, leaves, grad, case)
        except (RuntimeError, torch.OutOfMemoryError) as error:  # refused with a reason, or out of memory
            records[name] = {"skipped": str(error).strip().splitlines()[0][:300]}
            continue
        verdict = agreement.judge(
            case.judged(got), exact, reference, leaves[0].dtype, kinks=kinks, score=case.largest_score(leaves)
        )
        records[name] = {"share_of_budget": verdict.share, "check": verdict.detail}
        if verdict.passed:
            passed[name] = call
        else:
            records[name]["refused"] = verdict.detail
        del got
    return passed, records


def _output_gradient(case: Case, leaves: list[Tensor]) -> Tensor:
    generator = torch.Generator(leaves[0].device).manual_seed(7)
    shape = leaves[0].shape
    return torch.randn(shape, generator=generator, device=leaves[0].device).to(leaves[0].dtype)


def _run(call: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, case: Case) -> list[Tensor]:
    """The output and, if the operator has a backward, every gradient."""
    if case.decodes:
        with torch.no_grad():
            return [call(*tensors)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def prepared(call: Callable[..., Tensor], leaves: list[Tensor], direction: str) -> Callable[[], object]:
    """The function to time, after one call of it."""
    grad = torch.randn_like(leaves[0])

    def forward():
        with torch.no_grad():
            return call(*leaves)

    def both():
        return torch.autograd.grad(call(*leaves), leaves, grad)

    run = {"forward": forward, "both": both}.get(direction)
    if run is None:
        out = call(*leaves)

        def run():
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    run()
    return run


def _timed(case, base, direction, runs, records, device, dtype, peak_rates, seconds, rounds) -> Iterator[dict]:
    memory = {name: timing.peak_memory(run, device) for name, run in runs.items()}
    cold = False
    graphs: dict[str, Any] = dict.fromkeys(runs, False)
    if device.type == "cuda":
        quick = timing.measure(runs, device, seconds=0, rounds=(3, 3))
        # All implementations of a case follow one rule, so that launches count for all or for none.
        cold = min(timing.quantiles(v)["p50"] for v in quick.values()) < GRAPH_BELOW if quick else False
        if cold:
            captured = {name: timing.as_graph(run) for name, run in runs.items()}
            runs, graphs = ({name: pair[i] for name, pair in captured.items()} for i in (0, 1))
    samples = timing.measure(runs, device, seconds=seconds, rounds=rounds, cold=cold)
    least = case.cost(direction, dtype.itemsize)
    bound = least.bound(peak_rates)
    baseline = samples.get("reference")
    for name, values in samples.items():
        spread = timing.quantiles(values)
        yield (
            base
            | {
                "implementation": name,
                "direction": direction,
                "seconds": spread,
                "rounds": len(values),
                "speedup": timing.paired_ratio(baseline, values) if baseline else None,
                "tflops": least.flops / spread["p50"] / 1e12,
                "gbytes_per_second": least.bytes / spread["p50"] / 1e9,
                "cost": {"flops": least.flops, "bytes": least.bytes, "exponentials": least.exponentials},
                "bound": bound,
                "limited_by": max(least.terms(peak_rates).items(), key=lambda term: term[1])[0],
                "percent_of_bound": 100 * bound / spread["p50"],
                "peak_memory": memory[name],
                "graph": graphs[name],
                "cold_cache": cold,
            }
            | records[name]
        )
