"""Texts as tokens: a part to train on, and a part to judge by."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..models.tokenizers import Tokenizer
from .digests import digest

EVALUATION_TOKENS = 1 << 16
"""About how many validation tokens an evaluation reads, evenly spread where there are more."""


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error


def python_manual() -> str:
    """The language reference that Python's own ``help()`` shows, without its tables: about 425,000 characters."""
    from pydoc_data.topics import topics

    lines = "\n\n".join(topics[name] for name in sorted(topics)).split("\n")
    # Tables are drawn with rules and long runs of blanks, and a model would spend its samples on them.
    return "\n".join(line for line in lines if not line.lstrip().startswith(("|", "+")))


class Corpus:
    """A tokenized text: the first nine tenths to train on, the rest to judge by.

    Args:
        text: all of it.
        tokenizer: cuts it.
        context: the longest window that is read.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, context: int):
        tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int32)
        cut = len(tokens) * 9 // 10
        self.tokenizer, self.context = tokenizer, context
        self.train, self.validation = tokens[:cut], tokens[cut:]
        if len(self.validation) <= context:
            raise ValueError(
                f"the text has {len(tokens)} tokens; a tenth of it must be longer than --context {context}"
            )
        self.fingerprint = f"a text of {len(tokens):,} tokens (sha256 {digest(tokens.numpy())})"
        self.bytes_per_token = len(tokenizer.to_bytes(self.validation.tolist())) / len(self.validation)
        # One token more than the tokenizer's, for masks; a multiple of 64 as GPT-2's 50,304 is.
        self.mask_token = tokenizer.vocab_size
        self.vocab_size = -(-(tokenizer.vocab_size + 1) // 64) * 64

    def windows(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """Random pieces of the training text ``(count, size)`` int64."""
        starts = torch.randint(len(self.train) - size + 1, (count,), generator=generator)
        return self.train[starts[:, None] + torch.arange(size)].long()

    def validation_windows(self, size: int) -> Tensor:
        """Pieces of the validation text that do not overlap, evenly spread: ``(count, size)`` int64."""
        pieces = self.validation[: len(self.validation) // size * size].view(-1, size)
        return pieces[:: max(1, pieces.numel() // EVALUATION_TOKENS)].long()
