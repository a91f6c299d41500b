"""``crate-kernels prepare-images``: write labeled images as shuffled tar or Parquet shards, in parallel and resumable.

With ``--index`` it only describes shards that already exist, so that ``crate-kernels train --data`` can read them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from .. import options
from ..extras import needs
from ..models.checkpoint import naming, write_atomically
from ..options import option
from ..terminal import count
from . import parts
from .batches import decode
from .errors import DataError
from .image_shards import DAMAGE, FORMAT, MANIFEST, ImageManifest, ImageShard, ShardSplit, is_url, open_url, read_shard
from .images import IMAGENET_MEAN, IMAGENET_STD, ImageSource, Split, load

QUALITY = 95
"""Quality of the JPEG files that ``--resize`` writes."""
ROW_GROUP = 64
"""Rows in a row group of a Parquet shard. They are in memory together."""


@dataclass(frozen=True)
class Settings:
    """The settings that decide the shards, besides the images.

    Args:
        format: ``"tar"`` or ``"parquet"``.
        images: number of images in one shard.
        resize: pixels of the shorter side to which larger images are reduced; None copies every file unchanged.
        seed: seed of the order.
    """

    format: str
    images: int
    resize: int | None
    seed: int


@dataclass(frozen=True)
class Part:
    """The images of one shard (paths or arrays), their names and labels."""

    split: str
    number: int
    images: list[Any]
    names: list[str]
    labels: list[int]
    classes: list[str]


def prepare(source: ImageSource, folder: Path, settings: Settings, workers: int = 0, show=print) -> ImageManifest:
    """Write the shards of a data set into ``folder``, or continue an earlier call.

    Args:
        workers: number of processes; 0 works in this process.
        show: function that prints a line of progress.

    Raises:
        DataError: the images cannot be read, or the folder holds shards of other images or settings.
        OSError: for example, the disk is full.
    """
    data = load(source)
    if not isinstance(data.train, Split) or not isinstance(data.test, Split):
        raise DataError(f"{source.data} already consists of shards: train on it directly")
    plan = {**dataclasses.asdict(settings), "data": data.fingerprint}
    if (folder / MANIFEST).is_file():
        manifest = ImageManifest.read(str(folder))
        if manifest.settings != plan:
            raise DataError(f"{folder} holds shards of other images or settings: choose another --output")
        parts.forget(folder)
        show(f"{folder} is already complete")
        return manifest
    pieces = [*_parts("train", data, settings), *_parts("test", data, settings)]
    work = functools.partial(write_shard, settings, data.channels)
    shards: dict[str, list[ImageShard]] = {"train": [], "test": []}
    broken: list[str] = []
    records = parts.work_on(folder, parts.plan_digest(plan), pieces, work, workers, show)
    for piece, record in zip(pieces, records, strict=True):
        broken += record["broken"]
        shards[piece.split].append(ImageShard(**record["shard"]))
    manifest = ImageManifest(
        FORMAT, data.classes, list(data.mean), list(data.std), data.image_size and list(data.image_size), plan, broken,
        tuple(shards["train"]), tuple(shards["test"]),
    )  # fmt: skip
    write_atomically(folder / MANIFEST, manifest.content())
    parts.forget(folder)
    return manifest


def _parts(name: str, data, settings: Settings) -> Iterator[Part]:
    split = getattr(data, name)
    order = np.random.default_rng((settings.seed, name == "test")).permutation(len(split))
    for number, indices in enumerate(np.array_split(order, -(-len(order) // settings.images))):
        images = [split.images[i] for i in indices]
        names = [image if isinstance(image, str) else f"{data.name} {name} {i}" for image, i in zip(images, indices)]  # noqa: B905
        yield Part(name, number, images, names, split.labels[indices].tolist(), data.classes)


def write_shard(settings: Settings, channels: int, folder: Path, number: int, part: Part) -> dict[str, Any]:
    """Write one shard -> its record. An image that cannot be decoded is left out and named in the record."""
    path = folder / f"{part.split}-{part.number:05}.{settings.format}"
    broken: list[str] = []

    def samples() -> Iterator[tuple[str, bytes, int]]:
        for image, name, label in zip(part.images, part.names, part.labels, strict=True):
            try:
                ending, content = encoded(image, name, channels, settings.resize)
            except DataError as error:
                broken.append(str(error))
            else:
                yield ending, content, label

    temporary = parts.temporary(path)
    with naming(path):
        with open(temporary, "wb") as file:
            count = (_write_tar if settings.format == "tar" else _write_parquet)(file, samples(), part)
            file.flush()
            os.fsync(file.fileno())
        with open(temporary, "rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        os.replace(temporary, path)
    return {"shard": dataclasses.asdict(ImageShard(path.name, count, sha256)), "broken": broken}


def encoded(image: np.ndarray | str, name: str, channels: int, resize: int | None) -> tuple[str, bytes]:
    """The ending and the content of an image's file: unchanged, or reduced in size. Arrays become PNG files.

    Raises:
        DataError: the file is no image, or is damaged.
    """
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return "png", buffer.getvalue()
    try:
        content = Path(image).read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}") from error
    picture = decode(io.BytesIO(content), name, "", channels)
    shorter = min(picture.size)
    if resize is None or shorter <= resize:
        return Path(image).suffix[1:].lower(), content
    width, height = (max(1, round(side * resize / shorter)) for side in picture.size)
    buffer = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return "jpg", buffer.getvalue()


def _write_tar(file, samples: Iterator[tuple[str, bytes, int]], part: Part) -> int:
    count = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for ending, content, label in samples:
            for suffix, body in ((ending, content), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{part.split}-{part.number:05}-{count:06}.{suffix}")
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))
            count += 1
    return count


def _write_parquet(file, samples: Iterator[tuple[str, bytes, int]], part: Part) -> int:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise DataError(needs("--format parquet", "pyarrow")) from error
    # The package datasets writes the same schema, and so recognizes the columns for images and classes.
    features = {"image": {"_type": "Image"}, "label": {"names": part.classes, "_type": "ClassLabel"}}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    count = 0
    with ParquetWriter(file, schema, compression="none") as writer:
        rows: list[dict[str, Any]] = []
        for ending, content, label in samples:
            path = f"{part.split}-{part.number:05}-{count:06}.{ending}"
            rows.append({"image": {"bytes": content, "path": path}, "label": label})
            count += 1
            if len(rows) == ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    return count


# -- shards that are there already -------------------------------------------------------------------------------------


def index(base: str, output: Path, classes: list[str] | None, show=print) -> ImageManifest:
    """Describe the shards below the folder or URL ``base`` in ``output``.

    A shard with ``val`` or ``test`` in its path is a test shard. Every shard is read once, to count its images.

    Args:
        classes: names of the classes. None uses numbers, up to the largest label.

    Raises:
        DataError: there are no shards, or a sample is broken.
    """
    endings = (".tar", ".tar.gz", ".tgz", ".parquet")
    if is_url(base):
        import fsspec

        system, root = fsspec.core.url_to_fs(base)
        found = sorted(f"{base.rstrip('/')}/{path[len(root) :].lstrip('/')}" for path in system.find(root))
    else:
        found = sorted(str(path) for path in Path(base).rglob("*") if path.is_file())
    shards: dict[str, list[ImageShard]] = {"train": [], "test": []}
    largest = -1
    for path in (p for p in found if p.endswith(endings)):
        labels = []
        try:
            for sample in read_shard(path):
                if sample.content is None:
                    raise DataError(f"{sample.name}: {sample.reason}")
                labels.append(sample.label)
        except DAMAGE as error:
            raise error if isinstance(error, DataError) else DataError(f"{path} is damaged: {error}") from error
        largest = max(largest, *labels) if labels else largest
        with open_url(path) as file:
            sha256 = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
        below = path[len(base) :].lower()
        name = path if is_url(path) else os.path.relpath(path, output)
        split = "test" if "val" in below or "test" in below else "train"
        shards[split].append(ImageShard(name, len(labels), sha256))
        show(f"{path}: {len(labels)} images, {split}")
    for split, files in shards.items():
        if not files:
            raise DataError(
                f"{base} has no {split} shards ({' '.join(endings)}); val or test in a path marks test shards"
            )
    classes = classes or [str(i) for i in range(largest + 1)]
    manifest = ImageManifest(
        FORMAT, classes, list(IMAGENET_MEAN), list(IMAGENET_STD), None, {"index": base}, [],
        tuple(shards["train"]), tuple(shards["test"]),
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / MANIFEST, manifest.content())
    return manifest


def verify(folder: str) -> None:
    """Read every shard and compare its digest with the manifest's.

    Raises:
        DataError: a shard differs.
    """
    manifest = ImageManifest.read(folder)
    for shard in (*manifest.train, *manifest.test):
        with open_url(ShardSplit(folder, (), 0).path(shard)) as file:
            found = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
        if found != shard.sha256:
            raise DataError(f"{shard.file} is damaged: SHA-256 {found}, not {shard.sha256}")


# -- command -----------------------------------------------------------------------------------------------------------


WRITES = ("without --verify and --index", lambda o: not o.verify and o.index is None)


@dataclass
class Options:
    """The options of ``crate-kernels prepare-images``."""

    output: str | None = option(None, "required: the folder for the shards; train --data accepts this folder")
    root: str | None = option(None, "folder with the files of fashion-mnist or cifar10", only=WRITES)
    format: str = option("tar", "WebDataset's tar, or Parquet", choices=("tar", "parquet"), only=WRITES)
    shard_images: int = option(1000, "images in a shard", least=1, only=WRITES)
    resize: int | None = option(
        None, "pixels of the shorter side to which larger images are reduced, as JPEG", least=1, most=65536, only=WRITES
    )
    seed: int = option(0, "seed of the order, and of the split of a folder without one", least=0, only=WRITES)
    workers: int | None = option(None, "processes; default: one for each core", least=0, most=1024, only=WRITES)
    max_broken: int | None = option(
        None, "fail when more than N images cannot be read; default: name them and continue", least=0, only=WRITES
    )
    index: str | None = option(
        None, "folder or URL of existing shards: write only their manifest",
        only=("without --verify", lambda o: not o.verify),
    )  # fmt: skip
    classes: str | None = option(
        None, "file with the names of the classes, one per line", only=("with --index", lambda o: o.index is not None)
    )
    verify: bool = option(False, "compare the shards of --output with their digests, and write nothing")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "After an interruption, the same command writes the missing shards."
    parser.add_argument(
        "data",
        nargs="?",
        metavar="NAME_OR_PATH",
        help="a folder of class folders, or the name of a data set, as for crate-kernels train",
    )
    options.add_arguments(parser, Options, needed="[NAME_OR_PATH] --output PATH")


def run(args: argparse.Namespace) -> int:
    """Check the command line. Then write, describe or verify the shards."""
    wanted = options.parse(args, Options)
    if wanted.output is None:
        raise ValueError("--output is required: the folder for the shards")
    if wanted.verify and args.data:
        raise ValueError("--verify accepts no data: it reads the folder of --output")
    if not wanted.verify and bool(args.data) == bool(wanted.index):
        raise ValueError("give a folder or the name of a data set, or existing shards with --index")
    if wanted.root is not None and args.data not in ("fashion-mnist", "cifar10"):
        raise ValueError("--root applies only with fashion-mnist or cifar10")
    return write(args.data, wanted)


def write(data: str | None, wanted: Options) -> int:
    """Write, describe or verify the shards, and print their content."""
    output, began = Path(str(wanted.output)), time.monotonic()
    if wanted.verify:
        verify(str(output))
        print(f"{output} is complete")
        return 0
    if wanted.index is not None:
        names = wanted.classes and Path(wanted.classes).read_text(encoding="utf-8").split("\n")
        manifest = index(wanted.index, output, [name for name in names or () if name] or None)
    else:
        settings = Settings(wanted.format, wanted.shard_images, wanted.resize, wanted.seed)
        workers = (os.cpu_count() or 1) if wanted.workers is None else wanted.workers
        manifest = prepare(ImageSource(str(data), wanted.root, seed=wanted.seed), output, settings, workers)
    for split in ("train", "test"):
        shards = getattr(manifest, split)
        print(f"{split}: {count(sum(shard.images for shard in shards), 'image')} in {count(len(shards), 'shard')}")
    for sentence in manifest.broken[:10]:
        print(f"broken: {sentence}")
    if manifest.broken:
        print(f"{len(manifest.broken)} broken images were left out; {output / MANIFEST} names them")
    if wanted.max_broken is not None and len(manifest.broken) > wanted.max_broken:
        raise DataError(f"{len(manifest.broken)} images are broken, and --max-broken is {wanted.max_broken}")
    print(f"{time.monotonic() - began:.0f} s; train on them with crate-kernels train --data {output}")
    return 0
