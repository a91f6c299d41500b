"""Text generation: the one-tensor cache, sampling, and the generation loop."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..ops import checks

if TYPE_CHECKING:
    from .tokenizers import Tokenizer

NOTHING = -1
"""The value that :func:`stream` yields for a sequence that has already ended."""


class ProjectionCache:
    """The projected tokens ``w`` of every layer. Causal subspace attention needs no other state.

    CRATE's query, key and value are one tensor. A key-value cache of the same model is therefore twice as large.

    Args:
        layers, batch, capacity, heads, width: sizes of the buffer ``(layers, batch, capacity, heads, width)``.
        dtype, device: dtype and device of the buffer.

    Attributes:
        lengths: ``(batch,)`` int64, number of stored tokens of each sequence.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        capacity: int,
        heads: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        checks.positive_ints(layers=layers, heads=heads, width=width)
        checks.integer("batch", batch)
        checks.integer("capacity", capacity)
        # The buffer starts with zeros. Masked places get the weight zero, and zero times NaN would be NaN.
        self.w = torch.zeros(layers, batch, capacity, heads, width, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0

    @property
    def capacity(self) -> int:
        return self.w.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer: layers · batch · capacity · heads · width · bytes per element."""
        return self.w.nbytes

    def reorder_cache(self, rows: Tensor) -> None:
        """Keep the sequences ``rows (B,)``, in that order. Sequences may be repeated or left out, as in a beam
        search."""
        self.w = self.w.index_select(1, rows)
        self.lengths = self.lengths.index_select(0, rows)

    def begin(self, new: int) -> Tensor:
        """Reserve places for ``new`` more tokens of each sequence -> the places ``(B, new)``, beginning at
        ``lengths``."""
        self.longest += new
        return self.lengths[:, None] + torch.arange(new, device=self.lengths.device)

    def write(self, layer: int, w: Tensor, places: Tensor) -> Tensor:
        """Store ``w (B, M, H, p)``, without its gradient, at ``places (B, M)`` -> all tokens of the layer.

        Their shape is ``(B, N, H, p)``, where N is the length of the longest sequence.
        """
        rows = torch.arange(len(places), device=places.device)[:, None]
        self.w[layer].index_put_((rows, places), w.detach().to(self.w.dtype))
        return self.w[layer, :, : self.longest]

    def end(self, lengths: Tensor) -> None:
        """Keep the first ``lengths (B,)`` of the new tokens. The other new tokens are padding."""
        self.lengths += lengths

    def reserve(self, tokens: int, most: int) -> None:
        """Enlarge the buffer for ``tokens`` per sequence: at least to twice its size, at most to ``most``."""
        if tokens > self.capacity:
            more = min(max(tokens, 2 * self.capacity), most) - self.capacity
            self.w = torch.nn.functional.pad(self.w, (0, 0, 0, 0, 0, more))

    def forget(self, tokens: int) -> None:
        """Drop the last ``tokens`` of every sequence."""
        self.lengths, self.longest = (self.lengths - tokens).clamp(min=0), max(self.longest - tokens, 0)


class CausalModel(Protocol):
    """The interface of a language model for generation. :class:`~crate_kernels.models.CrateGPT` implements it."""

    block_size: int
    """Longest sequence of the model."""
    token_embedding: torch.nn.Embedding

    def new_cache(self, batch: int, capacity: int | None = None) -> ProjectionCache: ...

    def step(self, idx: Tensor, cache: ProjectionCache, lengths: Tensor | None = None) -> Tensor: ...


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Choose a token for each row of ``logits (B, V)`` -> ``(B,)`` int64.

    Args:
        temperature: divides the logits; 0 chooses the most likely token.
        top_k: only the k most likely tokens can be chosen.
        top_p: only the most likely tokens that together reach this probability can be chosen; at least one.
        uniform: ``(B,)`` random numbers in [0, 1); None draws them from torch's generator.
    """
    checks.number("temperature", temperature, minimum=0.0)
    if top_k is not None:
        checks.positive_int("top_k", top_k)
    if top_p is not None and not 0 < checks.number("top_p", top_p) <= 1:
        raise ValueError(f"top_p: expected a probability above 0, got {top_p}")
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    probabilities, tokens = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    # The logits are sorted, so that each filter keeps a prefix, and a cumulative sum finds the chosen token.
    if top_k is not None:
        probabilities = probabilities[:, :top_k]
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    reached = probabilities.cumsum(-1)
    if top_p is not None:
        reached = reached * (reached - probabilities < top_p)
    total = reached.amax(-1)
    if uniform is None:
        uniform = torch.rand(len(logits), device=logits.device)
    # Through rounding the random number could equal the total sum. The index would then be past the last token.
    below = torch.minimum(uniform.to(total) * total, total * (1 - 1e-6))
    chosen = ((reached <= below[:, None]) & (reached > 0)).sum(-1)
    return tokens.gather(1, chosen[:, None])[:, 0]


@torch.no_grad()
def stream(
    model: CausalModel,
    prompts: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Continue prompts, one token per sequence at a time.

    Each sequence has its own random numbers, so its continuation does not depend on the batch. Dropout is not applied.
    Beyond the model's ``block_size`` the oldest tokens are dropped. Then positions shift with every token and the cache
    cannot be used, so each token costs a pass over the whole window.

    Args:
        model: the language model.
        prompts: ``(B, N)`` integers, or a sequence of B prompts of any lengths (at least one token each).
        max_new_tokens: largest number of tokens to add to each prompt.
        temperature, top_k, top_p: see :func:`sample`.
        seed: seed of the random numbers. Sequence b uses ``seed + b``, or ``seed[b]``. None draws it from torch's
            generator.
        stop_token: ends a sequence that produces it.

    Yields:
        ``(B,)`` int64: the next token of each sequence, or :data:`NOTHING` for a sequence that has ended.
    """
    checks.integer("max_new_tokens", max_new_tokens)
    device = model.token_embedding.weight.device
    rows = [row.to(device, torch.int64) for row in _rows(prompts)]
    seeds = _seeds(seed, len(rows))
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = int(lengths.max())
    tokens = torch.nn.functional.pad(pad_sequence(rows, batch_first=True), (0, max_new_tokens))
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    cache = None
    for _ in range(max_new_tokens):
        if cache is None or longest > model.block_size:
            start = (lengths - model.block_size).clamp(min=0)
            width = min(longest, model.block_size)
            window = tokens.gather(1, (start[:, None] + torch.arange(width, device=device)).clamp(max=longest - 1))
            cache = model.new_cache(len(rows), min(longest + max_new_tokens, model.block_size))
            logits = model.step(window, cache, lengths - start)
        else:
            logits = model.step(tokens.gather(1, lengths[:, None] - 1), cache)
        uniform = torch.stack([torch.rand((), generator=g) for g in generators]).to(device)
        chosen = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, uniform=uniform)
        # Sequences that have ended stay in the batch, so that the shape of the batch does not change.
        tokens.scatter_(1, lengths[:, None], chosen[:, None])
        lengths, longest = lengths + 1, longest + 1
        yield chosen.masked_fill(ended, NOTHING)
        if stop_token is not None:
            ended = ended | (chosen == stop_token)
            if bool(ended.all()):
                return


def generate(
    model: CausalModel, prompts: Tensor | Sequence[Tensor | Sequence[int]], max_new_tokens: int, **options
) -> Tensor | list[Tensor]:
    """Continue prompts; arguments as for :func:`stream`.

    Returns:
        ``(B, N + new)`` for prompts ``(B, N)``, where rows that ended early are padded with ``stop_token``. For a
        sequence of prompts a list of 1-D tensors: prompt and continuation, including ``stop_token``.
    """
    new = list(stream(model, prompts, max_new_tokens, **options))
    device = model.token_embedding.weight.device
    added = torch.stack(new, 1) if new else torch.empty(len(prompts), 0, dtype=torch.int64, device=device)
    if isinstance(prompts, Tensor):
        fill = options.get("stop_token")
        return torch.cat([prompts.to(added), added if fill is None else added.masked_fill(added == NOTHING, fill)], 1)
    return [
        torch.cat([torch.as_tensor(prompt).to(added), row[row != NOTHING]])
        for prompt, row in zip(prompts, added, strict=True)
    ]


def stream_text(model: CausalModel, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **options) -> Iterator[str]:
    """Continue one text: yields pieces of complete characters; options as for :func:`stream`.

    An empty prompt is replaced by the end-of-text token. This token ends the text, unless ``stop_token`` is another.
    """
    options.setdefault("stop_token", tokenizer.end_of_text)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    prompt_tokens = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    for (token,) in stream(model, [prompt_tokens], max_new_tokens, **options):
        if piece := decoder.decode(tokenizer.to_bytes([int(token)])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def generate_text(model: CausalModel, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **options) -> str:
    """``prompt`` and its continuation; options as for :func:`stream`."""
    return prompt + "".join(stream_text(model, tokenizer, prompt, max_new_tokens, **options))


def _rows(prompts: Tensor | Sequence[Tensor | Sequence[int]]) -> list[Tensor]:
    """The prompts as 1-D tensors of integers, at least one."""
    wanted = "prompts: expected integers (B, N) or a sequence of prompts, with at least one token in each"
    try:
        rows = [torch.as_tensor(prompt) for prompt in prompts]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{wanted}; got {type(prompts).__name__}; a tokenizer makes them of texts") from None
    if not rows or any(row.dim() != 1 or not len(row) for row in rows):
        raise ValueError(wanted)
    for row in rows:
        if row.dtype not in checks.INTEGER:
            raise TypeError(f"{wanted}; got {row.dtype}")
    return rows


def _seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != batch:
            raise ValueError(f"seed: {len(seed)} numbers for {batch} sequences")
        return list(seed)
    checks.integer("seed", seed, minimum=-(2**63))
    return [seed + b for b in range(batch)]
