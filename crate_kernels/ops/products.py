"""Products of matrices for the eager backend, from the faster of the two libraries that torch carries for the CPU.

torch gives float32 products to MKL, which takes its AVX-512 kernels on Intel's processors alone; oneDNN generates them
for any. On an EPYC (Zen 5) it is 2.2 times as fast at these models' sizes, and where the processor has no more than
AVX2 both are equal. It adds up in longer chains than MKL: over 384 to 768 terms it is off by 3.6e-7 in relative norm
where MKL is by 2.5e-7, over 1,500 and more by 5.7e-7; cut into pieces as here, by 4e-7.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORTH = 1 << 22
"""Multiplications from which on a product goes to oneDNN: below, finding its kernel costs more than it saves."""

LONGEST = 1024
"""Terms of a sum that oneDNN adds up in one piece."""


def _faster_with_onednn() -> bool:
    if not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    try:
        with open("/proc/cpuinfo") as processors:
            intel = "GenuineIntel" in processors.read(1024)
    except OSError:  # not Linux: who made the processor stays unknown, and torch's choice stands
        return False
    return not intel and hasattr(torch.ops.mkldnn, "_linear_pointwise")


FASTER_WITH_ONEDNN = _faster_with_onednn()
"""Whether this processor's float32 products are oneDNN's; ``torch.backends.mkldnn.enabled = False`` overrules."""


def multiply(a: Tensor, b: Tensor, start: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """``start + alpha·a b`` for ``a (m, k)``, ``b (k, n)``, ``start (m, n)`` or None, of one dtype -> new ``(m, n)``.

    Equivalent to ``torch.addmm(start, a, b, alpha=alpha)``. ``start`` and with it the result may be of a wider dtype.
    """
    if start is not None and start.dtype != a.dtype:
        return torch.add(start, multiply(a, b), alpha=alpha)
    if not _takes_onednn(a, b):
        if start is not None:
            return torch.addmm(start, a, b, alpha=alpha)
        return a @ b if alpha == 1 else (a @ b).mul_(alpha)
    terms = a.shape[1]
    pieces = -(-terms // LONGEST)
    if pieces > 1:
        for i in range(pieces):
            part = slice(terms * i // pieces, terms * (i + 1) // pieces)
            start = multiply(a[:, part], b[part], start, alpha)
        assert start is not None
        return start
    if alpha != 1:  # where it is cheapest: the smallest of the three matrices
        if start is None and a.shape[0] * b.shape[1] <= min(a.numel(), b.numel()):
            return multiply(a, b).mul_(alpha)
        a, b = (alpha * a, b) if a.numel() < b.numel() else (a, alpha * b)
    # The operator is torch.compile's own for linear layers. It takes bᵀ in any dense layout; of any other, oneDNN has
    # only a kernel written for comparison.
    weight = b.T if b.is_contiguous() or b.T.is_contiguous() else b.T.contiguous()
    if start is None:
        return torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(a, start, weight, None, "add")


def _takes_onednn(a: Tensor, b: Tensor) -> bool:
    return bool(
        bool(FASTER_WITH_ONEDNN)
        and a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.shape[0] * a.shape[1] * b.shape[1] >= WORTH
        and torch.backends.mkldnn.enabled
    )
