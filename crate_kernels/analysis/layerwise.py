"""The layer-wise probe: coding rate and sparsity of every CRATE layer from one forward pass of any model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import CrateBlock
from .objective import sparsity, subspace_coding_rate


@dataclass
class Layerwise:
    """The measurements of the probe, a row per layer and a column per sample, float32 on the CPU.

    ``coding_rate (L, B)``: R^c of the tokens that enter each layer's attention, in their subspaces, ``w = LN(z) Uᵀ``.
    ``sparsity (L, B)``: the non-zero fraction of each layer's output.
    ``compressed_rate (L, B)``: R^c of the tokens that leave each layer's attention, in the subspaces of the same layer.
    :func:`layerwise` does not measure it and leaves it empty.
    """

    coding_rate: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    sparsity: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    compressed_rate: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def summary(self) -> dict[str, list[float]]:
        """Mean and standard deviation over the samples, with one list entry per layer, ready for JSON."""
        return {
            f"{name}_{statistic}": values.tolist()
            for name, samples in (
                ("coding_rate", self.coding_rate),
                ("sparsity", self.sparsity),
                ("compressed_rate", self.compressed_rate),
            )
            if samples.numel()
            for statistic, values in (("mean", samples.mean(dim=1)), ("std", samples.std(dim=1, correction=0)))
        }

    def __add__(self, other: Layerwise) -> Layerwise:
        """The measurements of two batches as one."""
        return Layerwise(
            torch.cat([self.coding_rate, other.coding_rate], dim=1),
            torch.cat([self.sparsity, other.sparsity], dim=1),
            torch.cat([self.compressed_rate, other.compressed_rate], dim=1),
        )

    def compression(self) -> str:
        """One or two sentences about the curves of R^c. Empty if ``compressed_rate`` was not measured.

        The sentences compare the rounded numbers that they print.
        """
        if not self.compressed_rate.numel():
            return ""
        before, after = self.coding_rate.mean(dim=1), self.compressed_rate.mean(dim=1)
        falls, layers = [round(fall, 1) for fall in (before - after).tolist()], len(before)
        if min(falls) > 0:
            spans = f"{min(falls):.1f} nats" if layers == 1 else f"{min(falls):.1f} to {max(falls):.1f} nats"
            text = f"Attention lowers the coding rate R^c in every layer, by {spans}: it compresses the tokens."
        elif lowered := sum(fall > 0 for fall in falls):
            text = f"Attention lowers the coding rate R^c in {lowered} of {layers} layers."
        else:
            text = f"Attention lowers the coding rate R^c in no layer of {layers}: this model does not compress its "
            text += "tokens."
        if layers == 1:
            return text
        first, last = f"{before[0].item():.0f}", f"{before[-1].item():.0f}"
        if last == first:
            return f"{text} R^c stays at {first} nats from the first layer to the last."
        if float(last) < float(first):
            return f"{text} R^c falls from {first} nats in the first layer to {last} in the last."
        return (
            f"{text} From the first layer to the last R^c does not fall ({first} to {last} nats): every layer "
            "measures it in its own subspaces."
        )


@torch.no_grad()
def layerwise(model: nn.Module, *inputs, **keywords) -> Layerwise:
    """Run ``model(*inputs, **keywords)`` once, in evaluation mode, and measure every :class:`CrateBlock` in it.

    This is the published convention: R^c of the tokens that enter the attention, non-zeros of the ISTA step's output.
    :func:`crate_kernels.analysis.half_steps` measures more, before and after each half of a layer.

    Args:
        model: any model with :class:`crate_kernels.nn.CrateBlock` layers. Every module gets its mode back afterwards.
        inputs, keywords: one batch, in the form that the model takes. All tokens count, padding included.

    Raises:
        ValueError: the model has no such layer.
    """
    return _measure(model, inputs, keywords, compression=False)


@torch.no_grad()
def layerwise_compression(model: nn.Module, *inputs, **keywords) -> Layerwise:
    """Like :func:`layerwise`, and also measures ``compressed_rate``. The attention of every layer runs twice."""
    return _measure(model, inputs, keywords, compression=True)


def _measure(model: nn.Module, inputs: tuple, keywords: dict, compression: bool) -> Layerwise:
    rates: list[Tensor] = []
    compressed: list[Tensor] = []
    nonzeros: list[Tensor] = []

    def rate(block: Any, tokens: Tensor) -> Tensor:
        w = block.mssa.project(block.mssa_norm(tokens)).transpose(1, 2)
        return subspace_coding_rate(w).float().cpu()

    def measure(block: Any, arguments: tuple, keywords: dict, output: Tensor):
        rates.append(rate(block, arguments[0]))
        if compression:
            compressed.append(rate(block, block.compress(*arguments, **keywords)))
        nonzeros.append(sparsity(output).cpu())

    with evaluating(model), observing(model, CrateBlock, measure):
        model(*inputs, **keywords)
    found = Layerwise(torch.stack(rates), torch.stack(nonzeros))
    if compression:
        found.compressed_rate = torch.stack(compressed)
    return found


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the ``with`` block; afterwards every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def observing(
    model: nn.Module, kinds: type | tuple[type, ...], observe: Callable[[nn.Module, tuple, dict, Tensor], None]
) -> Iterator[list[nn.Module]]:
    """Call ``observe(layer, arguments, keywords, output)`` for every layer of ``kinds`` that runs in the block.

    Yields the layers of ``kinds``, in the order of the model's modules.

    Raises:
        ValueError: the model has no such layer, or (when it runs) the batch is empty.
    """
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no CrateBlock to measure")

    def hook(layer, arguments, keywords, output):
        if not len(output):
            raise ValueError("the batch holds no sample to measure")
        with torch.no_grad():
            observe(layer, arguments, keywords, output)

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()
