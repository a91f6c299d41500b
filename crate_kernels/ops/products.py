"""Matrix products for the eager backend on the CPU, by the faster of two libraries that PyTorch bundles.

PyTorch computes float32 products with MKL, which uses AVX-512 only on Intel's processors. oneDNN uses it on all. On an
EPYC (Zen 5) oneDNN is 2.2 times as fast at the sizes of these models; on processors with AVX2 only, both are equally
fast. oneDNN adds longer sums in one piece. Its relative error is 3.6e-7 for 384 to 768 terms, where MKL's is 2.5e-7,
and 5.7e-7 for 1,500 terms and more. Sums that are cut into pieces, as below, have 4e-7.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORTH = 1 << 22
"""Smallest number of multiplications for oneDNN. Below it, finding the kernel costs more time than it saves."""

LONGEST = 1024
"""Most terms of a sum that oneDNN adds in one piece."""


def _faster_with_onednn() -> bool:
    if not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    try:
        with open("/proc/cpuinfo") as processors:
            intel = "GenuineIntel" in processors.read(1024)
    except OSError:  # not Linux: the vendor is unknown, so PyTorch's choice stays
        return False
    return not intel and hasattr(torch.ops.mkldnn, "_linear_pointwise")


FASTER_WITH_ONEDNN = _faster_with_onednn()
"""Whether oneDNN computes float32 products here; ``torch.backends.mkldnn.enabled = False`` prevents it."""


def multiply(a: Tensor, b: Tensor, start: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """``start + alpha·a b`` for ``a (m, k)``, ``b (k, n)``, ``start (m, n)`` or None, of one dtype -> new ``(m, n)``.

    Equivalent to ``torch.addmm(start, a, b, alpha=alpha)``. The result has the dtype of ``start``, which may
    be wider.
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
    if alpha != 1:  # scale the smallest of the three matrices
        if start is None and a.shape[0] * b.shape[1] <= min(a.numel(), b.numel()):
            return multiply(a, b).mul_(alpha)
        a, b = (alpha * a, b) if a.numel() < b.numel() else (a, alpha * b)
    # torch.compile uses this operator for linear layers. It takes bᵀ in any dense layout; for other layouts oneDNN has
    # only a slow reference kernel.
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
