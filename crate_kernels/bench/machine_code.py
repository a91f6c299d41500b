"""Analysis of the machine code of a compiled NVIDIA kernel: its loops, and the unit of each instruction.

``nvdisasm`` ships with Triton. Nothing here runs on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

UNITS = {
    "matrix": "HMMA HGMMA IMMA QGMMA DMMA OMMA UTCHMMA",
    "exponential": "MUFU",
    "fp32": "FFMA FMUL FADD FSEL FMNMX FMNMX3 FSETP FSET FCHK FFMA2 FMUL2 FADD2 FSWZADD",
    "shared": "LDS LDSM STS STSM SHFL LDT LDTM STT STTM ATOMS",
    "global": "LDG LDGSTS STG LDL STL LD ST ATOM ATOMG RED UTMALDG UTMASTG",
    "synchronization": "BAR SYNCS DEPBAR LDGDEPBAR WARPSYNC FENCE MEMBAR WARPGROUP UTCBAR ERRBAR CCTL NANOSLEEP",
    "control": "BRA CALL RET BSYNC BSSY BREAK EXIT NOP YIELD BMOV JMP",
}
"""Unit -> mnemonics that occupy it. Any other instruction is "integer": addresses, moves, conversions, logic."""
_UNIT = {mnemonic: unit for unit, mnemonics in UNITS.items() for mnemonic in mnemonics.split()}

_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"\.L_x_\d+")


@dataclass(frozen=True)
class Instruction:
    name: str
    """With its modifiers: ``HGMMA.64x64x16.F32.BF16``."""
    arguments: str

    @property
    def mnemonic(self) -> str:
        return self.name.partition(".")[0]

    @property
    def unit(self) -> str:
        return _UNIT.get(self.mnemonic, "integer")


@dataclass(frozen=True)
class Region:
    """Some instructions of a kernel: the body of a loop, or all that are in no loop."""

    instructions: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    def counts(self) -> dict[str, int]:
        """Unit -> how many instructions of a warp occupy it."""
        return dict(Counter(i.unit for i in self.instructions))

    def flops(self) -> float:
        """Floating-point operations of the matrix instructions of one warp (a quarter of a warp group's)."""
        return sum(_flops(i) for i in self.instructions)

    def bytes_loaded(self) -> int:
        """Bytes that one warp requests from global memory, including masked lanes."""
        return sum(32 * _width(i) for i in self.instructions if i.mnemonic in ("LDG", "LDGSTS"))

    def copies_in_flight(self) -> list[int]:
        """Number of groups of asynchronous copies that may be pending at each wait; 0 means no prefetch."""
        waits = [i for i in self.instructions if i.mnemonic == "DEPBAR" and "SB" in i.arguments]
        return [int(i.arguments.rpartition(",")[2], 16) for i in waits]

    def serialized(self) -> bool:
        """Whether each warp-group product waits for the one before it (what ptxas reports as C7515)."""
        products = sum(i.mnemonic == "HGMMA" for i in self.instructions)
        waits = sum(i.name.startswith("WARPGROUP.DEPBAR") for i in self.instructions)
        return products > 1 and waits >= products


@dataclass(frozen=True)
class Program:
    """One kernel: its loops in the order of the code, and the rest. A loop's body excludes the loops inside it."""

    loops: tuple[Region, ...]
    straight: Region

    @property
    def product_loops(self) -> tuple[Region, ...]:
        return tuple(loop for loop in self.loops if loop.counts().get("matrix"))


def disassembled(cubin: bytes) -> Program:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return read(done.stdout)


def read(text: str) -> Program:
    """The output of ``nvdisasm -c`` of one kernel."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if label := _LABEL.search(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append(Instruction(found[1], found[2].strip()))
    ends: dict[int, int] = {}
    for index, instruction in enumerate(code):
        if instruction.mnemonic in ("BRA", "CALL") and (target := _TARGET.search(instruction.arguments)):
            start = labels.get(target[0], len(code))
            if start < index:  # a branch to itself ends a kernel
                ends[start] = max(index, ends.get(start, 0))
    owner = [-1] * len(code)  # the innermost loop of each instruction: the latest start that encloses it
    for start in sorted(ends):
        for index in range(start, ends[start] + 1):
            owner[index] = start
    regions = {start: Region(tuple(i for i, o in zip(code, owner, strict=True) if o == start)) for start in (-1, *ends)}
    return Program(tuple(regions[start] for start in sorted(ends)), regions[-1])


def _flops(instruction: Instruction) -> float:
    if instruction.mnemonic == "HGMMA" and (size := re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.name)):
        m, n, k = map(int, size.groups())
        return 2 * m * n * k / 4
    if instruction.mnemonic == "HMMA" and (size := re.search(r"\.(16)(8)(4|8|16)\b", instruction.name)):
        m, n, k = map(int, size.groups())
        return 2 * m * n * k
    return 0.0


def _width(instruction: Instruction) -> int:
    """Bytes that each lane loads."""
    if size := re.search(r"\.(64|128)\b", instruction.name):
        return int(size[1]) // 8
    if size := re.search(r"\.[US](8|16)\b", instruction.name):
        return int(size[1]) // 8
    return 4
