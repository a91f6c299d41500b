"""The devices on which Triton kernels can run, and their launch."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""True under ``TRITON_INTERPRET=1``. Triton's interpreter then runs the kernels, also on CPU tensors."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(tensor: Tensor) -> str | None:
    """The reason why no Triton kernel can run on ``tensor``, the first argument of an operator; None if one can."""
    if tensor.dtype not in DTYPES:
        return f"Triton kernels compute in float32 and do not take {str(tensor.dtype).removeprefix('torch.')}"
    device = tensor.device
    if INTERPRETED and device.type in ("cpu", "cuda"):
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA or ROCm device, or TRITON_INTERPRET=1; the tensors are on {device.type}"
    if torch.version.hip is None:
        major, minor = _properties(device).major, _properties(device).minor
        if major < 8:
            return f"Triton kernels need compute capability 8.0; {device} has {major}.{minor}"
    return None


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def launch(kernel, grid: int, tensor: Tensor, *arguments, **options):
    """Run ``kernel`` with ``grid`` programs on the device of ``tensor``, its first argument."""
    # The kernels need fused multiply-adds. Triton's own default differs between versions.
    options["enable_fp_fusion"] = True
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[(grid,)](tensor, *arguments, **options)
    else:
        kernel[(grid,)](tensor, *arguments, **options)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``. Float32 is multiplied as tf32 only if torch's own flag allows it."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 64 * 1024
    properties = _properties(device)
    return properties.shared_memory_per_block if torch.version.hip else properties.shared_memory_per_block_optin


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of the device. The interpreter gets a small number."""
    return _properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def wgmma(device: torch.device) -> bool:
    """Whether products are ``wgmma`` instructions (Hopper)."""
    return device.type == "cuda" and torch.version.hip is None and _properties(device).major == 9


@functools.cache
def tensor_memory(device: torch.device) -> bool:
    """Whether products are summed in tensor memory (data-center Blackwell).

    There Triton 3.6 to 3.8 may miscompile two products per iteration that are chained through one accumulator.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return _properties(device).major == 10


def unit_stride(tensor: Tensor) -> Tensor:
    """``tensor`` itself if its last axis is dense, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
