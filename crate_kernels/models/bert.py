"""CRATE-BERT: a bidirectional language model, pre-trained to predict masked tokens ("White-Box Transformers via Sparse
Rate Reduction: Compression Is All There Is?", arXiv 2311.13110)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import CrateBlock
from ..ops import checks
from .base import CrateModel
from .checkpoint import KeyMap
from .gpt import IGNORED_TARGET, TARGETS, always_project

_ENCODER_KEYS = {
    "crate.embeddings.word_embeddings": "token_embedding",
    "crate.embeddings.position_embeddings": "position_embedding",
    "crate.embeddings.token_type_embeddings": "type_embedding",
    "crate.embeddings.LayerNorm": "embedding_norm",
    "crate.encoder.layer.{i}.attention.self.prenorm": "blocks.{i}.mssa_norm",
    "crate.encoder.layer.{i}.attention.self.qkv": "blocks.{i}.mssa.projection",
    "crate.encoder.layer.{i}.attention.output.dense": "blocks.{i}.mssa.output",
    "crate.encoder.layer.{i}.output.prenorm": "blocks.{i}.ista_norm",
    "crate.encoder.layer.{i}.output": "blocks.{i}.ista",
}
_IGNORED_KEYS = [r"crate\.embeddings\.position_ids"]


class MaskedLanguageHead(nn.Module):
    """Linear, GELU, LayerNorm (eps 1e-12), then scalar products with the token embeddings, plus a bias.

    Args:
        dim: width of the tokens.
        vocab_size: size of the bias.
    """

    def __init__(self, dim: int, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """``tokens (..., dim)``, ``embeddings (vocab_size, dim)`` -> logits ``(..., vocab_size)``."""
        tokens = self.norm(nn.functional.gelu(self.dense(tokens)))
        return nn.functional.linear(tokens, embeddings, self.bias)


class CrateBert(CrateModel):
    """Bidirectional CRATE with a head that predicts masked tokens or, with ``num_classes``, one that classifies.

    Token, position and type embeddings are added, normalized (eps 1e-12) and dropped out. The layers are
    :class:`crate_kernels.nn.CrateBlock` (eps 1e-5); their output projections have no bias. With the
    masked-language head the base size has 60,912,729 parameters.

    Args:
        vocab_size, max_length, token_types: sizes of the three embeddings.
        dim, depth, heads, dropout: sizes and dropout of the layers. If the layers have dropout, attention runs as plain
            modules in training.
        emb_dropout: dropout after the embeddings.
        num_classes: 0 for the masked-language head, None for no head. Otherwise the first token is pooled (linear,
            tanh) and classified.
        residual_dtype: see :attr:`CrateModel.residual_dtype`.
    """

    layout = KeyMap(
        _ENCODER_KEYS
        | {
            "cls.predictions.transform.dense": "head.dense",
            "cls.predictions.transform.LayerNorm": "head.norm",
            "cls.predictions.bias": "head.bias",
        },
        ignored=_IGNORED_KEYS,
        tied={
            "cls.predictions.decoder.weight": "crate.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    )

    def __init__(
        self,
        *,
        vocab_size: int = 50265,
        max_length: int = 512,
        token_types: int = 2,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        dropout: float = 0.0,
        emb_dropout: float = 0.1,
        num_classes: int | None = 0,
        residual_dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dict(
                vocab_size=vocab_size, max_length=max_length, token_types=token_types, dim=dim, depth=depth,
                heads=heads, dropout=dropout, emb_dropout=emb_dropout, num_classes=num_classes,
            )
        )  # fmt: skip
        checks.positive_ints(
            vocab_size=vocab_size, max_length=max_length, token_types=token_types, dim=dim, depth=depth, heads=heads
        )
        if num_classes is not None:
            checks.integer("num_classes", num_classes)
        checks.dropout("emb_dropout", emb_dropout)
        if dim % heads:
            raise ValueError(f"heads: {heads} does not divide dim = {dim}")
        self.vocab_size, self.max_length, self.num_classes = vocab_size, max_length, num_classes
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.position_embedding = nn.Embedding(max_length, dim)
        self.type_embedding = nn.Embedding(token_types, dim)
        self.embedding_norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(emb_dropout)
        self.blocks: Any = nn.ModuleList(
            CrateBlock(dim, heads, dim // heads, dropout=dropout, output_bias=False) for _ in range(depth)
        )
        if num_classes:
            self.layout = KeyMap(
                _ENCODER_KEYS | {"crate.pooler.dense": "pooler", "classifier": "classifier"}, ignored=_IGNORED_KEYS
            )
            self.pooler = nn.Linear(dim, dim)
            self.classifier = nn.Linear(dim, num_classes)
        elif num_classes == 0:
            self.head = MaskedLanguageHead(dim, vocab_size)
        self.residual_dtype = residual_dtype
        self.reset_parameters()

    def reset_parameters(self):
        """Embeddings and linear maps N(0, 0.02), ISTA weights kaiming-uniform, biases zero, norms one and zero."""
        for block in self.blocks:
            always_project(block, bias=False)
        module: Any
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if (bias := getattr(module, "bias", None)) is not None:
                    nn.init.zeros_(bias)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if self.num_classes == 0:
            nn.init.zeros_(self.head.bias)

    def forward_features(self, idx: Tensor, lengths: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """The last layer's tokens ``(B, N, dim)``; arguments as for :meth:`forward`."""
        checks.model_input("idx", idx, self.token_embedding.weight)
        if idx.dim() != 2 or not 1 <= idx.shape[1] <= self.max_length or idx.dtype not in checks.INTEGER:
            raise ValueError(
                f"idx: expected integers of shape (B, N) with N in 1..{self.max_length}, got {idx.dtype} "
                f"{tuple(idx.shape)}"
            )
        checks.indices("idx", idx, self.vocab_size, "the last token of the vocabulary")
        tokens = self.add_embeddings(self.token_embedding(idx), None, token_types)
        for block in self.blocks:
            tokens = block(tokens, lengths)
        return tokens

    def add_embeddings(
        self, tokens: Tensor, positions: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Token embeddings ``(B, N, dim)`` -> the first layer's tokens, with positions and types added.

        Positions ``(B, N)`` are 0, 1, ... if None. Types ``(B, N)`` are 0 if None."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            checks.values_within("positions", positions, 0, self.max_length - 1, "the last learned position")
        if token_types is None:
            token_types = torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        else:
            checks.indices("token_types", token_types, self.type_embedding.num_embeddings, "the last type")
        tokens = tokens + self.position_embedding(positions) + self.type_embedding(token_types)
        return self.dropout(self.embedding_norm(tokens))

    def forward_head(self, tokens: Tensor) -> Tensor:
        """``tokens (B, N, dim)`` -> logits ``(B, N, vocab_size)``, or ``(B, num_classes)``."""
        if self.num_classes is None:
            raise RuntimeError("this CrateBert was built without a head (num_classes=None)")
        if self.num_classes:
            return self.classifier(self.dropout(self.pooler(tokens[:, 0]).tanh()))
        return self.head(tokens, self.token_embedding.weight)

    def forward(
        self,
        idx: Tensor,
        lengths: Tensor | None = None,
        token_types: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the masked tokens, or the class of the text.

        Args:
            idx: ``(B, N)`` int32 or int64, N at most ``max_length``.
            lengths: ``(B,)`` int32 or int64 in 1..N, the number of real tokens of each text. The tokens after them are
                padding and masked. None means all N.
            token_types: ``(B, N)``, number of the text to which a token belongs, in a pair of texts; 0 if None.
            targets: ``(B, N)`` int64, the true tokens, and -1 for tokens that are not predicted; or classes ``(B,)``.

        Returns:
            Logits ``(B, N, vocab_size)``, or ``(B, num_classes)``; and their mean cross-entropy, None without targets.
        """
        logits = self.forward_head(self.forward_features(idx, lengths, token_types))
        if targets is None:
            return logits, None
        checks.tensor("targets", targets, tuple(logits.shape[:-1]), like=idx, dtypes=(torch.int64,), beside="idx")
        checks.indices("targets", targets, logits.shape[-1], TARGETS, least=IGNORED_TARGET)
        flat = logits.reshape(-1, logits.shape[-1])
        return logits, nn.functional.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED_TARGET)


def mask_tokens(
    tokens: Tensor,
    lengths: Tensor | None = None,
    *,
    mask_token: int,
    vocab_size: int,
    share: float = 0.15,
    protected: tuple[int, ...] = (),
    word_starts: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask tokens for the task of BERT (arXiv 1810.04805, section 3.1).

    Some tokens are chosen, at least one in every text. Of these, 80 % become ``mask_token``, 10 % a random token, and
    10 % stay.

    Args:
        tokens: ``(B, N)`` int64.
        lengths: ``(B,)``, number of real tokens of each text; all if None.
        mask_token: the token that replaces masked tokens.
        vocab_size: random tokens are smaller than this number.
        share: share of the tokens (or words) that are chosen.
        protected: tokens that are never chosen, such as the first token of a text.
        word_starts: ``(vocabulary or more,)`` bool from :func:`crate_kernels.models.tokenizers.word_starts`. Whole
            words are chosen then.
        generator: random generator on the CPU.

    Returns:
        Inputs ``(B, N)``, and targets ``(B, N)``: the true tokens for chosen ones, -1 for the others.
    """
    device = tokens.device

    def random() -> Tensor:
        return torch.rand(tokens.shape, generator=generator).to(device)

    index = torch.arange(tokens.shape[1], device=device)
    allowed = torch.ones_like(tokens, dtype=torch.bool) if lengths is None else index < lengths[:, None]
    for token in protected:
        allowed = allowed & (tokens != token)
    group = index.expand_as(tokens)
    if word_starts is not None:
        # Every protected token also ends a word. The words are therefore cut before it and after it.
        starts = word_starts.to(device)[tokens] | ~allowed
        starts[:, 1:] |= ~allowed[:, :-1]
        group = (starts.cumsum(1) - 1).clamp(min=0)
    noise = random().gather(1, group).masked_fill(~allowed, 2.0)
    chosen = (noise <= noise.amin(1, keepdim=True).clamp(min=share)) & allowed
    targets = tokens.masked_fill(~chosen, IGNORED_TARGET)
    fate = random()
    inputs = tokens.masked_fill(chosen & (fate < 0.8), mask_token)
    other = (random() * vocab_size).long()
    return torch.where(chosen & (fate >= 0.9), other, inputs), targets
