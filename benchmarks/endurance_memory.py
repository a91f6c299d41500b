"""Memory of a long training run: a run that repeats epochs with checkpoints until a deadline, and a CSV file of the
memory.

::

    python benchmarks/endurance_memory.py --minutes 120
    python benchmarks/endurance_memory.py --plot            # only the picture and the numbers, from the file

Every 20 seconds a line of the CSV file records four numbers: the memory of all processes of the run (PSS, which counts
shared pages once), the resident memory of the largest process (RSS), the number of processes, and the last step in the
log. At the deadline the run receives SIGTERM, saves a checkpoint and ends. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from text_memory import ROOT, family, memory

COMMAND = ("train", "--device", "cpu", "--epochs", "100000", "--workers", "1", "--checkpoint-seconds", "10")


def last_step(folder: Path) -> int:
    """The last step in the metrics log of a run, 0 before the first."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 4096))
            return max((json.loads(line)["step"] for line in file.read().splitlines()[1:-1]), default=0)
    except (OSError, ValueError):
        return 0


def evaluate(results: Path, picture: Path) -> None:
    """Draw the memory over time, and print its means over the second and the last quarter of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(results) as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    hours = [row["seconds"] / 3600 for row in rows]
    figure, axis = pyplot.subplots(figsize=(7, 3))
    axis.plot(hours, [row["pss_mb"] for row in rows], label="all processes (PSS)")
    axis.plot(hours, [row["largest_rss_mb"] for row in rows], label="largest process (RSS)", linestyle="--")
    axis.set(xlabel="hours", ylabel="MB", ylim=(0, None), title="crate-kernels train, epochs without end")
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    for name in ("pss_mb", "largest_rss_mb"):
        quarter = len(rows) // 4
        early, late = (
            sum(row[name] for row in part) / len(part) for part in (rows[quarter : 2 * quarter], rows[-quarter:])
        )
        print(f"{name}: mean {early:.0f} in the second quarter, {late:.0f} in the last")
    print(f"{rows[-1]['seconds'] / 60:.0f} minutes, {rows[-1]['step']:.0f} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="between two records")
    parser.add_argument("--folder", type=Path, help="folder of the run; default: a temporary folder")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "endurance_memory.csv")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "endurance_memory.png")
    parser.add_argument("--plot", action="store_true", help="run nothing")
    args = parser.parse_args()
    if args.plot:
        evaluate(args.results, args.picture)
        return
    folder = args.folder or Path(tempfile.mkdtemp()) / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "crate_kernels", *COMMAND, "--output", str(folder)],
        env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with open(args.results, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["seconds", "pss_mb", "largest_rss_mb", "processes", "step"])
        while process.poll() is None and time.monotonic() - began < 60 * args.minutes:
            time.sleep(args.seconds)
            try:
                pss, rss = memory(process.pid)
            except OSError:  # the run has ended
                break
            seconds, processes = time.monotonic() - began, len(family(process.pid))
            table.writerow([round(seconds, 1), round(pss, 1), round(rss, 1), processes, last_step(folder)])
            file.flush()
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    print(f"the run ended with code {code} (143 is expected), step {last_step(folder)}")
    evaluate(args.results, args.picture)


if __name__ == "__main__":
    main()
