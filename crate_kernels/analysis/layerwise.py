"""The layer-wise probe: coding rate and sparsity of every CRATE layer from one forward pass of any model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..nn import CrateBlock
from .objective import sparsity, subspace_coding_rate


@dataclass
class Layerwise:
    """What the probe measured, a row per layer and a column per sample, float32 on the CPU.

    ``coding_rate (L, B)``: R^c of the tokens in their subspaces, ``w = LN(z) Uᵀ``, entering each layer's attention.
    ``sparsity (L, B)``: the non-zero fraction of each layer's output.
    """

    coding_rate: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    sparsity: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def summary(self) -> dict[str, list[float]]:
        """Mean and standard deviation over the samples, a list entry per layer, ready for JSON."""
        return {
            f"{name}_{statistic}": getattr(values, statistic)(dim=1).tolist()
            for name, values in (("coding_rate", self.coding_rate), ("sparsity", self.sparsity))
            for statistic in ("mean", "std")
        }

    def __add__(self, other: Layerwise) -> Layerwise:
        """The measurements of two batches as one."""
        return Layerwise(
            torch.cat([self.coding_rate, other.coding_rate], dim=1), torch.cat([self.sparsity, other.sparsity], dim=1)
        )


@torch.no_grad()
def layerwise(model: nn.Module, *inputs, **keywords) -> Layerwise:
    """Run ``model(*inputs, **keywords)`` once, in evaluation mode, and measure every :class:`CrateBlock` in it.

    Args:
        model: anything built on :class:`crate_kernels.nn.CrateBlock`; its mode is restored afterwards.
        inputs, keywords: one batch, as the model takes it.

    Raises:
        ValueError: the model has no such layer.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with measuring(model) as measured:
            model(*inputs, **keywords)
    finally:
        for module, mode in training.items():
            module.training = mode
    rates, nonzeros = zip(*measured, strict=True)
    return Layerwise(torch.stack(rates), torch.stack(nonzeros))


@contextlib.contextmanager
def measuring(model: nn.Module, eps: float = 0.1) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect ``(R^c (B,), non-zero fraction (B,))`` of every layer that runs inside the ``with`` block."""
    blocks = [module for module in model.modules() if isinstance(module, CrateBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no CrateBlock to measure")
    measured: list[tuple[Tensor, Tensor]] = []

    def measure(block: CrateBlock, inputs: tuple, output: Tensor):
        with torch.no_grad():
            w = block.mssa.project(block.mssa_norm(inputs[0])).transpose(1, 2)
            measured.append((subspace_coding_rate(w, eps).float().cpu(), sparsity(output).cpu()))

    handles = [block.register_forward_hook(measure) for block in blocks]
    try:
        yield measured
    finally:
        for handle in handles:
            handle.remove()
