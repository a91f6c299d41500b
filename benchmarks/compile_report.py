"""Compile every Triton kernel for eight targets without a GPU: shared memory, registers and spills of each launch.

    python benchmarks/compile_report.py [--targets sm_90 gfx942] [--all] [--jobs 2] [--json report.json]

The operators run on meta tensors of the sizes that CRATE models have. Where they would launch a kernel, the kernel is
compiled for the target instead, with the options that a device of that kind would get. ``spilled`` counts bytes of
local memory, ``in loops`` the instructions inside loops that read or write it. The exit status is 1 if a kernel fails
to compile, needs more shared memory than the target has, waits for every single ``wgmma``, or spills without a reason
in ``ACCEPTED_SPILLS``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
}
"""Target -> bytes of shared memory that one program may use."""

ACCEPTED_SPILLS = [
    (
        lambda row: row["spilled"] <= 16,
        "at most four registers, which ptxas gives up to fit one more block per multiprocessor",
    ),
    (
        lambda row: row["spilled"] <= 96 and row["looped_spills"] == 0,
        "at most 24 registers and no such instruction in a loop: a program stores and loads them once",
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
        "no CRATE model has heads this wide: they run, they are not tuned",
    ),
    (
        lambda row: row["target"] == "sm_100" and row["kernel"] == "product" and row["spilled"] <= 24,
        "Triton 3.6, in the epilogue, once per tile: sums come out of tensor memory whole, beside the residual",
    ),
]
"""(which rows, why their spills are accepted)."""

UNUSUAL_TARGETS = ("sm_90", "gfx942")
"""One target per vendor for shapes whose code differs little from one target to the next."""
UNUSUAL = {"layer one token", "attention float16 p=16 one token", "attention p=128 one tile causal lengths"}

EXTRA = {
    "decoding float32", "decoding p=32", "attention p=48", "attention p=256", "attention float32 p=256",
    "ista few rows", "ista float32",
}  # fmt: skip
"""Cases compiled only with ``--all``: they differ from the others in tile sizes alone."""


# -- what is compiled ----------------------------------------------------------------------------------------------


def attention(dtype, batch=2, tokens=197, heads=12, width=64, *, causal=False, lengths=False, value=False, scale=0.125):
    """One forward and one backward of subspace attention."""
    import torch

    from crate_kernels.ops.subspace_attention import triton as backend

    w = torch.empty((batch, tokens, heads, width), dtype=dtype, device="meta")
    hidden = torch.empty(batch, dtype=torch.int64, device="meta") if lengths else None
    values = torch.empty_like(w) if value else None
    o, lse = backend.forward(w, values, hidden, scale, causal)
    backend.backward(o, w, values, hidden, o, lse, scale, causal)


def layer(dtype, stream, batch=256, tokens=197, heads=12, width=64):
    """One forward and one backward of a layer with a stream of dtype ``stream`` and matrices of ``dtype``."""
    import torch

    from crate_kernels.ops.crate_layer import triton as backend

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    dim = heads * width
    norm = [empty(dim, dtype=torch.float32), empty(dim, dtype=torch.float32)]
    weights = *norm, empty(dim, dim), empty(dim, dim), empty(dim), *norm, empty(dim, dim), None, None
    z = empty(batch, tokens, dim, dtype=stream)
    out, *saved = backend.forward(z, *weights, heads, 0.125, False, 1.0, 0.1, 0.1, 1e-5, 1e-5, True)
    backend.backward(out, z, *weights, out, *saved, 0.125, False, 1.0, 0.1, 1e-5, 1e-5)


def ista(dtype, rows=256 * 197, dim=768):
    """One forward and one backward of the ISTA step and of the overcomplete step."""
    import torch

    from crate_kernels.ops.ista_step import triton as step
    from crate_kernels.ops.overcomplete_ista import triton as overcomplete

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, dictionary = empty(rows, dim), empty(dim, dim), empty(dim, 4 * dim)
    out = step.forward(x, weight, None, 0.1, 0.1)
    step.backward(out, x, weight, None, out, 0.1)
    out, *codes = overcomplete.forward(x, dictionary, None, 0.1, 0.1)
    overcomplete.backward(out, x, dictionary, None, *codes, 0.1)


def decoding(dtype, queries=1, batch=1, tokens=1024, heads=12, width=64):
    """One step of generation against a cache."""
    import torch

    from crate_kernels.ops.triton_kernels import decoding as backend

    w = torch.empty((batch, queries, heads, width), dtype=dtype, device="meta")
    cache = torch.empty((batch, tokens, heads, width), dtype=dtype, device="meta")
    backend.decode(w, cache, torch.empty((batch, queries), dtype=torch.int64, device="meta"), 0.125)


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


class Driver:
    """What Triton asks of a device's driver when it only compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target.arch)

    def get_current_stream(self, device):
        return 0


def compile_case(target: str, case: str) -> list[dict]:
    """Compile what ``case`` launches on ``target``; one row per kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    from crate_kernels.ops.triton_kernels import configurations, launch

    amd = target.startswith("gfx")
    arch = target if amd else int(target.removeprefix("sm_"))
    triton.runtime.driver.set_active(Driver(GPUTarget("hip" if amd else "cuda", arch, 64 if amd else 32)))
    rows = []

    def compile_only(kernel, grid, *arguments, **options):
        compiled = kernel.warmup(*arguments, grid=(grid,), **options)
        row = {"target": target, "case": case, "kernel": kernel.fn.__name__.strip("_"), "programs": grid}
        row |= {name: value for name, value in options.items() if name.startswith(("BLOCK", "num_"))}
        row |= {"shared": compiled.metadata.shared} | (amd_usage if amd else nvidia_usage)(compiled)
        if row not in rows:
            rows.append(row)

    launch.launch = compile_only
    launch.shared_memory = lambda device: SHARED_MEMORY[target]
    launch.tensor_memory = lambda device: target == "sm_100"
    launch.wgmma = lambda device: target == "sm_90"
    configurations.forget()  # what another target was given
    cases()[case]()
    return rows


def nvidia_usage(compiled) -> dict:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _output(tools / "cuobjdump", "-res-usage", file.name)
        usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        spilled = usage["STACK"] + usage["LOCAL"]
        wanted = spilled or compiled.metadata.target.arch == 90
        code = instructions(_output(tools / "nvdisasm", "-c", file.name)) if wanted else []
    looped = [op for (op, _), inside in zip(code, in_loops(code), strict=True) if inside]
    products = sum(op.startswith("HGMMA") for op in looped)
    waits = sum(op.startswith("WARPGROUP.DEPBAR") for op in looped)
    return {
        "registers": usage["REG"],
        "spilled": spilled,
        "looped_spills": sum(op.startswith(("LDL", "STL")) for op in looped),
        # ptxas warns of it (C7515), but a kernel that comes from the cache does not meet ptxas again.
        "serialized": 1 < products <= waits,
    }


def _output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(disassembly: str) -> list[tuple[str, list[int]]]:
    """The instructions of a kernel in NVIDIA machine code: opcode, and the indices of those that may run next."""
    labels, found = {}, []
    for line in disassembly.splitlines():
        if label := re.match(r"(\S+):$", line.strip()):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", line):
            found.append(code.groups())
    result = []
    for index, (predicate, opcode, operands) in enumerate(found):
        kind = opcode.partition(".")[0]
        if kind in ("BRX", "JMX", "BRXU", "JMXU"):
            raise ValueError(f"an indirect branch: {opcode} {operands}")
        # The target of a branch whose condition is an operand follows that operand.
        always = predicate is None and (kind in ("EXIT", "RET") or (kind == "BRA" and operands.startswith("`")))
        following = [] if always or index + 1 == len(found) else [index + 1]
        if kind == "BRA":
            following.append(labels[re.search(r"`\((\S+?)\)", operands)[1]])
        result.append((opcode, following))
    return result


def in_loops(code: list[tuple[str, list[int]]]) -> list[bool]:
    """For each instruction, whether control can come back to it: its strongly connected component is a cycle.

    A branch back is no sign by itself: code that is laid out of line branches back as well.
    """
    order: list[int] = []  # Kosaraju's algorithm: components of the reversed graph, in the order of finished visits
    seen = [False] * len(code)
    for root in range(len(code)):
        stack = [] if seen[root] else [(root, iter(code[root][1]))]
        seen[root] = True
        while stack:
            node, following = stack[-1]
            for other in following:
                if not seen[other]:
                    seen[other] = True
                    stack.append((other, iter(code[other][1])))
                    break
            else:
                order.append(node)
                stack.pop()
    before: list[list[int]] = [[] for _ in code]
    for index, (_, following) in enumerate(code):
        for other in following:
            before[other].append(index)
    looped, assigned = [False] * len(code), [False] * len(code)
    for root in reversed(order):
        component, stack = [], [] if assigned[root] else [root]
        assigned[root] = True
        while stack:
            node = stack.pop()
            component.append(node)
            for other in before[node]:
                if not assigned[other]:
                    assigned[other] = True
                    stack.append(other)
        for node in component:
            looped[node] = len(component) > 1 or node in code[node][1]
    return looped


def amd_usage(compiled) -> dict:
    text = compiled.asm["amdgcn"]
    find = {
        name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
    }
    spilled = find["private_segment_fixed_size"]
    return {
        "registers": find["vgpr_count"],
        "spilled": spilled,
        "looped_spills": int(spilled > 0),
    }  # taken as in a loop


def faults(row: dict) -> list[str]:
    """What is wrong with one compiled kernel."""
    found = []
    if row["shared"] > SHARED_MEMORY[row["target"]]:
        found.append("shared memory")
    if row.get("serialized"):
        found.append("serialized")
    if row["spilled"] and not any(accepts(row) for accepts, _ in ACCEPTED_SPILLS):
        found.append("spills")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--all", action="store_true", help="also the cases that differ in tile sizes alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("kernels are interpreted, not compiled, under TRITON_INTERPRET=1")
    names = [name for name in cases() if options.all or name not in EXTRA]
    rows: list[dict] = []
    failed = []
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        wanted = [(t, c) for t in options.targets for c in names]
        if not options.all:
            wanted = [(t, c) for t, c in wanted if c not in UNUSUAL or t in UNUSUAL_TARGETS]
        tasks = {pool.submit(compile_case, t, c): (t, c) for t, c in wanted}
        for task, (target, case) in tasks.items():
            try:
                rows += task.result()
            except Exception as error:
                failed.append(f"{target} {case}: {error!r}")
    for row in rows:
        row["faults"] = faults(row)
    if options.json:
        options.json.write_text(json.dumps({"kernels": rows, "failed": failed}, indent=1))
    print("| target | case | kernel | tile | warps | stages | shared | registers | spilled | in loops | |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        tile = " x ".join(str(v) for k, v in row.items() if k.startswith("BLOCK"))
        launch = f"{row.get('num_warps', '')} | {row.get('num_stages', '')}"
        usage = f"{row['shared']} | {row['registers']} | {row['spilled']} | {row['looped_spills']}"
        print(
            f"| {row['target']} | {row['case']} | {row['kernel']} | {tile} | {launch} | {usage} "
            f"| {', '.join(row['faults'])} |"
        )
    for line in failed:
        print(line)
    return 1 if failed or any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
