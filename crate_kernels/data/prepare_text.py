"""``crate-kernels prepare-text``: write text, JSON lines, Arrow and Parquet files as a folder of token shards.

The input is cut into parts. Each part becomes one shard per split; see ``parts``. The result depends neither on the
number of processes nor on interruptions.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import options
from ..models.checkpoint import naming
from ..models.tokenizers import TOKENIZERS, Tokenizer, create_tokenizer
from ..options import option
from ..terminal import count
from . import parts, text_files
from .text_files import Format, Range
from .text_shards import COUNTS, FORMAT, MORE_VALIDATION, SPLITS, Manifest, Shard, TextShards, is_prepared

BUFFERED_TOKENS = 1 << 20
"""Number of tokens that a shard writes at a time."""


@dataclass(frozen=True)
class Settings:
    """The settings that decide the result, besides the input files.

    Args:
        tokenizer: name of a tokenizer.
        form: how the files contain documents.
        validation: share of the documents in the validation split. A hash of a document's text chooses its split, so
            equal documents fall into the same split.
        part_bytes: size of a part on disk.
    """

    tokenizer: str
    form: Format
    validation: float
    part_bytes: int


class ShardWriter:
    """A shard that is being written: takes documents, returns a :class:`Shard`.

    Args:
        path: path of the file.
        dtype: dtype of the tokens.
        counts: int64 ``(vocab_size,)``; the frequencies of the tokens are added to it.
    """

    def __init__(self, path: Path, dtype: np.dtype, counts: np.ndarray):
        self.path, self.dtype, self.counts = path, dtype, counts
        self.file, self.sha256 = open(parts.temporary(path), "wb"), hashlib.sha256()  # noqa: SIM115
        self.held: list[np.ndarray] = []
        self.waiting = self.tokens = self.documents = self.bytes = 0

    def add(self, tokens: np.ndarray, size: int) -> None:
        """Add tokens that encode ``size`` bytes of text."""
        self.held.append(tokens)
        self.bytes += size
        self.waiting += len(tokens)
        if self.waiting >= BUFFERED_TOKENS:
            self.flush()

    def end_document(self, end_of_text: int) -> None:
        self.add(np.array([end_of_text]), 0)
        self.documents += 1

    def flush(self) -> None:
        if self.held:
            tokens = np.concatenate(self.held)
            self.counts += np.bincount(tokens, minlength=len(self.counts))
            content = tokens.astype(self.dtype).tobytes()
            self.sha256.update(content)
            with naming(self.path):
                self.file.write(content)
            self.tokens += len(tokens)
            self.held, self.waiting = [], 0

    def close(self) -> Shard:
        """Flush the file to disk and give it its final name."""
        self.flush()
        with naming(self.path), self.file as file:
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path)
        return Shard(self.path.name, self.tokens, self.documents, self.bytes, self.sha256.hexdigest())


def belongs_to_validation(text: bytes, share: float) -> bool:
    """Whether a document belongs to the validation split. This depends on its text alone."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) < share * 2**64


def write_part(settings: Settings, folder: Path, number: int, part: list[Range]) -> dict[str, Any]:
    """Write the shards of one part -> its record."""
    tokenizer = _tokenizer(settings.tokenizer)
    dtype = token_dtype(tokenizer)
    counts = {split: np.zeros(tokenizer.vocab_size, np.int64) for split in SPLITS}
    writers = {split: ShardWriter(folder / f"{split}-{number:05}.bin", dtype, counts[split]) for split in SPLITS}
    for piece in part:
        running = None  # the split of an unfinished document, whose next excerpt follows
        for text, goes_on in text_files.documents(piece, settings.form):
            content = text.encode()
            split = SPLITS[belongs_to_validation(content, settings.validation)]
            if running not in (None, split):
                writers[running].end_document(tokenizer.end_of_text)
            writers[split].add(tokenizer.encode_array(text), len(content))
            if not goes_on:
                writers[split].end_document(tokenizer.end_of_text)
            running = split if goes_on else None
    shards = {split: dataclasses.asdict(writer.close()) for split, writer in writers.items()}
    return {**shards, "counts": counts["train"].tolist()}


@functools.cache
def _tokenizer(name: str) -> Tokenizer:
    """The tokenizer, created once per process."""
    return create_tokenizer(name)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """uint16 if it holds every token, else uint32."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def prepare(sources: list[text_files.Source], folder: Path, settings: Settings, workers: int = 0, show=print) -> None:
    """Write the token shards of ``sources`` into ``folder``, or continue an earlier call.

    Args:
        workers: number of processes; 0 works in this process.
        show: function that prints a line of progress.

    Raises:
        ValueError: an input file cannot be read, or the folder holds shards of another preparation.
        OSError: for example, the disk is full.
    """
    tokenizer = create_tokenizer(settings.tokenizer)
    plan = {
        **dataclasses.asdict(settings),
        "sources": [{**dataclasses.asdict(s), "modified": os.stat(s.path).st_mtime_ns} for s in sources],
    }
    digest = parts.plan_digest(plan)
    description = {name: value for name, value in plan.items() if name != "sources"}
    description |= {"plan": digest, "files": len(sources), "bytes": sum(s.bytes for s in sources)}
    if is_prepared(folder):
        if Manifest.read(folder).settings != description:
            raise ValueError(f"{folder} holds shards of other files or settings: choose another --output")
        parts.forget(folder)
        show(f"{folder} is already complete")
        return
    work = functools.partial(write_part, settings)
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for record in parts.work_on(folder, digest, text_files.cut(sources, settings.part_bytes), work, workers, show):
        counts += np.array(record["counts"])
        for split in SPLITS:
            shard = Shard(**record[split])
            if shard.tokens:
                shards[split].append(shard)
            else:
                (folder / shard.file).unlink(missing_ok=True)
    np.save(folder / COUNTS, counts)
    manifest = Manifest(
        FORMAT, tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text, token_dtype(tokenizer).str, description,
        *(tuple(shards[split]) for split in SPLITS),
    )  # fmt: skip
    manifest.write(folder)
    parts.forget(folder)


# -- command -----------------------------------------------------------------------------------------------------------


WRITES = ("without --verify", lambda o: not o.verify)
DATASET = ("with --dataset", lambda o: o.dataset is not None)


@dataclass
class Options:
    """The options of ``crate-kernels prepare-text``."""

    output: str | None = option(None, "required: the folder for the shards; train-text --text accepts this folder")
    tokenizer: str = option("bytes", "bytes, or gpt2 for GPT-2's byte pairs", choices=TOKENIZERS, only=WRITES)
    field: str = option("text", "key or column that holds the text", only=WRITES)
    separator: str | None = option(
        None, r"separator of the documents in a text file, such as '\n\n'; default: each file is one", only=WRITES
    )
    validation: float = option(0.005, "share of the documents in the validation split", least=0, below=1, only=WRITES)
    part_size: float = option(64.0, "MiB of input in one shard", above=0, most=2**20, only=WRITES)
    workers: int | None = option(None, "processes; default: one for each core", least=0, most=1024, only=WRITES)
    dataset: str | None = option(None, "a data set that the package datasets loads, instead of paths", only=WRITES)
    dataset_config: str | None = option(None, "its configuration", only=DATASET)
    dataset_split: str = option("train", "its split", only=DATASET)
    verify: bool = option(False, "compare the shards of --output with their digests, and write nothing")

    def form(self) -> Format:
        """How the files contain documents. Escapes in the separator are replaced."""
        try:
            return Format(self.field, self.separator and self.separator.encode().decode("unicode_escape"))
        except UnicodeDecodeError as error:
            raise ValueError(f"--separator {self.separator}: {error.reason}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "After an interruption, the same command writes the missing parts."
    parser.add_argument(
        "inputs", nargs="*", metavar="PATH", help="text, JSON lines, Arrow and Parquet files, or folders of them"
    )
    options.add_arguments(parser, Options, needed="[PATH ...] --output PATH")


def run(args: argparse.Namespace) -> int:
    """Check the command line. Then write or verify the shards."""
    wanted = options.parse(args, Options)
    if wanted.output is None:
        raise ValueError("--output is required: the folder for the shards")
    if wanted.verify and args.inputs:
        raise ValueError("--verify accepts no files: it reads the folder of --output")
    if not wanted.verify and bool(args.inputs) == bool(wanted.dataset):
        raise ValueError("give files or folders to read, or a --dataset")
    settings = Settings(wanted.tokenizer, wanted.form(), wanted.validation, max(1, int(wanted.part_size * 2**20)))
    return write(args.inputs, wanted, settings)


def write(inputs: list[str], wanted: Options, settings: Settings) -> int:
    """Write or verify the shards, and print their content."""
    output = Path(str(wanted.output))
    if wanted.verify:
        TextShards(output).verify()
        print(f"{output} is complete: {TextShards(output).fingerprint()}")
        return 0
    workers = (os.cpu_count() or 1) if wanted.workers is None else wanted.workers
    if wanted.dataset:
        sources = text_files.dataset(wanted.dataset, wanted.dataset_config, wanted.dataset_split)
    else:
        sources = text_files.find(inputs)
    began = time.monotonic()
    prepare(sources, output, settings, workers if len(sources) > 1 or sources[0].bytes > settings.part_bytes else 0)
    shards, seconds = TextShards(output), time.monotonic() - began
    manifest = shards.manifest
    for split in SPLITS:
        tokens, documents, size = (
            count(manifest.total(split, f"{noun}s"), noun) for noun in ("token", "document", "byte")
        )
        print(f"{split}: {tokens}, {documents}, {size} of text in {count(len(getattr(manifest, split)), 'shard')}")
    if not manifest.validation:
        print(f"warning: No text fell into the validation split. {MORE_VALIDATION}", file=sys.stderr)
    advice = f"; train on them with crate-kernels train-text --text {output}" if manifest.validation else ""
    print(f"{seconds:.0f} s{advice}")  # train-text refuses shards without a validation split
    return 0
