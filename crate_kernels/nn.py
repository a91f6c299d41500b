"""Modules of the CRATE layer: they hold the parameters and take the fused route; ``crate_kernels.ops`` computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops


class MSSA(nn.Module):
    """Multi-head subspace self-attention: one projection serves as query, key and value.

    ``MSSA(x) = [softmax(scale · w wᵀ) w] W_outᵀ + b`` with ``w = x Uᵀ`` per head (arXiv 2306.01129, equation 11).

    Args:
        dim: d, width of the tokens.
        heads: H.
        dim_head: p, width of a head; ``dim // heads`` if None.
        dropout: after the attention map and after the output projection, in training.
        causal: token i sees only tokens j <= i.
        output_bias: whether the output projection has a bias. With one head of width d there is no output projection.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int | None = 64,
        *,
        dropout: float = 0.0,
        causal: bool = False,
        output_bias: bool = True,
    ):
        super().__init__()
        if dim_head is None:
            if dim % heads:
                raise ValueError(f"heads: {heads} does not divide dim = {dim}; give dim_head")
            dim_head = dim // heads
        self.heads = heads
        self.scale = dim_head**-0.5
        self.causal = causal
        self.dropout = dropout
        self.projection = nn.Linear(dim, heads * dim_head, bias=False)
        identity = heads == 1 and dim_head == dim
        self.output = nn.Identity() if identity else nn.Linear(heads * dim_head, dim, bias=output_bias)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale:.4g}, causal={self.causal}, dropout={self.dropout}"

    def project(self, x: Tensor) -> Tensor:
        """The tokens in every head's subspace: ``x (B, N, d)`` -> ``w (B, N, H, p)``."""
        return self.projection(x).unflatten(-1, (self.heads, -1))

    def attention(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The attention maps ``softmax(scale · w wᵀ)``, written out: ``x (B, N, d)`` -> ``(B, H, N, N)``."""
        return ops.attention_maps(self.project(x), self.scale, self.causal, lengths)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``x (B, N, d)`` -> ``(B, N, d)``; ``lengths (B,)`` hides padded tokens."""
        w = self.project(x)
        if self.training and self.dropout:
            maps = ops.attention_maps(w, self.scale, self.causal, lengths)
            maps = nn.functional.dropout(maps, self.dropout)
            o = (maps @ w.transpose(1, 2)).transpose(1, 2)
        else:
            o = ops.subspace_attention(w, scale=self.scale, causal=self.causal, lengths=lengths)
        return nn.functional.dropout(self.output(o.flatten(2)), self.dropout, self.training)


class ISTA(nn.Module):
    """One ISTA step against a complete dictionary: ``relu(x + step_size·(x W − x Wᵀ W) − step_size·lambd)``.

    In evaluation, after :func:`prepare_for_inference`, the folded matrix ``W − WᵀW`` is computed once and kept. It is
    computed again whenever the weight is another tensor, has moved, or has been written to since.

    Args:
        dim: d; ``weight`` is ``(d, d)``, kaiming-uniform.
        step_size, lambd: see :func:`crate_kernels.ops.ista_step`.
    """

    def __init__(self, dim: int, *, step_size: float = 0.1, lambd: float = 0.1):
        super().__init__()
        self.step_size = step_size
        self.lambd = lambd
        self.weight = nn.Parameter(torch.empty(dim, dim))
        self.keep_folded = False
        self._folded: tuple[tuple, Tensor, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.weight)

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[0]}, step_size={self.step_size}, lambd={self.lambd}"

    def __getstate__(self):
        # A copy's weight lies elsewhere: the kept matrix would not be its own.
        return self.__dict__ | {"_folded": None}

    def train(self, mode: bool = True) -> ISTA:
        if mode:
            self._folded = None
        return super().train(mode)

    def folded(self) -> Tensor | None:
        """The kept ``W − WᵀW``, made anew if the weight has changed; None where none may be kept."""
        weight = self.weight
        # A compiled graph cannot look at the version counter each time it runs, and inference tensors have none.
        if not self.keep_folded or self.training or torch.compiler.is_compiling() or weight.is_inference():
            return None
        state = (weight._version, weight.data_ptr(), weight.dtype, weight.device, tuple(weight.stride()))
        if self._folded is None or self._folded[0] != state:
            # A matrix made in inference mode could not be used where gradients are wanted later. The alias keeps the
            # storage alive, so that no other weight can come to lie at the same address.
            with torch.inference_mode(False):
                self._folded = (state, ops.fold(weight), weight.detach())
        return self._folded[1]

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., d)`` -> ``(..., d)``."""
        return ops.ista_step(x, self.weight, step_size=self.step_size, lambd=self.lambd, folded=self.folded())


class CrateBlock(nn.Module):
    """One CRATE layer: ``z' = z + MSSA(LN z)`` compresses the tokens, ``z" = ISTA(LN z')`` sparsifies them.

    Both halves run as fused operators; with dropout in training the attention half runs as modules.

    Args:
        dim, heads, dim_head, dropout, causal, output_bias: see :class:`MSSA`.
        step_size, lambd: see :class:`ISTA`.
        eps: of both LayerNorms.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int | None = 64,
        *,
        dropout: float = 0.0,
        causal: bool = False,
        output_bias: bool = True,
        step_size: float = 0.1,
        lambd: float = 0.1,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.mssa_norm = nn.LayerNorm(dim, eps=eps)
        self.mssa = MSSA(dim, heads, dim_head, dropout=dropout, causal=causal, output_bias=output_bias)
        self.ista_norm = nn.LayerNorm(dim, eps=eps)
        self.ista = ISTA(dim, step_size=step_size, lambd=lambd)

    def compress(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The first half-step: ``z + MSSA(LN z)``; ``z (B, N, d)``."""
        return mssa_half_step(self.mssa_norm, self.mssa, z, lengths)

    def sparsify(self, z: Tensor) -> Tensor:
        """The second half-step: ``ISTA(LN z)``; ``z (B, N, d)``."""
        norm, ista = self.ista_norm, self.ista
        return ops.ista_block(
            z,
            norm.weight,
            norm.bias,
            ista.weight,
            step_size=ista.step_size,
            lambd=ista.lambd,
            eps=norm.eps,
            folded=ista.folded(),
        )

    def forward(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``z (B, N, d)`` -> ``(B, N, d)``; ``lengths (B,)`` hides padded tokens from the attention."""
        return self.sparsify(self.compress(z, lengths))


class OvercompleteISTA(nn.Module):
    """Two ISTA steps against an overcomplete dictionary, decoded again: the sparse coding of CRATE-alpha and CRATE-LM.

    Args:
        dim: d, width of the tokens.
        expansion: the dictionary ``D`` is ``(d, expansion·d)``.
        tied: decode with ``D`` itself; otherwise with a second dictionary ``D1`` of the same shape.
        step_size, lambd: see :func:`crate_kernels.ops.overcomplete_ista`.
    """

    def __init__(self, dim: int, *, expansion: int = 4, tied: bool = True, step_size: float = 0.1, lambd: float = 0.1):
        super().__init__()
        self.step_size = step_size
        self.lambd = lambd
        self.D = nn.Parameter(torch.empty(dim, expansion * dim))
        self.D1 = None if tied else nn.Parameter(torch.empty(dim, expansion * dim))
        self.reset_parameters()

    def reset_parameters(self):
        for dictionary in self.parameters():
            nn.init.kaiming_uniform_(dictionary)

    def extra_repr(self) -> str:
        shape = tuple(self.D.shape)
        return f"D={shape}, tied={self.D1 is None}, step_size={self.step_size}, lambd={self.lambd}"

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., d)`` -> ``(..., d)``."""
        return ops.overcomplete_ista(x, self.D, self.D1, step_size=self.step_size, lambd=self.lambd)


class OvercompleteCrateBlock(CrateBlock):
    """A CRATE layer whose second half codes against an overcomplete dictionary.

    ``z" = z' + ODL(LN z')`` in CRATE-alpha (``tied=False, residual=True``), ``z" = ODL(LN z')`` in the overcomplete
    language model (``tied=True, residual=False``).

    Args:
        dim, heads, dim_head, options: see :class:`CrateBlock`.
        expansion, tied: see :class:`OvercompleteISTA`.
        residual: add the half-step's input to its output.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int | None = 64,
        *,
        expansion: int = 4,
        tied: bool = False,
        residual: bool = True,
        **options,
    ):
        super().__init__(dim, heads, dim_head, **options)
        step_size, lambd = self.ista.step_size, self.ista.lambd
        self.ista = OvercompleteISTA(dim, expansion=expansion, tied=tied, step_size=step_size, lambd=lambd)
        self.residual = residual

    def sparsify(self, z: Tensor) -> Tensor:
        """The second half-step: ``z + ODL(LN z)`` or ``ODL(LN z)``; ``z (B, N, d)``."""
        coded = self.ista(self.ista_norm(z))
        return z + coded if self.residual else coded


class CrateDecoderBlock(nn.Module):
    """CRATE-MAE's decoder layer, the encoder's steps undone in reverse: ``y = LN(z) Wᵀ``, ``z' = y − MSSA(LN y)``.

    Args:
        dim, heads, dim_head, dropout, output_bias: see :class:`MSSA`.
        eps: of both LayerNorms.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int | None = 64,
        *,
        dropout: float = 0.0,
        output_bias: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.dictionary_norm = nn.LayerNorm(dim, eps=eps)
        self.dictionary = nn.Linear(dim, dim, bias=False)
        self.mssa_norm = nn.LayerNorm(dim, eps=eps)
        self.mssa = MSSA(dim, heads, dim_head, dropout=dropout, output_bias=output_bias)

    def forward(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``z (B, N, d)`` -> ``(B, N, d)``."""
        y = self.dictionary(self.dictionary_norm(z))
        return mssa_half_step(self.mssa_norm, self.mssa, y, lengths, step_size=-1.0)


def mssa_half_step(
    norm: nn.LayerNorm, mssa: MSSA, z: Tensor, lengths: Tensor | None = None, step_size: float = 1.0
) -> Tensor:
    """``z + step_size·MSSA(LN z)``: fused, or as modules where dropout acts; ``z (B, N, d)``."""
    if mssa.training and mssa.dropout:
        return z + step_size * mssa(norm(z), lengths)
    linear = isinstance(mssa.output, nn.Linear)
    return ops.mssa_block(
        z,
        norm.weight,
        norm.bias,
        mssa.projection.weight,
        mssa.output.weight if linear else None,
        mssa.output.bias if linear else None,
        heads=mssa.heads,
        scale=mssa.scale,
        causal=mssa.causal,
        lengths=lengths,
        step_size=step_size,
        eps=norm.eps,
    )


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Put ``model`` in evaluation mode and let its ISTA modules keep their folded matrix between calls.

    The cache notices changed weights (in-place writes, ``load_state_dict``, ``.to``) and is dropped by ``train()``.
    Writes that torch itself cannot see (through ``weight.data`` in place, or a NumPy view) need another call.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, ISTA):
            module.keep_folded = True
            module._folded = None
    return model
