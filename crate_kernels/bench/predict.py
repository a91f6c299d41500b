"""Predict the time of the Triton kernels on a GPU that is not present, from their machine code.

The program compiles the kernel of each launch and counts its instructions along the longest path. Each loop counts as
often as the shape repeats it. The time of a unit of a multiprocessor is the work of the busiest multiprocessor divided
by the published rate of the unit. Memory must read and write every tensor once. The L2 cache must deliver every byte
that asynchronous copies request. The prediction is::

    max(memory, L2, longest + (matrix + longer - longest) / blocks)

``longest`` is the largest time of a unit of the multiprocessor. ``longer`` is the largest time without the matrix unit.
``blocks`` is the number of programs that a multiprocessor holds. One program alternates between its products and
everything else, so these times add up. Further programs fill the gaps.

A prediction is not a measurement. It ignores latency that is not hidden, the clock under load, caches, and the time of
a launch, so it is too low for launches of few programs. Products of the vendor's library count with their physical
bound.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import cost
from .cases import Case
from .compilation import TARGETS, Launch, compiling
from .machine_code import Instruction, Loop
from .report import table


@dataclass(frozen=True)
class Device:
    """Published figures of one device of an architecture. This project measured none of them."""

    name: str
    clock: float
    """Cycles per second. Multiprocessors, clock and matrix rate together give ``product``."""
    product: float
    """Operations per second of 16-bit matrix products with float32 sums, without sparsity."""
    copy: float
    """Bytes per second of the memory."""
    l2: float = 0.0
    """Bytes per cycle that the L2 cache delivers; 0 if the rate is not published."""
    fp32_lanes: int = 128
    """Float32 operations per cycle of a multiprocessor."""

    def peaks(self, target: str) -> cost.Peaks:
        return cost.Peaks(self.copy, self.product, EXPONENTIALS * TARGETS[target].multiprocessors * self.clock)


MARKERS = "<!-- predictions:begin -->", "<!-- predictions:end -->"
"""Markers around the tables in docs/triton.md."""
EXPONENTIALS = 16
"""Results per cycle of a multiprocessor (CUDA's programming guide: compute capabilities 8.0 to 12.0)."""
SCHEDULERS = 4
"""Instructions of a warp that a multiprocessor starts per cycle."""
SHARED_BYTES = 128
"""Bytes per cycle between registers and shared memory."""

DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", 1.41e9, 312e12, 2.039e12, l2=5120, fp32_lanes=64),
    "sm_86": Device("GeForce RTX 3090", 1.695e9, 71e12, 0.936e12),
    "sm_89": Device("GeForce RTX 4090", 2.52e9, 165.2e12, 1.008e12),
    "sm_90": Device("H100 SXM", 1.83e9, 989.4e12, 3.35e12, l2=5120),
    "sm_120": Device("GeForce RTX 5090", 2.407e9, 209.5e12, 1.792e12),
}
"""Architecture -> device. NVIDIA states the rate of the L2 cache for the A100 only; the H100 is assumed to have the
same rate per cycle. sm_100 is absent, because its matrix instructions do not name their size. AMD is absent."""


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one launch, or the physical bound of one call of torch."""

    name: str
    seconds: float
    units: dict[str, float]
    """Seconds that each unit would need without waiting."""
    launch: Launch | None = None
    """None for a call of torch."""

    @property
    def limited_by(self) -> str:
        return max(self.units, key=self.units.__getitem__)


def predictable(launch: Launch) -> bool:
    """Whether this module knows the loops of a launch and the rates of its target."""
    dtypes = {t.dtype for t in launch.arguments.values() if isinstance(t, Tensor) and t.is_floating_point()}
    return launch.target in DEVICES and bool(dtypes & {torch.bfloat16, torch.float16})


def predict(launch: Launch, device: Device) -> Prediction:
    """The prediction for one launch, by the formula in the docstring of this module.

    Raises:
        RuntimeError: the machine code multiplies more or less than the shape requires, so the loops were misread.
    """
    trips = _trips(launch)
    ran = launch.program.path(trips)
    flops, wanted = launch.warps * sum(i.flops * times for i, times in ran), _flops(launch)
    if wanted is not None and not math.isclose(flops, wanted, rel_tol=0.01, abs_tol=1.0):
        raise RuntimeError(f"{launch.kernel}: {flops:.4g} operations in the machine code, {wanted:.4g} in the shape")
    processors = TARGETS[launch.target].multiprocessors
    programs = math.ceil(launch.programs / processors)

    def cycles(of: Callable[[Instruction], float]) -> float:
        return programs * launch.warps * sum(of(i) * times for i, times in ran)

    rate = device.product / processors / device.clock
    busy = {
        "matrix": cycles(lambda i: i.flops / rate),
        "issue": cycles(lambda i: 1 / SCHEDULERS),
        "exponential": cycles(lambda i: (i.unit == "exponential") * 32 / EXPONENTIALS),
        "fp32": cycles(lambda i: (i.unit == "fp32") * 32 / device.fp32_lanes),
        "shared memory": cycles(lambda i: i.shared_bytes / SHARED_BYTES),
    }
    on_chip = {unit: count / device.clock for unit, count in busy.items()}
    # The copies before a pipelined loop are those that its last rounds do not issue.
    copied = sum(i.copied_bytes * times for loop, times in trips.items() for i in launch.program.of(loop))
    copied *= launch.programs * launch.warps
    off_chip = {"L2": copied / (device.l2 * device.clock) if device.l2 else 0.0, "memory": _bytes(launch) / device.copy}
    longest = max(on_chip.values())
    longer = max(seconds for unit, seconds in on_chip.items() if unit != "matrix")
    together = max(1, min(launch.blocks, programs))
    seconds = max(*off_chip.values(), longest + (on_chip["matrix"] + longer - longest) / together)
    return Prediction(launch.kernel, seconds, on_chip | off_chip, launch)


def _bytes(launch: Launch) -> int:
    """Bytes of all tensors that a kernel reads or writes, each counted once."""
    return sum(value.numel() * value.itemsize for value in launch.arguments.values() if isinstance(value, Tensor))


# -- what the kernels repeat ---------------------------------------------------------------------------------------


def _starts(a: dict[str, Any]) -> list[int]:
    """The first tokens of the tiles of a head."""
    return list(range(0, a["tokens"], a["BLOCK_M"]))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _forward_rounds(a: dict[str, Any]) -> float:
    last = (a["tokens"] - 1) // a["BLOCK_N"]
    return _mean(min(last, first // a["BLOCK_N"]) if a["CAUSAL"] else last for first in _starts(a))


def _before(a: dict[str, Any]) -> float:
    """The rounds of the causal backward over earlier tokens."""
    return _mean(first // a["BLOCK_N"] for first in _starts(a))


def _behind(a: dict[str, Any]) -> float:
    """The rounds of the causal backward over later tokens."""
    rest = (max(0, a["tokens"] - first - a["BLOCK_M"]) for first in _starts(a))
    return _mean(math.ceil(tokens / a["BLOCK_N"]) for tokens in rest)


def _trips(launch: Launch) -> dict[Loop, float]:
    """How often each loop of a launch runs, averaged over its programs. All sequences are assumed to have full length.

    Raises:
        RuntimeError: the loops in the machine code do not match the loops of the kernel.
    """
    a, loops = launch.arguments, list(launch.program.loops)
    if launch.kernel in ("forward", "backward", "product", "decode"):
        loops = launch.program.product_loops() or loops
    if launch.kernel == "forward":
        rounds = [_forward_rounds(a)]
    elif launch.kernel == "backward" and a["CAUSAL"]:
        rounds = [_before(a), _behind(a)]
        loops.sort(key=lambda loop: sum(i.flops for i in launch.program.of(loop)))  # three products, then four
    elif launch.kernel == "backward" and a["weight"] is not None:
        rounds = [(a["tokens"] - 1) // a["BLOCK_N"], 0]  # with one exponential, and the fallback with two
        loops.sort(key=lambda loop: sum(i.unit == "exponential" for i in launch.program.of(loop)))
    elif launch.kernel == "backward":
        rounds = [math.ceil(a["tokens"] / a["BLOCK_N"])]
    elif launch.kernel == "product":
        rounds = [math.ceil(a["inner"] / a["BLOCK_K"])]
    elif launch.kernel == "decode":
        rounds = [math.ceil(min(a["span"], a["keys"]) / a["BLOCK_N"])]
    elif launch.kernel == "layer_norm_backward":
        rounds = [math.ceil(a["rows"] / a["BLOCK_M"] / a["programs"])]
    elif launch.kernel == "delta":
        rounds = [math.ceil(a["tokens"] / 256)] if a["weight"] is not None else []
    elif launch.kernel == "fold_norm":
        rounds = [math.ceil(a["inner"] / a["BLOCK_K"])]
    else:
        rounds = []
    if not loops and not any(rounds):  # the shape is so small that the compiler removed its loops
        return {}
    if len(loops) != len(rounds):
        raise RuntimeError(f"{launch.kernel}: {len(loops)} loops in the machine code, {len(rounds)} in the kernel")
    return dict(zip(loops, rounds, strict=True))


def _flops(launch: Launch) -> float | None:
    """Operations that a program's tiles multiply on average, including padding. None for kernels that are not
    counted."""
    a = launch.arguments
    if launch.kernel == "forward":
        cut = a["CUT"] * (max(1, a["BLOCK_M"] // a["BLOCK_N"]) if a["CAUSAL"] else 1)
        return 4 * a["BLOCK_M"] * a["WIDTH"] * (cut + a["BLOCK_N"] * _forward_rounds(a))
    if launch.kernel == "backward" and a["CAUSAL"]:
        pairs = 10 * a["BLOCK_M"] + a["BLOCK_N"] * (6 * _before(a) + 8 * _behind(a))
        return a["BLOCK_M"] * a["WIDTH"] * pairs
    if launch.kernel == "backward" and a["weight"] is not None:
        keys = a["CUT"] + (a["tokens"] - 1) // a["BLOCK_N"] * a["BLOCK_N"]
        return 10 * a["BLOCK_M"] * a["WIDTH"] * keys
    if launch.kernel == "product":
        return 2 * a["BLOCK_M"] * a["BLOCK_N"] * a["BLOCK_K"] * math.ceil(a["inner"] / a["BLOCK_K"])
    return None


# -- what an operator launches -------------------------------------------------------------------------------------


class _Torch(TorchDispatchMode):
    """Reports calls of torch's own kernels with their least work."""

    def __init__(self, called: Callable[[str, cost.Cost], object]):
        super().__init__()
        self.called = called

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not isinstance(out, Tensor) or func.is_view or name.startswith(("empty", "new_empty", "detach")):
            return out
        inputs = [value for value in args if isinstance(value, Tensor)]
        moved = sum(t.numel() * t.itemsize for t in [*inputs, out])
        flops = 2.0 * out.numel() * inputs[-1].shape[-2] if name in ("mm", "addmm", "bmm", "baddbmm") else 0.0
        self.called(name, cost.Cost(flops, moved))
        return out


def operator(case: Case, direction: str, target: str, dtype: torch.dtype = torch.bfloat16) -> list[Prediction]:
    """The launches of one call of an operator with the backend ``triton``, in order.

    ``direction``: ``forward``, or ``both`` for forward and backward.
    """
    device = DEVICES[target]
    found: list[Prediction] = []

    def called(name: str, work: cost.Cost) -> None:
        units = {"matrix": work.flops / device.product, "memory": work.bytes / device.copy}
        found.append(Prediction(f"torch {name}", max(units.values()), units))

    def launched(launch: Launch) -> None:
        found.append(predict(launch, device))

    tensors = case.tensors(torch.device("meta"), dtype)
    with compiling(target, launched), _Torch(called), torch.no_grad():
        _run(case, tensors, direction == "both")
    return found


def _run(case: Case, tensors: list[Tensor], backward: bool) -> None:
    """Call the functions of the backend ``triton`` directly, because the operators have no kernels for the meta
    device."""
    backend: Any = importlib.import_module(f"...ops.{case.operator}.triton", __name__)
    scale, eps = case.width**-0.5, 1e-5
    if case.operator == "subspace_attention":
        (w,) = tensors
        o, lse = backend.forward(w, None, None, scale, case.causal)
        if backward:
            backend.backward(o, w, None, None, o, lse, scale, case.causal)
    elif case.operator == "ista_block":
        z, *weights = tensors[0].flatten(0, 1), *tensors[1:]
        out, *saved = backend.forward(z, *weights, None, 1.0, 0.1, eps)
        if backward:
            backend.backward(out, z, *weights, None, out, *saved, 1.0, eps)
    elif case.operator == "mssa_block":
        out, *saved = backend.forward(*tensors, None, case.heads, scale, case.causal, 1.0, eps)
        if backward:
            backend.backward(out, *tensors, None, *saved, scale, case.causal, 1.0, eps)
    elif case.operator == "crate_layer":
        more = (scale, case.causal, 1.0, 0.1, 0.1, eps, eps)
        out, *saved = backend.forward(*tensors, None, None, case.heads, *more, backward)
        if backward:
            backend.backward(out, *tensors, None, None, out, *saved, *more[:4], eps, eps)
    else:
        raise ValueError(f"{case.operator}: there is no prediction for this operator")


OPERATORS = ("subspace_attention", "ista_block", "mssa_block", "crate_layer")
CASES = (
    *(Case(name, "CRATE-B/16", 256, 197, 12, 64) for name in OPERATORS),
    Case("subspace_attention", "CRATE-B/8", 64, 785, 12, 64),
    Case("subspace_attention", "CRATE-GPT2", 32, 1024, 12, 64, causal=True),
    Case("subspace_attention", "long", 4, 8192, 12, 64),
)
"""The shapes in the table, in bfloat16."""


def text(target: str, cases: Iterable[Case] = CASES) -> str:
    """The predictions for one architecture as Markdown: a table of operators and a table of their kernels."""
    if target not in DEVICES:
        raise ValueError(f"--target must be one of {', '.join(DEVICES)}, got {target}")
    device, limits = DEVICES[target], TARGETS[target]
    operators: list[list[str]] = []
    kernels: dict[tuple[str, ...], list[str]] = {}
    for case in cases:
        for direction in ("forward", "both"):
            found = operator(case, direction, target)
            seconds, bound = sum(p.seconds for p in found), case.cost(direction, 2).bound(device.peaks(target))
            own = sum(p.seconds for p in found if p.launch)
            largest = max(found, key=lambda p: p.seconds)
            operators.append([
                case.name, "forward + backward" if direction == "both" else direction, str(len(found)), _us(seconds),
                _us(own), f"{largest.name}: {largest.limited_by}", _us(bound), f"{seconds / bound:.1f}",
            ])  # fmt: skip
            for p in found:
                if p.launch:
                    row = _kernel(p, p.launch)
                    kernels.setdefault(tuple(row), [_shape(case), *row])
    cache = f", L2 {device.l2:g} B a cycle" if device.l2 else ""
    units = ("matrix", "issue", "exponential", "fp32", "shared memory", "L2", "memory")
    heads = ["operator", "", "launches", "predicted, µs", "of it Triton", "longest launch, its limit", "bound, µs", "×"]
    each = ["shape", "kernel", "tile", "programs", "registers", "shared, KiB", "blocks", "in flight", *units,
            "predicted, µs"]  # fmt: skip
    return (
        f"**Predictions, no measurements**: bfloat16 on {target}, with the published figures of {device.name}: "
        f"{limits.multiprocessors} multiprocessors at {device.clock / 1e9:g} GHz, {device.product / 1e12:g} TFLOP/s, "
        f"{device.copy / 1e12:g} TB/s{cache}. The bound is the least work "
        "of the operator at these rates. Calls of torch's own products count with their bound.\n\n"
        f"{table(heads, operators)}\n\nThe launches of the Triton kernels, with the time of each unit in µs if it "
        f"never waited:\n\n{table(each, list(kernels.values()))}"
    )


def _shape(case: Case) -> str:
    return f"B{case.batch} N{case.tokens}" + (" causal" if case.causal else "")


def _kernel(p: Prediction, launch: Launch) -> list[str]:
    tile = " × ".join(str(value) for name, value in launch.options.items() if name.startswith("BLOCK"))
    waits = [n for loop in launch.loops() for n in loop["in flight"]]
    cells = [launch.kernel, tile, str(launch.programs), str(launch.registers), f"{launch.shared / 1024:.0f}",
             str(launch.blocks), "/".join(map(str, waits)) or "–"]  # fmt: skip
    return [*cells, *map(_us, p.units.values()), _us(p.seconds)]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds >= 1e-5 else f"{seconds * 1e6:.1f}"
