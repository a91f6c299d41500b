"""The machine code of a compiled kernel: its loops, the unit of each instruction, and the instructions that run.

``nvdisasm`` and ``cuobjdump`` ship with Triton, and AMD kernels come as assembly. Nothing here runs on a GPU.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

UNITS = {
    "matrix": "HMMA HGMMA IMMA QGMMA DMMA OMMA UTCHMMA UTCQMMA",
    "exponential": "MUFU",
    "fp32": "FFMA FMUL FADD FSEL FMNMX FMNMX3 FSETP FSET FCHK FFMA2 FMUL2 FADD2 FSWZADD",
    "shared memory": "LDS LDSM STS STSM SHFL REDUX LDT LDTM STT STTM ATOMS",
    "global memory": "LDG LDGSTS STG LDL STL LD ST ATOM ATOMG RED UTMALDG UTMASTG",
    "synchronization": "BAR SYNCS DEPBAR LDGDEPBAR WARPSYNC FENCE MEMBAR WARPGROUP UTCBAR ERRBAR CCTL NANOSLEEP",
    "control": "BRA CALL RET BSYNC BSSY BREAK EXIT NOP YIELD BMOV JMP",
}
"""Unit -> NVIDIA mnemonics that occupy it. All other instructions are "integer": addresses, moves, logic."""
_UNIT = {mnemonic: unit for unit, mnemonics in UNITS.items() for mnemonic in mnemonics.split()}

AMD_UNITS = (
    ("matrix", r"v_(s?mfmac?|wmma)_"),
    ("exponential", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("fp32", r"v_(pk_)?\w*_f(32|64)(_|$)"),
    ("shared memory", r"ds_"),
    ("global memory", r"(global|buffer|flat|scratch|s_load|s_buffer)_"),
    ("synchronization", r"s_(barrier|waitcnt)"),
    ("control", r"s_(branch|cbranch|endpgm|nop|setprio|sleep|setpc|swappc)"),
)
"""(unit, prefix of the AMD mnemonics that occupy it). The first match counts."""


@dataclass(frozen=True)
class Instruction:
    name: str
    """The mnemonic with its modifiers, such as ``HGMMA.64x64x16.F32.BF16``."""
    arguments: str = ""

    @property
    def mnemonic(self) -> str:
        return self.name.partition(".")[0]

    @property
    def unit(self) -> str:
        if self.name.islower():
            return next((unit for unit, start in AMD_UNITS if re.match(start, self.name)), "integer")
        return _UNIT.get(self.mnemonic, "integer")

    @property
    def flops(self) -> float:
        """Floating-point operations of one warp. Four warps share a warp-group product."""
        if self.mnemonic == "HGMMA" and (size := re.search(r"\.(\d+)x(\d+)x(\d+)", self.name)):
            m, n, k = map(int, size.groups())
            return 2 * m * n * k / 4
        if self.mnemonic == "HMMA" and (size := re.search(r"\.(16)(8)(4|8|16)\b", self.name)):
            m, n, k = map(int, size.groups())
            return 2 * m * n * k
        return 0.0

    @property
    def shared_bytes(self) -> int:
        """Bytes that one warp moves between registers and shared memory, or between its lanes."""
        if self.mnemonic in ("LDSM", "STSM"):  # matrices of 8 x 8 elements of 16 bits
            many = self.name.rpartition(".")[2]
            return 128 * int(many) if many in ("2", "4") else 128
        return 32 * self.width if self.unit == "shared memory" else 0

    @property
    def copied_bytes(self) -> int:
        """Bytes that the asynchronous copies of one warp request, including masked lanes."""
        return 32 * self.width if self.mnemonic == "LDGSTS" else 0

    @property
    def width(self) -> int:
        """Bytes per lane of a load or store."""
        if size := re.search(r"\.(64|128)\b", self.name):
            return int(size[1]) // 8
        if size := re.search(r"\.[US](8|16)\b", self.name):
            return int(size[1]) // 8
        return 4


@dataclass(frozen=True)
class Loop:
    """A loop: the positions of its instructions (without those of inner loops), and its inner loops."""

    own: tuple[int, ...]
    inner: tuple[Loop, ...] = ()

    def all(self) -> Iterable[Loop]:
        """This loop and all loops inside it."""
        return (self, *(loop for inner in self.inner for loop in inner.all()))


class Program:
    """The instructions of a kernel. For each instruction, the positions of the instructions that may run next."""

    def __init__(self, instructions: Sequence[Instruction], following: Sequence[Sequence[int]]):
        self.instructions = tuple(instructions)
        self.following = tuple(tuple(places) for places in following)
        outermost = self._loops(self.reached())
        self._outermost = outermost
        self.loops = tuple(sorted((loop for outer in outermost for loop in outer.all()), key=lambda loop: loop.own[0]))

    def _loops(self, places: Iterable[int]) -> tuple[Loop, ...]:
        """The outermost loops among some instructions.

        A loop is a strongly connected component of the control flow. A backward branch alone does not prove a loop,
        because code that is laid out of line also branches back. Without its entry, a component shows its inner loops.
        """
        inside = set(places)
        found = []
        for part in self._components(inside):
            if len(part) == 1 and part[0] not in self.following[part[0]]:
                continue
            members = set(part)
            before = {place for place in inside - members if members & set(self.following[place])}
            entries = {place for other in before for place in self.following[other] if place in members}
            entry = min(entries or members)
            inner = self._loops(members - {entry})
            nested = {place for loop in inner for every in loop.all() for place in every.own}
            found.append(Loop(tuple(sorted(members - nested)), inner))
        return tuple(found)

    def _components(self, places: set[int]) -> list[list[int]]:
        """The strongly connected components, each after its successors (Tarjan's algorithm)."""
        number: dict[int, int] = {}
        low: dict[int, int] = {}
        waiting: list[int] = []
        held: set[int] = set()
        found = []
        for root in sorted(places):
            if root in number:
                continue
            stack = [(root, iter(self.following[root]))]
            number[root] = low[root] = len(number)
            waiting.append(root)
            held.add(root)
            while stack:
                place, following = stack[-1]
                for other in following:
                    if other not in places:
                        continue
                    if other not in number:
                        number[other] = low[other] = len(number)
                        waiting.append(other)
                        held.add(other)
                        stack.append((other, iter(self.following[other])))
                        break
                    if other in held:
                        low[place] = min(low[place], number[other])
                else:
                    stack.pop()
                    if stack:
                        low[stack[-1][0]] = min(low[stack[-1][0]], low[place])
                    if low[place] == number[place]:
                        part = waiting[waiting.index(place) :]
                        del waiting[-len(part) :]
                        held.difference_update(part)
                        found.append(part)
        return found

    def reached(self) -> set[int]:
        """The positions that can be reached. Padding after the end of a kernel cannot be reached."""
        found, ahead = set(), [0] if self.instructions else []
        while ahead:
            place = ahead.pop()
            if place not in found:
                found.add(place)
                ahead += self.following[place]
        return found

    def of(self, loop: Loop) -> list[Instruction]:
        """The instructions of a loop without those of its inner loops."""
        return [self.instructions[place] for place in loop.own]

    def product_loops(self) -> list[Loop]:
        """The loops that multiply matrices."""
        return [loop for loop in self.loops if any(i.unit == "matrix" for i in self.of(loop))]

    def path(self, trips: Mapping[Loop, float]) -> list[tuple[Instruction, float]]:
        """The instructions on the longest path through the kernel, each with the number of times that it runs.

        ``trips``: how often each loop runs. The path avoids loops with 0 trips. Loops that are not in ``trips`` run
            once.
        Inside a loop every instruction counts, even if a branch may skip it.
        """
        times = dict.fromkeys(self.reached(), 1.0)
        for outer in self._outermost:
            self._scale(outer, 1.0, trips, times)
        banned = {place for loop in self.loops if trips.get(loop) == 0 for place in loop.own}
        parts = self._components(set(times) - banned)
        part_of = {place: index for index, part in enumerate(parts) for place in part}
        most: list[float] = []
        after: list[int | None] = []
        for index, part in enumerate(parts):
            next_parts = {part_of[p] for place in part for p in self.following[place] if p in part_of} - {index}
            best = max(next_parts, key=lambda other: most[other], default=None)
            most.append(sum(times[place] for place in part) + (0.0 if best is None else most[best]))
            after.append(best)
        at: int | None = part_of.get(0)
        chosen: list[int] = []
        while at is not None:
            chosen += parts[at]
            at = after[at]
        return [(self.instructions[place], times[place]) for place in sorted(chosen)]

    def _scale(self, loop: Loop, outer: float, trips: Mapping[Loop, float], times: dict[int, float]) -> None:
        repeated = outer * trips.get(loop, 1.0)
        for place in loop.own:
            if place in times:
                times[place] = repeated
        for inner in loop.inner:
            self._scale(inner, repeated, trips, times)


def counts(instructions: Iterable[Instruction]) -> dict[str, int]:
    """Unit -> number of a warp's instructions that occupy it."""
    return dict(sorted(Counter(i.unit for i in instructions).items()))


def copies_in_flight(instructions: Iterable[Instruction]) -> list[int]:
    """For each wait: how many groups of asynchronous copies may still be pending. 0 means that there is no prefetch."""
    waits = [i for i in instructions if i.mnemonic == "DEPBAR" and "SB0" in i.arguments]
    return [int(i.arguments.partition(",")[2].split()[0].rstrip(","), 16) for i in waits]


def serialized(instructions: Sequence[Instruction]) -> bool:
    """Whether each warp-group product waits for the previous one. ptxas reports this as C7515.

    The warning of ptxas is not reliable: a kernel that comes from a cache is not compiled again.
    """
    products = sum(i.mnemonic == "HGMMA" for i in instructions)
    waits = sum(i.name.startswith("WARPGROUP.DEPBAR") for i in instructions)
    return products > 1 and waits >= products


# -- reading -------------------------------------------------------------------------------------------------------


def read_nvidia(text: str) -> Program:
    """Read the output of ``nvdisasm -c`` for one kernel."""
    labels: dict[str, int] = {}
    found: list[tuple[str | None, str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\S+):$", line.strip()):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?);", line):
            found.append((code[1], code[2], code[3]))
    following = []
    for index, (predicate, name, arguments) in enumerate(found):
        kind = name.partition(".")[0]
        if kind in ("BRX", "JMX", "BRXU", "JMXU"):
            raise ValueError(f"an indirect branch: {name} {arguments}")
        # If the condition of a branch is an operand, the target follows it.
        always = predicate is None and (kind in ("EXIT", "RET") or (kind == "BRA" and arguments.startswith("`")))
        places = [] if always or index + 1 == len(found) else [index + 1]
        target = re.search(r"`\((\S+?)\)", arguments) if kind in ("BRA", "CALL") else None
        if target and target[1] in labels:
            places.append(labels[target[1]])
        following.append(places)
    return Program([Instruction(name, arguments.strip()) for _, name, arguments in found], following)


def read_amd(text: str) -> Program:
    """Read the AMD assembly of one kernel, as the compiler writes it."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    for line in text.splitlines():
        line = line.partition(";")[0].strip()
        if label := re.match(r"(\S+):$", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"([vsa-z]+_\w+)\s*(.*)$", line):
            found.append(Instruction(code[1], code[2]))
    following = []
    for index, instruction in enumerate(found):
        always = instruction.name in ("s_endpgm", "s_branch", "s_setpc_b64")
        places = [] if always or index + 1 == len(found) else [index + 1]
        if instruction.name.startswith(("s_branch", "s_cbranch")) and instruction.arguments in labels:
            places.append(labels[instruction.arguments])
        following.append(places)
    return Program(found, following)


@functools.cache
def tool(name: str) -> Path:
    """The path of an NVIDIA tool in Triton's package: ``nvdisasm`` or ``cuobjdump``.

    Raises:
        RuntimeError: Triton, or the tool in it, is missing.
    """
    try:
        import triton
    except ImportError:
        raise RuntimeError(f"this needs Triton, whose package contains the disassembler {name}") from None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise RuntimeError(f"this needs {name}, but the installed Triton does not have it at {path}")
    return path


def _output(name: str, *arguments: str, folder: str | None = None) -> str:
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True, cwd=folder).stdout


def disassembled(cubin: bytes) -> tuple[Program, dict[str, int]]:
    """A compiled NVIDIA kernel, and its registers and bytes of local memory per thread: REG, STACK, LOCAL."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", _output("cuobjdump", "-res-usage", file.name))
        return read_nvidia(_output("nvdisasm", "-c", file.name)), {name: int(value) for name, value in usage}


@dataclass(frozen=True)
class Kernel:
    """A kernel of a library that nvcc compiled."""

    target: str
    symbol: str
    threads: int
    """Most threads of a block."""
    registers: int
    local: int
    """Bytes of local memory of a thread."""
    program: Program


def library(path: Path) -> list[Kernel]:
    """The kernels in the machine code that a library holds, for each of its architectures."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        _output("cuobjdump", "-xelf", "all", str(path.resolve()), folder=folder)
        for file in sorted(Path(folder).iterdir()):
            target = re.search(r"\.(sm_\w+)\.cubin$", file.name)
            usage = re.findall(r"Function (\S+):\s+(.*)", _output("cuobjdump", "-res-usage", str(file)))
            if target is None or not usage:
                continue
            # The text of each section, behind its name.
            _, *parts = re.split(r"^\s*\.section\s+([^,\s]+).*$", _output("nvdisasm", str(file)), flags=re.MULTILINE)
            sections = dict(zip(parts[::2], parts[1::2], strict=True))
            for symbol, line in usage:
                used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
                words = sections[f".nv.info.{symbol}"].partition("EIATTR_MAX_THREADS")[2]
                threads = re.search(r"\.word\s+(0x[0-9a-f]+)", words)
                program = read_nvidia(sections[f".text.{symbol}"])
                most = int(threads[1], 16) if threads else 1024
                found.append(Kernel(target[1], symbol, most, used["REG"], used["STACK"] + used["LOCAL"], program))
    return found
