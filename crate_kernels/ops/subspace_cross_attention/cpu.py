"""Subspace cross-attention in C++ on the CPU (``csrc/cpu/attention.h``): keys and queries are one sequence."""

from __future__ import annotations

from torch import Tensor

from .. import cpu_kernels


def why_not(w: Tensor, context: Tensor, value: Tensor | None, *_) -> str | None:
    return cpu_kernels.why_not(w, context, value) or cpu_kernels.why_not_heads(w.shape[3])


forward = cpu_kernels.cross_attention_forward
backward = cpu_kernels.cross_attention_backward
