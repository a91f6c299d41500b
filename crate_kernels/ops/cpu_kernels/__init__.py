"""The compiled CPU library: whether it is available, which inputs it accepts, and its operators on torch tensors.

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

from .. import libraries
from ..kept import kept

ENVIRONMENT_VARIABLE = "CRATE_KERNELS_CPU_ISA"

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_WIDTH = 256
"""Largest head width. The blocks of a wider head would not fit the cache."""

INTERFACE = 2
"""The number of the C interface that this file speaks; ``csrc/cpu/interface.h`` holds that of the library."""
FUNCTIONS: dict[str, tuple] = {
    "open": (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
    "built": (ctypes.c_char_p, ctypes.c_int32),
    "error": (ctypes.c_char_p,),
    "packed_bytes": (ctypes.c_int64, ctypes.c_char_p),
}
"""Result and arguments of the functions that take no structure."""

MISSING: str | None = None
"""The reason why the library is not available."""
BUILT: tuple[str, ...] = ()
"""The instruction sets that the library was built for, slowest first."""
RUNNABLE: tuple[str, ...] = ()
"""The instruction sets of these that this processor runs."""
ISA: str | None = None
"""The instruction set in use."""

# The structures of interface.h as formats of the module struct: q is an integer or a pointer, d a double.
_ATTENTION_SHAPE = "qqqqqqdqq"
_HEADS = "qqqqq"
_ARRAY = "qqq"
_NORM = _ARRAY + _ARRAY + "d"
_LAYER_SHAPE = _ATTENTION_SHAPE + "qddd"
_LAYER_WEIGHTS = _NORM + 3 * _ARRAY + _NORM + 2 * _ARRAY + "qqq"
_ABSENT = (0, 0, 0)


class _Function:
    """One C function, called with the fields of its structure."""

    def __init__(self, library: ctypes.CDLL, name: str, layout: str):
        fields = Struct(layout)
        size = getattr(library, f"crate_cpu_{name}_bytes")
        size.restype = ctypes.c_int64
        if size() != fields.size:
            raise OSError("the library was built from other sources than this package: install the package again")
        self._pack = fields.pack
        self._call = getattr(library, f"crate_cpu_{name}")
        self._call.argtypes = [ctypes.c_char_p]
        self._error = library.crate_cpu_error

    def __call__(self, *fields):
        if self._call(self._pack(*fields)):
            raise RuntimeError(f"the CPU kernels failed: {self._error().decode()}")


def _open(isa: str | None) -> tuple[ctypes.CDLL, str]:
    library = libraries.load("cpu", INTERFACE, FUNCTIONS)
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
    _library, ISA = _open(os.environ.get(ENVIRONMENT_VARIABLE) or None)
    BUILT = tuple(_library.crate_cpu_built(0).decode().split())
    RUNNABLE = tuple(_library.crate_cpu_built(1).decode().split())
    _packed_size = Struct("qqq").pack
    _pack = _Function(_library, "pack", _ARRAY + "qqqqq")
    _fold = _Function(_library, "fold", "qq" + 2 * _ARRAY)
    _attention_forward = _Function(_library, "attention_forward", _ATTENTION_SHAPE + 3 * _HEADS + "q")
    _attention_backward = _Function(_library, "attention_backward", _ATTENTION_SHAPE + 4 * _HEADS + "q" + 2 * _HEADS)
    _layer = _LAYER_SHAPE + _LAYER_WEIGHTS + "q"
    _layer_forward = _Function(_library, "layer_forward", _layer + 3 * _ARRAY + "q" + 2 * _ARRAY + "qqqq")
    _layer_backward = _Function(_library, "layer_backward", _layer + 5 * _ARRAY + "q" + _ARRAY + "qqqq" + 9 * _ARRAY)
    _overcomplete_forward = _Function(_library, "overcomplete_forward", "qqqddq" + 6 * _ARRAY)
    _overcomplete_backward = _Function(_library, "overcomplete_backward", "qqqdq" + 9 * _ARRAY)
except (libraries.Missing, OSError, AttributeError) as error:
    MISSING = f"the CPU kernels are not there: {error}"


def use_instruction_set(name: str | None) -> None:
    """Run the kernels of another instruction set from now on. None takes the fastest. For tests and measurements.

    Packed weights have the order of the instruction set that packed them, so they must be packed again.
    """
    global ISA
    _, ISA = _open(name)


def why_not(*tensors: Tensor | None) -> str | None:
    """The reason why no kernel of the library can run on these tensors; None if one can."""
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
    """The reason why no attention kernel can run on heads of this width; None if one can."""
    if width > MAX_WIDTH:
        return f"the CPU attention takes heads of width {MAX_WIDTH} and below; got {width}"
    return None


def _rows(t: Tensor | None) -> tuple[int, int, int]:
    """A matrix or a batch of rows with a contiguous last axis, as an Array of ``interface.h``."""
    if t is None:
        return _ABSENT
    return t.data_ptr(), TYPES[t.dtype], t.stride(-2) if t.dim() > 1 else 0


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
    """Whether products round their operands to bfloat16. They do if the operands are already bfloat16."""
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
        batch, tokens, heads, width, _pointer(lengths), causal, scale, low_precision(w.dtype), 0,
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
    """-> ``(dw, dvalue)``. Without a separate value, ``dvalue`` is None and its part is included in ``dw``."""
    batch, tokens, heads, width = w.shape
    grad, w, value, o = (_last_contiguous(t) for t in (grad, w, value, o))
    lengths = _int64(lengths)
    dw = torch.empty((batch, tokens, heads, width), dtype=w.dtype)
    dvalue = None if value is None else torch.empty_like(dw)
    _attention_backward(
        batch, tokens, heads, width, _pointer(lengths), causal, scale, low_precision(w.dtype), 0,
        *_heads(w), *_heads(value), *_heads(grad), *_heads(o), lse.data_ptr(), *_heads(dw), *_heads(dvalue),
    )  # fmt: skip
    return dw, dvalue


def cross_attention_forward(
    w: Tensor, context: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``w (B, N, H, p)``, ``context, value (B, M, H, p)`` -> ``o (B, N, H, p)`` and ``lse (B, H, M + N)`` float32.

    The kernel takes the keys and the queries as one sequence. The first M columns of ``lse`` are zeros.
    """
    tokens, value = torch.cat([context, w], 1), _after(value, w)
    batch, length, heads, width = tokens.shape
    keys, lengths = context.shape[1], _int64(lengths)
    o = torch.empty(w.shape, dtype=w.dtype)
    lse = torch.zeros((batch, heads, length), dtype=torch.float32)
    _attention_forward(
        batch, length, heads, width, _pointer(lengths), False, scale, low_precision(w.dtype), keys,
        *_heads(tokens), *_heads(value), *_from_row(o, -keys), lse.data_ptr(),
    )  # fmt: skip
    return o, lse


def cross_attention_backward(
    grad: Tensor,
    w: Tensor,
    context: Tensor,
    value: Tensor | None,
    lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> ``(dw, dcontext, dvalue)``. Without a separate value, ``dvalue`` is None and its part is in ``dcontext``."""
    keys, queries = context.shape[1], w.shape[1]
    tokens, lengths = torch.cat([context, w], 1), _int64(lengths)
    batch, length, heads, width = tokens.shape
    value, grad, o = _after(value, w), _behind(grad, keys), _behind(o, keys)
    dtokens = torch.empty_like(tokens)
    dvalue = None if value is None else torch.empty_like(tokens)
    _attention_backward(
        batch, length, heads, width, _pointer(lengths), False, scale, low_precision(w.dtype), keys,
        *_heads(tokens), *_heads(value), *_heads(grad), *_heads(o), lse.data_ptr(), *_heads(dtokens), *_heads(dvalue),
    )  # fmt: skip
    dcontext, dw = dtokens.split([keys, queries], 1)
    return dw.contiguous(), dcontext.contiguous(), None if dvalue is None else dvalue[:, :keys].contiguous()


def _after(value: Tensor | None, w: Tensor) -> Tensor | None:
    """Values of the keys, followed by zeros for the queries, which have no values."""
    return None if value is None else torch.cat([value, w.new_zeros(w.shape)], 1)


def _behind(t: Tensor, keys: int) -> Tensor:
    """Rows of the queries, preceded by zeros for the keys."""
    return torch.nn.functional.pad(t, (0, 0, 0, 0, keys, 0))


def _from_row(t: Tensor, row: int) -> tuple[int, int, int, int, int]:
    """:func:`_heads` of a tensor that begins at row ``row``: the address is that of the missing row 0."""
    pointer, *rest = _heads(t)
    return pointer + row * t.stride(1) * t.element_size(), *rest


def _inner_rows(t: Tensor | None, inner: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens of all heads ``(B, N, H, p)``, contiguous, as rows of H·p; None: kept in the library's own memory."""
    return _pointer(t), TYPES[dtype], inner


Weights = tuple[Tensor | None, ...]
"""Norm weight and bias, Uᵀ, output weight and bias of the attention half; norm weight and bias, dictionary, folded
dictionary of the ISTA half. The weights of a half that does not run are None."""

NO_ATTENTION = (None,) * 5
NO_ISTA = (None,) * 4


def layer_forward(
    z: Tensor,
    weights: Weights,
    lengths: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    steps: tuple[float, float, float],
    eps: tuple[float, float],
    save: bool = True,
    packed: tuple[int, int, int] = (0, 0, 0),
) -> tuple[Tensor | None, ...]:
    """A layer, or the half whose weights are given.

    ``z (B, N, d)``, ``steps`` = step size of the attention half, step size and lambda of the ISTA half ->
    ``out, w, o, lse, mean_1, rstd_1, between, mean_2, rstd_2``: ``out`` in the dtype of ``z``; ``w, o (B, N, H, p)``
    and the tokens ``between`` the halves ``(B, N, d)`` in the dtype of the matrices; ``lse (B, H, N)`` and the
    statistics ``(B, N)`` in float32. What the halves do not have is None, and so is what is not to be saved.

    ``packed``: addresses of the packed projection, output projection and folded dictionary, 0 where there is none.
    """
    z, lengths = z.contiguous(), _int64(lengths)
    weights = tuple(map(_last_contiguous, weights))
    batch, tokens, width = z.shape
    attention, ista = weights[2] is not None, weights[7] is not None
    compute = (weights[2] if attention else weights[7]).dtype
    inner = weights[2].shape[0] if attention else 0
    out = torch.empty(z.shape, dtype=z.dtype)
    w = o = lse = mean_1 = rstd_1 = between = mean_2 = rstd_2 = None
    if attention and save:
        w = torch.empty((batch, tokens, heads, inner // heads), dtype=compute)
        o = torch.empty(w.shape, dtype=compute)
        lse = torch.empty((batch, heads, tokens), dtype=torch.float32)
        mean_1 = torch.empty((batch, tokens), dtype=torch.float32)
        rstd_1 = torch.empty((batch, tokens), dtype=torch.float32)
        between = torch.empty(z.shape, dtype=compute) if ista else None
    if ista and save and weights[5] is not None:
        mean_2 = torch.empty((batch, tokens), dtype=torch.float32)
        rstd_2 = torch.empty((batch, tokens), dtype=torch.float32)
    _layer_forward(
        batch, tokens, heads, inner // heads, _pointer(lengths), causal, scale, low_precision(compute), 0,
        width, *steps,
        *_weight_fields(weights, eps), *packed, attention + 2 * ista,
        *_rows(z), *_inner_rows(w, inner, compute), *_inner_rows(o, inner, compute), _pointer(lse),
        *_rows(between), *_rows(out),
        _pointer(mean_1), _pointer(rstd_1), _pointer(mean_2), _pointer(rstd_2),
    )  # fmt: skip
    return out, w, o, lse, mean_1, rstd_1, between, mean_2, rstd_2


def layer_backward(
    grad: Tensor,
    z: Tensor,
    weights: Weights,
    lengths: Tensor | None,
    out: Tensor | None,
    w: Tensor | None,
    o: Tensor | None,
    lse: Tensor | None,
    mean_1: Tensor | None,
    rstd_1: Tensor | None,
    between: Tensor | None,
    mean_2: Tensor | None,
    rstd_2: Tensor | None,
    scale: float,
    causal: bool,
    steps: tuple[float, float, float],
    eps: tuple[float, float],
) -> list[Tensor | None]:
    """-> the gradients of ``z`` and of the first eight weights, each in its dtype; None for an absent weight."""
    grad, z, lengths = grad.contiguous(), z.contiguous(), _int64(lengths)
    weights = tuple(map(_last_contiguous, weights))
    batch, tokens, width = z.shape
    attention, ista = weights[2] is not None, weights[7] is not None
    inner, heads = (weights[2].shape[0], w.shape[2]) if attention else (0, 1)
    gradients = [torch.empty(z.shape, dtype=z.dtype)]
    gradients += [None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in weights[:8]]
    compute = (weights[2] if attention else weights[7]).dtype
    _layer_backward(
        batch, tokens, heads, inner // heads, _pointer(lengths), causal, scale, low_precision(compute), 0,
        width, *steps,
        *_weight_fields(weights, eps), 0, 0, 0, attention + 2 * ista,
        *_rows(grad), *_rows(out), *_rows(z), *_inner_rows(w, inner, compute),
        *_inner_rows(o, inner, compute), _pointer(lse),
        *_rows(between if attention else z), _pointer(mean_1), _pointer(rstd_1), _pointer(mean_2), _pointer(rstd_2),
        *(field for t in gradients for field in _rows(t)),
    )  # fmt: skip
    return gradients


def _weight_fields(weights: Weights, eps: tuple[float, float]) -> tuple:
    fields = [field for t in weights for field in _rows(t)]
    return (*fields[:6], eps[0], *fields[6:21], eps[1], *fields[21:])


def overcomplete_forward(
    x: Tensor, D: Tensor, D1: Tensor | None, step_size: float, lambd: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``x (n, d)``, ``D, D1 (d, m)`` -> ``out (n, d)`` and the codes ``z1, z2 (n, m)``."""
    x, D = _last_contiguous(x), _last_contiguous(D)
    D1 = D if D1 is None else _last_contiguous(D1)
    z1 = torch.empty((x.shape[0], D.shape[1]), dtype=x.dtype)
    out, z2 = torch.empty(x.shape, dtype=x.dtype), torch.empty_like(z1)
    _overcomplete_forward(
        *x.shape, D.shape[1], step_size, lambd, low_precision(D.dtype),
        *_rows(x), *_rows(D), *_rows(D1), *_rows(z1), *_rows(z2), *_rows(out),
    )  # fmt: skip
    return out, z1, z2


def overcomplete_backward(
    grad: Tensor, x: Tensor, D: Tensor, D1: Tensor | None, z1: Tensor, z2: Tensor, step_size: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> ``(dx, dD, dD1)``. If the dictionaries are tied, ``dD1`` is None and its part is included in ``dD``."""
    grad, x, D = _last_contiguous(grad), _last_contiguous(x), _last_contiguous(D)
    decoder = D if D1 is None else _last_contiguous(D1)
    dx, dD, dD1 = (torch.empty(t.shape, dtype=t.dtype) for t in (x, D, decoder))
    _overcomplete_backward(
        *x.shape, D.shape[1], step_size, low_precision(D.dtype),
        *_rows(grad), *_rows(x), *_rows(D), *_rows(decoder), *_rows(z1), *_rows(z2),
        *_rows(dx), *_rows(dD), *_rows(dD1),
    )  # fmt: skip
    return (dx, dD + dD1, None) if D1 is None else (dx, dD, dD1)


def fold(weight: Tensor) -> Tensor:
    """``W − WᵀW`` for ``weight (d, d)``, in its dtype, summed in float32."""
    weight = _last_contiguous(weight)
    out = torch.empty(weight.shape, dtype=weight.dtype)
    _fold(weight.shape[0], low_precision(weight.dtype), *_rows(weight), *_rows(out))
    return out


def pack(matrix: Tensor, transposed: bool) -> Tensor:
    """A weight in the order in which the products read it, for the instruction set in use.

    ``matrix (depth, columns)``, or ``(columns, depth)`` if ``transposed``: as in ``x @ matrix`` or ``x @ matrix.T``.
    """
    matrix = _last_contiguous(matrix)
    columns, depth = matrix.shape if transposed else matrix.shape[::-1]
    low = low_precision(matrix.dtype)
    out = torch.empty(_library.crate_cpu_packed_bytes(_packed_size(depth, columns, low)), dtype=torch.uint8)
    _pack(*_rows(matrix), transposed, depth, columns, low, out.data_ptr())
    return out


def kept_pack(weight: Tensor | None, transposed: bool) -> int:
    """The address of :func:`pack` of a weight that persists between calls; 0 for other tensors."""
    if weight is None:
        return 0
    packed = kept(weight, ("pack", transposed, ISA), lambda: pack(weight, transposed))
    return 0 if packed is None else packed.data_ptr()
