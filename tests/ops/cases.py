"""Inputs of every operator, on shapes that are likely to break. All tests that loop over the operators use this
list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from crate_kernels import ops


@dataclass
class Case:
    """One call: ``operator(*tensors, **options)``; None stands for an optional tensor left out."""

    name: str
    operator: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    options: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, tensors=tuple(None if t is None else t.to(dtype) for t in self.tensors))

    def run(self, **options) -> list[Tensor]:
        """The output and the gradient of every tensor, for a fixed random gradient of the output."""
        leaves = [None if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in self.tensors]
        for leaf in leaves:
            if leaf is not None:
                leaf.requires_grad_()
        out = self.operator(*leaves, **self.options, **options)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], weights)]

    def has_kinks(self) -> bool:
        """Whether the gradients pass a ReLU."""
        return self.operator not in (ops.subspace_attention, ops.subspace_cross_attention, ops.mssa_block)

    def largest_score(self) -> float:
        """The largest score in an attention, ``scale·max‖w‖²``; 0 without attention."""
        if self.operator in (ops.mssa_block, ops.crate_layer):
            z, norm_weight, norm_bias, u_weight, *_ = self.tensors
            x = torch.nn.functional.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, self.options.get("eps", 1e-5))
            w = (x @ u_weight.T).unflatten(-1, (self.options["heads"], -1))
        elif self.operator in (ops.subspace_attention, ops.subspace_cross_attention):
            w = torch.cat([t for t in self.tensors[:2] if t is not None], 1)
        else:
            return 0.0
        return self.options.get("scale", w.shape[-1] ** -0.5) * w.square().sum(-1).max().item()


def cases() -> list[Case]:
    """In float64, seeded."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def matrix(rows: int, columns: int) -> Tensor:
        return normal(rows, columns, spread=columns**-0.5)

    found: list[Case] = []

    def attention(name, batch, tokens, heads, width, value=False, spread=1.0, **options):
        w = normal(batch, tokens, heads, width, spread=spread)
        v = normal(batch, tokens, heads, width) if value else None
        found.append(Case(f"attention-{name}", ops.subspace_attention, (w, v), options))

    for tokens in (1, 2, 63, 64, 65, 197):
        attention(f"N{tokens}", 2, tokens, 2, 16)
        attention(f"N{tokens}-causal", 1, tokens, 2, 16, causal=True)
    attention("odd-width", 2, 33, 3, 7)
    attention("one-head", 1, 20, 1, 24, scale=0.3)
    attention("value", 2, 21, 2, 8, value=True)
    attention("value-causal-lengths", 2, 21, 2, 8, value=True, causal=True, lengths=torch.tensor([4, 21]))
    attention("lengths", 3, 19, 2, 8, lengths=torch.tensor([1, 7, 19], dtype=torch.int32))
    attention("large-norms", 1, 12, 2, 8, spread=30.0)
    attention("equal-tokens", 1, 9, 2, 8, spread=0.0)
    attention("empty", 0, 9, 2, 8)
    strided = normal(2, 3, 17, 8).transpose(1, 2)
    found.append(Case("attention-strided", ops.subspace_attention, (strided, None)))

    for rows, width in ((1, 8), (7, 8), (8, 8), (50, 8), (33, 17)):
        shape = f"{rows}x{width}"
        found.append(Case(f"ista-{shape}", ops.ista_step, (normal(rows, width), matrix(width, width))))
        found.append(
            Case(f"overcomplete-{shape}", ops.overcomplete_ista, (normal(rows, width), matrix(width, 4 * width), None))
        )
    decoupled = (normal(2, 5, 8), matrix(8, 20), matrix(8, 20))
    found.append(Case("overcomplete-decoupled", ops.overcomplete_ista, decoupled, dict(step_size=0.5, lambd=0.01)))
    found.append(Case("ista-batched", ops.ista_step, (normal(3, 5, 6), matrix(6, 6)), dict(step_size=1.0, lambd=0.3)))
    found.append(Case("ista-empty", ops.ista_step, (normal(0, 6), matrix(6, 6))))
    found.append(Case("overcomplete-empty", ops.overcomplete_ista, (normal(0, 6), matrix(6, 24), None)))

    def norm(width):
        return 1 + 0.2 * normal(width), 0.2 * normal(width)

    def mssa(name, batch, tokens, width, heads, p, output=True, bias=True, **options):
        out_weight = matrix(width, heads * p) if output else None
        out_bias = normal(width) if output and bias else None
        tensors = (normal(batch, tokens, width), *norm(width), matrix(heads * p, width), out_weight, out_bias)
        found.append(Case(f"mssa-{name}", ops.mssa_block, tensors, dict(heads=heads, **options)))

    mssa("plain", 2, 33, 24, 3, 8)
    mssa("one-token", 2, 1, 12, 2, 6)
    mssa("wide-heads", 2, 9, 12, 2, 16)
    mssa("identity-output", 2, 9, 12, 1, 12, output=False)
    mssa("no-bias", 2, 9, 12, 3, 4, bias=False)
    mssa("decoder", 2, 9, 12, 3, 4, step_size=-1.0)
    mssa("causal-lengths", 2, 9, 12, 3, 4, causal=True, lengths=torch.tensor([5, 9]), eps=1e-3)
    mssa("empty", 0, 9, 12, 3, 4)

    for batch, tokens, width in ((2, 33, 12), (1, 3, 12), (0, 3, 12)):
        tensors = (normal(batch, tokens, width), *norm(width), matrix(width, width))
        found.append(Case(f"ista_block-{batch}x{tokens}x{width}", ops.ista_block, tensors))

    def layer(name, batch, tokens, width, heads, p, output=True, bias=True, **options):
        out_weight = matrix(width, heads * p) if output else None
        out_bias = normal(width) if output and bias else None
        attention = (normal(batch, tokens, width), *norm(width), matrix(heads * p, width), out_weight, out_bias)
        tensors = (*attention, *norm(width), matrix(width, width))
        found.append(Case(f"layer-{name}", ops.crate_layer, tensors, dict(heads=heads, **options)))

    layer("plain", 2, 33, 24, 3, 8)
    layer("one-token", 3, 1, 12, 2, 6)
    layer("few-rows", 1, 5, 48, 2, 24)
    layer("odd", 3, 19, 17, 2, 7, causal=True, lengths=torch.tensor([5, 19, 1]), mssa_eps=1e-3, ista_eps=1e-4)
    layer("identity-output", 2, 9, 12, 1, 12, output=False)
    layer("no-bias", 2, 9, 12, 3, 4, bias=False, mssa_step_size=-1.0, step_size=0.3, lambd=0.2)
    layer("long", 1, 130, 40, 1, 40)
    layer("empty", 0, 9, 12, 3, 4)

    def cross(name, batch, queries, keys, heads, width, value=False, **options):
        w, *rest = (normal(batch, tokens, heads, width) for tokens in (queries, keys, keys))
        found.append(
            Case(f"cross-{name}", ops.subspace_cross_attention, (w, rest[0], rest[1] if value else None), options)
        )

    cross("one", 1, 1, 3, 1, 4)
    cross("few-queries", 2, 5, 130, 2, 8)
    cross("few-keys", 2, 130, 5, 1, 16, scale=0.4)
    cross("value-lengths", 3, 21, 19, 2, 7, value=True, lengths=torch.tensor([4, 1, 19]))
    cross("empty", 0, 3, 4, 2, 8)
    return found


CASES = {case.name: case for case in cases()}

SMALL = [
    "attention-N2", "attention-odd-width", "attention-value-causal-lengths", "cross-value-lengths", "ista-7x8",
    "ista-50x8", "overcomplete-7x8", "overcomplete-decoupled", "mssa-decoder", "mssa-identity-output",
    "mssa-causal-lengths", "ista_block-2x33x12", "layer-odd", "layer-identity-output",
]  # fmt: skip
"""A smaller list for slow tests. It still has every operator and option."""
