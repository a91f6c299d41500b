import pytest

from .compare import Calls


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)
