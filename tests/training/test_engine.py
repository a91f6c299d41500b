"""Behavior that all training commands share, on one rank. tests/distributed tests several ranks."""

import contextlib
import json
import os
import resource
import sys
import types

import numpy as np
import pytest
import torch

from crate_kernels.analysis.inputs import real_inputs
from crate_kernels.cli import main
from crate_kernels.distributed import launch
from crate_kernels.models import CrateMAE
from crate_kernels.models.checkpoint import read
from crate_kernels.ops import cpu_kernels
from crate_kernels.runs import checkpoints
from crate_kernels.training.engine import Engine, choose_precision

from ..distributed.trainers import RUNS, follow

TEXT = [
    "train-text", "--context=16", "--dim=16", "--depth=2", "--heads=2", "--batch-size=8", "--steps=12", "--log-steps=1",
    "--sample-tokens=4", "--layerwise-steps=4",
]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "rhyme.txt"
    path.write_text("The sparse and the dense went up the hill; it's said that the naïve one fell.\n" * 60)
    return [*TEXT, "--text", str(path)]


@pytest.fixture
def noise_root(tmp_path):
    """48 noise images in two classes, in the image size of the runs."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for name, i in ((name, i) for name in ("left", "right") for i in range(30)):
        (tmp_path / "noise" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / "noise" / name / f"{i}.png"
        )
    return str(tmp_path / "noise"), ""


def test_accumulated_batches_are_one_large_batch(noise_root, tmp_path):
    plain = dict(mixup=0.0, crop=1.0, flip=0.0, ema=0.0)  # settings that draw random numbers for every batch
    two = follow("classifier", noise_root, tmp_path / "two", batch_size=8, accumulate=2, **plain)
    one = follow("classifier", noise_root, tmp_path / "one", batch_size=16, accumulate=1, **plain)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-12, atol=0)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["classifier", "mae", "dino", "lm"])
def test_checkpointed_activations_change_memory_alone(name, noise_root, text, tmp_path):
    options = dict(depth=4, stop=2, accumulate=1) | (dict(dropout=0.2) if name in ("classifier", "lm") else {})

    def run(checkpointing):
        held = 0

        def pack(tensor):
            nonlocal held
            held += tensor.numel() * tensor.element_size()
            return tensor

        output = tmp_path / str(checkpointing)
        # A checkpointed layer has its own hooks, so only tensors that outlive the forward pass are counted.
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = follow(name, (noise_root[0], text[-1]), output, activation_checkpointing=checkpointing, **options)
        return result, held

    (stored, much), (recomputed, little) = run(False), run(True)
    assert little < 0.8 * much
    assert stored["losses"] == recomputed["losses"]
    assert all(torch.equal(value, recomputed["weights"][key]) for key, value in stored["weights"].items())


@pytest.mark.parametrize("name", RUNS)
def test_every_command_measures_layer_by_layer(name, noise_root, text, tmp_path):
    result = follow(name, (noise_root[0], text[-1]), tmp_path / "run")
    assert [record["step"] for record in result["layers"]] == [3, 6]
    depth = RUNS[name][1]["depth"]
    first, last = (np.array(record["coding_rate_mean"]) for record in result["layers"])
    assert first.shape == (depth,)
    assert (first > 0).all()
    assert (first != last).all()  # the same samples with different weights
    assert len((tmp_path / "run" / "layerwise.jsonl").read_text().splitlines()) == 2
    off = follow(name, (noise_root[0], text[-1]), tmp_path / "off", layerwise_steps=0)
    assert off["layers"] is None
    assert off["losses"] == result["losses"]  # measuring does not change the run
    assert not (tmp_path / "off" / "layerwise.jsonl").exists()


class Writer:
    """Replaces TensorBoard's writer."""

    def __init__(self, folder, purge_step):
        self.start, self.scalars = purge_step, {}
        Writer.last = self

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def close(self):
        self.closed = True


def test_a_run_leaves_measurements_and_a_resumed_one_continues_them(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    text = [*text, "--tensorboard", "--checkpoint-seconds=0"]
    assert main([*text, "--output", str(tmp_path / "whole")]) == 0
    assert "layerwise_training.png" in capsys.readouterr().out
    assert (tmp_path / "whole" / "layerwise_training.png").read_bytes()[:4] == b"\x89PNG"
    measured = (tmp_path / "whole" / "layerwise.jsonl").read_text()
    records = list(map(json.loads, measured.splitlines()))
    assert [record["step"] for record in records] == [0, 4, 8, 12]
    assert Writer.last.closed
    assert Writer.last.scalars["coding_rate/layer_02", 8] == records[2]["coding_rate_mean"][1]

    interrupted = Engine.train_step

    def step(self, batches):
        if self.step == 9:
            raise RuntimeError("stopped")
        interrupted(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", step)
        assert main([*text, "--output", str(tmp_path / "part")]) == 2
    assert main(["train-text", "--resume", str(tmp_path / "part")]) == 0
    assert Writer.last.start == 9
    assert (tmp_path / "part" / "layerwise.jsonl").read_text() == measured


def test_a_missing_tensorboard_is_named(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([*text, "--tensorboard", "--output", str(tmp_path / "run")]) == 2
    assert "--tensorboard needs the package tensorboard" in capsys.readouterr().err


def test_a_full_disk_ends_a_run_with_one_sentence_and_a_state(text, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    output, step = tmp_path / "run", Engine.train_step

    def full(self, batches):
        step(self, batches)
        if self.step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "train_step", full)
            assert main([*text, "--checkpoint-seconds=0", "--layerwise-steps=0", "--output", str(output)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (said,) = capsys.readouterr().err.splitlines()
    assert (
        f"the checkpoint of step 5 could not be written to {output}: File too large; "
        f"the previous checkpoint, {output / 'last.pt'}, is complete" in said
    )
    assert checkpoints.load(output / "last.pt")["step"] == 4
    assert not [name for name in os.listdir(output) if name.endswith(".tmp")]
    assert main(["train-text", "--resume", str(output), "--layerwise-steps=0"]) == 0
    assert main([*text, "--output", str(tmp_path / "whole")]) == 0
    ours, expected = (read(tmp_path / name / "model.safetensors")[0] for name in ("run", "whole"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_restart_resumes_the_same_run_only(text, tmp_path, monkeypatch, capsys):
    output, step = tmp_path / "run", Engine.train_step

    def stop(self, batches):
        if self.step == 3:
            raise RuntimeError("stopped")
        step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", stop)
        assert main([*text, "--checkpoint-seconds=0", "--output", str(output)]) == 2
    monkeypatch.setattr(launch, "process_group", lambda: contextlib.nullcontext(True))
    assert main([*text, "--seed=4", "--output", str(output)]) == 2
    assert "--seed 4 contradicts the run to resume, which has 0" in capsys.readouterr().err
    assert main([*text, "--checkpoint-seconds=0", "--output", str(output)]) == 0
    assert "resuming from step 3 of 12" in capsys.readouterr().out
    # A finished run that is started again rewrites its results. With other settings it is a different run.
    (output / "sample.txt").unlink()
    assert main([*text, "--checkpoint-seconds=0", "--output", str(output)]) == 0
    assert "resuming from step 12 of 12" in capsys.readouterr().out
    assert (output / "sample.txt").exists()
    # A different run does not replace the finished one, even when torchrun starts it again.
    assert main([*text, "--seed=4", "--output", str(output)]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    # A new run that restarts before its first checkpoint must not load the old run's checkpoint.
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", lambda self, batches: (_ for _ in ()).throw(RuntimeError("stopped")))
        assert main([*text, "--seed=4", "--overwrite", "--output", str(output)]) == 2
    assert checkpoints.find(output) is None
    assert not (output / "model.safetensors").exists()
    assert main([*text, "--seed=4", "--overwrite", "--output", str(output)]) == 0
    assert "resuming" not in capsys.readouterr().out


def test_a_resumed_run_does_not_write_over_another(text, tmp_path, capsys):
    for name in ("one", "two"):
        assert main([*text, "--output", str(tmp_path / name)]) == 0
    assert main(["train-text", "--resume", str(tmp_path / "one"), "--output", str(tmp_path / "two")]) == 2
    assert "holds a finished run, not that of" in capsys.readouterr().err


def test_a_resumed_run_reads_the_data_it_began_with(text, tmp_path, capsys):
    assert main([*text, "--output", str(tmp_path / "run")]) == 0
    rhyme = tmp_path / "rhyme.txt"
    rhyme.write_bytes(rhyme.read_bytes()[:-2] + b"!\n")
    assert main(["train-text", "--resume", str(tmp_path / "run")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "the run to resume reads other data: a text of 4,740 tokens (sha256 " in said


def test_non_finite_weights_are_not_saved(text, tmp_path, monkeypatch, capsys):
    output, step = tmp_path / "run", Engine.train_step

    def diverge(self, batches):
        step(self, batches)
        if self.step == 5:
            next(self.model.parameters()).data[0, 0] = float("nan")

    monkeypatch.setattr(Engine, "train_step", diverge)
    assert main([*text, "--checkpoint-seconds=0", "--output", str(output)]) == 2
    assert "some weights are not finite numbers at step 5; a lower --learning-rate" in capsys.readouterr().err
    assert checkpoints.load(output / "last.pt")["step"] == 4


def test_an_output_folder_with_an_unknown_name_in_braces_is_refused(text, capsys):
    assert main([*text, "--output", "runs/{foo}"]) == 2
    assert "--output runs/{foo}: what stands in braces must be an option" in capsys.readouterr().err


def test_photographs_are_a_data_set_like_others():
    pytest.importorskip("skimage")
    model = CrateMAE(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, decoder_depth=1)
    inputs, what = real_inputs(model, {"data": "photos", "mean": None, "std": None}, 3)
    assert inputs.shape == (3, 3, 16, 16)
    assert what == "3 test images of photos, 16 x 16"
    assert inputs.std() > 0.1


def test_the_automatic_precision_depends_on_the_device_alone(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    for capability, expected in (((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose_precision("auto", torch.device("cuda"))[0] == expected
    for isa in (None, "avx512", "neon"):
        monkeypatch.setattr(cpu_kernels, "ISA", isa)
        assert choose_precision("auto", torch.device("cpu")) == ("fp32", "automatic: bf16 is for GPUs")
    for isa in ("avx512_bf16", "amx"):
        monkeypatch.setattr(cpu_kernels, "ISA", isa)
        precision, reason = choose_precision("auto", torch.device("cpu"))
        assert precision == "fp32"
        assert reason == "automatic; --precision bf16 may be faster on this processor"
    assert choose_precision("bf16", torch.device("cpu")) == ("bf16", "as asked for")
