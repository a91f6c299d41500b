"""``crate-kernels tune`` on launch options: the options it tries and stores. Later launches use the stored options.

The clock is a stand-in. The kernels run, and the gate judges their results.
"""

import json
import random

import pytest
import torch

from crate_kernels import ops, timing, user_cache
from crate_kernels.bench import tune
from crate_kernels.cli import main
from crate_kernels.ops import tuned
from crate_kernels.ops.triton_kernels import configurations, launch
from crate_kernels.ops.triton_kernels.product import product

from ..ops.oracle import DEVICE

WARPS = {4: 1.0, 8: 0.5, 2: 0.25, 1: 0.125}
"""Warps -> seconds of a launch on the simulated device. Two warps give wrong results, and one warp fails."""
CASE = tune.Case("ista_step", "tiny", 1, 40, 2, 16)


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A device whose launches with two warps are wrong and with one warp fail, and an empty cache."""
    monkeypatch.setenv(user_cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    shipped = dict(BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(configurations, "candidates", lambda *about: [shipped | {"num_warps": n} for n in WARPS])
    original = launch.launch

    def faulty(kernel, grid, *arguments, num_warps=4, **options):
        if num_warps == 1:
            raise ValueError("out of resource: registers")
        original(kernel, grid, *arguments, num_warps=num_warps, **options)
        if num_warps == 2:
            arguments[2].mul_(1.05)  # the output of a product

    def clock(runs, device, **options):
        for run in runs.values():
            run()
        return {name: [WARPS[json.loads(name)["num_warps"]] * noise for noise in (0.9, 1.0, 1.1)] for name in runs}

    monkeypatch.setattr(launch, "launch", faulty)
    monkeypatch.setattr(timing, "measure", clock)
    tuned.forget()
    configurations.forget()
    yield torch.device(DEVICE)
    tuned.forget()
    configurations.forget()


def launched(rows, monkeypatch):
    """The warps of the product that a call launches."""
    found = []
    original = launch.launch
    with monkeypatch.context() as patch:
        patch.setattr(launch, "launch", lambda *a, **k: found.append(k["num_warps"]) or original(*a, **k))
        product(torch.ones(rows, 32, device=DEVICE), torch.ones(32, 32, device=DEVICE))
    return found


def test_the_fastest_right_launch_is_stored_and_followed(device, monkeypatch, capsys):
    assert launched(40, monkeypatch) == [4]
    (record,) = tune.tune_launches(CASE, device, torch.float32, 1.0)
    assert record["kernel"] == "product"
    assert (record["rows"], record["width"], record["dtype"]) == (40, 32, "float32")
    assert record["options"]["num_warps"] == 8
    assert {json.loads(name)["num_warps"] for name in record["seconds"]} == {4, 8}
    assert [launched(rows, monkeypatch) for rows in (40, 20, 80, 19, 81)] == [[8], [8], [8], [4], [4]]
    tuned._launches.clear()  # like a new process, which reads the file
    configurations.forget()
    assert launched(40, monkeypatch) == [8]
    with configurations.override("product", num_warps=16):
        assert launched(40, monkeypatch) == [16]  # the user's setting overrides the stored one
    assert main(["tune", "--show", "--device", DEVICE]) == 0
    assert "product float32 rows 40 width 32: " in (out := capsys.readouterr().out)
    assert "2 measured; 2.00 times as fast as shipped" in out
    assert main(["tune", "--clear", "--device", DEVICE]) == 0
    assert "forgot 1 records" in capsys.readouterr().out
    configurations.forget()
    assert launched(40, monkeypatch) == [4]


def test_decoding_has_launch_options_for_caches_of_like_length(device, monkeypatch):
    options = [dict(BLOCK_M=0, BLOCK_N=16, num_warps=n, num_stages=2) for n in WARPS]
    monkeypatch.setattr(configurations, "candidates", lambda *about: options)
    case = tune.Case("cached_subspace_attention", "tiny", 2, 40, 2, 16)
    (record,) = tune.tune_launches(case, device, torch.float32, 1.0)
    assert (record["kernel"], record["rows"], record["width"]) == ("decoding", 40, 16)
    assert record["options"]["num_warps"] == 8
    assert all(set(times) == {"forward"} for times in record["seconds"].values())
    assert "2.00 times as fast as shipped" in tune.launch_line(record)
    warps = [configurations.configuration("decoding", device, torch.float32, n, 16)["num_warps"] for n in (40, 80, 81)]
    assert warps == [8, 8, 4]


def test_a_language_model_has_a_step_of_decoding():
    settings = tune.Settings(model="crate_gpt2_base", context=128)
    *_, last = settings.cases(3)
    assert last == tune.Case("cached_subspace_attention", "crate_gpt2_base", 3, 128, 12, 64)
    assert not any(case.decodes for case in tune.Settings(model="crate_tiny").cases(3))


def test_a_difference_within_the_noise_changes_nothing(device, monkeypatch):
    monkeypatch.setitem(WARPS, 8, 0.99)
    noise, clock = random.Random(0), timing.measure

    def noisy(*arguments, **options):
        return {n: [v * noise.uniform(0.8, 1.2) for v in s] for n, s in clock(*arguments, **options).items()}

    monkeypatch.setattr(timing, "measure", noisy)
    (record,) = tune.tune_launches(CASE, device, torch.float32, 1.0)
    assert record["options"]["num_warps"] == 4


def test_launches_of_attention_follow_for_the_same_number_of_tokens(device):
    options = dict(BLOCK_M=16, BLOCK_N=16, CUT=16, num_warps=8, num_stages=7)
    about = dict(kernel="attention_forward", dtype="float32", rows=33, width=16, options=options)
    tuned.store(device, [about], tuned.LAUNCHES)
    kind = (device, torch.float32)
    assert configurations.configuration("attention_forward", *kind, 33, 16)["num_stages"] == 7
    assert configurations.configuration("attention_forward", *kind, 34, 16)["num_stages"] != 7
    assert configurations.configuration("attention_forward", *kind, 33, 32)["num_stages"] != 7
    w = torch.randn(1, 33, 2, 16, device=DEVICE)
    expected = ops.subspace_attention(w.double(), backend="reference")
    torch.testing.assert_close(ops.subspace_attention(w, backend="triton").double(), expected, rtol=1e-5, atol=1e-5)


def test_candidates_begin_with_the_shipped_launch_and_suit_the_operands():
    kind = (torch.device("cpu"), torch.bfloat16, 197, 64)
    found = configurations.candidates("attention_forward", *kind)
    assert found[0] == configurations.shipped("attention_forward", *kind)
    assert len(found) == len({json.dumps(each) for each in found}) > 4
    assert {each["num_stages"] for each in found} >= {1, 2, 3}
    assert all(each["num_warps"] >= 1 and each["num_stages"] >= 1 for each in found)


def test_on_a_device_without_triton_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(launch, "why_not", lambda tensor: "no such device")
    assert tune.tune_launches(CASE, torch.device("cpu"), torch.float32, 1.0) == []
