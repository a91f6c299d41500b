"""Labeled images in shards: tar files in WebDataset's layout or Parquet files, on a disk or behind an fsspec URL.

A folder contains ``manifest.json``, written by ``crate-kernels prepare-images``, and the shards that it names:

- tar: consecutive members ``KEY.jpg`` (or another image) and ``KEY.cls`` (the number of the class as text);
- Parquet: columns ``image`` (bytes, or a struct with ``bytes``) and ``label`` (integer), as in Hugging Face datasets.

A shard is read from front to back, and never loaded as a whole. The order of the shards is shuffled. The images are
shuffled in a buffer with a limited number of images and bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..distributed import launch
from ..extras import needs
from .errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff")
"""File endings of images in tar shards."""

BUFFERED_IMAGES, BUFFERED_BYTES = 4096, 1 << 28
"""Largest number of images, and of bytes, that a rank holds for shuffling, over all its loader processes."""
LANES = 16
"""Largest number of shards that a rank reads at a time. See :class:`TrainingStream`."""
ROWS = 64
"""Rows of a Parquet shard that are read at a time."""


class Sample(NamedTuple):
    """An image with the content of its file."""

    name: str
    content: bytes | None
    """The bytes of the file; None if the sample is broken."""
    label: int
    reason: str = ""
    """The reason why a sample is broken."""


@dataclass(frozen=True)
class ImageShard:
    """One file of a split.

    Args:
        file: its path relative to the manifest's folder, or a URL.
        images: number of images in the file.
        sha256: digest of the file, if the manifest records it.
    """

    file: str
    images: int
    sha256: str | None = None


@dataclass(frozen=True)
class ShardSplit:
    """The shards of a split.

    Args:
        base: the manifest's folder or URL.
        shards: the shards in the order of the manifest.
        classes: number of classes.
    """

    base: str
    shards: tuple[ImageShard, ...]
    classes: int

    def __len__(self) -> int:
        return sum(shard.images for shard in self.shards)

    def path(self, shard: ImageShard) -> str:
        """The path or URL of a shard."""
        return join(self.base, shard.file)

    def read(self, shard: ImageShard, fill: bool = False) -> Iterator[Sample]:
        """As many samples as the manifest lists. Broken or missing images are returned as broken samples.

        Args:
            fill: if the end of the shard is missing, return one broken sample and then repeat the readable samples.

        Raises:
            DataError: there is no such shard.
        """
        path, count, reason = self.path(shard), 0, ""
        try:
            for sample in itertools.islice(read_shard(path), shard.images):
                if sample.content is not None and not 0 <= sample.label < self.classes:
                    wrong = f"its label is {sample.label}, but there are {self.classes} classes"
                    sample = sample._replace(content=None, reason=wrong)
                count += 1
                yield sample
        except FileNotFoundError as error:
            raise DataError(f"the shard {path} is missing") from error
        except DAMAGE as error:
            reason = f": {error}"
        if count == shard.images:
            return
        missing = Sample(f"the rest of {path}", None, -1, f"it ends after {count} of {shard.images} images{reason}")
        yield missing
        again: Iterator[Sample] = itertools.repeat(missing)
        if fill and count:
            readable = dataclasses.replace(shard, images=count)
            again = itertools.chain.from_iterable(map(self.read, itertools.repeat(readable)))
        yield from itertools.islice(again, shard.images - count - 1)

    def fingerprint(self) -> bytes:
        """What is read, and the number of ranks, because the order depends on both."""
        return repr((self.shards, launch.size())).encode()


@dataclass(frozen=True)
class ImageManifest:
    """The content of ``manifest.json``."""

    format: int
    classes: list[str]
    mean: list[float]
    std: list[float]
    image_size: list[int] | None
    """(height, width), or None if the images have different sizes."""
    settings: dict[str, Any]
    """What was prepared, and with which settings."""
    broken: list[str]
    """Images that were left out, and the reasons."""
    train: tuple[ImageShard, ...]
    test: tuple[ImageShard, ...]

    def content(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    @classmethod
    def read(cls, base: str) -> ImageManifest:
        """Read the manifest of the folder or URL ``base``.

        Raises:
            DataError: there is no manifest, or it is damaged or has another format.
        """
        path = join(base, MANIFEST)
        try:
            with open_url(path) as file:
                content = json.load(file)
            if content["format"] != FORMAT:
                raise DataError(f"{path} has format {content['format']}; this version reads format {FORMAT}")
            for split in ("train", "test"):
                content[split] = tuple(ImageShard(**shard) for shard in content[split])
            return cls(**content)
        except FileNotFoundError as error:
            raise DataError(f"there is no {path}: crate-kernels prepare-images writes it") from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged or not a manifest of image shards: {error!r}") from error


def is_prepared(path: str) -> bool:
    """Whether ``path`` is a folder of image shards: a URL, or a folder with a manifest."""
    return is_url(path) or Path(path, MANIFEST).is_file()


# -- files -------------------------------------------------------------------------------------------------------------


def is_url(path: str) -> bool:
    return "://" in path


def join(base: str, file: str) -> str:
    """The path or URL of ``file`` below ``base``. ``file`` may be a complete URL or path itself."""
    if is_url(file) or Path(file).is_absolute():
        return file
    return f"{base.rstrip('/')}/{file}" if is_url(base) else str(Path(base, file))


def open_url(path: str) -> IO[bytes]:
    """Open a file on the disk, or a file that fsspec knows, for reading from front to back."""
    if not is_url(path):
        return open(path, "rb")
    try:
        import fsspec
    except ImportError as error:
        raise DataError(needs(path, "fsspec")) from error
    return fsspec.open(path, "rb").open()


DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError)
"""The errors that a damaged shard raises while it is read. (pyarrow's errors are ValueErrors.)"""


def read_shard(path: str) -> Iterator[Sample]:
    """The samples of a tar or Parquet shard. A damaged shard raises one of :data:`DAMAGE`."""
    return (_read_parquet if path.endswith(".parquet") else _read_tar)(path)


def _read_tar(path: str) -> Iterator[Sample]:
    with open_url(path) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        members = (member for member in archive if member.isfile())
        # A key is the name of a member, without its folder, up to the first dot.
        for key, group in itertools.groupby(members, key=lambda member: _split_name(member.name)[0]):
            fields = {
                _split_name(member.name)[1]: cast(IO[bytes], archive.extractfile(member)).read() for member in group
            }
            yield _sample(f"{path}: {key}", fields)


def _split_name(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def _sample(name: str, fields: dict[str, bytes]) -> Sample:
    content = next((fields[ending] for ending in IMAGES if ending in fields), None)
    if content is None:
        return Sample(name, None, -1, f"it has no image among its parts {', '.join(fields)}")
    try:
        label = int(fields["cls"]) if "cls" in fields else json.loads(fields["json"])["label"]
        return Sample(name, content, int(label))
    except (KeyError, TypeError, ValueError):
        return Sample(name, None, -1, "it has no class: neither a number in .cls, nor a label in .json")


def _read_parquet(path: str) -> Iterator[Sample]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(needs(path, "pyarrow")) from error
    number = 0
    with open_url(path) as file, ParquetFile(file) as table:
        for batch in table.iter_batches(ROWS, columns=["image", "label"]):
            rows = zip(batch.column("image").to_pylist(), batch.column("label").to_pylist(), strict=True)
            for image, label in rows:
                name, content = f"{path}: row {number}", image.get("bytes") if isinstance(image, dict) else image
                if isinstance(content, bytes) and label is not None:
                    yield Sample(name, content, label)
                else:
                    yield Sample(name, None, -1, "its image or its label is missing")
                number += 1


# -- streams -----------------------------------------------------------------------------------------------------------


def lanes(shards: int, ranks: int) -> int:
    """Number of shards that each rank reads at a time: a power of two, and at most the number of shards per rank."""
    return max(1, min(LANES, 1 << (shards // ranks).bit_length() >> 1))


def span(order: Sequence[int], sizes: Sequence[int], first: int, last: int) -> list[tuple[int, int, int]]:
    """The samples ``first`` to ``last`` of the shards in this ``order``, as (shard, first sample in it, last sample in
    it)."""
    found = []
    begin = 0
    for shard in order:
        end = begin + sizes[shard]
        if first < end and begin < last:
            found.append((shard, max(first - begin, 0), min(last, end) - begin))
        begin = end
    return found


def shuffle(samples: Iterator[Sample], images: int, size: int, generator: np.random.Generator) -> Iterator[Sample]:
    """``samples`` in another order. The buffer holds at most ``images`` of them and about ``size`` bytes."""
    buffer: list[Sample] = []
    held = 0
    for sample in samples:
        buffer.append(sample)
        held += len(sample.content or b"")
        while len(buffer) >= images or held > size:
            place = int(generator.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            held -= len(buffer[-1].content or b"")
            yield buffer.pop()
    generator.shuffle(buffer)
    yield from buffer


class _Stream(IterableDataset):
    """Batches from shards, in an order that does not depend on the number of loader processes.

    Batch ``b`` comes from lane ``b`` mod the number of lanes. The loader takes batch ``b`` from process ``b`` mod the
    number of processes. The number of processes divides the number of lanes, so each lane stays in one process.

    Args:
        split: the shards.
        make: function of (samples, their seeds or None) that returns what the loader yields.
        rank, ranks: number of this rank, and number of ranks.
        start, end: numbers of the first batch and of the batch after the last one.
    """

    def __init__(self, split: ShardSplit, make, rank: int, ranks: int, start: int, end: int):
        self.split, self.make, self.rank, self.ranks = split, make, rank, ranks
        self.start, self.end = start, end
        self.lanes = lanes(len(split.shards), ranks)

    def __len__(self) -> int:
        return self.end - self.start

    def processes(self, wanted: int) -> int:
        """Number of loader processes that can be used, up to ``wanted``."""
        return min(self.lanes, 1 << wanted.bit_length() >> 1)

    fill = False
    """See :meth:`ShardSplit.read`."""

    def samples(self, order: Sequence[int], first: int, last: int) -> Iterator[Sample]:
        """The samples ``first`` to ``last`` of the shards in this ``order``."""
        for shard, begin, end in span(order, [shard.images for shard in self.split.shards], first, last):
            yield from itertools.islice(self.split.read(self.split.shards[shard], self.fill), begin, end)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        try:
            yield from self.batches(range(self.start + offset, self.end, step))
        except DataError as error:  # raised in a loader process, the error would carry that process's traceback
            yield error

    def batches(self, numbers: range) -> Iterator[Any]:
        raise NotImplementedError


class TrainingStream(_Stream):
    """Batches of shuffled images. An epoch reads each image at most once, and leaves out an incomplete last part.

    Every epoch has a new order of the shards. Their sequence of images is cut into pieces, one for each lane of each
    rank. A piece has as many images as the lane's batches of the epoch need. Each lane shuffles its piece in a buffer.

    If a run resumes in the middle of an epoch, a lane reads its piece again up to that point, but decodes nothing
    there.

    Args:
        batch_size: samples in a batch, over all ranks.
        per_epoch: batches in an epoch.
        seed: seed of the order and of the augmentation.
    """

    fill = True

    def __init__(self, split, make, rank, ranks, start, end, batch_size: int, per_epoch: int, seed: int):
        super().__init__(split, make, rank, ranks, start, end)
        self.per_epoch, self.seed = per_epoch, seed
        self.before = batch_size * rank // ranks
        self.batch = batch_size * (rank + 1) // ranks - self.before

    def shuffled(self, epoch: int, lane: int) -> Iterator[Sample]:
        """The samples of a lane in an epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.split.shards)).tolist()
        counts = [
            len(range(i, self.per_epoch, self.lanes)) for i in range(self.lanes)
        ]  # number of batches of each lane
        first = self.per_epoch * self.before + sum(counts[:lane]) * self.batch
        generator = np.random.default_rng((self.seed, epoch, self.rank, lane, 1))
        samples = self.samples(order, first, first + counts[lane] * self.batch)
        return shuffle(samples, BUFFERED_IMAGES // self.lanes, BUFFERED_BYTES // self.lanes, generator)

    def batches(self, numbers: range) -> Iterator[Any]:
        epoch, open_lanes = -1, cast(dict[int, Any], {})
        for number in numbers:
            if number // self.per_epoch != epoch:
                epoch, open_lanes = number // self.per_epoch, {}
            turn, lane = divmod(number % self.per_epoch, self.lanes)
            if lane not in open_lanes:
                open_lanes[lane] = itertools.islice(self.shuffled(epoch, lane), turn * self.batch, None)
            taken = list(itertools.islice(open_lanes[lane], self.batch))
            seeds = [(self.seed, epoch, self.rank, lane, turn * self.batch + i) for i in range(len(taken))]
            yield self.make(taken, seeds)


class EvaluationStream(_Stream):
    """Every sample once, in order. All ranks yield the same number of batches; the last batches of a rank may be empty.

    Args:
        batch: the largest number of samples of this rank in a batch.
    """

    def __init__(self, split, make, rank, ranks, batch: int):
        super().__init__(split, make, rank, ranks, 0, 0)
        self.batch = batch
        longest = -(-len(split) // (self.lanes * ranks))
        self.end = -(-longest // batch) * self.lanes

    def batches(self, numbers: range) -> Iterator[Any]:
        order, pieces, open_lanes = range(len(self.split.shards)), self.lanes * self.ranks, {}
        for number in numbers:
            lane = number % self.lanes
            if lane not in open_lanes:
                piece = self.rank * self.lanes + lane
                first, last = (len(self.split) * i // pieces for i in (piece, piece + 1))
                open_lanes[lane] = self.samples(order, first, last)
            yield self.make(list(itertools.islice(open_lanes[lane], self.batch)), None)
