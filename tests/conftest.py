"""Tiny data sets on disk, in the layouts that the readers accept."""

import gzip
import importlib.util
import struct

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def loader_measured_briefly(monkeypatch):
    """Measure the loader's speed briefly in tests. A run on images measures it for two seconds at its end.

    The loader needs Pillow. Tests of kernels also run without Pillow.
    """
    if importlib.util.find_spec("PIL"):
        monkeypatch.setattr("crate_kernels.data.batches.MEASURED_SECONDS", 0.0)


@pytest.fixture(autouse=True, scope="session")
def small_figures():
    """Draw small figures in tests. Nearly every run ends with figures, which otherwise take as long as a small run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        yield
        return
    save = Figure.savefig

    def small(self, *arguments, **options):
        self.set_layout_engine("none")
        self.set_size_inches(1, 1)
        return save(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", small)
        yield


def write_idx(path, array, compress):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture
def fashion_root(tmp_path):
    """A torchvision ``FashionMNIST`` root: 40 + 20 images, the test half not gzipped."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count, compress in (("train", 40, True), ("t10k", 20, False)):
        ending = "-ubyte.gz" if compress else "-ubyte"
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{prefix}-images-idx3{ending}", images, compress)
        write_idx(raw / f"{prefix}-labels-idx1{ending}", np.arange(count, dtype=np.uint8) % 10, compress)
    return tmp_path / "data"


@pytest.fixture
def image_root(tmp_path):
    """Class folders ``blue`` and ``red``, 10 photos each, of different sizes and modes."""
    from PIL import Image

    root = tmp_path / "photos"
    for name, color in (("blue", (0, 0, 220)), ("red", (220, 0, 0))):
        (root / name).mkdir(parents=True)
        for i in range(10):
            image = Image.new("RGB", (40 + i, 30), color)
            image = image.convert("P") if i == 3 else image
            image.save(root / name / f"{i}.png")
    return root
