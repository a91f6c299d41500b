"""Batches of labeled images, repeatable from any step.

timm's transforms run in the loader's processes and return ``uint8``. The training loop normalizes whole batches on its
device. The order of the images and their augmentation are functions of (seed, epoch, position) alone. A run can
therefore resume from any step.
"""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..distributed import launch
from . import image_shards
from .errors import DataError
from .image_shards import EvaluationStream, Sample, ShardSplit, TrainingStream
from .images import ImageData, Split
from .order import seed_for


@dataclass(frozen=True)
class Batching:
    """How the images of a run are batched and augmented.

    Args:
        batch_size: images in one batch, over all ranks.
        accumulate: batches in one optimizer step. An epoch has a whole number of steps.
        epochs: passes over the training images.
        seed: seed of the order and the augmentation.
        workers: number of loader processes; None takes :func:`default_workers`.
        crop: smallest share of an image's area in a random crop; 1 crops nothing.
        flip: probability of mirroring an image.
        auto_augment: a timm policy, such as ``rand-m9-mstd0.5``.
        max_broken: largest number of broken images; more of them end the run. None means no limit.
        mixed: whether mixup or cutmix pairs the images of a batch. A rank then needs both images of each pair.
    """

    batch_size: int
    accumulate: int = 1
    epochs: int = 1
    seed: int = 0
    workers: int | None = None
    crop: float = 1.0
    flip: float = 0.0
    auto_augment: str | None = None
    max_broken: int | None = None
    mixed: bool = False


class Normalization:
    """Turns the bytes of images from loaders into a model's input on ``device``: ``(x / 255 − mean) / std``."""

    def __init__(self, data: ImageData, device: torch.device):
        shape = (1, data.channels, 1, 1)
        self.device = device
        self.mean = torch.tensor(data.mean, device=device).view(shape) * 255
        self.std = torch.tensor(data.std, device=device).view(shape) * 255

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.device, non_blocking=True).float() - self.mean) / self.std

    def inverse(self, images: Tensor) -> Tensor:
        """The inverse: images as ``uint8`` on the CPU."""
        return (images * self.std + self.mean).round().clamp(0, 255).byte().cpu()


def seed_everything(*parts: int) -> None:
    """Seed every generator that timm's augmentation and torch's dropout use."""
    seed = seed_for(*parts)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm draws from NumPy's global generator
    torch.manual_seed(seed)


Batch = tuple[Tensor, Tensor, list[str]]
"""Images ``uint8 (B, C, H, W)``, labels ``(B,)``, and a sentence about each broken image."""

Part = Callable[[int], np.ndarray]
"""Size of a batch -> the wanted positions in it."""


def part_of_rank(count: int, rank: int, size: int, mirrored: bool = False) -> np.ndarray:
    """This rank's positions in a batch of ``count`` samples. They are consecutive, in the order of the ranks.

    With ``mirrored``, position i always comes together with position -1 - i, because timm mixes these two. The batch
    size must then be a multiple of twice the number of ranks.
    """
    if not mirrored:
        return np.arange(count * rank // size, count * (rank + 1) // size)
    first = part_of_rank(count // 2, rank, size)
    return np.concatenate([first, count - 1 - first[::-1]])


class Batches(Dataset):
    """A split as complete batches: item ``(seed, indices)`` is a :data:`Batch`.

    Args:
        part: which images of a batch to return. The others are not read from files. Images in memory share one stream
            of random numbers per batch, so all of them are augmented, and the others are dropped afterwards.
    """

    def __init__(self, split: Split, transform, size: tuple[int, int], channels: int, part: Part = np.arange):
        self.split, self.transform, self.size, self.channels, self.part = split, transform, size, channels, part

    def __getitem__(self, item: tuple[int | None, np.ndarray]) -> Batch | DataError:
        seed, indices = item
        mine = self.part(len(indices))
        images, labels = self.split.images, self.split.labels[indices[mine]]
        if self.transform is None:
            batch = torch.from_numpy(images[indices[mine]]).view(len(mine), *self.size, self.channels)
            return batch.permute(0, 3, 1, 2), torch.from_numpy(labels), []
        if not isinstance(images, np.ndarray):
            files = [(images[i], images[i], "") for i in indices[mine]]
            seeds = None if seed is None else [(seed, int(position)) for position in mine]
            return augmented(files, labels, seeds, self.transform, self.size, self.channels)
        if seed is not None:
            seed_everything(seed)
        positions = range(len(indices)) if seed is not None else mine
        made = [self.transform(Image.fromarray(images[indices[position]])) for position in positions]
        pixels = np.stack(made) if made else np.empty((0, self.channels, *self.size), np.uint8)
        pixels = pixels if len(pixels) == len(mine) else pixels[mine]
        return torch.from_numpy(pixels), torch.from_numpy(labels), []


def augmented(
    files: Sequence[tuple[Any, str, str]],
    labels: Sequence[int],
    seeds: Sequence[tuple[int, ...]] | None,
    transform: Callable[[Image.Image], np.ndarray],
    size: tuple[int, int],
    channels: int,
) -> Batch | DataError:
    """A batch of decoded and augmented images.

    In training, another image of the batch replaces a broken image. Batches therefore keep their size, and a resumed
    run need not know which images were broken before. In an evaluation a broken image is left out.

    Args:
        files: for each image its file or path, its name, and what is wrong with it if that is known.
        labels: the labels of the files.
        seeds: the seed of each image's augmentation in training; None for an evaluation.
        transform: turns an image into ``uint8 (C, H, W)``.
        size, channels: size and channels of the transform's result.
    """
    images: list[Any] = []
    broken: list[str] = []
    for i, (file, name, reason) in enumerate(files):
        try:
            image = decode(file, name, reason, channels)
        except DataError as error:
            broken.append(str(error))
            images.append(None)
            continue
        if seeds is not None:
            seed_everything(*seeds[i])
        images.append(transform(image))
    good = [i for i, image in enumerate(images) if image is not None]
    if seeds is None:
        chosen = good
    elif good or not images:
        chosen = [i if image is not None else good[i % len(good)] for i, image in enumerate(images)]
    else:
        return DataError(f"all images of a batch are broken; the first: {broken[0]}")
    batch = np.stack([images[i] for i in chosen]) if chosen else np.empty((0, channels, *size), np.uint8)
    return torch.from_numpy(batch), torch.tensor([int(labels[i]) for i in chosen], dtype=torch.int64), broken


def decode(file: Any, name: str, reason: str, channels: int) -> Image.Image:
    """Read a file or path as a Pillow image, in RGB or as gray levels.

    Raises:
        DataError: the file is no image, or is damaged. The message has its ``name`` and the ``reason`` if it is known.
    """
    try:
        if reason:
            raise ValueError(reason)
        with Image.open(file) as image:
            return image.convert("RGB" if channels == 3 else "L")
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is not a readable image: its format is not known, or its beginning is damaged"
        ) from None
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise DataError(f"{name} is not a readable image: {error}") from error


@dataclass(frozen=True)
class FromSamples:
    """Makes batches from the samples of shards. See :func:`augmented`."""

    transform: Callable[[Image.Image], np.ndarray]
    size: tuple[int, int]
    channels: int

    def __call__(self, samples: Sequence[Sample], seeds: Sequence[tuple[int, ...]] | None) -> Batch | DataError:
        files = [(io.BytesIO(s.content or b""), s.name, s.reason) for s in samples]
        return augmented(files, [s.label for s in samples], seeds, self.transform, self.size, self.channels)


def to_bytes(image: Image.Image) -> np.ndarray:
    """An image without any change: ``uint8 (C, H, W)``."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


class TrainingOrder(Sampler):
    """The batches of a whole run, beginning with ``start``. Every epoch has a new permutation and drops its last
    part."""

    def __init__(self, images: int, batching: Batching, start: int = 0):
        self.images, self.batch_size, self.start = images, batching.batch_size, start
        self.epochs, self.seed = batching.epochs, batching.seed
        self.per_epoch = images // (batching.batch_size * batching.accumulate) * batching.accumulate
        if not self.per_epoch:
            raise DataError(
                f"{images} training images do not fill one step of --batch-size {batching.batch_size}"
                + (f" x --accumulate {batching.accumulate}" if batching.accumulate > 1 else "")
            )

    def __len__(self) -> int:
        return self.per_epoch * self.epochs - self.start

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for epoch in range(self.start // self.per_epoch, self.epochs):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
            first = self.start % self.per_epoch if epoch == self.start // self.per_epoch else 0
            for i in range(first, self.per_epoch):
                yield seed_for(self.seed, epoch, i), order[i * self.batch_size : (i + 1) * self.batch_size]


def default_workers() -> int:
    """One loader process for every two cores of this rank, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    return min(8, max(1, cores // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def training_batches(
    data: ImageData,
    batching: Batching,
    size: tuple[int, int],
    start: int,
    device: torch.device,
    *,
    shared: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches of the run, in order, beginning with number ``start``. ``shared`` gives only this rank's
    part."""
    order = TrainingOrder(len(data.train), batching, start)
    plain = batching.crop == 1 and not batching.flip and not batching.auto_augment
    transform = None if plain and data.image_size == size else _transform(data, batching, size, training=not plain)
    rank, ranks = (launch.rank(), launch.size()) if shared else (0, 1)
    if isinstance(data.train, ShardSplit):
        make = FromSamples(transform or to_bytes, size, data.channels)
        end = batching.epochs * order.per_epoch
        stream = TrainingStream(
            data.train, make, rank, ranks, start, end, batching.batch_size, order.per_epoch, batching.seed
        )
        return _load(stream, None, data, batching, device)
    part = partial(part_of_rank, rank=rank, size=ranks, mirrored=batching.mixed)
    return _load(Batches(data.train, transform, size, data.channels, part), order, data, batching, device)


def evaluation_batches(
    data: ImageData,
    batching: Batching,
    size: tuple[int, int],
    device: torch.device,
    *,
    shared: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The test images in order, not augmented. ``shared`` gives only this rank's part of each batch, which may be
    empty."""
    transform = None if data.image_size == size else _transform(data, batching, size, training=False)
    rank, ranks = (launch.rank(), launch.size()) if shared else (0, 1)
    most = max(256, batching.batch_size)
    if isinstance(data.test, ShardSplit):
        make = FromSamples(transform or to_bytes, size, data.channels)
        return _load(EvaluationStream(data.test, make, rank, ranks, -(-most // ranks)), None, data, batching, device)
    indices = np.array_split(np.arange(len(data.test)), -(-len(data.test) // most))
    batches = Batches(data.test, transform, size, data.channels, partial(part_of_rank, rank=rank, size=ranks))
    if transform is None:
        found = (batches[None, part] for part in indices)
        return (batch[:2] for batch in found if not isinstance(batch, DataError))
    return _load(batches, [(None, part) for part in indices], data, batching, device)


def _transform(data: ImageData, batching: Batching, size: tuple[int, int], training: bool):
    from timm.data import create_transform

    # use_prefetcher returns uint8 arrays: a quarter of the bytes between processes, and one normalization per batch.
    common: dict[str, Any] = dict(input_size=(data.channels, *size), mean=data.mean, std=data.std, use_prefetcher=True)
    if not training:
        return create_transform(**common, is_training=False, crop_pct=1.0 if data.image_size else 0.875)
    return create_transform(
        **common,
        is_training=True,
        scale=(batching.crop, 1.0),
        ratio=(0.9, 1.1) if data.image_size else (3 / 4, 4 / 3),
        hflip=batching.flip,
        color_jitter=0.0,
        auto_augment=batching.auto_augment,
    )


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C in a loader process. It reaches all processes of a terminal, and the main process must finish its
    step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _load(
    batches: Batches | TrainingStream | EvaluationStream,
    order,
    data: ImageData,
    batching: Batching,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    workers = default_workers() if batching.workers is None else batching.workers
    remote = False
    if isinstance(batches, Batches):
        # Without transforms a batch is one slice of an array. A loader process would not save time.
        workers = workers if batches.transform is not None else 0
    else:
        workers = batches.processes(workers)
        remote = image_shards.is_url(batches.split.base)
    # Clients of remote file systems have threads, which do not survive a fork.
    servers = workers and remote and "forkserver" in multiprocessing.get_all_start_methods()
    loader = DataLoader(
        batches, batch_size=None, sampler=order, num_workers=workers, pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None, multiprocessing_context="forkserver" if servers else None,
        worker_init_fn=_ignore_interrupts,
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        *batch, broken = batch
        data.broken.note(broken, batching.max_broken)
        yield tuple(batch)


MEASURED_SECONDS = 2.0


def loader_speed(data: ImageData, batching: Batching, size: tuple[int, int], seconds: float | None = None) -> float:
    """Training images per second that this rank's loader delivers while nothing else runs, measured in at most one
    epoch.

    Args:
        seconds: duration of the measurement; ``MEASURED_SECONDS`` by default.

    The first batches do not count if there are others: the loader prepares them while its processes start.
    """
    seconds = MEASURED_SECONDS if seconds is None else seconds
    workers = default_workers() if batching.workers is None else batching.workers
    once = dataclasses.replace(batching, epochs=1)
    counts, times = [0], [time.perf_counter()]
    for images, _ in training_batches(data, once, size, 0, torch.device("cpu"), shared=True):
        counts.append(counts[-1] + len(images))
        times.append(time.perf_counter())
        if len(times) > 4 * workers + 2 and times[-1] - times[4 * workers + 1] > seconds:
            break
    first = 4 * workers + 1 if len(times) > 4 * workers + 2 else 0
    return (counts[-1] - counts[first]) / (times[-1] - times[first])
