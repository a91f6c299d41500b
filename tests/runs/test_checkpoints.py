import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from crate_kernels.models import CheckpointError
from crate_kernels.runs import checkpoints
from crate_kernels.runs.logs import MetricsLog
from crate_kernels.training.command import resumed_settings
from crate_kernels.training.config import Config, resolve

STATE = {"config": dataclasses.asdict(resolve({})), "step": 3, "model": {"weight": torch.arange(1000.0)}}


def test_a_crash_while_writing_leaves_the_last_good_state(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoints.save(path, STATE)
    good = path.read_bytes()

    def half(state, file):
        file.write(good[: len(good) // 2])
        raise InterruptedError

    def nothing(*arguments):
        raise InterruptedError

    for module, name, crash in ((torch, "save", half), (os, "fsync", nothing), (os, "replace", nothing)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, crash)
            with pytest.raises(InterruptedError):
                checkpoints.save(path, STATE | {"step": 4})
        assert path.read_bytes() == good
        assert checkpoints.load(path)["step"] == 3
    checkpoints.save(path, STATE | {"step": 4})
    assert checkpoints.load(path)["step"] == 4
    assert os.listdir(tmp_path) == ["last.pt"]


def test_what_a_killed_process_leaves_behind_is_removed(tmp_path):
    checkpoints.save(tmp_path / "last.pt", STATE)
    (tmp_path / ".last.pt.123.tmp").write_bytes(b"half")
    checkpoints.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["last.pt"]


class Code:
    def __reduce__(self):
        return os.mkdir, ("should-not-exist",)


def test_only_complete_checkpoints_of_runs_are_read_and_no_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match=r"nothing to resume: there is no .*last\.pt"):
        checkpoints.load(path)
    checkpoints.save(path, STATE)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint of a run"):
        checkpoints.load(path)
    torch.save(STATE["model"], path)
    with pytest.raises(CheckpointError, match="give a file of weights with --init"):
        checkpoints.load(path)
    torch.save(STATE | {"format": checkpoints.FORMAT, "code": Code()}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of a run"):
        checkpoints.load(path)
    assert not (tmp_path / "should-not-exist").exists()


def test_options_of_a_resumed_run():
    config = resumed_settings(STATE, {"workers": 3, "output": "elsewhere", "seed": 0}, Config)
    assert config == resolve({"workers": 3, "output": "elsewhere"})
    with pytest.raises(ValueError, match=r"--learning-rate 0.1 contradicts the run to resume, which has 0.003"):
        resumed_settings(STATE, {"learning_rate": 0.1}, Config)


def test_the_log_never_runs_ahead_of_the_state(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 6):
        log.write(step=step, loss=1 / step)
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    MetricsLog(path, 3).write(step=4, loss=0.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 1 / 3},
        {"step": 4, "loss": 0},
    ]
    MetricsLog(path, 0)
    assert path.read_text() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_named_with_the_file(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        log.write(step=1)


@pytest.fixture
def sharded():
    """A state with one sharded tensor, on a single rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield {"step": 12, "model": {"weight": distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])}}
    finally:
        torch.distributed.destroy_process_group()


def test_a_folder_that_is_half_removed_or_of_another_name_is_no_state(sharded, tmp_path):
    (tmp_path / "last-00000012").mkdir()
    (tmp_path / "last-00000012" / "__0_0.distcp").write_bytes(b"half removed")
    (tmp_path / "last-backup").mkdir()
    (tmp_path / "last-backup" / "state.pt").write_bytes(b"somebody's copy")
    assert checkpoints.find(tmp_path) is None
    for step in (12, 13):
        path = checkpoints.save_run(tmp_path, sharded | {"step": step})
        assert checkpoints.find(tmp_path) == path == tmp_path / f"last-{step:08}"
    state = checkpoints.restore(checkpoints.load(path), lambda keys: None)
    assert state["model"]["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert sorted(os.listdir(tmp_path)) == ["last-00000013", "last-backup"]


def test_a_folder_under_removal_is_no_checkpoint(sharded, tmp_path, monkeypatch):
    checkpoints.save_run(tmp_path, sharded)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)  # killed before the first file is gone
    checkpoints.discard(tmp_path)
    assert checkpoints.find(tmp_path) is None
    monkeypatch.undo()
    checkpoints.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []
