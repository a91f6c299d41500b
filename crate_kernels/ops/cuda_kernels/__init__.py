"""The CUDA library: whether it is available, which inputs it accepts, and its kernels on torch tensors.

``csrc/cuda`` compiles to ``crate_kernels/_cuda.so``. ``csrc/cuda/interface.h`` documents its functions. The functions
here enqueue kernels on the current stream of the tensors' device.
"""

from __future__ import annotations

import functools
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from .. import libraries

FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (16, 32, 48, 64, 80, 96, 128)
MAX_TOKENS = 272
MAX_COLUMNS = 2048
ALIGNMENT = 8
"""Elements in 16 bytes, the largest access of one thread."""

WORKSPACE_BYTES = 32 << 20
"""Workspace of cuBLASLt, as NVIDIA recommends for Hopper."""

PARTIAL_SUMS = 1024
"""Largest number of blocks of a LayerNorm backward. It is fixed, so that gradients do not depend on the device's
size."""

INTERFACE = 3
"""The number of the C interface that this file uses. ``interface.cpp`` has that of the library."""

FUNCTIONS = {
    "error": (c_char_p,),
    "missing": (c_char_p,),
    "product_missing": (c_char_p,),
    "attention_shared_bytes": (c_int, c_int, c_int, c_int),
    "attention_forward": (c_int, *4 * [c_void_p], *3 * [c_int64], *5 * [c_int], c_double, c_int, c_void_p),
    "attention_backward": (c_int, *6 * [c_void_p], *6 * [c_int64], *5 * [c_int], c_double, c_int, c_void_p),
    "layer_norm_forward": (c_int, *11 * [c_void_p], c_int64, *4 * [c_int], c_double, c_void_p),
    "layer_norm_backward": (c_int, *11 * [c_void_p], c_int64, *3 * [c_int], c_void_p),
    "product": (
        c_int, *5 * [c_void_p], *3 * [c_int64], *2 * [c_int64, c_int], *2 * [c_int64], *2 * [c_int], c_double, c_int,
        c_void_p, c_int64, c_int, c_void_p,
    ),
}  # fmt: skip
"""The functions of ``interface.h``: result and arguments. A test compares them with the header."""

try:
    LIBRARY, MISSING = libraries.load("cuda", INTERFACE, FUNCTIONS), None
except libraries.Missing as reason:
    LIBRARY, MISSING = None, str(reason)

ARCHITECTURES: tuple[str, ...] = tuple(libraries.record().get("cuda", {}).get("architectures", ()))
"""Targets of the build: ``sm_90`` is machine code, ``compute_90`` is code that newer devices compile themselves."""


# -- what can run ----------------------------------------------------------------------------------------------------


def why_not(tensor: Tensor) -> str | None:
    """The reason why no kernel of the library can run with ``tensor``, an operand of the tensor cores; None if one
    can."""
    if MISSING is not None:
        return MISSING
    if tensor.dtype not in DTYPES:
        return f"the CUDA kernels take bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type != "cuda":
        return f"the CUDA kernels need a CUDA device; the tensors are on {tensor.device.type}"
    return _why_not_device(tensor.device)


@functools.cache
def _why_not_device(device: torch.device) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    if not runs_on(ARCHITECTURES, properties.major, properties.minor):
        return (
            f"the CUDA library was built for {', '.join(ARCHITECTURES)}; the device is "
            f"sm_{properties.major}{properties.minor}"
        )
    return _text(LIBRARY.crate_cuda_missing())


@functools.cache
def _most_tokens(device: torch.device, width: int) -> int:
    """The number of tokens of a head of this width that fit the shared memory of a block."""
    available = torch.cuda.get_device_properties(device).shared_memory_per_block_optin

    def size(tokens: int) -> int:
        return max(LIBRARY.crate_cuda_attention_shared_bytes(backward, width, tokens) for backward in (0, 1))

    return 16 * sum(size(n) <= available for n in range(16, MAX_TOKENS + 1, 16))


def runs_on(architectures: tuple[str, ...], major: int, minor: int) -> bool:
    """Whether a device of compute capability ``major.minor`` runs code built for ``architectures``.

    Machine code runs on the same major version, from its minor version on (``sm_90a`` only on that version).
    Intermediate code runs on everything from its version on.
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
    """The reason why no attention kernel can run on heads of ``tokens`` by ``width``. ``w`` gives dtype and device."""
    reason = why_not(w)
    if reason is not None:
        return reason
    if width not in WIDTHS:
        return f"the CUDA attention is built for head widths {', '.join(map(str, WIDTHS))}; got {width}"
    if tokens > MAX_TOKENS:
        return f"the CUDA attention holds a whole head on chip, up to {MAX_TOKENS} tokens; got {tokens}"
    fitting = _most_tokens(w.device, width)
    if tokens > fitting:
        return f"heads of width {width} fit the shared memory of this device up to {fitting} tokens; got {tokens}"
    return None


def why_not_columns(stream: Tensor, matrix: Tensor, *sizes: int) -> str | None:
    """The reason why LayerNorm and the products cannot run on rows of these ``sizes``; None if they can.

    ``stream`` has the rows of the residual stream, which may be float32 with a narrower ``matrix``.
    """
    reason = why_not(matrix) or _text(LIBRARY.crate_cuda_product_missing())
    if reason is not None:
        return reason
    if stream.dtype not in (matrix.dtype, torch.float32):
        return f"the CUDA kernels take {matrix.dtype} matrices beside rows in float32 or the same, not {stream.dtype}"
    for size in sizes:
        if size % ALIGNMENT or size > MAX_COLUMNS:
            return f"the CUDA kernels take a multiple of {ALIGNMENT} channels, up to {MAX_COLUMNS}; got {size}"
    return None


# -- kernels ---------------------------------------------------------------------------------------------------------


def attention_forward(w: Tensor, lengths: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """``w (B, N, H, p)`` -> ``o (B, N, H, p)``, ``lse (B, H, N)``."""
    batch, tokens, heads, width = w.shape
    w, lengths = _aligned(w), _int32(lengths)
    o = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=w.device)
    _enqueue(
        "attention_forward", w, *_pointers(w, o, lse, lengths), *w.stride()[:3], batch, tokens, heads, width,
        FORMATS[w.dtype], scale, causal,
    )  # fmt: skip
    return o, lse


def attention_backward(
    grad: Tensor, w: Tensor, lengths: Tensor | None, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> Tensor:
    """-> ``dw (B, N, H, p)``."""
    batch, tokens, heads, width = w.shape
    _expect(w, (batch, tokens, heads, width), grad=grad, o=o)
    grad, w, o, lse, lengths = _aligned(grad), _aligned(w), _packed(o), lse.contiguous(), _int32(lengths)
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    _enqueue(
        "attention_backward", w, *_pointers(grad, w, o, lse, dw, lengths), *grad.stride()[:3], *w.stride()[:3], batch,
        tokens, heads, width, FORMATS[w.dtype], scale, causal,
    )  # fmt: skip
    return dw


def layer_norm(
    z: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, *, wide: bool = False
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """``z (n, d)`` -> ``x = LN(z) (n, d)`` in ``dtype``, ``x`` in the dtype of z, ``mean, rstd (n,)``.

    ``dtype`` is that of the products that read ``x``. z has the same dtype or float32. If both dtypes are equal, the
    second result is ``x`` itself. Otherwise it is None unless ``wide`` requests it.
    """
    mean = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    rstd = torch.empty_like(mean)
    x, x_wide, _, _ = _layer_norm(z, weight, bias, mean, rstd, None, None, dtype, wide, False, eps)
    return x, x_wide, mean, rstd


def layer_norm_again(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    grad: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Recompute ``x = LN(z)`` in ``dtype`` in the backward, from the statistics that the forward saved.

    With ``grad`` and ``out`` the same pass also computes ``grad`` where ``out > 0``, else 0, in ``dtype`` and in the
    dtype of z.
    """
    _expect(z, z.shape, grad=grad, out=out)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    x, _, gated, gated_wide = _layer_norm(z, weight, bias, mean, rstd, grad, out, dtype, grad is not None, True, 0.0)
    return x, gated, gated_wide


def _layer_norm(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor | None,
    out: Tensor | None,
    dtype: torch.dtype,
    wide: bool,
    known: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """-> ``x, x_wide, gated, gated_wide``; None for those that were not requested."""
    z, weight, bias = _packed(z), _float32(weight), _float32(bias)
    gates = grad is not None
    if gates:
        grad, out = _packed(grad), _packed(out)

    def rows(dtype: torch.dtype, wanted: bool = True) -> Tensor | None:
        return torch.empty(z.shape, dtype=dtype, device=z.device) if wanted else None

    x, gated = rows(dtype), rows(dtype, gates)
    both = wide and z.dtype != dtype
    x_wide, gated_wide = rows(z.dtype, both and not gates), rows(z.dtype, both and gates)
    pointers = _pointers(z, weight, bias, x, x_wide, mean, rstd, grad, out, gated, gated_wide)
    _enqueue("layer_norm_forward", z, *pointers, *z.shape, FORMATS[dtype], FORMATS[z.dtype], known, eps)
    if wide and z.dtype == dtype:
        x_wide, gated_wide = x, gated
    return x, x_wide, gated, gated_wide


def layer_norm_backward(
    dx: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """-> ``dz (n, d)``, ``dweight, dbias (d,)`` in float32 and, with a ``residual``, which is added to dz, its sum over
    the rows. All rows have the dtype of z."""
    rows, columns = z.shape
    _expect(z, z.shape, dx=dx, residual=residual)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    # Separate tensors, because outputs of an operator must not share memory.
    sums = [torch.empty(columns, dtype=torch.float32, device=z.device) for _ in range(2 if residual is None else 3)]
    blocks = min((rows + 3) // 4, PARTIAL_SUMS)
    partial = torch.empty((blocks, len(sums), columns), dtype=torch.float32, device=z.device)
    dx, z, mean, rstd, weight = _packed(dx), _packed(z), mean.contiguous(), rstd.contiguous(), _float32(weight)
    residual = None if residual is None else _packed(residual)
    pointers = _pointers(dx, z, mean, rstd, weight, residual, dz, partial, *sums, *(3 - len(sums)) * [None])
    _enqueue("layer_norm_backward", z, *pointers, rows, columns, blocks, FORMATS[z.dtype])
    return dz, *sums


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
    """``alpha·a b + c + bias`` in ``dtype`` or that of ``a``, then ReLU if requested, as one cuBLASLt call.

    Either operand may be a transposed view. ``c`` and ``bias`` have the dtype of the result.
    """
    if relu and not _relu_keeps_nan(a.device, a.dtype, dtype or a.dtype):
        return _product(a, b, c, bias, alpha, False, dtype).relu_()
    return _product(a, b, c, bias, alpha, relu, dtype)


def _relu_keeps_nan(device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype) -> bool:
    """Whether NaN survives the ReLU of cuBLASLt. A non-finite result must not look finite.

    NVIDIA does not document it, so the first product of its kind on a device tests it. Values cannot be read while a
    graph is
    captured: the safe route is then taken, and a later call tests it.
    """
    kind = device, dtype, out_dtype
    if kind not in _NAN_KEPT:
        if torch.cuda.is_current_stream_capturing():
            return False
        nan = torch.full((16, 16), torch.nan, dtype=dtype, device=device)
        _NAN_KEPT[kind] = bool(_product(nan, nan, None, nan[0].to(out_dtype), 1.0, True, out_dtype).isnan().all())
    return _NAN_KEPT[kind]


_NAN_KEPT: dict[tuple[torch.device, torch.dtype, torch.dtype], bool] = {}


def _product(
    a: Tensor, b: Tensor, c: Tensor | None, bias: Tensor | None, alpha: float, relu: bool, dtype: torch.dtype | None
) -> Tensor:
    out = torch.empty((a.shape[0], b.shape[1]), dtype=dtype or a.dtype, device=a.device)
    (a, *a_storage), (b, *b_storage) = _matrix(a), _matrix(b)
    _expect(a, (a.shape[1], out.shape[1]), b=b)
    if c is not None:
        _expect(out, out.shape, c=c)
        c = c.contiguous()
    if bias is not None:
        _expect(out, out.shape[1:], bias=bias)
        bias = _packed(bias)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=a.device)
    _enqueue(
        "product", out, *_pointers(a, b, c, bias, out), *out.shape, a.shape[1], *a_storage, *b_storage, out.shape[1],
        out.shape[1], FORMATS[a.dtype], FORMATS[out.dtype], alpha, relu, workspace.data_ptr(), WORKSPACE_BYTES,
        out.get_device(),
    )  # fmt: skip
    return out


# -- tensors as the library takes them -------------------------------------------------------------------------------


def _enqueue(function: str, tensor: Tensor, *arguments) -> None:
    """Call a function of the library. The device and the stream of ``tensor`` are current during the call."""
    with torch.cuda.device_of(tensor):
        status = getattr(LIBRARY, f"crate_cuda_{function}")(*arguments, _stream(tensor.device))
    if status:
        raise RuntimeError(_text(LIBRARY.crate_cuda_error()))


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _text(text: bytes | None) -> str | None:
    return None if text is None else text.decode()


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def _expect(like: Tensor, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Check what a kernel cannot check: the tensors have this shape, and the dtype and the device of ``like``."""
    for name, tensor in tensors.items():
        if tensor is None or (tensor.shape == shape and tensor.dtype == like.dtype and tensor.device == like.device):
            continue
        raise ValueError(
            f"{name}: expected {tuple(shape)} in {like.dtype} on {like.device}, got {tuple(tensor.shape)} in "
            f"{tensor.dtype} on {tensor.device}"
        )


def _on_boundary(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def _packed(tensor: Tensor) -> Tensor:
    """A contiguous tensor that begins on a 16-byte boundary: the tensor itself or a copy."""
    if tensor.is_contiguous() and _on_boundary(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _aligned(heads: Tensor) -> Tensor:
    """``heads`` if each row begins on a 16-byte boundary and is contiguous, else a copy."""
    *strides, last = heads.stride()
    if last == 1 and not any(s % ALIGNMENT for s in strides) and _on_boundary(heads):
        return heads
    return heads.clone(memory_format=torch.contiguous_format)


def _matrix(tensor: Tensor) -> tuple[Tensor, int, bool]:
    """``tensor``, the stride of its stored rows, and whether its transpose is stored.

    The tensor is copied if neither the matrix nor its transpose is row-major.
    """
    rows, columns = tensor.shape
    # The stride of a matrix with one row or one column can be anything.
    row, column = tensor.stride()
    if column == 1 and (row >= columns or rows == 1):
        return tensor, max(row, columns), False
    if row == 1 and (column >= rows or columns == 1):
        return tensor, max(column, rows), True
    return tensor.contiguous(), columns, False


def _int32(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else _packed(lengths.to(torch.int32))


def _float32(tensor: Tensor) -> Tensor:
    return _packed(tensor.to(torch.float32))
