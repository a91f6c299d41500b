"""The choice of a backend: a request is followed or refused with a reason, and never replaced."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from crate_kernels import collect_env, ops
from crate_kernels.ops import backends
from crate_kernels.ops.ista_step import eager as ista_step_eager

W = torch.randn(1, 3, 1, 4, dtype=torch.float64)


def test_an_explicit_backend_that_cannot_run_raises_with_its_reason():
    # No kernel backend runs float64, with or without a GPU, an interpreter or an extension.
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=rf"backend '{name}' cannot run these inputs: \S+"):
            ops.subspace_attention(W, backend=name)


def test_the_argument_outranks_the_context_and_the_context_is_restored():
    before = ops.requested_backend()
    with ops.use_backend("cuda"):
        assert ops.requested_backend() == "cuda"
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
            ops.subspace_attention(W)
        ops.subspace_attention(W, backend="eager")
        with ops.use_backend("reference"):
            ops.subspace_attention(W)
        assert ops.requested_backend() == "cuda"
    assert ops.requested_backend() == before
    with pytest.raises(ValueError, match="use_backend: unknown backend 'fast'"), ops.use_backend("fast"):
        pass


def test_a_request_is_that_of_its_thread():
    before = ops.requested_backend()
    with ops.use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(ops.requested_backend).result() == before != "reference"


def test_a_compiled_function_follows_use_backend():
    # No kernel runs float64. The request must be refused, and the choice of the first call must not be repeated.
    torch._dynamo.reset()
    compiled = torch.compile(ops.subspace_attention, backend="eager", fullgraph=True)
    expected = ops.subspace_attention(W)
    torch.testing.assert_close(compiled(W), expected)
    with ops.use_backend("cuda"), pytest.raises(Exception, match="backend 'cuda' cannot run these inputs"):
        compiled(W)
    torch.testing.assert_close(compiled(W), expected)


def test_the_measured_order_is_followed_by_size_and_rows_and_completed(monkeypatch):
    inf = float("inf")
    entries = ((512, 300, ("eager",)), (512, inf, ("triton", "eager")), (inf, inf, ("eager", "cuda")))
    monkeypatch.setattr(backends.measured, "ORDER", {("sm_90", "ista_step", "bfloat16", False): entries})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = {"eager": ista_step_eager}
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)

    def order(tensor=x, size=512, rows=301, causal=False):
        return backends.automatic_order(found, tensor, size, rows, causal)

    assert order() == ("triton", "eager", "cuda")
    assert order(rows=300) == ("eager", "triton", "cuda")
    assert order(size=513) == ("eager", "cuda", "triton")
    assert order(causal=True) == backends.AUTOMATIC["cuda"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert order() == backends.AUTOMATIC["cuda"]
    assert order(torch.empty(1)) == ("cpu", "eager")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_the_environment_variable():
    code = "import torch; from crate_kernels import ops; print(ops.requested_backend())"
    assert run_python(code, CRATE_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    wrong = run_python(code, CRATE_KERNELS_BACKEND="quick")
    assert wrong.returncode != 0
    assert (
        "CRATE_KERNELS_BACKEND: unknown backend 'quick'; accepted are cuda, triton, cpu, eager, reference"
        in wrong.stderr
    )


def test_importing_works_without_triton():
    code = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)
from crate_kernels.ops.subspace_attention.op import operator
print(operator.implementations["triton"])
"""
    assert run_python(code).stdout.strip() == "the package triton is not installed"


def test_the_report_names_every_operator_and_backend():
    table = collect_env.backend_report(torch.device("cpu"))
    assert set(table) == {*ops.OPERATORS, "subspace_cross_attention", "cached_subspace_attention"}
    for operator, reasons in table.items():
        assert set(reasons) == set(backends.BACKENDS)
        assert reasons["eager"] == "yes"
        assert reasons["reference"] == ("runs eager instead" if operator.startswith("cached") else "yes")
        assert all(reason.strip() for reason in reasons.values())
    assert "subspace_attention" in collect_env.report()
