import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from crate_kernels.training import speed


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    """Speeds are checked for sense in one test; elsewhere one measurement is as good as many."""
    medians = speed.medians
    monkeypatch.setattr(speed, "medians", lambda runs, device, rounds: medians(runs, device, 1))
