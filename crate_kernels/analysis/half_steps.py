"""Every term of the objective, before and after each half of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..nn import CrateBlock, CrateDecoderBlock
from .layerwise import Layerwise, evaluating, observing
from .objective import coding_rate, effective_rank, sparsity, subspace_coding_rate, subspace_coherence

POINTS = ("before the layer", "after its first half", "after its second half")
"""Points of measurement. The halves are attention and ISTA; in CRATE-MAE's decoder they are dictionary and
attention."""

QUANTITIES = {
    "subspace_coding_rate": "R^c of the tokens in the layer's subspaces, nats",
    "nonzero": "fraction of the tokens' entries that are not zero",
    "coding_rate": "R of the tokens, each scaled to length one, nats",
    "effective_rank": "effective rank of the tokens",
    "objective": "R − R^c − lam·‖Z‖₀",
}


@dataclass
class HalfSteps:
    """Measurements of every layer at three points.

    ``layers (L)``: names, such as ``"layer 1"``; with a decoder ``"encoder 1"`` and ``"decoder 1"``.
    ``values``: quantity (see ``QUANTITIES``) -> ``(L, 3, B)``, layers by ``POINTS`` by samples, float32 on the CPU.
    ``coherence (L, H, H)``: the coherence of every two heads, see :func:`subspace_coherence`.
    ``chance``: p/d, the coherence of random subspaces.
    ``eps``, ``lam``: the distortion of the rates, and the weight of the sparsity in the objective.
    """

    layers: list[str]
    values: dict[str, Tensor]
    coherence: Tensor
    chance: float
    eps: float
    lam: float

    def published(self) -> Layerwise:
        """The measurements in the published convention: R^c before each layer, non-zeros after it.

        The layers of a decoder are left out.

        R^c after the attention is included, too.
        """
        encoder = [i for i, name in enumerate(self.layers) if not name.startswith("decoder")]
        rates, nonzeros = self.values["subspace_coding_rate"][encoder], self.values["nonzero"][encoder]
        return Layerwise(rates[:, 0], nonzeros[:, 2], rates[:, 1])

    def summary(self) -> dict:
        """Mean and standard deviation over the samples, for every quantity at every point, ready for JSON."""
        heads = self.coherence.shape[-1]
        others = self.coherence[:, ~torch.eye(heads, dtype=torch.bool)]  # empty with one head
        return {
            "convention": {
                "published": "subspace_coding_rate before the layer, nonzero after its second half",
                "rates": f"natural logarithm, tokens scaled to length one, eps = {self.eps}",
                "objective": f"R - R^c - lam * (number of non-zero entries), lam = {self.lam}",
            },
            "samples": next(iter(self.values.values())).shape[-1],
            "layers": [
                {
                    "layer": name,
                    **{
                        quantity: {
                            point: {
                                "mean": values[i, j].mean().item(),
                                "std": values[i, j].std(correction=0).item(),
                            }
                            for j, point in enumerate(POINTS)
                        }
                        for quantity, values in self.values.items()
                    },
                    "coherence": {
                        "mean": others[i].mean().item() if heads > 1 else None,
                        "largest": others[i].max().item() if heads > 1 else None,
                        "random_subspaces": self.chance,
                    },
                }
                for i, name in enumerate(self.layers)
            ],
        }

    def __add__(self, other: HalfSteps) -> HalfSteps:
        """The measurements of two batches as one."""
        values = {name: torch.cat([mine, other.values[name]], dim=-1) for name, mine in self.values.items()}
        return HalfSteps(self.layers, values, self.coherence, self.chance, self.eps, self.lam)


@torch.no_grad()
def half_steps(model: nn.Module, *inputs, eps: float = 0.1, lam: float = 0.1, **keywords) -> HalfSteps:
    """Run the model once, in evaluation mode, and measure every layer before and after each of its halves.

    The tokens ``z`` are measured in the layer's own subspaces at each of the three points: ``w = LN(z) Uᵀ``, with the
    LayerNorm and the projection of the layer's attention. The three values can therefore be compared.

    Args:
        model: any model with CRATE layers. Every module gets its mode (training or evaluation) back afterwards.
        inputs, keywords: one batch, in the form that the model takes. All tokens count, padding included.
        eps: distortion of the coding rates.
        lam: weight of ``‖Z‖₀`` in the objective.

    Raises:
        ValueError: the model has no CRATE layer.
    """
    measured, coherences = [], []

    def measure(layer: Any, arguments: tuple, keywords: dict, output: Tensor):
        before = arguments[0]
        if isinstance(layer, CrateDecoderBlock):
            between = layer.dictionary(layer.dictionary_norm(before))
        else:
            between = layer.compress(*arguments, **keywords)
        points = [_measure(layer, z, eps, lam) for z in (before, between, output)]
        measured.append({name: torch.stack([point[name] for point in points]) for name in QUANTITIES})
        coherences.append(subspace_coherence(layer.mssa.projection.weight, layer.mssa.heads).float().cpu())

    kinds = (CrateBlock, CrateDecoderBlock)
    with evaluating(model), observing(model, kinds, measure) as layers:
        model(*inputs, **keywords)
    values = {name: torch.stack([layer[name] for layer in measured]) for name in QUANTITIES}
    mssa: Any = layers[0].mssa
    rows, width = mssa.projection.weight.shape
    chance = rows / mssa.heads / width
    return HalfSteps(_names(layers), values, torch.stack(coherences), chance, eps, lam)


def _measure(layer: CrateBlock | CrateDecoderBlock, z: Tensor, eps: float, lam: float) -> dict[str, Tensor]:
    w = layer.mssa.project(layer.mssa_norm(z)).transpose(1, 2)
    compressed, nonzero = subspace_coding_rate(w, eps), sparsity(z)
    rate = coding_rate(normalize(z.float(), dim=-1), eps)
    objective = rate - compressed - lam * nonzero * z[0].numel()
    values = dict(zip(QUANTITIES, (compressed, nonzero, rate, effective_rank(z), objective), strict=True))
    return {name: value.float().cpu() for name, value in values.items()}


def _names(layers: list[nn.Module]) -> list[str]:
    encoder = sum(isinstance(layer, CrateBlock) for layer in layers)
    decoder = len(layers) - encoder
    kind = "encoder" if decoder else "layer"
    return [f"{kind} {i + 1}" for i in range(encoder)] + [f"decoder {i + 1}" for i in range(decoder)]
