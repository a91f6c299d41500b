"""A training run that is disturbed at random moments and resumed must end bit for bit like an undisturbed run.

::

    python benchmarks/endurance_kills.py --kills 50 --full-disks 10     # --full-disks needs root, for a mount

Four kinds of runs are disturbed and resumed until they end. If a run ends before there were enough disturbances,
another run of its kind follows:

- ``process``: one process with a loader process. SIGKILL ends either of the two.
- ``ranks``: two ranks under FSDP2. SIGKILL ends one of them, and the other one half a second later, as torchrun does.
- ``checkpoint``: one process that writes its checkpoints to a slow disk (a throttled file of 2 MB/s). SIGKILL ends the
  process while it writes a checkpoint.
- ``full``: one process that writes to a small file system. Another file fills this file system. The run must end by
  itself with one sentence. Then the other file is removed.

The script compares the weights, the metrics log (without its speeds) and the layer-wise measurements with those of
undisturbed runs. It records every finished kind in the results file. A later call runs only the missing kinds. It works
on Linux only. All processes are forked from this one, which has already imported everything that is slow to import.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from text_memory import ROOT, family

from crate_kernels import cli
from crate_kernels.training import classifier

ARGUMENTS = [
    "--device", "cpu", "--dim", "32", "--depth", "2", "--heads", "2", "--batch-size", "32", "--workers", "1",
    "--checkpoint-seconds", "0.2",
]  # fmt: skip
RUNS = {"process": [], "ranks": ["--parallel", "fsdp"], "checkpoint": [], "full": []}
EPOCHS = {"process": "4", "ranks": "1"}
SLOW_BYTES_PER_SECOND = 2e6
SMALL_DISK = 16 << 20
"""Size in bytes of the file system that is filled."""


def write_slowly() -> None:
    """Make ``torch.save`` write as slowly as to a slow disk."""
    save = torch.save

    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data) -> int:
            data = memoryview(data).cast("B")
            for start in range(0, len(data), 4096):
                self.file.write(data[start : start + 4096])
                self.file.flush()
                time.sleep(4096 / SLOW_BYTES_PER_SECOND)
            return len(data)

        def flush(self) -> None:
            self.file.flush()

    torch.save = lambda state, file: save(state, Slow(file))


def log_of(folder: Path) -> Path:
    """The file for the output of a run's processes. It is outside of the run's file system, which may be full."""
    return folder.parent.with_suffix(".log")


def undisturbed(name: str) -> str:
    """The kind of run for the comparison. Neither a slow nor a full disk may change the result."""
    return "ranks" if name == "ranks" else "process"


def start(name: str, folder: Path) -> list[int]:
    """Fork the processes of a run. The run resumes if it can."""
    arguments = ["train", *RUNS[name]]
    if any(folder.glob("last*")):
        arguments += ["--resume", str(folder)]
    else:
        arguments += [*ARGUMENTS, "--epochs", EPOCHS[undisturbed(name)], "--overwrite", "--output", str(folder)]
    ranks = 2 if name == "ranks" else 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            processes.append(pid)
            continue
        code = 1
        try:
            log = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            torch.set_num_threads(1)
            if ranks > 1:
                os.environ |= {
                    "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
                }  # fmt: skip
            if name == "checkpoint":
                write_slowly()
            code = cli.main(arguments)
        finally:
            os._exit(code)
    return processes


def ended(pid: int) -> bool:
    """Whether a process of ours has ended. It can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def finish(processes: list[int]) -> bool:
    """Wait for processes. Return whether all of them succeeded."""
    return all([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in processes])


def checkpoint(folder: Path) -> tuple[int, str] | None:
    """The newest checkpoint, identified by its name and time; None if there is none."""
    found = []
    for path in folder.glob("last*"):
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
            found.append((path.stat().st_mtime_ns, path.name))
    return max(found, default=None)


def kill(name: str, folder: Path, processes: list[int], generator: random.Random, longest: float) -> str | None:
    """Kill a part of a run at a random moment. Return what was killed; None if the run ended before."""
    wait, victim, what = generator.uniform(0, longest), generator.choice(processes), name
    # One kill in four may happen during the start, which takes seconds. The others wait for a checkpoint first.
    before, starting = checkpoint(folder), generator.random() < 0.25
    while not starting and checkpoint(folder) == before and not any(ended(pid) for pid in processes):
        time.sleep(0.002)
    began = time.monotonic()
    while time.monotonic() - began < wait or (name == "checkpoint" and not any(folder.glob(".last*.tmp"))):
        if any(ended(pid) for pid in processes):
            break
        time.sleep(0.002)
    if not any(ended(pid) for pid in processes):
        if name == "process" and generator.random() < 0.5 and (loaders := family(processes[0])[1:]):
            victim, what = generator.choice(loaders), "loader"
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:  # a loader that has ended meanwhile
            what = None
    else:
        what = None
    deadline = time.monotonic() + (60 if what == "loader" else 0.5)
    while what and time.monotonic() < deadline and not all(ended(pid) for pid in processes):
        time.sleep(0.01)
    for pid in processes:
        if what and not ended(pid):
            os.kill(pid, signal.SIGKILL)
    return None if finish(processes) and what is None else what or "error"


def fill(folder: Path, processes: list[int], generator: random.Random, longest: float) -> str | None:
    """Fill the file system of a run at a random moment; None if the run ended before.

    The run must notice this and end by itself. Any other end is "error".
    """
    log, filler = log_of(folder), folder.parent / "filler"
    before = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + generator.uniform(0, longest)
    while time.monotonic() < deadline and not ended(processes[0]):
        time.sleep(0.002)
    if ended(processes[0]):
        return None if finish(processes) else "error"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:  # to the last byte
            file.write(b"x" * 4096)
    if finish(processes):  # the run had nothing left to write
        return None
    filler.unlink()
    return "full disk" if b"No space left on device" in log.read_bytes()[before:] else "error"


def outcome(folder: Path) -> dict[str, bytes | list]:
    """Everything that a run leaves and that must not depend on kills."""
    logs = {}
    for name in ("metrics.jsonl", "layerwise.jsonl"):
        records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        logs[name] = [{k: v for k, v in record.items() if "per_second" not in k} for record in records]
    weights = {name: (folder / name).read_bytes() for name in ("model.safetensors", "best.safetensors")}
    return weights | logs


def error(name: str, folder: Path) -> SystemExit:
    return SystemExit(f"{name}: the run ended with an unexpected error:\n{log_of(folder).read_text()[-2000:]}")


def disturbed(name: str, folder: Path, most: int, generator: random.Random, longest: float) -> list[str]:
    """Disturb a run until it has ended, at most ``most`` times. Return what happened to it."""
    seen: list[str] = []
    disturb = fill if name == "full" else functools.partial(kill, name)
    while len(seen) < most:
        processes = start(name, folder)
        what = disturb(folder, processes, generator, longest)
        if what == "error":
            raise error(name, folder)
        if what is None:
            return seen
        seen.append(what)
        print(f"{name}: {what}", flush=True)
    if not finish(start(name, folder)):
        raise error(name, folder)
    return seen


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of ``SMALL_DISK`` bytes at ``folder``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def compare(name: str, folder: Path, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Disturb runs ``count`` times. Return what happened to them, and which of their files equal the undisturbed
    run's."""
    # Each kind has its own generator, so that the moments do not depend on earlier records.
    generator = random.Random(f"{args.seed} {name}")
    whole = folder / "whole" / undisturbed(name) / "run"
    if not whole.exists():
        whole.parent.mkdir(parents=True)
        if not finish(start(undisturbed(name), whole)):
            raise error(name, whole)
    expected, seen, runs = outcome(whole), [], 0
    identical = dict.fromkeys(expected, True)
    while len(seen) < count:
        part = folder / "part" / f"{name}{runs}" / "run"
        part.parent.mkdir(parents=True)
        with small_disk(part.parent) if name == "full" else contextlib.nullcontext():
            seen += disturbed(name, part, count - len(seen), generator, args.longest)
            got = outcome(part)
        identical = {key: same and got[key] == expected[key] for key, same in identical.items()}
        runs += 1
        print(f"{name}: run {runs} has ended, identical: {identical}", flush=True)
    return {
        "runs": runs,
        "disturbances": {what: seen.count(what) for what in sorted(set(seen))},
        "identical": identical,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--full-disks", type=int, default=0)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds to the disturbance, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "endurance_kills.json")
    args = parser.parse_args()
    record: dict[str, dict] = json.loads(args.results.read_text()) if args.results.exists() else {}
    assert classifier  # imported once, for all forks
    killed = [name for name in RUNS if name != "full"]
    counts = {name: args.kills // len(killed) + (i < args.kills % len(killed)) for i, name in enumerate(killed)}
    counts["full"] = args.full_disks
    with tempfile.TemporaryDirectory() as folder:
        for name, count in counts.items():
            if name in record or not count:
                continue
            record[name] = compare(name, Path(folder), count, args)
            args.results.write_text(json.dumps(record, indent=1) + "\n")
            print(name, json.dumps(record[name]), flush=True)
    if not all(all(run["identical"].values()) for run in record.values()):
        raise SystemExit("a disturbed run ended differently from an undisturbed one")


if __name__ == "__main__":
    main()
