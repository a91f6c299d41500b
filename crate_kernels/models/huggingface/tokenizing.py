"""The package's tokenizers as Hugging Face tokenizers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

from ..tokenizers import ByteTokenizer, read_gpt2_ranks

END_OF_TEXT, MASK = "<|endoftext|>", "<|mask|>"


def tokenizer(name: str = "bytes", *, masked: bool = False, ranks: str | Path | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of :mod:`crate_kernels.models.tokenizers` as a Hugging Face tokenizer, with the same tokens.

    The end-of-text token also begins texts and pads them. A text that spells a special token means this token, as with
    every tokenizer of transformers.

    Args:
        name: ``"bytes"`` or ``"gpt2"``.
        masked: for CRATE-BERT as trained by ``crate-kernels train-text --model bert``. There is one more token, the
            mask, and every text begins with the end-of-text token.
        ranks: GPT-2's merge ranks; see :class:`crate_kernels.models.tokenizers.GPT2Tokenizer`.
    """
    if name == "bytes":
        vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
        merges: list[tuple[str, str]] = []
        end = ByteTokenizer.end_of_text
    elif name == "gpt2":
        vocabulary, merges = _from_ranks(read_gpt2_ranks(ranks))
        end = len(vocabulary)
    else:
        raise ValueError(f"tokenizer: expected 'bytes' or 'gpt2', got {name!r}")
    special = {END_OF_TEXT: end} | ({MASK: end + 1} if masked else {})
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary | special, merges=merges))
    # GPT-2 cuts a text into words before it merges bytes. Without merges there is no need to cut.
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "gpt2")
    backend.decoder = tokenizers.decoders.ByteLevel()
    if masked:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        **({"mask_token": MASK} if masked else {}),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_characters() -> list[str]:
    """The character with which byte-level tokenizers write each byte: itself if it is printable, else one above
    U+00FF."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


def _from_ranks(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the ordered merges of a table of merge ranks."""
    characters = _byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            # A token is the merge of the two parts that remain after all earlier merges.
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
                first = min(range(len(pairs)), key=pairs.__getitem__)
                parts[first : first + 2] = [parts[first] + parts[first + 1]]
            merges.append((written(parts[0]), written(parts[1])))
    return {written(token): rank for token, rank in ranks.items()}, merges
