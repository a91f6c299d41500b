"""Subspace attention in C++ on the CPU (``csrc/cpu/attention.h``). One thread computes a head, block by block."""

from __future__ import annotations

from torch import Tensor

from .. import cpu_kernels


def why_not(w: Tensor, value: Tensor | None, *_) -> str | None:
    return cpu_kernels.why_not(w, value) or cpu_kernels.why_not_heads(w.shape[3])


forward = cpu_kernels.attention_forward
backward = cpu_kernels.attention_backward
