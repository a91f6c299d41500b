"""A kernel's results against the literal reference in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(case: Case, backend: str, dtype: torch.dtype, device: str = DEVICE) -> list[Tensor]:
    """The output and the gradient of every tensor of ``case``, for a fixed random output gradient; on the CPU.

    The tensors are rounded to ``dtype`` by the caller, so that only the arithmetic is judged.
    """
    leaves = [None if t is None else _moved(t, dtype, device).requires_grad_() for t in case.tensors]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    out = case.operator(*leaves, **options, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weights = weights.to(case.tensors[0].dtype).to(device, dtype)
    gradients = torch.autograd.grad(out, [t for t in leaves if t is not None], weights)
    return [t.detach().cpu() for t in (out, *gradients)]


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Output and all gradients are within twice the error of the literal arithmetic in ``dtype`` and one rounding."""
    rounded = case.to(dtype)
    exact, literal, got = (
        run(rounded, name, kind)
        for name, kind in (("reference", torch.float64), ("reference", dtype), (backend, dtype))
    )
    # The backward recomputes the softmax from its float32 log-normaliser: scores of size |S|, rounded in both
    # directions, move the probabilities by a few eps·|S|, where the literal form keeps them.
    largest = abs(rounded.to(torch.float64).largest_score()) if case.tensors[0].numel() else 0.0
    recomputed = 4 * torch.finfo(torch.float32).eps * largest
    for index, (oracle, reference, result) in enumerate(zip(exact, literal, got, strict=True)):
        assert result.dtype == dtype
        assert result.shape == oracle.shape
        if not reference.isfinite().all():
            continue  # float16 overflows in the literal arithmetic itself
        rounding = (torch.finfo(dtype).eps + recomputed) * oracle.abs().max().item() if oracle.numel() else 0.0
        budget = 2 * error(reference, oracle) + rounding
        found = error(result, oracle)
        which = "output" if index == 0 else f"gradient {index}"
        assert found <= budget, f"{which}: error {found:.2e}, budget {budget:.2e}"


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite where a NaN is."""
    if not expected.numel():
        return 0.0
    worst = (got.double() - expected.double()).abs().max().item()
    return worst if worst == worst else float("inf")


def _moved(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """A leaf with the strides of ``tensor``."""
    return tensor.detach().to(device, dtype, copy=True, memory_format=torch.preserve_format)
