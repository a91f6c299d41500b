"""Compares a kernel's results with the reference backend in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crate_kernels import ops
from crate_kernels.agreement import judge
from crate_kernels.ops import cpu_kernels

from .cases import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def skip_without(backend: str) -> None:
    """Skip the test if ``backend`` needs the compiled CPU library and the library is missing."""
    if backend == "cpu" and cpu_kernels.MISSING:
        pytest.skip(cpu_kernels.MISSING)


def run(case: Case, backend: str, dtype: torch.dtype, device: str = DEVICE) -> list[Tensor]:
    """The output and the gradient of every tensor of ``case``, on the CPU, for a fixed random gradient of the output.

    The caller has rounded the tensors to ``dtype``, so that only errors of the arithmetic count.
    """
    leaves = [None if t is None else _moved(t, dtype, device).requires_grad_() for t in case.tensors]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    out = case.operator(*leaves, **options, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weights = weights.to(case.tensors[0].dtype).to(device, dtype)
    gradients = torch.autograd.grad(out, [t for t in leaves if t is not None], weights)
    return [t.detach().cpu() for t in (out, *gradients)]


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The output and all gradients of ``backend`` are within the error budget: see ``crate_kernels.agreement``.

    The gradients of a whole layer pass a ReLU after long sums, so units may flip there. The inputs of the other cases
    stay away from the threshold and need no allowance.
    """
    rounded = case.to(dtype)
    exact, reference, got = (
        run(rounded, name, kind)
        for name, kind in (("reference", torch.float64), ("reference", dtype), (backend, dtype))
    )
    assert all(result.dtype == dtype for result in got)
    score = abs(rounded.to(torch.float64).largest_score()) if case.tensors[0].numel() else 0.0
    verdict = judge(got, exact, reference, dtype, kinks=case.operator is ops.crate_layer, score=score)
    assert verdict.passed, verdict.detail


def _moved(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """A leaf with the strides of ``tensor``."""
    return tensor.detach().to(device, dtype, copy=True, memory_format=torch.preserve_format)
