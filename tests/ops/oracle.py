"""Compares a kernel's results with the reference backend in float64."""

from __future__ import annotations

import importlib

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


def check_huge_scores(
    backend: str, dtype: torch.dtype, causal: bool, lengths: Tensor | None = None, device: str = DEVICE
) -> None:
    """The gradient of scores of 1e9 stays in bounds where its log-normalizer is a rounding too low.

    That rounding is 64, and no probability may become 2^64 for that. ``lengths`` has three entries of at most 40.
    """
    kernels = importlib.import_module(f"crate_kernels.ops.subspace_attention.{backend}")
    generator = torch.Generator().manual_seed(0)
    w = (1e4 * torch.randn(3, 40, 2, 16, generator=generator)).to(device, dtype)
    grad = torch.randn(w.shape, generator=generator).to(device, dtype)
    call = None if lengths is None else lengths.to(device), 0.25, causal
    o, lse = kernels.forward(w, None, *call)
    below = lse.nextafter(torch.full_like(lse, -torch.inf))
    dw, _ = kernels.backward(grad, w, None, call[0], o, below, *call[1:])
    leaf = w.double().requires_grad_()
    exact = ops.subspace_attention(leaf, lengths=call[0], scale=0.25, causal=causal, backend="reference")
    torch.testing.assert_close(o.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
    (want,) = torch.autograd.grad(exact, leaf, grad.double())
    assert dw.norm(dtype=torch.float64) <= 100 * want.norm()


def _moved(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """A leaf with the strides of ``tensor``."""
    return tensor.detach().to(device, dtype, copy=True, memory_format=torch.preserve_format)
