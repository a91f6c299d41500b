"""Tokenizers: bytes, or GPT-2's byte-pair encoding."""

from __future__ import annotations

import base64
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..extras import needs

if TYPE_CHECKING:
    import numpy as np

GPT2_RANKS = (("whisper", "assets/gpt2.tiktoken"),)
"""Installed packages that contain GPT-2's merge ranks, and the files in them."""

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""How GPT-2 cuts text before merging bytes ("Language Models are Unsupervised Multitask Learners", section 2.2)."""


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. The name of a special token in the text is ordinary text."""

    def encode_array(self, text: str) -> np.ndarray:
        """The same as an integer array, for long texts."""

    def to_bytes(self, tokens: Sequence[int]) -> bytes:
        """The UTF-8 bytes of tokens; they may end within a character."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens. Bytes that are not UTF-8 become U+FFFD."""


class ByteTokenizer:
    """256 bytes and an end-of-text token. It works for every language without further files, but sequences are long."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_array(self, text: str) -> np.ndarray:
        import numpy as np  # imported here, because torch alone does not need it

        return np.frombuffer(text.encode(), np.uint8)

    def to_bytes(self, tokens: Sequence[int]) -> bytes:
        # Ids above 255 (end of text, and those of a rounded-up vocabulary) represent no bytes.
        return bytes(token for token in tokens if token < 256)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.to_bytes(tokens).decode(errors="replace")


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding: 50,257 tokens, the last of which is end of text. It uses the package tiktoken.

    Args:
        ranks: file of merge ranks in tiktoken's format, with a base64 token and its rank per line. None searches the
            installed packages of :data:`GPT2_RANKS`. Nothing is downloaded.
    """

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self, ranks: str | os.PathLike | None = None):
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(needs("GPT2Tokenizer", "tiktoken")) from error
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=read_gpt2_ranks(ranks),
            special_tokens={"<|endoftext|>": self.end_of_text},
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def to_bytes(self, tokens: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes([token for token in tokens if token < self.end_of_text])

    def decode(self, tokens: Sequence[int]) -> str:
        return self.to_bytes(tokens).decode(errors="replace")


TOKENIZERS = {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer}
"""Name -> class."""


def create_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name."""
    if name not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {name!r}; known are {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


def find_gpt2_ranks() -> Path:
    """Path of GPT-2's merge ranks in an installed package. The package is not imported."""
    for package, file in GPT2_RANKS:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder) / file).is_file():
                return path
    raise FileNotFoundError(
        "GPT-2's merge ranks are in no installed package: pip install --no-deps openai-whisper, which carries"
        " whisper/assets/gpt2.tiktoken, or give the path of such a file"
    )


def read_gpt2_ranks(path: str | os.PathLike | None = None) -> dict[bytes, int]:
    """GPT-2's tokens and their merge ranks, from a file in tiktoken's format. None takes :func:`find_gpt2_ranks`."""
    path = find_gpt2_ranks() if path is None else Path(path)
    tokens = {base64.b64decode(t): int(rank) for t, rank in map(bytes.split, path.read_bytes().splitlines())}
    if len(tokens) != 50256:
        raise ValueError(f"{path} holds {len(tokens)} ranks, but GPT-2 has 50256")
    return tokens


def word_starts(tokenizer: Tokenizer) -> Tensor:
    """For each token whether it begins a word: ``(vocab_size,)`` bool. All other tokens continue a word.

    Whole-word masking masks such words. A word consists of letters, digits and apostrophes, with the space before it.
    """
    continues = b"'_" + bytes(range(128, 256))
    first = (tokenizer.to_bytes([token])[:1] for token in range(tokenizer.vocab_size))
    return torch.tensor([not (b.isalnum() or (b != b"" and b in continues)) for b in first])
