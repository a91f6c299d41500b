"""The compiled CPU library: whether it is there, what it takes, and its operators on tensors that are allocated here.

``crate_kernels/_cpu.so`` is built by ``setup.py`` from ``csrc/cpu``. The library knows neither torch nor Python: a call
passes one structure of numbers and pointers (``csrc/cpu/interface.h``), and the library runs on torch's own threads.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "CRATE_KERNELS_CPU_ISA"

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_WIDTH = 256
"""Largest head width: the blocks of a wider head would leave the cache."""

MISSING: str | None = None
"""Why the library is not there."""
BUILT: tuple[str, ...] = ()
"""The instruction sets that the library was built for, slowest first."""
ISA: str | None = None
"""The instruction set that runs."""

# The structures of interface.h as formats of the module struct: q is an integer or a pointer, d a double.
_ATTENTION_SHAPE = "qqqqqqdq"
_HEADS = "qqqqq"
_ARRAY = "qqq"
_NORM = _ARRAY + _ARRAY + "d"
_LAYER_SHAPE = _ATTENTION_SHAPE + "qddd"
_LAYER_WEIGHTS = _NORM + 3 * _ARRAY + _NORM + 2 * _ARRAY + "qqq"
_ABSENT = (0, 0, 0)


class _Function:
    """One C function, called with the fields of its structure."""

    def __init__(self, library: ctypes.CDLL, name: str, layout: str):
        self._pack = Struct(layout).pack
        self._call = getattr(library, f"crate_cpu_{name}")
        self._call.argtypes = [ctypes.c_char_p]
        self._error = library.crate_cpu_error

    def __call__(self, *fields):
        if self._call(self._pack(*fields)):
            raise RuntimeError(f"the CPU kernels failed: {self._error().decode()}")


def _open(path: Path, isa: str | None) -> tuple[ctypes.CDLL, str]:
    library = ctypes.CDLL(str(path))
    library.crate_cpu_open.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p]
    library.crate_cpu_open.restype = library.crate_cpu_error.restype = library.crate_cpu_built.restype = ctypes.c_char_p
    parallel, threads = _torch_functions()
    name = library.crate_cpu_open(parallel, threads, (isa or "").encode())
    if name is None:
        runnable = library.crate_cpu_built(1).decode() or "none"
        wanted = f"{ENVIRONMENT_VARIABLE}={isa}: " if isa else ""
        raise OSError(
            f"{wanted}built instruction sets that run on this processor: {runnable} "
            f"(built: {library.crate_cpu_built(0).decode()})"
        )
    return library, name.decode()


def _torch_functions() -> tuple[int | None, int | None]:
    """Addresses of torch's own parallel loop, which obeys ``torch.set_num_threads``."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        torch_library = ctypes.CDLL(str(path))
        try:
            functions = torch_library.torch_parallel_for, torch_library.torch_get_num_threads
        except AttributeError:
            continue
        return tuple(ctypes.cast(f, ctypes.c_void_p).value for f in functions)
    raise OSError("this torch does not export torch_parallel_for, on whose threads the CPU kernels run")


try:
    _path = Path(__file__).parents[2] / "_cpu.so"
    if not _path.exists():
        raise OSError("the library was not built")
    _library, ISA = _open(_path, os.environ.get(ENVIRONMENT_VARIABLE) or None)
    BUILT = tuple(_library.crate_cpu_built(0).decode().split())
    RUNNABLE = tuple(_library.crate_cpu_built(1).decode().split())
    _library.crate_cpu_packed_bytes.argtypes = [ctypes.c_char_p]
    _library.crate_cpu_packed_bytes.restype = ctypes.c_int64
    _packed_size = Struct("qqq").pack
    _pack = _Function(_library, "pack", _ARRAY + "qqqqq")
    _fold = _Function(_library, "fold", "qq" + 2 * _ARRAY)
    _attention_forward = _Function(_library, "attention_forward", _ATTENTION_SHAPE + 3 * _HEADS + "q")
    _attention_backward = _Function(
        _library, "attention_backward", _ATTENTION_SHAPE + 4 * _HEADS + "q" + 2 * _HEADS
    )
    _layer_forward = _Function(
        _library, "layer_forward", _LAYER_SHAPE + _LAYER_WEIGHTS + 3 * _ARRAY + "q" + 2 * _ARRAY + "qqqqq"
    )
    _layer_backward = _Function(
        _library,
        "layer_backward",
        _LAYER_SHAPE + _LAYER_WEIGHTS + 4 * _ARRAY + "q" + 2 * _ARRAY + "qqqq" + 9 * _ARRAY + "q",
    )
    _overcomplete_forward = _Function(_library, "overcomplete_forward", "qqqddq" + 6 * _ARRAY)
    _overcomplete_backward = _Function(_library, "overcomplete_backward", "qqqdq" + 9 * _ARRAY)
except (OSError, AttributeError) as error:
    MISSING = f"the CPU kernels are not there: {error}"


def why_not(*tensors: Tensor | None) -> str | None:
    """Why no kernel of the library can run on these tensors."""
    if MISSING is not None:
        return MISSING
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"the CPU kernels need tensors on the CPU; one is on {tensor.device.type}"
        if tensor.dtype not in TYPES:
            accepted = ", ".join(str(d).removeprefix("torch.") for d in TYPES)
            return f"the CPU kernels take {accepted}, not {str(tensor.dtype).removeprefix('torch.')}"
    return None


def why_not_heads(width: int) -> str | None:
    """Why no attention kernel can run on heads of this width."""
    if width > MAX_WIDTH:
        return f"the CPU attention takes heads of width {MAX_WIDTH} and below; got {width}"
    return None


def _rows(t: Tensor | None) -> tuple[int, int, int]:
    """A matrix or a batch of rows with a contiguous last axis, as an Array."""
    if t is None:
        return _ABSENT
    return t.data_ptr(), TYPES[t.dtype], t.stride(-2) if t.dim() > 1 else 0


def rows_first(t: Tensor) -> Tensor:
    """``t`` with a contiguous last axis and rows at one distance from each other; a copy where that is not so."""
    return t if t.is_contiguous() else t.contiguous()


def _heads(t: Tensor | None) -> tuple[int, int, int, int, int]:
    if t is None:
        return 0, 0, 0, 0, 0
    batch, tokens, heads, _ = t.stride()
    return t.data_ptr(), TYPES[t.dtype], batch, tokens, heads


def _last_contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _int64(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def low_precision(dtype: torch.dtype) -> int:
    """Whether products round their operands to bfloat16: where the operands are bfloat16 already."""
    return int(dtype == torch.bfloat16)


def attention_forward(
    w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """``w, value (B, N, H, p)`` -> ``o (B, N, H, p)`` contiguous and ``lse (B, H, N)`` float32."""
    batch, tokens, heads, width = w.shape
    w, value, lengths = _last_contiguous(w), _last_contiguous(value), _int64(lengths)
    o = torch.empty((batch, tokens, heads, width), dtype=w.dtype)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32)
    _attention_forward(
        batch, tokens, heads, width, _pointer(lengths), causal, scale, low_precision(w.dtype),
        *_heads(w), *_heads(value), *_heads(o), lse.data_ptr(),
    )  # fmt: skip
    return o, lse


def attention_backward(
    grad: Tensor,
    w: Tensor,
    value: Tensor | None,
    lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """-> ``(dw, dvalue)``; ``dvalue`` is None without a separate value, its part is then in ``dw``."""
    batch, tokens, heads, width = w.shape
    grad, w, value, o = (_last_contiguous(t) for t in (grad, w, value, o))
    lengths = _int64(lengths)
    dw = torch.empty((batch, tokens, heads, width), dtype=w.dtype)
    dvalue = None if value is None else torch.empty_like(dw)
    _attention_backward(
        batch, tokens, heads, width, _pointer(lengths), causal, scale, low_precision(w.dtype),
        *_heads(w), *_heads(value), *_heads(grad), *_heads(o), lse.data_ptr(), *_heads(dw), *_heads(dvalue),
    )  # fmt: skip
    return dw, dvalue


class Layer:
    """The parameters of a layer, or of one of its halves, as the library takes them; computes forward and backward.

    ``halves``: 1 for the attention half, 2 for the ISTA half, 3 for both. A parameter of the other half is None. Without
    ``ista_norm_weight`` the ISTA half is the step alone.
    """

    def __init__(
        self,
        halves: int,
        *,
        mssa_norm_weight: Tensor | None = None,
        mssa_norm_bias: Tensor | None = None,
        u_weight: Tensor | None = None,
        out_weight: Tensor | None = None,
        out_bias: Tensor | None = None,
        ista_norm_weight: Tensor | None = None,
        ista_norm_bias: Tensor | None = None,
        weight: Tensor | None = None,
        folded: Tensor | None = None,
        lengths: Tensor | None = None,
        heads: int = 1,
        scale: float = 1.0,
        causal: bool = False,
        mssa_step_size: float = 1.0,
        step_size: float = 0.0,
        lambd: float = 0.0,
        mssa_eps: float = 0.0,
        ista_eps: float = 0.0,
        compute: torch.dtype = torch.float32,
    ):
        # Kept here as well: the library is given addresses, and a copy made below must live through the call.
        self.tensors = [
            _last_contiguous(t)
            for t in (
                mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias,
                ista_norm_weight, ista_norm_bias, weight, folded, _int64(lengths),
            )
        ]  # fmt: skip
        self.halves, self.heads, self.scale, self.causal = halves, heads, scale, causal
        self.steps = mssa_step_size, step_size, lambd
        self.eps = mssa_eps, ista_eps
        self.compute = compute
        self.inner = u_weight.shape[0] if halves & 1 else 0

    def _shape(self, batch: int, tokens: int, width: int) -> tuple:
        lengths = self.tensors[9]
        return (
            batch, tokens, self.heads, self.inner // self.heads, _pointer(lengths), self.causal, self.scale,
            low_precision(self.compute), width, *self.steps,
        )  # fmt: skip

    def _weights(self, packed=(0, 0, 0)) -> tuple:
        norm_1, bias_1, u, out, out_bias, norm_2, bias_2, weight, folded = map(_rows, self.tensors[:9])
        mssa_eps, ista_eps = self.eps
        return (*norm_1, *bias_1, mssa_eps, *u, *out, *out_bias, *norm_2, *bias_2, ista_eps, *weight, *folded, *packed)

    def forward(self, z: Tensor, packed=(0, 0, 0)) -> tuple[Tensor | None, ...]:
        """``z (B, N, d)`` contiguous -> ``out, w, o, lse, mean_1, rstd_1, middle, mean_2, rstd_2``.

        ``w, o (B, N, H, p)`` in the dtype of computation, ``lse (B, H, N)``, statistics ``(B, N)``, all float32;
        ``middle (B, N, d)`` are the tokens between the halves. What the halves do not need is None.
        """
        batch, tokens, width = z.shape
        out = torch.empty(z.shape, dtype=z.dtype)
        w = o = lse = mean_1 = rstd_1 = mean_2 = rstd_2 = None
        middle = z
        if self.halves & 1:
            w = torch.empty((batch, tokens, self.heads, self.inner // self.heads), dtype=self.compute)
            o = torch.empty_like(w)
            lse = torch.empty((batch, self.heads, tokens), dtype=torch.float32)
            mean_1, rstd_1 = torch.empty((2, batch, tokens), dtype=torch.float32)
            middle = torch.empty(z.shape, dtype=z.dtype) if self.halves & 2 else out
        if self.halves & 2:
            mean_2, rstd_2 = torch.empty((2, batch, tokens), dtype=torch.float32)
        heads = (lambda t: _ABSENT if t is None else (t.data_ptr(), TYPES[t.dtype], self.inner))
        _layer_forward(
            *self._shape(batch, tokens, width), *self._weights(packed), *_rows(z), *heads(w), *heads(o), _pointer(lse),
            *_rows(middle), *_rows(out), *map(_pointer, (mean_1, rstd_1, mean_2, rstd_2)), self.halves,
        )  # fmt: skip
        return out, w, o, lse, mean_1, rstd_1, middle, mean_2, rstd_2

    def backward(self, grad: Tensor, z, w, o, lse, mean_1, rstd_1, middle, mean_2, rstd_2, out) -> list[Tensor | None]:
        """-> ``dz`` and the gradients of the eight parameters in the order of the constructor; None where absent."""
        reference = middle if z is None else z
        batch, tokens, width = reference.shape
        dz = torch.empty(reference.shape, dtype=reference.dtype)
        parameters = self.tensors[:8]
        gradients = [None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in parameters]
        heads = (lambda t: _ABSENT if t is None else (t.data_ptr(), TYPES[t.dtype], self.inner))
        _layer_backward(
            *self._shape(batch, tokens, width), *self._weights(), *_rows(grad), *_rows(z), *heads(w), *heads(o),
            _pointer(lse), *_rows(middle), *_rows(out), *map(_pointer, (mean_1, rstd_1, mean_2, rstd_2)),
            *_rows(dz), *(field for t in gradients for field in _rows(t)), self.halves,
        )  # fmt: skip
        return [dz, *gradients]
