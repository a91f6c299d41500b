"""Memory over time of ``prepare-text`` and ``train-text`` on a generated corpus: a picture and a file of the numbers.

::

    python benchmarks/text_memory.py --gigabytes 4 --folder /tmp/text_memory --steps 300

The corpus is JSON lines. A document consists of words from a pool, with its own number. The script measures the memory
of all processes of a command together (PSS, which counts shared pages once) and that of its largest process (RSS). It
deletes the corpus, the shards and the run at the end. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def write_corpus(path: Path, size: int, seed: int = 0) -> None:
    """JSON lines of about ``size`` bytes: 4,000 documents of 50 to 3,000 words, repeated with different numbers."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(generator.choice(letters, generator.integers(2, 11))) for _ in range(20_000)])
    frequency = 1 / np.arange(1, len(words) + 1)
    frequency /= frequency.sum()
    pool = [" ".join(generator.choice(words, generator.integers(50, 3000), p=frequency)) for _ in range(4000)]
    written = number = 0
    with open(path, "w") as file:
        while written < size:
            written += file.write(f'{{"text": "{number} {pool[generator.integers(len(pool))]}"}}\n')
            number += 1


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found, children = [], [pid]
    while children:
        pid = children.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            children += map(int, task.read_text().split())
    return found


def memory(pid: int) -> tuple[float, float]:
    """MB of a process and its descendants: all of their PSS, and the largest RSS."""
    pss, largest = 0.0, 0.0
    for process in family(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # the process has ended
            continue
        fields = dict(line.split(":") for line in lines)
        pss += int(fields["Pss"].split()[0]) * 1024 / 1e6
        largest = max(largest, int(fields["Rss"].split()[0]) * 1024 / 1e6)
    return pss, largest


def watch(command: list[str], seconds: float) -> dict:
    """Run a command of the package, and record its memory every ``seconds`` seconds."""
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "crate_kernels", *command], env=environment)
    samples, ended = [], threading.Event()

    def look() -> None:
        while not ended.wait(seconds):
            try:
                samples.append((round(time.monotonic() - began, 1), *(round(mb, 1) for mb in memory(process.pid))))
            except OSError:
                return

    thread = threading.Thread(target=look)
    thread.start()
    code = process.wait()
    ended.set()
    thread.join()
    if code:
        raise SystemExit(f"crate-kernels {command[0]} ended with code {code}")
    return {
        "command": command[0],
        "seconds": round(time.monotonic() - began, 1),
        "peak_pss_mb": max(s[1] for s in samples),
        "peak_process_rss_mb": max(s[2] for s in samples),
        "samples": samples,
    }


def plot(record: dict, path: Path) -> None:
    """Draw the memory of both commands over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.2), sharey=True)
    for axis, stage in zip(axes, record["stages"], strict=True):
        seconds, pss, rss = zip(*stage["samples"], strict=True)
        axis.plot(seconds, pss, label="all processes (PSS)")
        axis.plot(seconds, rss, label="largest process (RSS)", linestyle="--")
        axis.axhline(1500, color="gray", linewidth=0.8)
        axis.set(title=f"crate-kernels {stage['command']}", xlabel="seconds", ylim=(0, 1700))
    axes[0].set_ylabel("MB")
    axes[0].legend(loc="lower right")
    figure.suptitle(f"{record['corpus_gb']:.1f} GB of text, {record['shards_gb']:.1f} GB of token shards")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/text_memory"))
    parser.add_argument("--workers", default="2")
    parser.add_argument("--steps", default="300")
    parser.add_argument("--seconds", type=float, default=1.0, help="time between two records of the memory")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "text_memory.png")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "text_memory.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        corpus, shards = args.folder / "corpus.jsonl", args.folder / "shards"
        write_corpus(corpus, int(args.gigabytes * 1e9))
        prepare = ["prepare-text", str(corpus), "--output", str(shards), "--workers", args.workers]
        # Many windows per step, so that the run reads from all parts of the shards.
        train = ["train-text", "--text", str(shards), "--context", "128", "--batch-size", "64", "--dim", "32"]
        train += ["--depth", "1", "--heads", "2", "--steps", args.steps, "--evaluate-steps", "1000000"]
        train += ["--sample-tokens", "20", "--device", "cpu", "--output", str(args.folder / "run")]
        record = {"corpus_gb": corpus.stat().st_size / 1e9, "stages": [watch(prepare, args.seconds)]}
        record["shards_gb"] = sum(path.stat().st_size for path in shards.glob("*.bin")) / 1e9
        record["stages"].append(watch(train, args.seconds))
    finally:
        shutil.rmtree(args.folder)
    plot(record, args.picture)
    args.results.write_text(json.dumps(record) + "\n")
    for stage in record["stages"]:
        print(
            f"{stage['command']}: {stage['seconds']:.0f} s, peak {stage['peak_pss_mb']:.0f} MB in all processes (PSS), "
            f"{stage['peak_process_rss_mb']:.0f} MB in the largest (RSS)"
        )


if __name__ == "__main__":
    main()
