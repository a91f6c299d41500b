"""Measure backends and launch options of the Triton kernels on the user's device, with the shapes of one model.

The automatic choice then uses the results. A backend or a launch with wrong results is not timed: the correctness check
of the benchmark runs first. The launch options of the Triton kernels are measured before the backends, one kernel at a
time. New options replace the shipped ones only if they are faster by more than the noise. Backends are ordered by the
geometric mean of their times in inference and in training. Decoding, which only language models need, has launch
options and no choice of a backend. The records are stored in the user's cache folder (see
:mod:`crate_kernels.user_cache`), with the device, the versions, the shapes and the times. Nothing is measured at import
or by a call.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import options, timing, user_cache
from ..distributed import plan
from ..ops import backends, tuned
from ..options import option
from . import dispatch, operators
from .cases import Case

BLOCKS = ("crate_layer", "mssa_block", "ista_block", "subspace_attention", "ista_step")
DTYPES = ("float32", "bfloat16", "float16")
RUNS = ("unless --show or --clear is given", lambda s: not (s.show or s.clear))


@dataclass
class Settings:
    """The options of ``tune``."""

    model: str = option("crate_base", "the model", choices=(*plan.SHORT, *plan.MODELS), only=RUNS)
    batch: int | None = option(
        None, "images or texts in one call; default: 256 on CUDA, 8 on the CPU", least=1, most=1 << 20, only=RUNS
    )
    image_size: int | None = option(None, "pixels along an image, of vision models", least=1, most=8192, only=RUNS)
    context: int | None = option(None, "tokens of a text, of language models", least=1, most=1 << 20, only=RUNS)
    device: str = option("auto", "cpu or cuda; auto takes CUDA if there is a device")
    dtype: str | None = option(
        None, "float32, bfloat16 or float16; default: bfloat16 on CUDA, float32 on the CPU", choices=DTYPES,
        only=RUNS,
    )  # fmt: skip
    seconds: float = option(1.0, "target duration of each interleaved measurement", above=0, most=3600, only=RUNS)
    show: bool = option(False, "print the stored results and measure nothing")
    clear: bool = option(False, "delete the stored results of this device and measure nothing")

    def check(self, given: Any) -> None:
        """Raise ValueError for an option that is misspelled or does not apply."""
        options.check(self, given)
        options.check_device(self.device)
        if self.show and self.clear:
            raise ValueError("--show and --clear cannot be combined: leave one of them out")
        language = "gpt2" in self.model
        if language and self.image_size is not None:
            raise ValueError("--image-size applies only to vision models")
        if not language and self.context is not None:
            raise ValueError("--context applies only to language models")

    def cases(self, batch: int) -> list[Case]:
        """One case for every operator that a layer of the model may call; for a causal model also one for decoding."""
        sizes: dict[str, Any] = {"context": self.context, "image_size": self.image_size}
        wanted = plan.PlanOptions(model=self.model, **{k: v for k, v in sizes.items() if v is not None})
        model: Any = wanted.build()
        shape = plan.Shape.of(model, plan.sample_tokens(model))
        width, causal = shape.inner // shape.heads, model.blocks[0].mssa.causal
        names = BLOCKS if hasattr(model.blocks[0].ista, "weight") else ("mssa_block", "overcomplete_ista")
        decoding = Case("cached_subspace_attention", self.model, batch, shape.tokens, shape.heads, width)
        return [
            Case(name, self.model, batch, shape.tokens, shape.heads, width, causal and "ista" not in name)
            for name in names
        ] + [decoding] * causal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser, Settings)


def run(args: argparse.Namespace) -> int:
    given = options.given(args, Settings)
    settings = Settings(**given)
    settings.check(given)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    print(user_cache.combination(device))
    if settings.clear:
        print(f"forgot {tuned.clear(device)} records")
        return 0
    if not settings.show:
        tune(settings, device)
    lines = [line(record) for record in tuned.records(device)]
    lines += [launch_line(record) for record in tuned.records(device, tuned.LAUNCHES)]
    print("\n".join(lines) if lines else "nothing is stored")
    print(f"stored in {user_cache.folder()}, {tuned.FILE}.json and {tuned.LAUNCHES}.json")
    return 0


def tune(settings: Settings, device: torch.device) -> None:
    """Measure all operators, and store a record for each."""
    from ..training.progress import Report

    batch = settings.batch or (256 if device.type == "cuda" else 8)
    dtype = getattr(torch, settings.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    cases = settings.cases(batch)
    with Report(len(cases)) as report:
        for number, case in enumerate(cases):
            report.show(number, case.name)
            try:
                tune_launches(case, device, dtype, settings.seconds, functools.partial(report.show, number))
                record = None if case.decodes else measure(case, device, dtype, settings.seconds)
            except torch.OutOfMemoryError:
                report.line(f"{case.name}: the device has no memory for the float64 reference; use a smaller --batch")
                continue
            if record is not None:
                for backend, reason in record["left_out"].items():
                    report.line(f"{case.operator}: {backend} is not measured: {reason}")
                tuned.store(device, [record])
            report.show(number + 1, case.name)


def tune_launches(
    case: Case, device: torch.device, dtype: torch.dtype, seconds: float, progress: Callable[[str], object] = str
) -> list[dict[str, Any]]:
    """Find the fastest launch options of the Triton kernels of an operator, and store a record for each kernel.

    Nothing happens if Triton is missing, cannot run the operator on the device, or gives wrong results with the shipped
    options.
    """
    if importlib.util.find_spec("triton") is None:
        return []
    from ..ops.triton_kernels import configurations, launch

    leaves = [t.requires_grad_() for t in case.tensors(device, dtype)]
    if launch.why_not(leaves[0]) is not None:
        return []
    call = case.call("triton")

    def right(chosen: dict[str, dict]) -> bool:
        with configurations.trial(chosen):
            try:
                return bool(operators.gated(case, {"triton": call}, leaves)[0])
            except (
                Exception
            ):  # compilers and launches raise many types of errors: too many registers, an impossible tile
                return False

    def tried(chosen: dict[str, dict], direction: str) -> Callable[[], object]:
        with configurations.trial(chosen):
            run = operators.prepared(call, leaves, direction)

        def inside():
            with configurations.trial(chosen):
                run()

        return inside

    with configurations.asked() as asked:
        if not right({}):
            return []
    best: dict[str, dict] = {}
    found = []
    for kernel, kind, rows, width in sorted(asked, key=str):
        options = configurations.candidates(kernel, device, kind, rows, width)
        passed = {}
        for number, each in enumerate(options):
            progress(f"{case.name}: {kernel}, {number + 1} of {len(options)} launch options")
            if right(best | {kernel: each}):
                passed[json.dumps(each)] = each
        samples: dict[str, dict[str, list[float]]] = {}
        for direction in [d for d in dispatch.DIRECTIONS if d in case.directions]:
            runs = {name: tried(best | {kernel: each}, direction) for name, each in passed.items()}
            samples[direction] = timing.measure(runs, device, seconds=seconds, rounds=(5, 50))
        first = json.dumps(options[0])
        if first not in passed:
            continue
        faster = {
            name: math.prod(timing.paired_ratio(samples[d][first], samples[d][name])["p50"] for d in samples)
            for name in passed
        }
        fastest = max(faster, key=faster.__getitem__)
        low = (timing.paired_ratio(samples[d][first], samples[d][fastest])["p20"] for d in samples)
        chosen = passed[fastest] if math.prod(low) > 1 else options[0]
        best[kernel] = chosen
        found.append({
            "kernel": kernel, "dtype": str(kind).removeprefix("torch."), "rows": rows, "width": width,
            "options": chosen, "shipped": options[0], "operator": case.operator, "shape": case.shape(),
            "seconds": {name: {d: timing.quantiles(samples[d][name])["p50"] for d in samples} for name in passed},
        })  # fmt: skip
    tuned.store(device, found, tuned.LAUNCHES)
    configurations.forget()
    return found


def measure(case: Case, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """The record of one operator: the inputs for which it holds, the order of the backends, and the seconds of each."""
    leaves = [t.requires_grad_() for t in case.tensors(device, dtype)]
    calls = {name: case.call(name) for name in backends.BACKENDS if name != "reference"}
    passed, checked = operators.gated(case, calls, leaves)
    times: dict[str, dict[str, float]] = {name: {} for name in passed}
    for direction in dispatch.DIRECTIONS:
        runs = {name: operators.prepared(call, leaves, direction) for name, call in passed.items()}
        for name, samples in timing.measure(runs, device, seconds=seconds, rounds=(5, 50)).items():
            times[name][direction] = timing.quantiles(samples)["p50"]
    about = {"operator": case.operator, "shape": case.shape()}
    return {
        "operator": case.operator,
        "dtype": str(dtype).removeprefix("torch."),
        "causal": case.causal,
        "size": dispatch.size(about),
        "rows": dispatch.token_rows(about),
        "shape": case.shape(),
        "order": sorted(times, key=lambda name: math.prod(times[name].values())),
        "seconds": times,
        "left_out": {name: record.get("skipped") or record["refused"] for name, record in checked.items()
                     if name not in passed},
    }  # fmt: skip


def line(record: dict[str, Any]) -> str:
    """One record for the terminal."""
    best = record["order"][0] if record["order"] else None
    times = "; ".join(
        f"{name} {' and '.join(f'{1e3 * value:.3g}' for value in record['seconds'][name].values())} ms"
        for name in record["order"]
    )
    what = f"{record['operator']} {record['dtype']} size {record['size']} rows {record['rows']}"
    return f"{what}{' causal' if record['causal'] else ''}: {best or 'no backend passed'} ({times})"


def launch_line(record: dict[str, Any]) -> str:
    """One record of launch options for the terminal."""
    times = record["seconds"]
    chosen, shipped = (times[json.dumps(record[name])].values() for name in ("options", "shipped"))
    gain = (math.prod(shipped) / math.prod(chosen)) ** (1 / len(shipped))
    what = f"{record['kernel']} {record['dtype']} rows {record['rows']} width {record['width']}"
    options = " ".join(f"{name}={value}" for name, value in record["options"].items())
    return f"{what}: {options} ({len(times)} measured; {gain:.2f} times as fast as shipped)"
