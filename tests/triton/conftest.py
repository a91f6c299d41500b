"""These tests run on a GPU if there is one, else in Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/triton``.

The interpreter is chosen when kernels are defined, for the whole process; compiling them (``test_compile.py``) is for
the run without the variable.
"""

import pytest
import torch

pytest.importorskip("triton")

from crate_kernels.ops.triton_kernels import configurations, launch


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/triton" not in item.path.as_posix():
            continue
        if item.path.name == "test_compile.py":
            if launch.INTERPRETED:
                item.add_marker(pytest.mark.skip(reason="compiled in the run without TRITON_INTERPRET"))
        elif not (torch.cuda.is_available() or launch.INTERPRETED):
            item.add_marker(pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill new memory with NaN, so that elements which a kernel did not write fail the test."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor):
        if tensor.is_floating_point() and tensor.device.type != "meta":
            tensor.detach().fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))


@pytest.fixture(autouse=True)
def small_tiles(request):
    """Small tiles, so that a few dozen tokens make full, cut and diagonal tiles. A GPU uses the real tiles."""
    if not launch.INTERPRETED:
        yield
        return
    with (
        configurations.override("attention_forward", BLOCK_M=32, BLOCK_N=16),
        configurations.override("attention_backward", BLOCK_M=32, BLOCK_N=16),
        configurations.override("attention_delta", BLOCK_M=32),
        configurations.override("decoding", BLOCK_N=16),
        configurations.override("product", BLOCK_M=32, BLOCK_N=16, BLOCK_K=16),
        configurations.override("fold_norm", BLOCK_K=16, BLOCK_N=16),
    ):
        yield
