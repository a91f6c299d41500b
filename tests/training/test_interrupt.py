"""Ctrl-C and SIGTERM: the step in progress is finished and saved, and the run resumes to the same result."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from crate_kernels.cli import main
from crate_kernels.models.checkpoint import read
from crate_kernels.runs import checkpoints
from crate_kernels.training.engine import Engine
from crate_kernels.training.interrupt import Interrupted, Interrupts

COMMAND = [
    "train-text", "--context=16", "--dim=16", "--depth=1", "--heads=2", "--batch-size=8", "--steps=12",
    "--sample-tokens=4", "--layerwise-steps=0",
]  # fmt: skip


@pytest.fixture
def command(tmp_path):
    path = tmp_path / "rhyme.txt"
    path.write_text("The sparse and the dense went up the hill; it's said that the naïve one fell.\n" * 60)
    return [*COMMAND, "--text", str(path)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_in_progress_and_says_how_to_resume(
    number, code, command, tmp_path, monkeypatch, capsys
):
    output, step = tmp_path / "run", Engine.train_step

    def interrupted(self, batches):
        if self.step == 4:
            signal.raise_signal(number)
        step(self, batches)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", interrupted)
        assert main([*command, "--output", str(output)]) == code  # no checkpoint is due before 30 seconds
    assert signal.getsignal(number) is before
    said = capsys.readouterr()
    assert (
        f"after step 5 of 12; the checkpoint is saved. Resume with: crate-kernels train-text --resume {output}"
        in said.out
    )
    assert said.err == ""
    assert checkpoints.load(output / "last.pt")["step"] == 5
    assert main(["train-text", "--resume", str(output)]) == 0
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    ours, expected = (read(tmp_path / name / "model.safetensors")[0] for name in ("run", "whole"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_signal_before_the_first_step_leaves_nothing_to_resume(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "fit", lambda self, report: signal.raise_signal(signal.SIGTERM))
    assert main([*command, "--output", str(tmp_path / "run")]) == 143
    assert "interrupted before the first step: there is nothing to resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert main([*command, "--output", str(tmp_path / "run")]) == 0  # and the same command can run again


def test_a_process_that_is_terminated_exits_with_143(command, tmp_path):
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "crate_kernels", *command, "--steps=1000000", "--log-steps=1", "--output", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (output / "metrics.jsonl").is_file() or not (output / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "Resume with: crate-kernels train-text --resume" in out
    assert err == ""
    assert checkpoints.load(output / "last.pt")["step"] > 0


def test_a_second_signal_ends_a_single_process_at_once(monkeypatch):
    with Interrupts() as interrupts, interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        with pytest.raises(Interrupted) as raised:
            signal.raise_signal(signal.SIGINT)
        assert raised.value.code == 130
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # under torchrun the same Ctrl-C comes from the terminal and from torchrun
    with Interrupts() as interrupts, interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
