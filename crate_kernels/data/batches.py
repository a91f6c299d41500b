"""Batches of labelled images, repeatable from any step.

timm's transforms run in the loader's processes and leave ``uint8``; the training loop normalizes whole batches on its
device. The order of the images and their augmentation are functions of (seed, epoch, position) alone, so a run can
resume from any step.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..distributed import launch
from .images import DataError, ImageData, Split
from .order import seed_for


@dataclass(frozen=True)
class Batching:
    """How the images of a run are put together and augmented.

    Args:
        batch_size: images of all ranks together in one batch.
        accumulate: batches in one optimizer step; an epoch is a whole number of steps.
        epochs: passes over the training images.
        seed: of the order and the augmentation.
        workers: loader processes; None takes :func:`default_workers`.
        crop: smallest share of an image's area that a random crop keeps; 1 crops nothing.
        flip: probability of mirroring an image.
        auto_augment: timm's policy, such as ``rand-m9-mstd0.5``.
        mixed: whether mixup or cutmix pairs the images of a batch, so that a rank needs both images of each pair.
    """

    batch_size: int
    accumulate: int = 1
    epochs: int = 1
    seed: int = 0
    workers: int | None = None
    crop: float = 1.0
    flip: float = 0.0
    auto_augment: str | None = None
    mixed: bool = False


class Normalization:
    """Images in bytes, as loaders give them, to a model's input on ``device``: ``(x / 255 − mean) / std``."""

    def __init__(self, data: ImageData, device: torch.device):
        shape = (1, data.channels, 1, 1)
        self.device = device
        self.mean = torch.tensor(data.mean, device=device).view(shape) * 255
        self.std = torch.tensor(data.std, device=device).view(shape) * 255

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.device, non_blocking=True).float() - self.mean) / self.std

    def inverse(self, images: Tensor) -> Tensor:
        """-> ``uint8`` on the CPU."""
        return (images * self.std + self.mean).round().clamp(0, 255).byte().cpu()


def seed_everything(*parts: int) -> None:
    """Seed every generator that timm's augmentation and torch's dropout draw from."""
    seed = seed_for(*parts)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm draws from NumPy's global generator
    torch.manual_seed(seed)


Part = Callable[[int], np.ndarray]
"""Size of a batch -> the positions in it that are wanted."""


def part_of_rank(count: int, rank: int, size: int, mirrored: bool = False) -> np.ndarray:
    """The positions in a batch of ``count`` that are a rank's: consecutive ones, in the order of the ranks.

    With ``mirrored`` the part is as symmetric as the batch: position i comes with -1 - i, the two that timm mixes. The
    batch must then be a multiple of twice the ranks.
    """
    if not mirrored:
        return np.arange(count * rank // size, count * (rank + 1) // size)
    first = part_of_rank(count // 2, rank, size)
    return np.concatenate([first, count - 1 - first[::-1]])


class Batches(Dataset):
    """A split as ready batches: item ``(seed, indices)`` is ``(uint8 images (B, C, H, W), labels (B,))``.

    Args:
        part: which of a batch's images to return. The others are not read from files; images in memory, which cost
            little, share their batch's stream of random numbers, so they are augmented with it and left out then.
    """

    def __init__(self, split: Split, transform, size: tuple[int, int], channels: int, part: Part = np.arange):
        self.split, self.transform, self.size, self.channels, self.part = split, transform, size, channels, part

    def __getitem__(self, item: tuple[int | None, np.ndarray]) -> tuple[Tensor, Tensor] | DataError:
        seed, indices = item
        mine = self.part(len(indices))
        labels = torch.from_numpy(self.split.labels[indices[mine]])
        images = self.split.images
        if self.transform is None:
            batch = torch.from_numpy(images[indices[mine]]).view(len(mine), *self.size, self.channels)
            return batch.permute(0, 3, 1, 2), labels
        in_memory = isinstance(images, np.ndarray)
        if seed is not None and in_memory:
            seed_everything(seed)
        batch = []
        try:
            for position in range(len(indices)) if seed is not None and in_memory else mine:
                if seed is not None and not in_memory:
                    seed_everything(seed, int(position))
                batch.append(self.transform(self._open(indices[position])))
        except DataError as error:
            return error  # raised in a loader's process it would arrive wrapped in that process's traceback
        batch = np.stack(batch) if batch else np.empty((0, self.channels, *self.size), np.uint8)
        return torch.from_numpy(batch if len(batch) == len(mine) else batch[mine]), labels

    def _open(self, index: int):
        from PIL import Image

        image = self.split.images[index]
        if isinstance(image, np.ndarray):
            return Image.fromarray(image)
        try:
            with Image.open(image) as file:
                return file.convert("RGB" if self.channels == 3 else "L")
        except Exception as error:  # Pillow's decoders raise whatever their format makes them stumble over
            raise DataError(f"{image} is not a readable image: {error}") from error


class TrainingOrder(Sampler):
    """The batches of a whole run from ``start`` on: every epoch a new permutation, its ragged end left out."""

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
    """One loader process for every two cores that this rank has to itself, at most eight."""
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
    """Augmented batches of the run, in order, from number ``start`` on; of each this rank's part if ``shared``."""
    order = TrainingOrder(len(data.train), batching, start)
    plain = batching.crop == 1 and not batching.flip and not batching.auto_augment
    transform = None if plain and data.image_size == size else _transform(data, batching, size, training=not plain)
    part = (
        partial(part_of_rank, rank=launch.rank(), size=launch.size(), mirrored=batching.mixed) if shared else np.arange
    )
    return _load(Batches(data.train, transform, size, data.channels, part), order, batching, device)


def evaluation_batches(
    data: ImageData,
    batching: Batching,
    size: tuple[int, int],
    device: torch.device,
    *,
    shared: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The test images in order, not augmented; of each batch this rank's part if ``shared``, perhaps none."""
    transform = None if data.image_size == size else _transform(data, batching, size, training=False)
    indices = np.array_split(np.arange(len(data.test)), -(-len(data.test) // max(256, batching.batch_size)))
    part = partial(part_of_rank, rank=launch.rank(), size=launch.size()) if shared else np.arange
    batches = Batches(data.test, transform, size, data.channels, part)
    if transform is None:
        return (batches[None, part] for part in indices)
    return _load(batches, [(None, part) for part in indices], batching, device)


def _transform(data: ImageData, batching: Batching, size: tuple[int, int], training: bool):
    from timm.data import create_transform

    # use_prefetcher ends in uint8 arrays: a quarter of the bytes between processes, and one normalisation per batch.
    common = dict(input_size=(data.channels, *size), mean=data.mean, std=data.std, use_prefetcher=True)
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


def _load(batches: Batches, order, batching: Batching, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    workers = default_workers() if batching.workers is None else batching.workers
    # Without transforms a batch is one slice of an array, which is not worth a process.
    workers = workers if batches.transform is not None else 0
    loader = DataLoader(
        batches, batch_size=None, sampler=order, num_workers=workers, pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
