"""The CUDA backend as the dispatcher sees it: it refuses with a reason, whatever is or is not installed."""

import pytest
import torch

from crate_kernels import ops
from crate_kernels.ops import cuda_kernels
from crate_kernels.ops.ista_step import cuda as ista_step
from crate_kernels.ops.mssa_block import cuda as mssa_block
from crate_kernels.ops.subspace_attention import cuda as attention


@pytest.fixture
def present(emulated, monkeypatch):
    """As if the library were there, on a device of compute capability 9.0 with 227 KiB of shared memory a block."""
    properties = type("Properties", (), {"major": 9, "minor": 0, "shared_memory_per_block_optin": 232448})
    monkeypatch.setattr(cuda_kernels, "MISSING", None)
    monkeypatch.setattr(cuda_kernels, "ARCHITECTURES", ("sm_80", "sm_90", "compute_90"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for cached in (cuda_kernels._why_not_device, cuda_kernels._most_tokens):
        cached.cache_clear()
    yield properties
    for cached in (cuda_kernels._why_not_device, cuda_kernels._most_tokens):
        cached.cache_clear()


def heads(tokens=8, width=64, dtype=torch.bfloat16):
    # A tensor that says it is on a GPU, and needs none.
    with torch._subclasses.FakeTensorMode():
        return torch.empty(1, tokens, 2, width, dtype=dtype, device="cuda")


def test_an_explicit_request_names_the_reason():
    w = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"cuda library was not built|need a CUDA device"):
        ops.subspace_attention(w, backend="cuda")


def test_accepted(present):
    for width in cuda_kernels.WIDTHS:
        assert attention.why_not(heads(272, width), None, None, 0.1, False) is None


@pytest.mark.parametrize(
    ("w", "reason"),
    [
        (heads(dtype=torch.float32), "take bfloat16 and float16, not float32"),
        (heads(width=24), "built for head widths 16, 32, 48, 64, 80, 96, 128; got 24"),
        (heads(tokens=273), "up to 272 tokens; got 273"),
    ],
)
def test_refused(present, w, reason):
    assert reason in attention.why_not(w, None, None, 0.1, False)


def test_a_head_that_does_not_fit_the_device_is_refused(present):
    present.shared_memory_per_block_optin = 166912
    reason = attention.why_not(heads(tokens=209, width=128), None, None, 0.1, False)
    assert reason == "heads of width 128 fit the shared memory of this device up to 208 tokens; got 209"


def test_a_separate_value_is_refused(present):
    assert "no separate value" in attention.why_not(heads(), heads(), None, 0.1, False)


def test_an_old_device_is_refused(present):
    present.major = 7
    present.minor = 5
    reason = "was built for sm_80, sm_90, compute_90; the device is sm_75"
    assert reason in attention.why_not(heads(), None, None, 0.1, False)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("sm_80",), (8, 0), True),
        (("sm_80",), (8, 9), True),
        (("sm_86",), (8, 0), False),
        (("sm_80", "sm_90"), (10, 0), False),
        (("sm_80", "compute_80"), (12, 0), True),
        (("sm_90", "compute_90"), (8, 0), False),
        (("sm_90a", "compute_90a"), (9, 0), True),
        (("sm_90a", "compute_90a"), (10, 0), False),
        (("sm_100f",), (10, 3), True),
        ((), (9, 0), False),
    ],
)
def test_runs_where_the_build_has_code(architectures, capability, runs):
    assert cuda_kernels.runs_on(architectures, *capability) is runs


def test_channels(present):
    def matrix(d):
        return heads(4, d)[0, :, 0]

    assert ista_step.why_not(matrix(768), matrix(768)) is None
    assert "multiple of 8 channels, up to 2048; got 12" in ista_step.why_not(matrix(12), matrix(12))
    assert "got 4096" in ista_step.why_not(matrix(4096), matrix(4096))
    assert ista_step.why_not(matrix(768).float(), matrix(768)) is None
    assert "not torch.float16" in ista_step.why_not(matrix(768).half(), matrix(768))
    assert "not float32" in ista_step.why_not(matrix(768).float(), matrix(768).float())
    z, u = heads(8, 96)[:, :, 0], heads(128, 96)[0, :, 0]
    assert mssa_block.why_not(z, None, None, u, None, None, None, 2) is None
    assert "head widths" in mssa_block.why_not(z, None, None, u, None, None, None, 16)
