"""Subspace attention in CUDA C++ (``csrc/include/crate/attention_*.cuh``). One thread block holds a whole head."""

from __future__ import annotations

from torch import Tensor

from .. import cuda_kernels


def why_not(w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool) -> str | None:
    if value is not None:
        return "the CUDA attention keeps one operand on chip; it takes no separate value"
    return cuda_kernels.why_not_heads(w, w.shape[1], w.shape[3])


def forward(
    w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """-> ``o (B, N, H, p)``, ``lse (B, H, N)``."""
    return cuda_kernels.attention_forward(w, lengths, scale, causal)


def backward(
    grad: Tensor,
    w: Tensor,
    value: Tensor | None,
    lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, None]:
    """-> ``(dw, None)``."""
    return cuda_kernels.attention_backward(grad, w, lengths, o, lse, scale, causal), None
