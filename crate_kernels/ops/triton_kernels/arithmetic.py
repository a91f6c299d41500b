"""Matrix product and rounding for all kernels, on hardware and in Triton's interpreter.

The interpreter multiplies the bit patterns of bfloat16, and truncates where hardware rounds to nearest even. It does
not implement tf32, for which hardware drops the last 13 bits. Under ``TRITON_INTERPRET=1`` both functions therefore
compute in float32 what the hardware would compute.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` with float32 sums; ``acc`` may be None."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if PRECISION == "tf32":
            a = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            b = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 ``x`` in ``dtype``, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)
