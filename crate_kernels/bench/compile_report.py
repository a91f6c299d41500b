"""Compile every Triton kernel for eight targets without a GPU, and report what is in the machine code.

    python -m crate_kernels.bench.compile_report [--targets sm_90 gfx942] [--all] [--jobs 2] [--json report.json]
    python -m crate_kernels.bench.compile_report --write-budget tests/triton/budget.json
    python -m crate_kernels.bench.compile_report --cuda crate_kernels/_cuda.so   # the CUDA C++ kernels of that library

Each launch has a row: tile, warps, stages, bytes of shared memory, registers, programs that a multiprocessor holds,
bytes of local memory (``spilled``), and how many instructions inside loops read or write local memory (``in loops``).
The loops of the launch follow. Each has its number of instructions in each unit, and for each wait the groups of copies
that may be in flight.

The exit status is 1 if a kernel fails to compile, needs more shared memory than the target has, waits for every single
``wgmma``, waits for the copies that it has just issued, or spills without a reason in ``ACCEPTED_SPILLS``. With
``--budget`` it is also 1 if a kernel exceeds the counts of that file. The counts depend on the version of the compiler,
Triton or nvcc. The file names the version, and under another version its counts do not hold.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from . import cuda_report, predict
from .compilation import TARGETS, UNITS, Launch, compiling

ACCEPTED_SPILLS = [
    (
        lambda row: row["spilled"] <= 16,
        "at most four registers, which ptxas spills so that one more block fits on a multiprocessor",
    ),
    (
        lambda row: row["spilled"] <= 96 and row["looped_spills"] == 0,
        "at most 24 registers, none of them in a loop: a program stores and loads them once",
    ),
    (
        lambda row: (
            row["target"] == "sm_120"
            and (row["case"], row["kernel"]) == ("attention p=80", "backward")
            and row["looped_spills"] <= 6
        ),
        "five loads in loops of 235 and 331 instructions; eight warps need none and multiply 1.6 times as much",
    ),
    (
        lambda row: row["case"] in EXTRA and row["kernel"] == "backward" and "p=256" in row["case"],
        "no CRATE model has heads this wide: the kernels run, but they are not tuned",
    ),
    (
        lambda row: row["target"] == "sm_100" and row["kernel"] == "product" and row["spilled"] <= 24,
        "Triton 3.6, in the epilogue, once per tile: sums come out of tensor memory whole, beside the residual",
    ),
]
"""(rows, the reason why their spills are accepted)."""

UNUSUAL_TARGETS = ("sm_90", "gfx942")
"""One target per vendor, for shapes whose code differs little between targets."""
UNUSUAL = {"layer one token", "attention float16 p=16 one token", "attention p=128 one tile causal lengths"}

EXTRA: set[str] = {
    "decoding float32", "decoding p=32", "decoding paged p=128 eight tokens",
    "attention p=48", "attention p=256", "attention float32 p=256",
    "ista few rows", "ista float32",
}  # fmt: skip
"""Cases that are compiled only with ``--all``: they differ from the others only in tile sizes."""


# -- what is compiled ----------------------------------------------------------------------------------------------


def attention(dtype, batch=2, tokens=197, heads=12, width=64, *, causal=False, lengths=False, value=False, scale=0.125):
    """One forward and one backward of subspace attention."""
    import torch

    from ..ops.subspace_attention import triton as backend

    w = torch.empty((batch, tokens, heads, width), dtype=dtype, device="meta")
    hidden = torch.empty(batch, dtype=torch.int64, device="meta") if lengths else None
    values = torch.empty_like(w) if value else None
    o, lse = backend.forward(w, values, hidden, scale, causal)
    backend.backward(o, w, values, hidden, o, lse, scale, causal)


def layer(dtype, stream, batch=256, tokens=197, heads=12, width=64):
    """Forward and backward of a layer. The residual stream has the dtype ``stream``, the matrices have ``dtype``."""
    import torch

    from ..ops.crate_layer import triton as backend

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    dim = heads * width
    norm = [empty(dim, dtype=torch.float32), empty(dim, dtype=torch.float32)]
    weights = *norm, empty(dim, dim), empty(dim, dim), empty(dim), *norm, empty(dim, dim), None, None
    z = empty(batch, tokens, dim, dtype=stream)
    arguments: Any = (z, *weights, heads, 0.125, False, 1.0, 0.1, 0.1, 1e-5, 1e-5, True)
    saved = backend.forward(*arguments)
    arguments = (saved[0], z, *weights, *saved, 0.125, False, 1.0, 0.1, 1e-5, 1e-5)
    backend.backward(*arguments)


def ista(dtype, rows=256 * 197, dim=768):
    """One forward and one backward of the ISTA step and of the overcomplete step."""
    import torch

    from ..ops.ista_step import triton as step
    from ..ops.overcomplete_ista import triton as overcomplete

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, dictionary = empty(rows, dim), empty(dim, dim), empty(dim, 4 * dim)
    out = step.forward(x, weight, None, 0.1, 0.1)
    step.backward(out, x, weight, None, out, 0.1)
    out, *codes = overcomplete.forward(x, dictionary, None, 0.1, 0.1)
    arguments: Any = (out, x, dictionary, None, *codes, 0.1)
    overcomplete.backward(*arguments)


def decoding(dtype, queries=1, batch=1, tokens=1024, heads=12, width=64, size=0):
    """One step of generation with a cache. ``size``: tokens in a block of a paged cache."""
    import torch

    from ..ops.triton_kernels import decoding as backend

    w = torch.empty((batch, queries, heads, width), dtype=dtype, device="meta")
    cache = torch.empty((batch, tokens, heads, width), dtype=dtype, device="meta")
    table = None
    if size:
        cache = cache.view(-1, size, heads, width)
        table = torch.empty((batch, tokens // size), dtype=torch.int32, device="meta")
    backend.decode(w, cache, torch.empty((batch, queries), dtype=torch.int64, device="meta"), 0.125, table)


def cases() -> dict:
    """Name -> function that runs operators on meta tensors."""
    import torch

    half, single = torch.bfloat16, torch.float32
    return {
        "attention": lambda: attention(half),
        "attention causal": lambda: attention(half, tokens=1024, causal=True),
        "attention lengths value": lambda: attention(half, lengths=True, value=True),
        "attention p=80": lambda: attention(half, tokens=785, width=80),
        "attention float32": lambda: attention(single),
        "attention float16 p=16 one token": lambda: attention(torch.float16, tokens=1, width=16, scale=-0.25),
        "attention p=128 one tile causal lengths": lambda: attention(
            half, tokens=64, width=128, causal=True, lengths=True
        ),
        "attention p=48": lambda: attention(half, tokens=785, width=48),
        "attention p=256": lambda: attention(half, width=256),
        "attention float32 p=256": lambda: attention(single, width=256),
        "decoding": lambda: decoding(half),
        "decoding p=128 eight tokens": lambda: decoding(half, queries=8, width=128),
        "decoding paged": lambda: decoding(half, size=16),
        "decoding paged p=128 eight tokens": lambda: decoding(half, queries=8, width=128, size=256),
        "decoding float32": lambda: decoding(single),
        "decoding p=32": lambda: decoding(half, width=32),
        "layer": lambda: layer(half, half),
        "layer one token": lambda: layer(half, half, batch=1, tokens=1, heads=1, width=16),
        "layer, float32 stream": lambda: layer(half, single),
        "ista": lambda: ista(half),
        "ista few rows": lambda: ista(half, rows=1000),
        "ista float32": lambda: ista(single),
    }


# -- compiling -----------------------------------------------------------------------------------------------------


def compile_case(target: str, case: str) -> list[dict]:
    """Compile the kernels that ``case`` launches on ``target``. Each different launch gives one row."""
    launches: list[Launch] = []
    with compiling(target, launches.append):
        cases()[case]()
    rows: list[dict] = []
    for launch in launches:
        if case not in UNUSUAL and predict.predictable(launch):
            predict.predict(launch, predict.DEVICES[target])  # raises an error for unknown loops
        row = {"target": target, "case": case, "kernel": launch.kernel, "programs": launch.programs, **launch.options}
        row |= launch.report()
        if row not in rows:
            rows.append(row)
    return rows


def faults(row: dict) -> list[str]:
    """The faults of one compiled kernel. They do not depend on Triton's version."""
    found = []
    if row["shared"] > TARGETS[row["target"]].program_shared * 1024:
        found.append("shared memory")
    if row["serialized"]:
        found.append("serialized")
    if row.get("num_stages", 0) > 2 and any(0 in loop["in flight"] for loop in row["loops"]):
        found.append("no prefetch")
    if row["spilled"] and not any(accepts(row) for accepts, _ in ACCEPTED_SPILLS):
        found.append("spills")
    return found


# -- the budget ----------------------------------------------------------------------------------------------------


def version() -> dict[str, str]:
    import triton

    return {"triton": triton.__version__}


def budget(rows: list[dict], compiler: dict[str, str]) -> dict[str, Any]:
    """The budget of each kernel: the counts of ``rows``, for one version of a compiler."""
    kernels = {
        name: {
            "registers": row["registers"],
            "spills": row["looped_spills"],
            "loops": [[*(loop[unit] for unit in UNITS), loop["in flight"]] for loop in row["loops"]],
        }
        for name, row in named(rows).items()
    }
    return compiler | {"units": UNITS, "kernels": kernels}


def named(rows: list[dict]) -> dict[str, dict]:
    """The rows by target, case and kernel. A number distinguishes several launches of a kernel in one case."""
    found: dict[str, dict] = {}
    for row in rows:
        name = f"{row['target']}, {row['case']}, {row['kernel']}"
        number = 1 + sum(other == name or other.startswith(f"{name} ") for other in found)
        found[name if number == 1 else f"{name} {number}"] = row
    return found


def over_budget(rows: list[dict], allowed: dict[str, Any], compiler: dict[str, str]) -> list[str]:
    """One sentence for each count that exceeds the budget by more than a small margin. Empty for another version."""
    if any(allowed[name] != version for name, version in compiler.items()):
        return []
    found = []
    for name, row in named(rows).items():
        most = allowed["kernels"].get(name)
        if most is None:
            found.append(f"{name}: the budget does not have it")
            continue
        if row["registers"] > most["registers"] + 8:  # a warp gets registers in units of eight
            found.append(f"{name}: {row['registers']} registers, budget {most['registers']}")
        if row["looped_spills"] > most["spills"]:
            found.append(f"{name}: {row['looped_spills']} spills in loops, budget {most['spills']}")
        if len(row["loops"]) != len(most["loops"]):
            found.append(f"{name}: {len(row['loops'])} loops, budget {len(most['loops'])}")
            continue
        for number, (loop, (*counts, in_flight)) in enumerate(zip(row["loops"], most["loops"], strict=True), 1):
            for unit, count in zip(allowed["units"], counts, strict=True):
                if loop[unit] > 1.05 * count + 4:
                    found.append(f"{name}, loop {number}: {loop[unit]} {unit} instructions, budget {count}")
            fewest = min(loop["in flight"], default=math.inf if not in_flight else 0)
            if fewest < min(in_flight, default=0):
                found.append(f"{name}, loop {number}: waits with {fewest} copies in flight, budget {min(in_flight)}")
    return found


def write_budget(rows: list[dict], path: Path, compiler: dict[str, str]) -> None:
    content = budget(rows, compiler)
    kernels = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in content.pop("kernels").items())
    head = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    path.write_text(f'{{\n{head},\n "kernels": {{\n{kernels}\n }}\n}}\n')


# -- the command ---------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cases", nargs="+", choices=cases(), metavar="CASE", help="only these")
    parser.add_argument("--cuda", type=Path, metavar="LIBRARY", help="read this library, compile nothing")
    parser.add_argument("--all", action="store_true", help="also the cases that differ in tile sizes alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--budget", type=Path, help="compare the kernels with the counts in this file")
    parser.add_argument("--write-budget", type=Path, help="write the counts to this file")
    options = parser.parse_args(arguments)
    if options.write_budget and (options.all or options.cases or options.targets != list(TARGETS)):
        parser.error("--write-budget accepts none of --all, --cases and --targets: a budget contains every kernel")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("kernels are interpreted, not compiled, under TRITON_INTERPRET=1")
    rows: list[dict] = []
    failed: list[str] = []
    if options.cuda:
        if options.all or options.cases:
            parser.error("--all and --cases choose what Triton compiles; they do not go with --cuda")
        rows, compiler = cuda_report.rows(options.cuda, options.targets), cuda_report.version(options.cuda)
    else:
        rows, compiler = _compile(options, failed), version()
    for row in rows:
        row["faults"] = faults(row)
    if options.json:
        options.json.write_text(json.dumps({"kernels": rows, "failed": failed}, indent=1))
    if options.write_budget and not failed:
        write_budget(rows, options.write_budget, compiler)
    heads = ["target", "case", "kernel", "tile", "warps", "stages", "shared", "registers", "blocks", "spilled"]
    print(f"| {' | '.join([*heads, 'in loops', 'loops', 'faults'])} |\n{'|---' * (len(heads) + 3)}|")
    for row in rows:
        tile = " x ".join(str(v) for k, v in row.items() if k.startswith("BLOCK"))
        launch = f"{row.get('num_warps', '')} | {row.get('num_stages', '')}"
        usage = f"{row['shared']} | {row['registers']} | {row['blocks']} | {row['spilled']} | {row['looped_spills']}"
        loops = "; ".join(map(described, row["loops"]))
        print(
            f"| {row['target']} | {row['case']} | {row['kernel']} | {tile} | {launch} | {usage} | {loops} "
            f"| {', '.join(row['faults'])} |"
        )
    if options.budget:
        failed += over_budget(rows, json.loads(options.budget.read_text()), compiler)
    for line in failed:
        print(line)
    return 1 if failed or any(row["faults"] for row in rows) else 0


def _compile(options: argparse.Namespace, failed: list[str]) -> list[dict]:
    """The rows of all cases and targets that are asked for; ``failed`` gets a line for each that does not compile."""
    names = options.cases or [name for name in cases() if options.all or name not in EXTRA]
    wanted = [(t, c) for t in options.targets for c in names]
    if not (options.all or options.cases):
        wanted = [(t, c) for t, c in wanted if c not in UNUSUAL or t in UNUSUAL_TARGETS]
    rows: list[dict] = []
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(compile_case, t, c): (t, c) for t, c in wanted}
        for task, (target, case) in tasks.items():
            try:
                rows += task.result()
            except Exception as error:
                failed.append(f"{target} {case}: {error!r}")
    return rows


def described(loop: dict) -> str:
    """A loop of a row, as text for the terminal."""
    mix = ", ".join(f"{loop[unit]} {unit}" for unit in UNITS if loop[unit])
    flight = f", {'/'.join(map(str, loop['in flight']))} in flight" if loop["in flight"] else ""
    return f"{sum(loop[unit] for unit in UNITS)}: {mix}{flight}"


if __name__ == "__main__":
    sys.exit(main())
