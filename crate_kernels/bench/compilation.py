"""Compile Triton kernels ahead of time, for a target that need not be present, and read their machine code.

The operators run on meta tensors. In place of each launch, the kernel is compiled for the target, with the options that
a device of this kind would get.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import machine_code
from .machine_code import Program


@dataclass(frozen=True)
class Target:
    """Limits of a multiprocessor of one architecture, from NVIDIA's and AMD's guides."""

    program_shared: int
    """KiB of shared memory that one program may use."""
    shared: int
    """KiB of shared memory of a multiprocessor."""
    warps: int
    """Most warps that a multiprocessor holds."""
    blocks: int
    """Most blocks that a multiprocessor holds."""
    multiprocessors: int
    """Of the device that :mod:`.predict` assumes for the architecture."""


TARGETS = {
    "sm_80": Target(163, 164, 64, 32, 108),
    "sm_86": Target(99, 100, 48, 16, 82),
    "sm_89": Target(99, 100, 48, 24, 128),
    "sm_90": Target(227, 228, 64, 32, 132),
    "sm_100": Target(227, 228, 64, 32, 148),
    "sm_120": Target(99, 100, 48, 24, 170),
    "gfx90a": Target(64, 64, 32, 32, 104),
    "gfx942": Target(64, 64, 32, 32, 304),
}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments, and the result of the compiler."""

    target: str
    kernel: str
    programs: int
    arguments: dict[str, Any]
    """The kernel's arguments by name, including compile-time parameters."""
    options: dict[str, Any]
    """Tile sizes, warps and stages."""
    shared: int
    """Bytes of shared memory that a program uses."""
    warps: int
    program: Program
    registers: int
    spilled: int
    """Bytes of local memory that a thread uses."""

    @property
    def blocks(self) -> int:
        """Number of programs that a multiprocessor holds at a time, limited by registers, shared memory and warps."""
        limits = TARGETS[self.target]
        if self.target.startswith("gfx"):
            # A SIMD has 512 registers per lane, allocated in units of eight. A compute unit has four SIMDs.
            warps = 4 * min(limits.warps // 4, 512 // (8 * -(-self.registers // 8)))
            shared = limits.shared * 1024 // max(self.shared, 1)
        else:
            # A quarter of a multiprocessor has 16,384 registers. A warp gets them in units of 256.
            # A block reserves 1 KiB of shared memory.
            warps = min(limits.warps, 4 * (16384 // (256 * -(-32 * self.registers // 256))))
            shared = limits.shared * 1024 // (self.shared + 1024)
        return min(limits.blocks, warps // self.warps, shared)

    def loops(self) -> list[dict]:
        """For each loop: how many instructions of a warp each unit gets, and how many copies are in flight at each
        wait."""
        found = []
        for loop in self.program.loops:
            code = self.program.of(loop)
            row = {unit: machine_code.counts(code).get(unit, 0) for unit in UNITS}
            found.append(row | {"in flight": machine_code.copies_in_flight(code)})
        return found

    def report(self) -> dict[str, Any]:
        """What :mod:`.compile_report` says of the machine code."""
        names = ("shared", "registers", "blocks", "spilled")
        row: dict[str, Any] = {name: getattr(self, name) for name in names}
        row |= {"looped_spills": self.looped_spills(), "serialized": self.serialized(), "loops": self.loops()}
        return row

    def looped_spills(self) -> int:
        """Instructions inside loops that read or write local memory. For AMD: 1 if the kernel has any local memory."""
        if self.target.startswith("gfx"):
            return int(self.spilled > 0)
        looped = [i for loop in self.program.loops for i in self.program.of(loop)]
        return sum(i.mnemonic in ("LDL", "STL") for i in looped)

    def serialized(self) -> bool:
        """Whether each product of some loop waits for the previous one."""
        return any(machine_code.serialized(self.program.of(loop)) for loop in self.program.loops)


UNITS = (*machine_code.UNITS, "integer")


class _Driver:
    """The answers of a device's driver that Triton needs to compile."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target.arch)

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling(target: str, launched: Callable[[Launch], object]) -> Iterator[None]:
    """Inside, operators compile their kernels for ``target`` instead of launching them. ``launched`` gets each launch.

    Raises:
        RuntimeError: Triton or its disassembler is missing, or Triton interprets kernels (``TRITON_INTERPRET=1``).
    """
    machine_code.tool("nvdisasm")
    import triton
    from triton.backends.compiler import GPUTarget

    from ..ops.triton_kernels import configurations, launch

    if launch.INTERPRETED:
        raise RuntimeError("kernels are interpreted, not compiled, under TRITON_INTERPRET=1")
    amd = target.startswith("gfx")
    arch = target if amd else int(target.removeprefix("sm_"))

    def compile_only(kernel, grid, *arguments, **options):
        options["enable_fp_fusion"] = True  # like launch.launch
        compiled = kernel.warmup(*arguments, grid=(grid,), **options)
        tiles = {name: value for name, value in options.items() if name.startswith(("BLOCK", "num_"))}
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        about = (target, kernel.fn.__name__.strip("_"), grid, named, tiles)
        launched(Launch(*about, compiled.metadata.shared, compiled.metadata.num_warps, *_read(compiled, amd)))

    replaced = {
        "launch": compile_only,
        "why_not": lambda tensor: None,
        "shared_memory": lambda device: TARGETS[target].program_shared * 1024,
        "multiprocessors": lambda device: TARGETS[target].multiprocessors,
        "tensor_memory": lambda device: target == "sm_100",
        "wgmma": lambda device: target == "sm_90",
    }
    before = {name: getattr(launch, name) for name in replaced}
    triton.runtime.driver.set_active(_Driver(GPUTarget("hip" if amd else "cuda", arch, 64 if amd else 32)))
    configurations.forget()  # the choices for another target
    try:
        for name, function in replaced.items():
            setattr(launch, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(launch, name, function)
        with contextlib.suppress(RuntimeError):  # a machine without a device has no other driver
            triton.runtime.driver.reset_active()
        configurations.forget()


def _read(compiled, amd: bool) -> tuple[Program, int, int]:
    """The machine code of a compiled kernel, its number of registers, and its bytes of local memory."""
    if not amd:
        return _read_nvidia(compiled.asm["cubin"])
    text = compiled.asm["amdgcn"]
    registers, spilled = (
        int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return machine_code.read_amd(text), registers, spilled


@functools.lru_cache(maxsize=256)
def _read_nvidia(cubin: bytes) -> tuple[Program, int, int]:
    program, usage = machine_code.disassembled(cubin)
    return program, usage["REG"], usage["STACK"] + usage["LOCAL"]
