"""Result files: their environment record, reading and writing, and the comparison of two files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from ..version import __version__

FORMAT = 1
PARTS = ("operators", "models", "overhead")
"""There is one file for each: ``<results>/<device>/operators.json``, ``models.json`` and ``overhead.json``."""


def environment(device: torch.device, commit: str | None = None) -> dict:
    """Device, driver, versions and commit, as every result file records them."""
    versions: dict[str, str | None] = {
        "crate_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "timm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found = {"versions": versions, "commit": commit or _commit(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return found | {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_cache": properties.L2_cache_size,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found | {
        "device": _processor(),
        "capability": "cpu",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def device_folder(device: torch.device) -> str:
    """``cpu``, or the name of the CUDA device in lower case with hyphens."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def _output(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parents[1])
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    return commit + (" with changes" if _output("git", "status", "--porcelain", "--untracked-files=no", ".") else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(path: Path, content: dict) -> None:
    """Replace the file atomically, so that an interrupted run leaves the earlier results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"format": FORMAT, **content}, indent=1, default=str) + "\n")
    part.replace(path)


def read(path: Path) -> dict:
    """Read a result file. An error says what is wrong with the file."""
    try:
        content = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a result file ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "records" not in content:
        raise ValueError(f"{path} is not a result file of format {FORMAT}")
    return content


def read_all(folder: Path) -> dict[str, dict[str, dict]]:
    """Device folder -> part -> content, for every result file under ``folder``, sorted."""
    found: dict[str, dict[str, dict]] = {}
    for part in PARTS:
        for path in sorted(Path(folder).glob(f"*/{part}.json")):
            found.setdefault(path.parent.name, {})[part] = read(path)
    return dict(sorted(found.items()))


# -- regressions -------------------------------------------------------------------------------------------------------


def key(record: dict) -> tuple:
    """The identity of a measurement. It is the same in every file."""
    shape = json.dumps(record.get("shape", {}), sort_keys=True)
    subject = record.get("operator") or record.get("model"), record.get("family"), record.get("batch")
    return (
        *subject,
        shape,
        record.get("dtype"),
        record.get("direction") or record.get("task"),
        record.get("implementation"),
    )


def slower(old: Iterable[dict], new: Iterable[dict], *, least: float = 0.03, relative: bool = False) -> list[dict]:
    """Records that became slower by more than the noise, the worst first.

    A record is listed if its median rose by more than ``least`` and the ranges p20..p80 of the two runs do not overlap.

    Args:
        relative: compare speed-ups over the reference of the same run instead of seconds. Use it on machines whose
            speed differs between the runs.
    """
    before, found = {key(r): r for r in old}, []
    for record in new:
        previous = before.get(key(record))
        field = "speedup" if relative else "seconds"
        if previous is None or not previous.get(field) or not record.get(field):
            continue
        was, now = previous[field], record[field]
        if relative:
            was, now = ({p: 1 / v[q] for p, q in (("p20", "p80"), ("p50", "p50"), ("p80", "p20"))} for v in (was, now))
        if now["p50"] > was["p50"] * (1 + least) and now["p20"] > was["p80"]:
            found.append({"record": record, "ratio": now["p50"] / was["p50"]})
    return sorted(found, key=lambda entry: -entry["ratio"])
