"""Documents in text files, JSON lines, Arrow and Parquet files, read piece by piece.

A source is a file with a unit in which it can be cut: bytes of a text file, record batches of an Arrow file, row groups
of a Parquet file. A compressed file has one unit, the whole of it. :func:`documents` reads the documents of a range of
units; the ranges of a file together give each document exactly once.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

TEXT, LINES, ARROW, PARQUET = "text", "lines", "arrow", "parquet"
KINDS = {
    ".txt": TEXT, ".text": TEXT, ".md": TEXT, ".jsonl": LINES, ".ndjson": LINES, ".json": LINES,
    ".arrow": ARROW, ".parquet": PARQUET,
}  # fmt: skip
"""Ending -> kind of file. A file that is named itself and has another ending is text."""
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
"""Further endings of text and JSON lines. All but .gz need the package pyarrow."""

BLOCK = 1 << 20
"""Bytes that are read at a time."""
EXCERPT = 1 << 14
"""A text file without separators is cut into excerpts of about so many bytes, at ends of lines."""


@dataclass(frozen=True)
class Source:
    """A file and the sizes of the units that it can be cut into.

    Args:
        path: the file.
        kind: one of :data:`KINDS`.
        bytes: on disk.
        units: how many units there are.
    """

    path: str
    kind: str
    bytes: int
    units: int


@dataclass(frozen=True)
class Range:
    """The units ``start`` to ``end`` of a file. A text file is whole if ``end`` is None."""

    path: str
    kind: str
    start: int
    end: int | None


@dataclass(frozen=True)
class Format:
    """How documents lie in files.

    Args:
        field: the key of JSON lines, or the column of tables, that holds the text.
        separator: what stands between two documents of a text file. None makes each file one document.

    Raises:
        ValueError: the separator can overlap itself, so that a file cannot be cut between two of them.
    """

    field: str = "text"
    separator: str | None = None

    def __post_init__(self):
        s = self.separator
        if s == "":
            raise ValueError("--separator must not be empty")
        if s and len(set(s)) > 1 and any(s.endswith(s[:i]) for i in range(1, len(s))):
            raise ValueError(f"--separator {s!r} begins as it ends: two of them could overlap")


def kind_of(path: Path) -> str | None:
    """The kind of file that the ending of ``path`` names."""
    plain = path.with_suffix("") if path.suffix in COMPRESSED else path
    kind = KINDS.get(plain.suffix.lower())
    return None if path.suffix in COMPRESSED and kind in (ARROW, PARQUET) else kind


def find(inputs: Iterable[str | os.PathLike]) -> list[Source]:
    """The sources that files and folders name; folders are searched, in the order of names.

    Raises:
        ValueError: a path does not exist, or a folder has no file of a known ending.
    """
    sources = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p) and not p.name.startswith("."))
            if not found:
                raise ValueError(f"{path} has no files with the endings {' '.join(KINDS)}")
            # A folder that datasets wrote keeps descriptions beside its tables.
            if any(kind_of(p) == ARROW for p in found):
                found = [p for p in found if kind_of(p) == ARROW]
        elif path.is_file():
            found = [path]
        else:
            raise ValueError(f"there is no file or folder {path}")
        sources += [source(p) for p in found]
    return sources


def source(path: Path) -> Source:
    """A file as a :class:`Source`."""
    kind, size = kind_of(path) or TEXT, path.stat().st_size
    if kind == ARROW:
        units = sum(1 for _ in _arrow_batches(path))
    elif kind == PARQUET:
        units = _parquet(path).num_row_groups
    else:
        units = min(1, size) if path.suffix in COMPRESSED else size
    return Source(str(path), kind, size, units)


def dataset(name: str, configuration: str | None, split: str) -> list[Source]:
    """The Arrow files of a data set that the package ``datasets`` loads; it may download them into its cache.

    Raises:
        ValueError: the split is a part of its files, which cannot be told from the files alone.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("--dataset needs the package datasets: pip install 'crate_kernels[data]'") from error
    loaded = datasets.load_dataset(name, configuration, split=split)
    files = [Path(file["filename"]) for file in loaded.cache_files]
    rows = sum(len(batch) for file in files for batch in _arrow_batches(file))
    if rows != len(loaded):
        raise ValueError(f"--dataset-split {split} is a part of its files: give a whole split, such as train")
    return [source(file) for file in files]


def cut(sources: Iterable[Source], size: int) -> list[list[Range]]:
    """Parts of about ``size`` bytes on disk each: large files are cut, small files are joined."""
    parts: list[list[Range]] = []
    room = 0.0
    for file in sources:
        start, each = 0, file.bytes / max(1, file.units)
        while start < file.units:
            if room < each:
                parts.append([])
                room = max(size, each)
            end = min(file.units, start + max(1, int(room / each)))
            whole = file.kind in (TEXT, LINES) and end - start == file.units
            parts[-1].append(Range(file.path, file.kind, start, None if whole else end))
            room -= (end - start) * each
            start = end
    return parts


def documents(part: Range, form: Format) -> Iterator[tuple[str, bool]]:
    """The documents of a range as pairs of (text, whether the document continues in the next pair).

    Raises:
        ValueError: the file is damaged, no UTF-8 text, or lacks the field.
    """
    if part.kind == TEXT and form.separator is None:
        yield from _excerpts(part)
    elif part.kind == TEXT:
        assert form.separator is not None
        for record, offset in records(part, form.separator.encode()):
            if record.strip():
                yield _text(record, part.path, offset), False
    elif part.kind == LINES:
        for record, offset in records(part, b"\n"):
            if record.strip():
                yield _field(record, part.path, offset, form.field), False
    else:
        for text in _rows(part, form.field):
            if text:
                yield text, False


# -- text --------------------------------------------------------------------------------------------------------------


def _open(path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.endswith(COMPRESSED):
        return _pyarrow().input_stream(path, compression="detect")
    return open(path, "rb")


def records(part: Range, separator: bytes, keep: bool = False) -> Iterator[tuple[bytes, int]]:
    """The records of a range of bytes, with their places in the file. A record belongs to the range it begins in.

    Args:
        keep: whether a record ends with its separator.
    """
    with _open(part.path) as file:
        position = _before(file, part.start, separator) if part.start else 0
        end = float("inf") if part.end is None else part.end
        # The piece up to the first separator is the end of a record that began before the range.
        ours = part.start == 0
        held, searched = bytearray(), 0
        while position < end or not ours:
            found = held.find(separator, searched)
            if found < 0:
                searched = max(0, len(held) - len(separator) + 1)
                block = file.read(BLOCK)
                if block:
                    held += block
                    continue
                if held and ours:
                    yield bytes(held), position
                return
            after = found + len(separator)
            if ours:
                yield bytes(held[: after if keep else found]), position
            del held[:after]
            position, searched = position + after, 0
            ours = position >= part.start


def _before(file: IO[bytes], start: int, separator: bytes) -> int:
    """Seek to where the last separator that ends at ``start`` or before it can be found; the place."""
    position = max(0, start - len(separator))
    if len(set(separator)) == 1:  # in a run of the character, separators count from the run's first one
        file.seek(position)
        while position and file.read(1) == separator[:1]:
            position -= 1
            file.seek(position)
    file.seek(position)
    return position


def _excerpts(part: Range) -> Iterator[tuple[str, bool]]:
    """Lines of one document in excerpts; all but the last continue in the next.

    A cut is made between two lines that neither end nor begin with white space: there byte pairs are never merged
    across the cut. Only where no such place comes for long, a cut is made at another line.
    """
    held, place = bytearray(), 0
    for line, offset in records(part, b"\n", keep=True):
        clean = not line[:1].isspace() and not held[-2:-1].isspace()
        if len(held) >= (EXCERPT if clean else 64 * EXCERPT):
            yield _text(bytes(held), part.path, place), True
            held = bytearray()
        place = place if held else offset
        held += line
    if held:
        yield _text(bytes(held), part.path, place), False


def _text(record: bytes, path: str, offset: int) -> str:
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {offset + error.start:,}, {error.reason}") from error


def _field(record: bytes, path: str, offset: int, field: str) -> str:
    try:
        content: Any = json.loads(record)
    except ValueError as error:
        raise ValueError(f"{path}: the line at byte {offset:,} is no JSON: {error}") from error
    text = content.get(field) if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{path}: the line at byte {offset:,} has no text in the field {field!r}")
    return text


# -- tables ------------------------------------------------------------------------------------------------------------


def _pyarrow():
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError("these files need the package pyarrow: pip install 'crate_kernels[data]'") from error
    return pyarrow


def _arrow_batches(path: Path | str) -> Iterator[Any]:
    """The record batches of an Arrow file, mapped into memory; datasets writes streams, others write files."""
    pyarrow = _pyarrow()
    with pyarrow.memory_map(str(path)) as mapped:
        try:
            reader = pyarrow.ipc.open_file(mapped)
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            try:
                yield from pyarrow.ipc.open_stream(mapped)
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"{path} is truncated or no Arrow file: {error}") from error
        else:
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)


def _parquet(path: Path | str):
    pyarrow = _pyarrow()
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is truncated or no Parquet file: {error}") from error


def _rows(part: Range, field: str) -> Iterator[str | None]:
    def column(names: list[str]) -> None:
        if field not in names:
            raise ValueError(f"{part.path} has no column {field!r}; its columns are {', '.join(names)}")

    assert part.end is not None
    if part.kind == ARROW:
        for i, batch in enumerate(_arrow_batches(part.path)):
            if i >= part.end:
                return
            if i >= part.start:
                column(batch.schema.names)
                yield from batch.column(field).to_pylist()
    else:
        with _parquet(part.path) as table:
            column(table.schema_arrow.names)
            for batch in table.iter_batches(row_groups=range(part.start, part.end), columns=[field]):
                yield from batch.column(field).to_pylist()
