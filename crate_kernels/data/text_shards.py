"""Tokens on disk: a folder written by ``crate-kernels prepare-text``, and windows of it for training.

::

    manifest.json         tokenizer, settings, and for every shard its tokens, documents, bytes of text and SHA-256
    counts.npy            how often each token occurs in the training shards, int64 (vocab_size,)
    train-00000.bin       tokens, little-endian uint16 or uint32
    validation-00000.bin  the same for the validation documents

Documents are packed: each ends with the tokenizer's end-of-text token, and the next follows directly. No document
contains this token, so it marks every boundary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..models.checkpoint import write_atomically
from .digests import digest
from .order import epochs, seed_for, shuffled

FORMAT = 1
MANIFEST, COUNTS = "manifest.json", "counts.npy"
SPLITS = ("train", "validation")

MORE_VALIDATION = "Raise --validation, or split the text with --separator."
"""Advice for too few validation tokens. These are options of ``prepare-text``."""

OPEN_SHARDS = 64
"""Largest number of open shards, because each one needs a file descriptor."""


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    tokens: int
    documents: int
    bytes: int
    """Bytes of UTF-8 text, without the end-of-text tokens."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    format: int
    tokenizer: str
    vocab_size: int
    end_of_text: int
    dtype: str
    settings: dict[str, Any]
    """What was prepared, and with which settings."""
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    def total(self, split: str, field: str) -> int:
        """Sum of a ``field`` over the shards of a ``split``."""
        return sum(getattr(shard, field) for shard in getattr(self, split))

    def write(self, folder: Path) -> None:
        """Write the file atomically. A folder with a manifest is therefore complete."""
        write_atomically(folder / MANIFEST, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of ``folder``.

        Raises:
            ValueError: there is no manifest, or the file is damaged or has another format.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"{path} has format {content['format']}; this version reads format {FORMAT}")
            for split in SPLITS:
                content[split] = tuple(Shard(**shard) for shard in content[split])
            return cls(**content)
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} has no {MANIFEST}: crate-kernels prepare-text writes it when all shards are complete"
            ) from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged or not a manifest of token shards: {error!r}") from error


def is_prepared(path: Path) -> bool:
    """Whether ``path`` is a folder of token shards."""
    return (path / MANIFEST).is_file()


class Tokens:
    """The shards of one split as one long sequence of tokens. Only the tokens that are read are in memory.

    The files are read, not mapped: with a mapping, the kernel would count clusters of pages around each window as
    memory of the process.

    Args:
        folder: folder of the shards.
        shards: the shards, in order.
        dtype: dtype of the files.

    Raises:
        ValueError: a shard is missing or has another size than the manifest says.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...], dtype: str):
        self.folder, self.shards, self.dtype = folder, shards, np.dtype(dtype)
        self.ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        for shard in shards:
            path = folder / shard.file
            size, expected = path.stat().st_size if path.is_file() else 0, shard.tokens * self.dtype.itemsize
            if size != expected:
                raise ValueError(f"{path} has {size:,} bytes, but the manifest says {expected:,}")
        self._open: OrderedDict[int, IO[bytes]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """A copy of ``count`` tokens from position ``start``; a read may cross shards."""
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        parts = []
        number = int(np.searchsorted(self.ends, start, side="right"))
        while count:
            begin = int(self.ends[number]) - self.shards[number].tokens
            taken = min(count, int(self.ends[number]) - start)
            size, offset = taken * self.dtype.itemsize, (start - begin) * self.dtype.itemsize
            content = os.pread(self._shard(number).fileno(), size, offset)
            if len(content) != size:
                raise ValueError(f"{self.folder / self.shards[number].file} has become shorter")
            parts.append(np.frombuffer(content, self.dtype).copy())
            start, count, number = start + taken, count - taken, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def _shard(self, number: int) -> IO[bytes]:
        if number not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[number] = open(self.folder / self.shards[number].file, "rb", buffering=0)  # noqa: SIM115
        self._open.move_to_end(number)
        return self._open[number]

    def windows(self, starts: np.ndarray, size: int) -> np.ndarray:
        """The windows of ``size`` tokens that begin at ``starts``: ``(len(starts), size)`` in the files' dtype."""
        rows = np.empty((len(starts), size), self.dtype)
        for row, start in zip(rows, starts.tolist(), strict=True):
            row[:] = self.read(start, size)
        return rows


class WindowOrder:
    """The window of each sample of a run. It is a function of the sample's number ``i`` and the seed.

    An epoch reads windows that begin ``stride`` tokens apart, each one once, in its own order. Each epoch also shifts
    the grid of windows by fewer than ``stride`` tokens, so that documents are cut at other places. Ranks that take
    different samples ``i`` read different windows. A run can resume at any ``i``.

    Args:
        tokens: number of tokens.
        size: size of a window.
        stride: distance between the starts of two windows, at most ``size``.
        seed: seed of the order.

    Raises:
        ValueError: there are too few tokens for one window.
    """

    def __init__(self, tokens: int, size: int, stride: int, seed: int):
        self.per_epoch = (tokens - size - (stride - 1)) // stride + 1 if tokens >= size + stride - 1 else 0
        if not self.per_epoch:
            raise ValueError(f"{tokens:,} tokens do not fill a window of {size} that is shifted by up to {stride - 1}")
        self.stride, self.seed = stride, seed

    def starts(self, first: int, count: int) -> np.ndarray:
        """The starts of the windows of samples ``first`` to ``first + count``: int64 ``(count,)``."""
        parts = [np.empty(0, np.int64)]
        for epoch, positions in epochs(first, count, self.per_epoch):
            shift = seed_for(self.seed, epoch, 1) % self.stride
            parts.append(shuffled(positions, self.per_epoch, seed_for(self.seed, epoch)) * self.stride + shift)
        return np.concatenate(parts)


class TextShards:
    """A folder of token shards.

    Args:
        folder: the folder of ``crate-kernels prepare-text --output``.

    Attributes:
        train, validation: the :class:`Tokens` of the two splits.

    Raises:
        ValueError: the folder is incomplete or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = manifest = Manifest.read(self.folder)
        self.train = Tokens(self.folder, manifest.train, manifest.dtype)
        self.validation = Tokens(self.folder, manifest.validation, manifest.dtype)

    def counts(self) -> np.ndarray:
        """How often each token occurs in the training split: int64 ``(vocab_size,)``."""
        return np.load(self.folder / COUNTS, allow_pickle=False)

    def fingerprint(self) -> str:
        """A description of the shards with a digest of their digests."""
        manifest = self.manifest
        digests = (f"{split} {shard.sha256}\n".encode() for split in SPLITS for shard in getattr(manifest, split))
        return (
            f"shards of {len(self.train):,} training and {len(self.validation):,} validation tokens "
            f"({manifest.tokenizer}, sha256 {digest(*digests)})"
        )

    def verify(self) -> None:
        """Read every shard and compare its digest with the manifest's.

        Raises:
            ValueError: a shard differs.
        """
        for shard in (*self.manifest.train, *self.manifest.validation):
            with open(self.folder / shard.file, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise ValueError(f"{self.folder / shard.file} is damaged: SHA-256 {found}, not {shard.sha256}")
