"""The compiled CUDA extension: whether it is there, what it takes, and its operators on tensors they allocate.

``crate_kernels._C`` is built by ``setup.py`` from ``csrc/``; importing it registers ``torch.ops.crate_cuda``.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (16, 32, 48, 64, 80, 96, 128)
MAX_TOKENS = 272
MAX_COLUMNS = 2048
ALIGNMENT = 8
"""Elements in 16 bytes, what one thread moves at a time."""

WORKSPACE_BYTES = 32 << 20
"""For cuBLASLt; what it recommends on Hopper."""

PARTIAL_SUMS = 1024
"""Most blocks of a LayerNorm backward: fixed, so that gradients do not depend on the device's size."""

MISSING: str | None = None
"""Why the extension is not there."""
SHARED_BYTES: dict[int, tuple[int, ...]] = {}
ARCHITECTURES: tuple[str, ...] = ()
"""What the extension was built for: ``sm_90`` is machine code, ``compute_90`` what newer devices compile themselves."""

_NAME = f"{__package__.partition('.')[0]}._C"
if importlib.util.find_spec(_NAME) is None:
    MISSING = "the CUDA extension was not built"
else:
    try:
        ARCHITECTURES = tuple(importlib.import_module(_NAME).architectures.split())
        # Width -> shared memory of the larger of the two attention kernels, for 16, 32, ... MAX_TOKENS tokens.
        SHARED_BYTES = {
            width: tuple(
                max(torch.ops.crate_cuda.attention_shared_bytes(b, True, width, n) for b in (False, True))
                for n in range(16, MAX_TOKENS + 1, 16)
            )
            for width in WIDTHS
        }
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # another torch, or an older build
        MISSING = f"the CUDA extension does not load here: {error}"


def why_not(tensor: Tensor) -> str | None:
    """Why no kernel of the extension can run on ``tensor``, the first argument of an operator."""
    if MISSING is not None:
        return MISSING
    if tensor.dtype not in DTYPES:
        return f"the CUDA kernels take bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type != "cuda":
        return f"the CUDA kernels need a CUDA device; the tensors are on {tensor.device.type}"
    properties = torch.cuda.get_device_properties(tensor.device)
    if not runs_on(ARCHITECTURES, properties.major, properties.minor):
        return (
            f"the CUDA extension was built for {', '.join(ARCHITECTURES)}; the device is "
            f"sm_{properties.major}{properties.minor}"
        )
    return None


def runs_on(architectures: tuple[str, ...], major: int, minor: int) -> bool:
    """Whether a device of compute capability ``major.minor`` runs code built for ``architectures``.

    Machine code runs on the same major version from its minor on (``sm_90a`` on that version
    alone), intermediate code on everything from its version on.
    """
    for architecture in architectures:
        kind, _, version = architecture.partition("_")
        digits = version.rstrip("af")
        built = divmod(int(digits), 10)
        if version.endswith("a"):
            fits = built == (major, minor)
        elif kind == "sm":
            fits = built[0] == major and built[1] <= minor
        else:
            fits = built <= (major, minor)
        if fits:
            return True
    return False


def why_not_heads(w: Tensor, tokens: int, width: int) -> str | None:
    """Why no attention kernel can run on heads of ``tokens`` by ``width``; ``w`` names dtype and device."""
    reason = why_not(w)
    if reason is not None:
        return reason
    if width not in WIDTHS:
        return f"the CUDA attention is built for head widths {', '.join(map(str, WIDTHS))}; got {width}"
    if tokens > MAX_TOKENS:
        return f"the CUDA attention holds a whole head on chip, up to {MAX_TOKENS} tokens; got {tokens}"
    available = torch.cuda.get_device_properties(w.device).shared_memory_per_block_optin
    fitting = 16 * sum(size <= available for size in SHARED_BYTES[width])
    if tokens > fitting:
        return f"heads of width {width} fit the shared memory of this device up to {fitting} tokens; got {tokens}"
    return None


def why_not_columns(tensor: Tensor, *sizes: int) -> str | None:
    """Why LayerNorm and the products cannot run on rows of these ``sizes``."""
    reason = why_not(tensor)
    if reason is not None:
        return reason
    for size in sizes:
        if size % ALIGNMENT or size > MAX_COLUMNS:
            return f"the CUDA kernels take a multiple of {ALIGNMENT} channels, up to {MAX_COLUMNS}; got {size}"
    return None


def attention_forward(w: Tensor, lengths: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """``w (B, N, H, p)`` -> ``o (B, N, H, p)``, ``lse (B, H, N)``."""
    batch, tokens, heads, _ = w.shape
    o = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=w.device)
    torch.ops.crate_cuda.attention_forward(_aligned(w), o, lse, _int32(lengths), scale, causal)
    return o, lse


def attention_backward(
    grad: Tensor, w: Tensor, lengths: Tensor | None, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> Tensor:
    """-> ``dw (B, N, H, p)``."""
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    torch.ops.crate_cuda.attention_backward(
        _aligned(grad), _aligned(w), _packed(o), lse.contiguous(), dw, _int32(lengths), scale, causal
    )
    return dw


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``z (n, d)`` -> ``LN(z) (n, d)``, ``mean, rstd (n,)``."""
    x = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    mean = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    rstd = torch.empty_like(mean)
    torch.ops.crate_cuda.layer_norm_forward(_packed(z), *_float32(weight, bias), x, mean, rstd, eps)
    return x, mean, rstd


def layer_norm_again(
    z: Tensor, weight: Tensor, bias: Tensor, eps: float, grad: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``LN(z)`` once more, in the backward; with ``grad`` and ``out`` also ``grad`` where ``out > 0``, in one pass."""
    x = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    gated = None if grad is None else torch.empty_like(x)
    grad, out = (None if t is None else _packed(t) for t in (grad, out))
    torch.ops.crate_cuda.layer_norm_again(_packed(z), *_float32(weight, bias), x, grad, out, gated, eps)
    return x, gated


def layer_norm_backward(
    dx: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """-> ``dz (n, d)``, ``dweight, dbias (d,)`` in float32 and, with a ``residual``, which is added to dz, its sum over
    the rows."""
    rows, columns = z.shape
    sums = 2 if residual is None else 3
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    blocks = min((rows + 3) // 4, PARTIAL_SUMS)
    partial = torch.empty((blocks, sums, columns), dtype=torch.float32, device=z.device)
    total = torch.empty((sums, columns), dtype=torch.float32, device=z.device)
    residual = None if residual is None else _packed(residual)
    torch.ops.crate_cuda.layer_norm_backward(
        _packed(dx), _packed(z), mean.contiguous(), rstd.contiguous(), *_float32(weight), residual, dz, partial, total
    )
    # Tensors of their own: an operator's outputs may not share memory.
    return dz, *(row.clone() for row in total)


def product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    relu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``alpha·a b + c + bias``, then ReLU if asked, as one cuBLASLt call; either operand may be a transpose."""
    out = torch.empty((a.shape[0], b.shape[1]), dtype=dtype or a.dtype, device=a.device)
    c = None if c is None else c.contiguous()
    bias = None if bias is None else _packed(bias)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=a.device)
    torch.ops.crate_cuda.product(_matrix(a), _matrix(b), c, bias, out, workspace, alpha, 1.0, relu)
    return out


def _on_boundary(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def _packed(tensor: Tensor) -> Tensor:
    """Contiguous, beginning on a 16-byte boundary."""
    if tensor.is_contiguous() and _on_boundary(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _aligned(heads: Tensor) -> Tensor:
    """``heads`` if each row begins on a 16-byte boundary and is contiguous, else a copy."""
    *strides, last = heads.stride()
    if last == 1 and not any(s % ALIGNMENT for s in strides) and _on_boundary(heads):
        return heads
    return heads.clone(memory_format=torch.contiguous_format)


def _matrix(tensor: Tensor) -> Tensor:
    """``tensor`` if it is row-major, or the transpose of a row-major matrix, else a copy."""
    rows, columns = tensor.shape
    row_major = tensor.stride(1) == 1 and tensor.stride(0) >= columns
    column_major = tensor.stride(0) == 1 and tensor.stride(1) >= rows
    return tensor if row_major or column_major else tensor.contiguous()


def _int32(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else _packed(lengths.to(torch.int32))


def _float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(_packed(t.to(torch.float32)) for t in tensors)
