"""CRATE-GPT2, the causal language model, and its overcomplete variant CRATE-LM (arXiv 2410.16443)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import CrateBlock, OvercompleteCrateBlock
from ..ops import checks
from . import generation
from .base import CrateModel
from .checkpoint import KeyMap

IGNORED_TARGET = -1
"""Targets with this value are ignored in the loss."""

TARGETS = "the last class; -1 is ignored"


@dataclass
class CrateGPTConfig:
    """Sizes of a :class:`CrateGPT`; the defaults are CRATE-GPT2 base.

    Args:
        block_size: longest sequence, the number of learned positions.
        vocab_size: number of tokens; the default is GPT-2's 50257, rounded up to a multiple of 64.
        n_layer, n_head, n_embd: number of layers, number of heads, width of the tokens.
        dropout: dropout after the embedding, on the attention maps and after the output projections.
        overcomplete: two ISTA steps with a tied dictionary of 4 n_embd atoms, and a LayerNorm before the head.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    overcomplete: bool = False


def _layout(ista: str, **more) -> KeyMap:
    return KeyMap(
        {
            "transformer.wte": "token_embedding",
            "transformer.wpe": "position_embedding",
            "transformer.h.{i}.prenorm_1": "blocks.{i}.mssa_norm",
            "transformer.h.{i}.attn.c_attn": "blocks.{i}.mssa.projection",
            "transformer.h.{i}.attn.c_proj": "blocks.{i}.mssa.output",
            "transformer.h.{i}.prenorm_2": "blocks.{i}.ista_norm",
            "transformer.h.{i}.ista.weight": f"blocks.{{i}}.ista.{ista}",
            "transformer.ln_f": "norm",
        },
        ignored=[r"transformer\.h\.\d+\.attn\.bias"],
        tied={"lm_head.weight": "transformer.wte.weight"},
        **more,
    )


class CrateGPT(CrateModel):
    """Causal CRATE: token and learned position embeddings, layers, and a head tied to the token embedding.

    ``z' = z + MSSA(LN z)`` with a causal mask, ``z" = ISTA(LN z')`` (arXiv 2306.01129, equations 11 and 17); the
    overcomplete variant has the two-step dictionary of :class:`crate_kernels.nn.OvercompleteISTA` in place of ISTA.

    Args:
        config: the sizes; or give the fields of the configuration by name.
        residual_dtype: see :attr:`CrateModel.residual_dtype`. Overcomplete layers end with a matrix product, so
            autocast narrows their output in any case, as in the public code.
    """

    layout = _layout("weight")

    def __init__(self, config: CrateGPTConfig | None = None, *, residual_dtype: torch.dtype | None = None, **options):
        if config is not None and options:
            raise TypeError("give either a CrateGPTConfig or its fields, not both")
        config = config or CrateGPTConfig(**options)
        super().__init__(dataclasses.asdict(config))
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        checks.positive_ints(**{name: getattr(config, name) for name in names})
        checks.dropout("dropout", config.dropout)
        checks.flag("overcomplete", config.overcomplete)
        if config.n_embd % config.n_head:
            raise ValueError(f"n_head: {config.n_head} does not divide n_embd = {config.n_embd}")
        self.block_size, self.vocab_size, self.heads = config.block_size, config.vocab_size, config.n_head
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        sizes = dict(dim=config.n_embd, heads=config.n_head, dim_head=config.n_embd // config.n_head)
        if config.overcomplete:
            # The public weight is (4d, d), with one row per atom. Ours is D (d, 4d).
            self.layout = _layout("D", transposed=[r"transformer\.h\.\d+\.ista\.weight"])
            make: Callable[..., CrateBlock] = functools.partial(OvercompleteCrateBlock, tied=True, residual=False)
        else:
            make = CrateBlock
        layers = (make(**sizes, dropout=config.dropout, causal=True) for _ in range(config.n_layer))
        self.blocks: Any = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.n_embd) if config.overcomplete else nn.Identity()
        self.residual_dtype = residual_dtype
        self.reset_parameters()

    def reset_parameters(self):
        """N(0, 0.02), output projections N(0, 0.02 / sqrt(2·layers)), ISTA weights kaiming-uniform, biases zero."""
        for block in self.blocks:
            always_project(block)
        module: Any
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if (bias := getattr(module, "bias", None)) is not None:
                    nn.init.zeros_(bias)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for block in self.blocks:
            nn.init.normal_(block.mssa.output.weight, std=0.02 * (2 * len(self.blocks)) ** -0.5)
            if self.config["overcomplete"]:
                # The fan is n_embd, as in the public orientation (4d, d).
                nn.init.kaiming_uniform_(block.ista.D, mode="fan_out")

    def embed(self, idx: Tensor, positions: Tensor | None = None) -> Tensor:
        """``idx (B, N)`` -> the first layer's tokens ``(B, N, n_embd)``; ``positions (B, N)``, 0, 1, ... if None."""
        checks.model_input("idx", idx, self.token_embedding.weight)
        if idx.dim() != 2 or idx.shape[1] < 1 or idx.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"idx: expected integers of shape (B, N), N at least 1, got {idx.dtype} {tuple(idx.shape)}"
            )
        if positions is None:
            if idx.shape[1] > self.block_size:
                raise ValueError(f"idx: {idx.shape[1]} tokens, but block_size is {self.block_size}")
            positions = torch.arange(idx.shape[1], device=idx.device)
        else:
            checks.values_within("positions", positions, 0, self.block_size - 1, "the last learned position")
        checks.indices("idx", idx, self.vocab_size, "the last token of the vocabulary")
        return self.token_embedding(idx) + self.position_embedding(positions)

    def upstream_state_dict(self) -> dict[str, Tensor]:
        """The weights under the keys of the public code, bit for bit, with the causal masks that the public class
        stores.

        All layers share one mask ``(1, 1, block_size, block_size)``. The overcomplete class stores no masks.
        """
        state = super().upstream_state_dict()
        if not self.config["overcomplete"]:
            mask = torch.ones(self.block_size, self.block_size, device=self.token_embedding.weight.device).tril()
            state |= {f"transformer.h.{i}.attn.bias": mask[None, None] for i in range(len(self.blocks))}
        return state

    def forward_features(self, idx: Tensor) -> Tensor:
        """``idx (B, N)`` -> the input of the head ``(B, N, n_embd)``."""
        tokens = self.dropout(self.embed(idx))
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward_head(self, tokens: Tensor) -> Tensor:
        """``(..., n_embd)`` -> logits ``(..., vocab_size)``: scalar products with the token embeddings."""
        return nn.functional.linear(tokens, self.token_embedding.weight)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the token after each of ``idx``.

        Args:
            idx: ``(B, N)`` int32 or int64, N at most ``block_size``. Padding on the right needs no mask, because tokens
                attend only to earlier tokens.
            targets: ``(B, N)`` int64, the true next tokens; -1 is ignored.

        Returns:
            Logits ``(B, N, vocab_size)`` and their mean cross-entropy; without targets the logits of the last position
            ``(B, 1, vocab_size)`` and None.

        Raises:
            TypeError, ValueError: dtype, shape or values of an argument are wrong. Values are checked on the CPU only.
        """
        checks.model_input("idx", idx, self.token_embedding.weight)
        if targets is not None:
            checks.tensor("targets", targets, tuple(idx.shape), like=idx, dtypes=(torch.int64,), beside="idx")
            checks.indices("targets", targets, self.vocab_size, TARGETS, least=IGNORED_TARGET)
        tokens = self.forward_features(idx)
        if targets is None:
            return self.forward_head(tokens[:, -1:]), None
        logits = self.forward_head(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)
        return logits, loss

    def new_cache(self, batch: int, capacity: int | None = None) -> generation.ProjectionCache:
        """An empty cache for ``batch`` sequences of up to ``capacity`` (``block_size`` if None) tokens."""
        mssa = self.blocks[0].mssa
        weight = mssa.projection.weight
        capacity = self.block_size if capacity is None else capacity
        heads, width = mssa.heads, weight.shape[0] // self.heads  # under tensor parallelism, this rank's heads
        device = weight.device
        dtype = ops.backends.autocast_dtype(weight)
        return generation.ProjectionCache(len(self.blocks), batch, capacity, heads, width, dtype=dtype, device=device)

    @torch.no_grad()
    def step(self, idx: Tensor, cache: generation.ProjectionCache, lengths: Tensor | None = None) -> Tensor:
        """Append the next tokens of each sequence to the cache, and predict the token after them. Dropout is not
        applied.

        Args:
            idx: ``(B, M)``, the prompts, or later the tokens that follow them.
            cache: the cache of :meth:`new_cache`. The new tokens are stored in it.
            lengths: ``(B,)`` int64, number of real tokens among the M; the rest is padding on the right. None means
                all.

        Returns:
            Logits ``(B, vocab_size)`` after the last real token of each sequence. They equal those of :meth:`forward`
            on all
                tokens so far.
        """
        checks.model_input("idx", idx, self.token_embedding.weight)
        batch, new = idx.shape
        if batch != len(cache.lengths) or cache.longest + new > cache.capacity:
            raise ValueError(
                f"cache: has room for {len(cache.lengths)} sequences of {cache.capacity} tokens and holds"
                f" {cache.longest}; {batch} sequences with {new} more do not fit"
            )
        lengths = torch.full_like(cache.lengths, new) if lengths is None else lengths
        places = cache.begin(new)
        tokens = self.embed(idx, places)
        for layer in range(len(self.blocks)):
            tokens = self.cached_layer(layer, tokens, cache, places)
        cache.end(lengths)
        last = tokens.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, tokens.shape[2]))
        return self.forward_head(self.norm(last[:, 0]))

    def cached_layer(self, layer: int, tokens: Tensor, cache: generation.ProjectionCache, places: Tensor) -> Tensor:
        """One layer for new ``tokens (B, M, n_embd)``. They attend to the tokens in ``cache``, and are stored there.

        :meth:`ProjectionCache.begin` returned ``places (B, M)``. Gradients flow through the new tokens only, so they
        are complete only if the cache was empty.
        """
        block = self.blocks[layer]
        mssa = block.mssa
        w = mssa.project(block.mssa_norm(tokens))
        past = cache.write(layer, w, places)
        if cache.longest == places.shape[1]:
            o = ops.subspace_attention(w, scale=mssa.scale, causal=True)
        else:
            o = ops.cached_subspace_attention(w, past.to(w.dtype), places, scale=mssa.scale)
        return block.sparsify(tokens + mssa.output(o.flatten(2)))

    def generate(
        self, idx: Tensor | Sequence, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, **options
    ) -> Tensor | list[Tensor]:
        """Continue prompts, see :func:`crate_kernels.models.generation.generate`."""
        return generation.generate(self, idx, max_new_tokens, temperature=temperature, top_k=top_k, **options)

    def stream(self, idx: Tensor | Sequence, max_new_tokens: int, **options) -> Iterator[Tensor]:
        """Continue prompts a token at a time, see :func:`crate_kernels.models.generation.stream`."""
        return generation.stream(self, idx, max_new_tokens, **options)


def always_project(block: CrateBlock, bias: bool = True) -> None:
    """Give ``block`` an output projection even if one head spans the whole width. The vision models leave it out
    then."""
    if isinstance(block.mssa.output, nn.Identity):
        weight = block.mssa.projection.weight
        inner, dim = weight.shape
        block.mssa.output = nn.Linear(inner, dim, bias=bias, device=weight.device, dtype=weight.dtype)


SIZES = {
    "base": dict(n_layer=12, n_head=12, n_embd=768),
    "medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "large": dict(n_layer=36, n_head=20, n_embd=1280),
    "xl": dict(n_layer=48, n_head=25, n_embd=1600),
}
"""GPT-2's sizes."""


def crate_gpt2(size: str = "base", **options) -> CrateGPT:
    """CRATE-GPT2 of a size of :data:`SIZES`; base has 60,699,648 parameters. ``options`` override the configuration."""
    if size not in SIZES:
        raise ValueError(f"size: unknown {size!r}; known are {', '.join(SIZES)}")
    return CrateGPT(**SIZES[size] | options)


def crate_lm(size: str = "base", **options) -> CrateGPT:
    """The overcomplete CRATE language model of a size of :data:`SIZES`; base has 81,934,848 parameters."""
    return crate_gpt2(size, **{"overcomplete": True} | options)
