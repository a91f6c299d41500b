"""Texts as tokens, with a part for training and a part for validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..models.tokenizers import Tokenizer, create_tokenizer
from .digests import digest
from .text_shards import MORE_VALIDATION, TextShards, WindowOrder

EVALUATION_TOKENS = 1 << 16
"""An evaluation reads about this many validation tokens, evenly spread if there are more."""

WINDOW = "--context"
"""The option of ``train-text`` that sets the length of the longest window."""


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def python_manual() -> str:
    """The language reference that Python's own ``help()`` shows, without its tables: about 425,000 characters."""
    from pydoc_data.topics import topics

    lines = "\n\n".join(topics[name] for name in sorted(topics)).split("\n")
    # Tables contain rulers and long runs of blanks, and a model would spend its samples on them.
    return "\n".join(line for line in lines if not line.lstrip().startswith(("|", "+")))


class Corpus:
    """Tokens for training, and tokens for validation.

    Args:
        tokenizer: cuts text into tokens.
        context: length of the longest window.
        train, validation: numbers of tokens.
        source: the name of the text in an error.
        window: the name of ``context`` in an error.

    Raises:
        ValueError: the validation tokens are too few for one window.
    """

    fingerprint: str
    """A description of the corpus with a digest."""
    bytes_per_token: float
    """Average bytes of text per validation token."""
    advice = ""
    """End of the error about too few validation tokens: how to get more."""

    def __init__(
        self, tokenizer: Tokenizer, context: int, train: int, validation: int, source: str, window: str = WINDOW
    ):
        if validation <= context:
            raise ValueError(
                f"{source}: {validation:,} of {train + validation:,} tokens are for validation; "
                f"there must be more than {window} {context}{self.advice}"
            )
        self.tokenizer, self.context = tokenizer, context
        self.training_tokens, self.validation_tokens = train, validation
        # One token more than the tokenizer has, for masks. Rounded up to a multiple of 64, like GPT-2's 50,304.
        self.mask_token = tokenizer.vocab_size
        self.vocab_size = -(-(tokenizer.vocab_size + 1) // 64) * 64

    def windows(
        self, batch: int, rows: slice, count: int, size: int, stride: int, generator: torch.Generator
    ) -> Tensor:
        """Pieces of the training text: int64 ``(len(rows), size)``.

        Args:
            batch: number of the batch in the run.
            rows: which windows of the batch to return.
            count: number of windows in the whole batch.
            size: tokens in a window.
            stride: distance of two windows in tokens, if windows follow each other.
            generator: source of the batch's random numbers. Its final state does not depend on ``rows``.
        """
        raise NotImplementedError

    def validation_windows(self, size: int) -> Tensor:
        """Pieces of the validation text, evenly spread and without overlap: int64 ``(count, size)``."""
        count = self.validation_tokens // size
        starts = torch.arange(0, count, max(1, count * size // EVALUATION_TOKENS)) * size
        return self._validation(starts, size)

    def _validation(self, starts: Tensor, size: int) -> Tensor:
        raise NotImplementedError

    def counts(self) -> Tensor:
        """How often each token occurs in the training text: int64 ``(vocab_size,)``."""
        raise NotImplementedError


class TextCorpus(Corpus):
    """A text in memory. The first nine tenths of its tokens are for training, the rest for validation.

    Training windows begin at random positions, drawn independently.

    Args:
        text: the whole text.
        tokenizer, context, source, window: see :class:`Corpus`.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, context: int, source: str = "the text", window: str = WINDOW):
        tokens = torch.from_numpy(tokenizer.encode_array(text).astype(np.int32))
        cut = len(tokens) * 9 // 10
        self.train, self.validation = tokens[:cut], tokens[cut:]
        super().__init__(tokenizer, context, len(self.train), len(self.validation), source, window)
        self.fingerprint = f"a text of {len(tokens):,} tokens (sha256 {digest(tokens.numpy())})"
        self.bytes_per_token = len(tokenizer.to_bytes(self.validation.tolist())) / len(self.validation)

    def windows(
        self, batch: int, rows: slice, count: int, size: int, stride: int, generator: torch.Generator
    ) -> Tensor:
        starts = torch.randint(len(self.train) - size + 1, (count,), generator=generator)
        return self.train[starts[rows, None] + torch.arange(size)].long()

    def _validation(self, starts: Tensor, size: int) -> Tensor:
        return self.validation[starts[:, None] + torch.arange(size)].long()

    def counts(self) -> Tensor:
        return torch.bincount(self.train, minlength=self.vocab_size)


class ShardCorpus(Corpus):
    """Token shards on disk; see :mod:`~crate_kernels.data.text_shards`.

    Every epoch reads each training window once, in its own order. Ranks never read the same window in an epoch.

    Args:
        folder: the output of ``crate-kernels prepare-text``.
        context: see :class:`Corpus`.
        seed: seed of the order.
        window: see :class:`Corpus`.

    Raises:
        ValueError: the folder is damaged, or was made with another tokenizer than the present one.
    """

    advice = f". In crate-kernels prepare-text: {MORE_VALIDATION}"

    def __init__(self, folder: Path, context: int, seed: int, window: str = WINDOW):
        self.shards = shards = TextShards(folder)
        tokenizer, manifest = create_tokenizer(shards.manifest.tokenizer), shards.manifest
        if (tokenizer.vocab_size, tokenizer.end_of_text) != (manifest.vocab_size, manifest.end_of_text):
            raise ValueError(
                f"{folder} was made with {manifest.vocab_size} tokens of the tokenizer {manifest.tokenizer}, "
                f"which now has {tokenizer.vocab_size}"
            )
        super().__init__(tokenizer, context, len(shards.train), len(shards.validation), str(folder), window)
        self.seed, self.fingerprint = seed, shards.fingerprint()
        self.bytes_per_token = manifest.total("validation", "bytes") / len(shards.validation)
        self.orders: dict[tuple[int, int], WindowOrder] = {}

    def windows(
        self, batch: int, rows: slice, count: int, size: int, stride: int, generator: torch.Generator
    ) -> Tensor:
        if (size, stride) not in self.orders:
            self.orders[size, stride] = WindowOrder(self.training_tokens, size, stride, self.seed)
        first, last, _ = rows.indices(count)
        starts = self.orders[size, stride].starts(batch * count + first, last - first)
        return torch.from_numpy(self.shards.train.windows(starts, size).astype(np.int64))

    def _validation(self, starts: Tensor, size: int) -> Tensor:
        return torch.from_numpy(self.shards.validation.windows(starts.numpy(), size).astype(np.int64))

    def counts(self) -> Tensor:
        counts = torch.from_numpy(self.shards.counts())
        return torch.nn.functional.pad(counts, (0, self.vocab_size - len(counts)))


def open_corpus(path: str | None, tokenizer: str, context: int, seed: int = 0, window: str = WINDOW) -> Corpus:
    """The corpus for ``--text path``: a text file, a folder of token shards, or Python's manual if None.

    ``window`` is the name of ``context`` in an error.

    Raises:
        ValueError: the file is no text or is too short, or the shards were made with another tokenizer.
    """
    if path is None:
        return TextCorpus(python_manual(), create_tokenizer(tokenizer), context, "Python's manual", window)
    if not Path(path).is_dir():
        return TextCorpus(read_text(Path(path)), create_tokenizer(tokenizer), context, path, window)
    corpus = ShardCorpus(Path(path), context, seed, window)
    if corpus.tokenizer.name != tokenizer:
        raise ValueError(f"{path} was made with the tokenizer {corpus.tokenizer.name}, not with {tokenizer}")
    return corpus
