"""The operators on pytest-benchmark: ``python -m pytest benchmarks --benchmark-only``.

Cases, implementations and the correctness gate are those of ``crate-kernels bench``. A wrong implementation fails its
test and is not timed. Variables: ``CRATE_KERNELS_BENCH_DEVICE`` (cpu, cuda), ``CRATE_KERNELS_BENCH_QUICK=1`` (tiny
shapes).
"""

import os

import pytest
import torch

from crate_kernels.bench import cases, operators

DEVICE = torch.device(os.environ.get("CRATE_KERNELS_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CASES = [c for c in cases.cases(DEVICE, quick=os.environ.get("CRATE_KERNELS_BENCH_QUICK") == "1") if c.family != "long"]
CALLS = [(case, name) for case in CASES for name in case.implementations(DEVICE)]


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize(("case", "name"), CALLS, ids=lambda value: getattr(value, "name", value))
def test_operator(benchmark, case, name, direction):
    if direction not in case.directions:
        pytest.skip("has no backward")
    leaves = [t.requires_grad_() for t in case.tensors(DEVICE, DTYPE)]
    passed, records = operators.gated(case, {name: case.implementations(DEVICE)[name]}, leaves)
    if "skipped" in records[name]:
        pytest.skip(records[name]["skipped"])
    assert name in passed, records[name]
    run = operators.prepared(passed[name], leaves, direction)

    def finished():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name}, {direction}"
    benchmark(finished)
