"""Documents in text files, JSON lines, Arrow and Parquet files, read piece by piece.

A source is a file that can be cut into units: bytes of a text file, record batches of an Arrow file, row groups of a
Parquet file. A compressed file has one unit. :func:`documents` reads the documents of a range of units. The ranges of a
file together return each document exactly once.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ..extras import needs

TEXT, LINES, ARROW, PARQUET = "text", "lines", "arrow", "parquet"
KINDS = {
    ".txt": TEXT, ".text": TEXT, ".md": TEXT, ".jsonl": LINES, ".ndjson": LINES, ".json": LINES,
    ".arrow": ARROW, ".parquet": PARQUET,
}  # fmt: skip
"""Ending -> kind of file. A file with another ending counts as text if it is named directly."""
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
"""Further endings of text and JSON lines. All except .gz need the package pyarrow."""

BLOCK = 1 << 20
"""Bytes to read at a time."""
EXCERPT = 1 << 14
"""A text file without separators is cut into excerpts of about this many bytes, at line ends."""


@dataclass(frozen=True)
class Source:
    """A file, and the sizes of the units into which it can be cut.

    Args:
        path: the file.
        kind: one of :data:`KINDS`.
        bytes: size on disk.
        units: number of units.
    """

    path: str
    kind: str
    bytes: int
    units: int


@dataclass(frozen=True)
class Range:
    """The units ``start`` to ``end`` of a file. If ``end`` is None, the range is a whole text file."""

    path: str
    kind: str
    start: int
    end: int | None


@dataclass(frozen=True)
class Format:
    """How files contain documents.

    Args:
        field: key of JSON lines, or column of tables, with the text.
        separator: separates two documents of a text file. None makes each file one document.

    Raises:
        ValueError: the separator can overlap itself. A file could then not be cut reliably between two of them.
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
    """The sources in files and folders. Folders are searched, in the order of names.

    Raises:
        ValueError: a path does not exist, or a folder has no file of a known ending.
    """
    sources = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p) and not p.name.startswith("."))
            if not found:
                raise ValueError(f"{path} has no files with the endings {' '.join(KINDS)}")
            # A folder that the package datasets wrote has descriptions beside its tables.
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
    """The Arrow files of a data set that the package ``datasets`` loads. It may download them into its cache.

    Raises:
        ValueError: the split is only a part of its files, and the files do not show which part.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(needs("--dataset", "datasets")) from error
    loaded = datasets.load_dataset(name, configuration, split=split)
    files = [Path(file["filename"]) for file in loaded.cache_files]
    rows = sum(len(batch) for file in files for batch in _arrow_batches(file))
    if rows != len(loaded):
        raise ValueError(f"--dataset-split {split} is only a part of its files: give a whole split, such as train")
    return [source(file) for file in files]


def cut(sources: Iterable[Source], size: int) -> list[list[Range]]:
    """Parts of about ``size`` bytes on disk each. Large files are cut, small files are joined."""
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
    """The records of a range of bytes, with their positions in the file. A record belongs to the range in which it
    begins.

    Args:
        keep: whether a record includes its separator.
    """
    with _open(part.path) as file:
        position = _before(file, part.start, separator) if part.start else 0
        end = float("inf") if part.end is None else part.end
        # The piece before the first separator is the end of a record that began before the range.
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
    """Seek to a position from which the last separator that ends at or before ``start`` can be found -> that
    position."""
    position = max(0, start - len(separator))
    if len(set(separator)) == 1:  # in a run of one character, separators count from the start of the run
        file.seek(position)
        while position and file.read(1) == separator[:1]:
            position -= 1
            file.seek(position)
    file.seek(position)
    return position


def _excerpts(part: Range) -> Iterator[tuple[str, bool]]:
    """Lines of one document in excerpts. Each excerpt but the last continues in the next.

    A cut lies between two lines that neither end nor begin with white space, because byte pairs are never merged across
    such a cut. If there is no such place for a long stretch, the cut lies between two other lines.
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
        raise ValueError(f"{path} is not UTF-8 text: byte {offset + error.start:,}, {error.reason}") from error


def _field(record: bytes, path: str, offset: int, field: str) -> str:
    try:
        content: Any = json.loads(record)
    except ValueError as error:
        raise ValueError(f"{path}: the line at byte {offset:,} is not JSON: {error}") from error
    text = content.get(field) if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{path}: the line at byte {offset:,} has no text in the field {field!r}")
    return text


# -- tables ------------------------------------------------------------------------------------------------------------


def _pyarrow():
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(needs("a file of this kind", "pyarrow")) from error
    return pyarrow


def _arrow_batches(path: Path | str) -> Iterator[Any]:
    """The record batches of an Arrow file, mapped into memory. The package datasets writes streams, others write
    files."""
    pyarrow = _pyarrow()
    with pyarrow.memory_map(str(path)) as mapped:
        try:
            reader = pyarrow.ipc.open_file(mapped)
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            try:
                yield from pyarrow.ipc.open_stream(mapped)
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"{path} is truncated or not an Arrow file: {error}") from error
        else:
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)


def _parquet(path: Path | str):
    pyarrow = _pyarrow()
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is truncated or not a Parquet file: {error}") from error


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
