import pytest
import torch

from crate_kernels.ops import cuda_kernels, libraries

from . import emulator


@pytest.fixture(scope="session")
def simt():
    """The kernels as the emulator runs them."""
    reason = emulator.missing()
    if reason:
        pytest.skip(reason)
    return emulator.Kernels(emulator.load(emulator.build()))


@pytest.fixture
def emulated(simt, monkeypatch):
    """The CUDA backend on CPU tensors: the emulator in the place of the library, a plain loop in that of cuBLASLt.

    Tensors are filled with NaN where they are allocated.
    """
    path = simt.module.__file__
    library = libraries.open_library(path, "cuda", cuda_kernels.INTERFACE, cuda_kernels.FUNCTIONS)
    monkeypatch.setattr(cuda_kernels, "LIBRARY", library)
    monkeypatch.setattr(cuda_kernels, "_stream", lambda device: None)
    monkeypatch.setattr(cuda_kernels, "_NAN_KEPT", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield library
    torch.use_deterministic_algorithms(before)
