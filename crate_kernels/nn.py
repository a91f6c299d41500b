"""Modules of the CRATE layer. They hold the parameters; the operators of ``crate_kernels.ops`` compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from . import ops
from .graphs import Graphs
from .ops import checks, standard
from .ops.kept import forget
from .ops.masks import finite_where_hidden, forbidden

Model = TypeVar("Model", bound=nn.Module)


class MSSA(nn.Module):
    """Multi-head subspace self-attention. One projection is query, key and value.

    ``MSSA(x) = [softmax(scale · w wᵀ) w] W_outᵀ + b`` with ``w = x Uᵀ`` per head (arXiv 2306.01129, equation 11).

    Args:
        dim: d, width of the tokens.
        heads: H.
        dim_head: p, width of a head; ``dim // heads`` if None.
        dropout: probability, on the attention maps and on the output projection, in training.
        causal: token i attends only to tokens j <= i.
        output_bias: whether the output projection has a bias. One head of width d has no output projection.
        scale: factor of the scores, ``dim_head ** -0.5`` if None. The papers' equations have 1.
        tied_output: ``W_out = Uᵀ``, as equation 11 of the paper has it. There are no parameters beside U.
        qk_norm: RMSNorm with a learned gain per channel of a head, before the scores. The values are not normalized.
        rotary: base of rotary position embeddings of queries and keys (10000 is usual); None for none.
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
        scale: float | None = None,
        tied_output: bool = False,
        qk_norm: bool = False,
        rotary: float | None = None,
    ):
        super().__init__()
        checks.positive_ints(dim=dim, heads=heads)
        checks.dropout("dropout", dropout)
        if dim_head is None:
            if dim % heads:
                raise ValueError(f"heads: {heads} does not divide dim = {dim}; give dim_head")
            dim_head = dim // heads
        checks.positive_int("dim_head", dim_head)
        scale = dim_head**-0.5 if scale is None else checks.number("scale", scale)
        for name, value in dict(
            causal=causal, output_bias=output_bias, tied_output=tied_output, qk_norm=qk_norm
        ).items():
            checks.flag(name, value)
        if rotary is not None and checks.number("rotary", rotary) <= 0:
            raise ValueError(f"rotary: expected a positive base, got {rotary}")
        if rotary is not None and dim_head % 2:
            raise ValueError(f"rotary: rotates pairs of channels, so dim_head must be even; got {dim_head}")
        self.dim = dim
        self.heads = heads
        self.scale = scale
        self.causal = causal
        self.dropout = dropout
        self.rotary = rotary
        self.projection = nn.Linear(dim, heads * dim_head, bias=False)
        self.output: Any  # TransposedProjection, Linear or Identity
        if tied_output:
            self.output = TransposedProjection(self.projection)
        elif heads == 1 and dim_head == dim:
            self.output = nn.Identity()
        else:
            self.output = nn.Linear(heads * dim_head, dim, bias=output_bias)
        self.qk_norm = nn.RMSNorm(dim_head) if qk_norm else None

    def extra_repr(self) -> str:
        rotary = "" if self.rotary is None else f", rotary={self.rotary}"
        return f"heads={self.heads}, scale={self.scale:.4g}, causal={self.causal}, dropout={self.dropout}{rotary}"

    @property
    def one_operand(self) -> bool:
        """Whether the projected tokens themselves are query, key and value."""
        return self.qk_norm is None and self.rotary is None

    @property
    def fusible(self) -> bool:
        """Whether the fused half-step computes this module: no dropout, no option that it does not know, no hook."""
        return self.one_operand and not (self.training and self.dropout) and plain(self, self.projection, self.output)

    def project(self, x: Tensor) -> Tensor:
        """The tokens in every head's subspace: ``x (B, N, d)`` -> ``w (B, N, H, p)``."""
        return self.projection(x).unflatten(-1, (self.heads, -1))

    def directions(self, w: Tensor, positions: Tensor | None = None) -> Tensor:
        """Queries and keys: ``w (B, N, H, p)``, normalized with ``qk_norm`` and rotated with ``rotary``."""
        if self.qk_norm is not None:
            w = self.qk_norm(w.to(self.qk_norm.weight.dtype)).to(w.dtype)
        return w if self.rotary is None else rotate(w, positions, self.rotary)

    def attention(self, x: Tensor, lengths: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """The attention maps ``softmax(scale · w wᵀ)``: ``x (B, N, d)`` -> ``(B, H, N, N)``."""
        return ops.attention_maps(self.directions(self.project(x), positions), self.scale, self.causal, lengths)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        context: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """``x (B, N, d)`` -> ``(B, N, d)``, or a feature map ``(B, d, rows, columns)`` -> the same.

        Args:
            lengths: ``(B,)``, the number of real tokens; the padding after them is masked. With ``context`` it counts
                the tokens of ``context``.
            context: ``(B, M, d)`` or a feature map, for cross-attention ``softmax(scale · w_x w_cᵀ) w_c``. The tokens
                of ``x`` are the queries, those of ``context`` are keys and values; U projects both. Not with causal
                or rotary.
            positions: ``(N,)`` or ``(B, N)``, for rotary embeddings; 0 to N - 1 if None.
        """
        checks.width("x", x, self.dim, maps=True)
        if x.dim() == 4:
            return _as_map(self.forward(_as_tokens(x), lengths, context=context, positions=positions), x)
        checks.tensor("x", x, ("B", "N", "d"))
        if context is None and self.training and self.dropout:
            return self.with_maps(x, lengths, positions)
        w = self.project(x)
        if context is not None:
            checks.width("context", context, self.dim, maps=True)
            o = self._cross(w, _as_tokens(context) if context.dim() == 4 else context, lengths)
        elif self.one_operand:
            o = ops.subspace_attention(w, scale=self.scale, causal=self.causal, lengths=lengths)
        else:
            directions = self.directions(w, positions)
            o = ops.subspace_attention(directions, w, scale=self.scale, causal=self.causal, lengths=lengths)
        return nn.functional.dropout(self.output(o.flatten(2)), self.dropout, self.training)

    def with_maps(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        edit: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The output ``(B, N, d)``, computed through the attention maps; arguments as for :meth:`forward`.

        ``edit`` maps the attention maps ``(B, H, N, N)``, before dropout, to the maps that are used instead.
        """
        w = self.project(x)
        maps = ops.attention_maps(self.directions(w, positions), self.scale, self.causal, lengths)
        if edit is not None:
            maps = edit(maps)
        w = finite_where_hidden(w, lengths)
        o = (nn.functional.dropout(maps, self.dropout, self.training) @ w.transpose(1, 2)).transpose(1, 2)
        return nn.functional.dropout(self.output(o.flatten(2)), self.dropout, self.training)

    def _cross(self, w: Tensor, context: Tensor, lengths: Tensor | None) -> Tensor:
        if self.causal or self.rotary is not None:
            raise ValueError("context: queries and context have no common order; build with causal=False, rotary=None")
        values = finite_where_hidden(self.project(context), lengths)
        if self.training and self.dropout:
            if lengths is not None:
                checks.lengths(lengths, len(values), values)
                checks.length_values(lengths, values.shape[1])
            hidden = forbidden(values.shape[1], lengths, False, values.device)
            return nn.functional.scaled_dot_product_attention(
                self.directions(w).transpose(1, 2),
                self.directions(values).transpose(1, 2),
                values.transpose(1, 2),
                attn_mask=None if hidden is None else ~hidden,
                dropout_p=self.dropout,
                scale=self.scale,
            ).transpose(1, 2)
        if self.one_operand:
            return ops.subspace_cross_attention(w, values, scale=self.scale, lengths=lengths)
        directions = self.directions(w), self.directions(values)
        return ops.subspace_cross_attention(*directions, values, scale=self.scale, lengths=lengths)


class TransposedProjection(nn.Module):
    """``o (..., H·p)`` -> ``(..., d)`` by the transposed weight of another Linear; no parameters of its own."""

    def __init__(self, projection: nn.Linear):
        super().__init__()
        self._projection = (projection,)  # a tuple hides it from state_dict, where its weight has a name already

    @property
    def weight(self) -> Tensor:
        """``(d, H·p)``, like the weight of a Linear."""
        return self._projection[0].weight.T

    bias = None

    def forward(self, o: Tensor) -> Tensor:
        return nn.functional.linear(o, self.weight)


def rotate(w: Tensor, positions: Tensor | None = None, base: float = 10000.0) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864): rotates channels ``(i, i + p/2)`` by ``position · base^(−2i/p)``.

    ``w (B, N, H, p)`` with p even, ``positions (N,)`` or ``(B, N)``, 0 to N - 1 if None -> ``(B, N, H, p)`` in the
    dtype of ``w``. The angles are float32; float64 if ``w`` is.
    """
    half = w.shape[-1] // 2
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    if positions is None:
        positions = torch.arange(w.shape[1], device=w.device)
    frequencies = base ** (-torch.arange(half, device=w.device, dtype=dtype) / half)
    angles = (positions.to(dtype)[..., None] * frequencies)[..., None, :]  # (N, 1, p/2) or (B, N, 1, p/2)
    cos, sin = angles.cos(), angles.sin()
    a, b = w.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(w.dtype)


def residual_stream(z: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tokens between layers, ``z``, in ``dtype`` while autocast is on. None, or no autocast, leaves them alone.

    The half-steps keep the dtype of the tokens that they are given: a stream that is cast once stays as it is.
    """
    return z if dtype is None or z.dtype == dtype or not ops.backends.autocast_is_on(z) else z.to(dtype)


class KeepsFolded(nn.Module):
    """Base of a module with a dictionary ``weight (d, d)``. It can cache ``W − WᵀW`` between calls.

    The cached matrix is computed again when the weight is another tensor, has moved, or was written to.
    """

    weight: nn.Parameter
    keep_folded = False
    _folded: tuple[tuple, Tensor, Tensor] | None = None

    def __getstate__(self):
        # A copy has another weight, so it must not inherit the cached matrix.
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_folded"} if isinstance(state, dict) else state

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._folded = None
        return super().train(mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # An export cannot tell whether the weight is still the tensor that was folded.
        self._folded = None
        super().register_parameter(name, param)

    def folded(self) -> Tensor | None:
        """The cached ``W − WᵀW``, computed again if the weight has changed; None where caching is not allowed."""
        weight = self.weight
        if not self.keep_folded or self.training:
            return None
        if torch.compiler.is_compiling():
            return self._folded_in_graph(weight)
        if weight.is_inference():  # such tensors have no version counter
            return None
        if self._folded is not None and self._folded[0] == self._weight_state():
            return self._folded[1]
        # A matrix computed in inference mode could not be used later where gradients are needed.
        with torch.inference_mode(False):
            return self.keep(ops.fold(weight))

    def keep(self, folded: Tensor) -> Tensor:
        """Cache ``folded (d, d)`` as the folded matrix of the weight as it is now, and return it."""
        # The detached weight keeps the storage alive, so that no other weight can get the same address.
        self._folded = (self._weight_state(), folded, self.weight.detach())
        return folded

    def _weight_state(self) -> tuple:
        weight = self.weight
        return weight._version, weight.data_ptr(), weight.dtype, weight.device, tuple(weight.stride())

    def _folded_in_graph(self, weight: Tensor) -> Tensor | None:
        """The folded matrix in a graph of torch.compile or torch.export. A graph cannot check the version counter in
        every call."""
        if standard.exporting():
            if self._folded is not None:
                (version, *_), folded, alias = self._folded
                if (alias._version, alias.dtype, alias.device) == (version, weight.dtype, weight.device):
                    return folded  # a constant of the exported program
            return standard.fold(weight)
        # A graph with frozen parameters computes this once, when it is compiled.
        return standard.fold(weight) if _parameters_are_frozen() else None


@torch.compiler.assume_constant_result
def _parameters_are_frozen() -> bool:
    return torch._inductor.config.freezing and not torch.is_grad_enabled()


class ISTA(KeepsFolded):
    """One ISTA step against a complete dictionary: ``relu(x + step_size·(x W − x Wᵀ W) − step_size·lambd)``.

    In evaluation, after :func:`prepare_for_inference`, the folded matrix ``W − WᵀW`` is computed once and cached.

    Args:
        dim: d; ``weight`` is ``(d, d)``, kaiming-uniform.
        step_size, lambd: see :func:`crate_kernels.ops.ista_step`.
        learnable: ``"scalar"`` or ``"channel"`` makes both learnable parameters, ``()`` or ``(d,)``, which start at the
            given values. The operators take only numbers, so the step then runs in stock PyTorch: the same products
            and a few more elementwise passes.
    """

    def __init__(self, dim: int, *, step_size: float = 0.1, lambd: float = 0.1, learnable: str | None = None):
        super().__init__()
        checks.positive_int("dim", dim)
        self.step_size, self.lambd = _step_parameters(step_size, lambd, learnable, dim)
        self.weight = nn.Parameter(torch.empty(dim, dim))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.weight)

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[0]}, {_step_repr(self)}"

    @property
    def learns_step(self) -> bool:
        """Whether step size and threshold are parameters."""
        return isinstance(self.step_size, Tensor)

    @property
    def fusible(self) -> bool:
        """Whether the fused half-step computes this module: a fixed step size and no hook."""
        return not self.learns_step and plain(self)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., d)`` -> ``(..., d)``."""
        checks.width("x", x, self.weight.shape[0])
        if self.learns_step:
            weight, shifted = self.weight, x - self.step_size * self.lambd
            # As in the operator: fold the dictionary where that is less work. A compiled graph always folds.
            if torch.compiler.is_compiling() or x.numel() >= weight.numel():
                return torch.relu(shifted + self.step_size * (x @ (weight - weight.T @ weight)))
            return torch.relu(shifted + self.step_size * ((x - x @ weight.T) @ weight))
        return ops.ista_step(x, self.weight, step_size=self.step_size, lambd=self.lambd, folded=self.folded())


class CrateBlock(nn.Module):
    """One CRATE layer: ``z' = z + MSSA(LN z)`` compresses the tokens, ``z" = ISTA(LN z')`` sparsifies them.

    The layer is one fused operator. It runs as modules with dropout in training, with options that the operator does
    not know, and while one of its modules has a hook or is replaced (see :func:`plain`).

    Args:
        dim, heads, dim_head, dropout, causal, output_bias: see :class:`MSSA`.
        step_size, lambd, learnable: see :class:`ISTA`.
        eps: of both LayerNorms.
        mssa_step_size, shrink: ``z' = (1 − shrink)·z + mssa_step_size·MSSA(LN z)``. The gradient step on the coding
            rate has ``κ·p/(N·ε²)`` for both (arXiv 2306.01129); the public code has 1 and 0.
        mssa_options: ``scale``, ``tied_output``, ``qk_norm``, ``rotary``; see :class:`MSSA`.
    """

    residual_dtype: torch.dtype | None = None
    """Of the residual stream under autocast, see :attr:`crate_kernels.models.CrateModel.residual_dtype`."""

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
        learnable: str | None = None,
        mssa_step_size: float = 1.0,
        shrink: float = 0.0,
        **mssa_options,
    ):
        super().__init__()
        checks.positive_int("dim", dim)
        checks.number("eps", eps, minimum=0.0)
        self.dim = dim
        self.mssa_step_size = checks.number("mssa_step_size", mssa_step_size)
        self.shrink = checks.number("shrink", shrink)
        mssa_options |= dict(dropout=dropout, causal=causal, output_bias=output_bias)
        self.mssa_norm = nn.LayerNorm(dim, eps=eps)
        self.mssa = MSSA(dim, heads, dim_head, **mssa_options)
        self.ista_norm = nn.LayerNorm(dim, eps=eps)
        self.ista: Any = ISTA(dim, step_size=step_size, lambd=lambd, learnable=learnable)

    def extra_repr(self) -> str:
        steps = f"mssa_step_size={self.mssa_step_size}, shrink={self.shrink}"
        return "" if (self.mssa_step_size, self.shrink) == (1, 0) else steps

    def compress(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The first half-step: ``z + MSSA(LN z)``; ``z (B, N, d)``."""
        out = mssa_half_step(self.mssa_norm, self.mssa, z, lengths, self.mssa_step_size)
        return out - self.shrink * z if self.shrink else out

    def sparsify(self, z: Tensor) -> Tensor:
        """The second half-step: ``ISTA(LN z)``; ``z (B, N, d)``."""
        norm, ista = self.ista_norm, self.ista
        if not ista.fusible or not plain(norm):
            return ista(norm(z)).to(z.dtype)
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
        """``z (B, N, d)`` -> ``(B, N, d)``; ``lengths (B,)`` masks padded tokens in the attention.

        A feature map ``(B, d, rows, columns)`` is processed as its tokens and returned as a map.
        """
        checks.width("z", z, self.dim, maps=True)
        if z.dim() == 4:
            return _as_map(self.forward(_as_tokens(z), lengths), z)
        z = residual_stream(z, self.residual_dtype)
        mssa, ista, first, second = self.mssa, self.ista, self.mssa_norm, self.ista_norm
        whole = self._one_operator and mssa.fusible and ista.fusible and plain(first, second)
        if self.shrink or not whole:
            return self.sparsify(self.compress(z, lengths))
        output = mssa.output
        linear = not isinstance(output, nn.Identity)
        return ops.crate_layer(
            z,
            first.weight,
            first.bias,
            mssa.projection.weight,
            output.weight if linear else None,
            output.bias if linear else None,
            second.weight,
            second.bias,
            ista.weight,
            heads=mssa.heads,
            scale=mssa.scale,
            causal=mssa.causal,
            lengths=lengths,
            mssa_step_size=self.mssa_step_size,
            step_size=ista.step_size,
            lambd=ista.lambd,
            mssa_eps=first.eps,
            ista_eps=second.eps,
            folded=ista.folded(),
        )

    @property
    def _one_operator(self) -> bool:
        """Whether both half-steps are the ones of this class, so that one operator can replace them.

        A subclass may define another half-step, and a caller may replace one on an instance.
        """
        own = self.__dict__
        cls = type(self)
        return (
            cls.compress is CrateBlock.compress
            and cls.sparsify is CrateBlock.sparsify
            and "compress" not in own
            and "sparsify" not in own
        )


class OvercompleteISTA(nn.Module):
    """Two ISTA steps against an overcomplete dictionary, then decoding: the sparse coding of CRATE-alpha and CRATE-LM.

    Args:
        dim: d, width of the tokens.
        expansion: the dictionary ``D`` is ``(d, expansion·d)``.
        tied: decode with ``D`` itself; otherwise with a second dictionary ``D1`` of the same shape.
        step_size, lambd: see :func:`crate_kernels.ops.overcomplete_ista`.
        learnable: as for :class:`ISTA`; ``"channel"`` gives every atom of the dictionary its own values.
    """

    def __init__(
        self,
        dim: int,
        *,
        expansion: int = 4,
        tied: bool = True,
        step_size: float = 0.1,
        lambd: float = 0.1,
        learnable: str | None = None,
    ):
        super().__init__()
        checks.positive_ints(dim=dim, expansion=expansion)
        checks.flag("tied", tied)
        self.step_size, self.lambd = _step_parameters(step_size, lambd, learnable, expansion * dim)
        self.D = nn.Parameter(torch.empty(dim, expansion * dim))
        self.D1 = None if tied else nn.Parameter(torch.empty(dim, expansion * dim))
        self.reset_parameters()

    def reset_parameters(self):
        for dictionary in (self.D, self.D1):
            if dictionary is not None:
                nn.init.kaiming_uniform_(dictionary)

    def extra_repr(self) -> str:
        shape = tuple(self.D.shape)
        return f"D={shape}, tied={self.D1 is None}, {_step_repr(self)}"

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., d)`` -> ``(..., d)``."""
        checks.width("x", x, self.D.shape[0])
        if isinstance(self.step_size, Tensor):
            threshold = self.step_size * self.lambd
            codes = torch.relu(self.step_size * (x @ self.D) - threshold)
            codes = torch.relu(codes - self.step_size * ((codes @ self.D.T - x) @ self.D) - threshold)
            return codes @ (self.D if self.D1 is None else self.D1).T
        return ops.overcomplete_ista(x, self.D, self.D1, step_size=self.step_size, lambd=self.lambd)


class OvercompleteCrateBlock(CrateBlock):
    """A CRATE layer whose second half uses an overcomplete dictionary.

    ``z" = z' + ODL(LN z')`` in CRATE-alpha (``tied=False, residual=True``), ``z" = ODL(LN z')`` in the overcomplete
    language model (``tied=True, residual=False``).

    Args:
        dim, heads, dim_head, options: see :class:`CrateBlock`.
        expansion, tied: see :class:`OvercompleteISTA`.
        residual: add the input of the half-step to its output.
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
        checks.flag("residual", residual)
        steps = {name: options[name] for name in ("step_size", "lambd", "learnable") if name in options}
        self.ista = OvercompleteISTA(dim, expansion=expansion, tied=tied, **steps)
        self.residual = residual

    def sparsify(self, z: Tensor) -> Tensor:
        """The second half-step: ``z + ODL(LN z)`` or ``ODL(LN z)``; ``z (B, N, d)``."""
        coded = self.ista(self.ista_norm(z))
        return z + coded if self.residual else coded


class CrateDecoderBlock(nn.Module):
    """Decoder layer of CRATE-MAE. It inverts the encoder's steps: ``y = LN(z) Wᵀ``, ``z' = y − MSSA(LN y)``.

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
        checks.positive_int("dim", dim)
        checks.number("eps", eps, minimum=0.0)
        self.dim = dim
        self.dictionary_norm = nn.LayerNorm(dim, eps=eps)
        self.dictionary = nn.Linear(dim, dim, bias=False)
        self.mssa_norm = nn.LayerNorm(dim, eps=eps)
        self.mssa = MSSA(dim, heads, dim_head, dropout=dropout, output_bias=output_bias)

    def forward(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``z (B, N, d)`` -> ``(B, N, d)``, or a feature map ``(B, d, rows, columns)`` -> the same."""
        checks.width("z", z, self.dim, maps=True)
        if z.dim() == 4:
            return _as_map(self.forward(_as_tokens(z), lengths), z)
        y = self.dictionary(self.dictionary_norm(z))
        return mssa_half_step(self.mssa_norm, self.mssa, y, lengths, step_size=-1.0)


PLAIN = frozenset((nn.LayerNorm, nn.Linear, nn.Identity, TransposedProjection, MSSA, ISTA))
"""The classes whose forward an operator computes from their parameters."""


def plain(*modules: nn.Module) -> bool:
    """Whether an operator may read the modules' parameters instead of calling their ``forward``.

    False for a module with a hook or with its own ``forward`` on the instance, and for a class that replaces ours (an
    adapter, a quantized layer, a parametrized or sharded one).
    """
    return all(
        type(m) in PLAIN
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        and "forward" not in m.__dict__
        for m in modules
    )


def mssa_half_step(
    norm: nn.LayerNorm, mssa: MSSA, z: Tensor, lengths: Tensor | None = None, step_size: float = 1.0
) -> Tensor:
    """``z + step_size·MSSA(LN z)``, by the operator if it can compute this module; ``z (B, N, d)``."""
    if not mssa.fusible or not plain(norm):
        return z + step_size * mssa(norm(z), lengths)
    linear = not isinstance(mssa.output, nn.Identity)
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


def _step_parameters(step_size: float, lambd: float, learnable: str | None, width: int):
    step_size = checks.number("step_size", step_size, minimum=0.0)
    lambd = checks.number("lambd", lambd, minimum=0.0)
    if learnable is None:
        return step_size, lambd
    if learnable not in ("scalar", "channel"):
        raise ValueError(f"learnable: expected None, 'scalar' or 'channel', got {learnable!r}")
    shape = () if learnable == "scalar" else (width,)
    return nn.Parameter(torch.full(shape, step_size)), nn.Parameter(torch.full(shape, lambd))


def _step_repr(module: ISTA | OvercompleteISTA) -> str:
    return ", ".join(
        f"{name}={f'learned {tuple(value.shape)}' if isinstance(value, Tensor) else value}"
        for name, value in (("step_size", module.step_size), ("lambd", module.lambd))
    )


def _as_tokens(feature_map: Tensor) -> Tensor:
    return feature_map.flatten(2).transpose(1, 2)


def _as_map(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def prepare_for_inference(model: Model, *, cuda_graph: bool = False) -> Model:
    """Put ``model`` in evaluation mode and let its ISTA modules cache their folded matrix. Return ``model``.

    ``model`` is one of this package, or any model in which :func:`crate_kernels.fuse` found ISTA modules.

    The cache follows changes of the weights (in-place writes, ``load_state_dict``, ``.to``), and ``train()`` drops it.
    torch does not see some writes (in place through ``weight.data``, or through a NumPy view). Call this function
    again after such a write.

    An exported program (``torch.export``, ``torch.onnx.export``) holds the folded matrices as constants.

    Args:
        cuda_graph: replay the forward from CUDA graphs, one for each kind of input (shapes, dtypes, other arguments),
            at most :data:`crate_kernels.graphs.MOST_GRAPHS`. Call the model under ``torch.no_grad()`` or
            ``torch.inference_mode()``, from one thread and on one stream at a time. The first call of a kind captures
            its graph and takes longer. Results are copies, which later calls leave alone. Where no graph can be used,
            with tensors on a CPU for example, the plain forward runs: :class:`crate_kernels.graphs.Graphs` lists when.
            After adding or replacing modules, call this function again.

    Raises:
        RuntimeError: with ``cuda_graph``, if torch finds no CUDA device.
    """
    if cuda_graph:
        object.__setattr__(model, "forward", Graphs(model))
    elif isinstance(model.forward, Graphs):
        object.__setattr__(model, "forward", model.forward.plain)
    model.eval()
    forget(model.parameters())
    for module in model.modules():
        if isinstance(module, KeepsFolded):
            module.keep_folded, module._folded = True, None
            if type(module.weight) in (Tensor, nn.Parameter) and not module.weight.is_meta:
                module.folded()
    return model
