"""Commands under torchrun: a rank that dies, torchrun's restart, and what is refused."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("timm")
pytest.importorskip("rich")

from crate_kernels.cli import main
from crate_kernels.models.checkpoint import read
from crate_kernels.runs.logs import read_records

from .ranks import run_on_ranks

HERE = Path(__file__).parent
SMALL = [
    "train-text", "--context=16", "--dim=16", "--depth=1", "--heads=2", "--batch-size=8", "--steps=12", "--log-steps=1",
    "--sample-tokens=4", "--layerwise-steps=4", "--learning-rate=0.01", "--warmup-steps=0",
]  # fmt: skip
KILL_AT = 7


def torchrun(*command, restarts=0):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KILL_AT": str(KILL_AT), "PYTHONPATH": str(HERE.parents[1])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, f"--max-restarts={restarts}", *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("The sparse and the dense went up the hill; it's said that the naïve one fell.\n" * 60)
    return [*SMALL, "--text", str(path)]


def records(folder):
    """The metrics log without speeds, and the probe's file."""
    log = read_records(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "second" not in k} for line in log], (
        folder / "layerwise.jsonl"
    ).read_text()


def said_by_each_rank(*command):
    """What the command returns, and what each of the ranks that exist already prints: normally, and as errors."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            code = main(list(map(str, command)))
        except SystemExit as end:
            code = end.code
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, (out.getvalue(), error.getvalue()))
    return code, *zip(*texts, strict=True)


def refused_and_whole(command, folder):
    code, _, errors = said_by_each_rank(*command, "--batch-size=7", "--output", folder / "x")
    assert code == 2
    sentence = "crate-kernels: --batch-size 7 is the batch of all ranks together: 2 ranks do not divide it\n"
    assert errors == (sentence, "")  # of one rank

    code, texts, errors = said_by_each_rank(*command, "--parallel=fsdp", "--output", folder / "whole")
    assert code == 0, errors
    assert texts[0].count("fsdp over 2 ranks") == 1
    assert texts[1] == ""  # rank 0 alone speaks


def test_torchrun_starts_a_killed_run_again_and_nothing_is_lost(command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_on_ranks(2, refused_and_whole, command, tmp_path)
    assert (whole / "layerwise_training.png").read_bytes()[:4] == b"\x89PNG"
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["ranks"] == 2

    run = torchrun(
        HERE / "killed_rank.py", *command, "--parallel=fsdp", "--checkpoint-seconds=0", "--output", killed, restarts=1
    )
    assert run.returncode == 0, run.stderr
    assert "exitcode: -9" in run.stderr
    assert f"resuming from step {KILL_AT} of 12" in run.stdout
    ours, expected = (read(folder / "model.safetensors")[0] for folder in (killed, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert records(killed) == records(whole)
    assert json.loads((killed / "summary.json").read_text())["validation"] == summary["validation"]


def test_a_killed_run_ends_with_an_error_and_resumes_on_one_rank(command, tmp_path, capsys):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = torchrun(HERE / "killed_rank.py", *command, "--parallel=ddp", "--checkpoint-seconds=0", "--output", killed)
    assert run.returncode != 0
    assert "Signal 9 (SIGKILL)" in run.stderr
    assert not (killed / "summary.json").exists()
    assert main([*command, "--output", str(killed)]) == 2
    assert f"unfinished run: continue it with --resume {killed}" in capsys.readouterr().err
    assert main(["train-mae", "--resume", str(killed)]) == 2
    assert "belongs to a run of crate-kernels train-text: train-mae cannot" in capsys.readouterr().err
    assert main(["train-text", "--resume", str(killed)]) == 0
    assert f"resuming from step {KILL_AT} of 12" in capsys.readouterr().out
    assert main([*command, "--output", str(whole)]) == 0
    ours, expected = (read_records(folder / "metrics.jsonl") for folder in (killed, whole))
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    # float32: one rank and two round differently.
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_has_nothing_to_share_out(strategy, command, tmp_path, capsys):
    assert main([*command, f"--parallel={strategy}", "--output", str(tmp_path)]) == 2
    assert f"--parallel {strategy} shares a run out over ranks: start it with torchrun" in capsys.readouterr().err
