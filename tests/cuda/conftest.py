import pytest

from . import emulator


@pytest.fixture(scope="session")
def simt():
    """The kernels as the emulator runs them."""
    reason = emulator.missing()
    if reason:
        pytest.skip(reason)
    return emulator.Kernels(emulator.load(emulator.build()))
