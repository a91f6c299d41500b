import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from crate_kernels.training import speed


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    """Measure each speed once. A single test checks that speeds are plausible."""
    medians = speed.medians
    monkeypatch.setattr(speed, "medians", lambda runs, device, rounds: medians(runs, device, 1))
