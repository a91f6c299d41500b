"""Two overcomplete ISTA steps in C++ on the CPU (``csrc/cpu/overcomplete.h``)."""

from __future__ import annotations

from torch import Tensor

from .. import cpu_kernels


def why_not(x: Tensor, D: Tensor, D1: Tensor | None, *_) -> str | None:
    return cpu_kernels.why_not(x, D, D1)


forward = cpu_kernels.overcomplete_forward
backward = cpu_kernels.overcomplete_backward
