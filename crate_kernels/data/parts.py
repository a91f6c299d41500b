"""Work that is cut into parts, done by several processes, and resumed after a kill.

A finished part leaves a record in the output folder. If :func:`work_on` is called again with the same plan, it does
only the parts that have no record.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..models.checkpoint import write_atomically

RECORDS = "parts"
"""Name of the folder of the records, inside the output folder."""

Work = Callable[[Path, int, Any], dict[str, Any]]
"""(output folder, number of the part, part) -> record in a form that JSON can store. It must be picklable."""


def plan_digest(plan: Any) -> str:
    """A digest of everything that decides the result, in a form that JSON can store."""
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def work_on(
    folder: Path, digest: str, parts: Sequence[Any], work: Work, workers: int = 0, show: Callable[[str], Any] = print
) -> Iterator[dict[str, Any]]:
    """Do ``work`` on every part that has no record yet -> the records of all parts, in order, read one by one.

    Args:
        folder: the output folder; it is created if it is missing.
        digest: digest of the plan. Records of another plan are refused.
        workers: number of processes; 0 works in this process.
        show: function that prints a line of progress.

    Raises:
        ValueError: the folder holds records of another plan.
    """
    records = folder / RECORDS
    records.mkdir(parents=True, exist_ok=True)
    mark = records / "plan"
    if mark.is_file() and mark.read_text() != digest:
        raise ValueError(
            f"{folder} holds unfinished shards of other files or settings: remove the folder or choose another --output"
        )
    mark.write_text(digest)
    for leftover in (*folder.glob(".*.tmp"), *records.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)
    missing = [number for number in range(len(parts)) if not _record(folder, number).is_file()]
    if len(missing) < len(parts):
        show(f"{len(parts) - len(missing)} of {len(parts)} parts are finished already")
    began = shown = time.monotonic()
    tasks = [functools.partial(_do, work, folder, number, parts[number]) for number in missing]
    for done, _ in enumerate(_in_processes(tasks, workers) if workers else (task() for task in tasks), start=1):
        if time.monotonic() - shown >= 10:
            shown = time.monotonic()
            left = (shown - began) / done * (len(missing) - done)
            show(f"{len(parts) - len(missing) + done} of {len(parts)} parts, {left:.0f} s left")
    return (json.loads(_record(folder, number).read_text()) for number in range(len(parts)))


def forget(folder: Path) -> None:
    """Remove the records, because the result is complete."""
    shutil.rmtree(folder / RECORDS, ignore_errors=True)


def temporary(path: Path) -> Path:
    """A temporary name beside ``path``. Each process has its own, so a process that survived a kill writes to another
    file."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _record(folder: Path, number: int) -> Path:
    return folder / RECORDS / f"{number:05}.json"


def _do(work: Work, folder: Path, number: int, part: Any) -> None:
    write_atomically(_record(folder, number), json.dumps(work(folder, number, part)).encode())


def _in_processes(tasks: Sequence[Callable[[], None]], workers: int) -> Iterator[None]:
    # The processes are forked from a server that has imported this module. They share its memory and fork none of our
    # threads.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this process when its parent process ends, which may be killed.

    The server that forked this process does not help: it lives as long as any process that it forked.
    """

    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a process that multiprocessing started

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
