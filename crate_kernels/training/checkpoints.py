"""A run's state on disk: what the next step depends on, replaced in one piece, and a log that never runs ahead of it.

The random generators are not in it: each step seeds them anew from (seed, epoch, position), see ``data``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import CheckpointError, write_atomically
from .config import Config

FORMAT = 1
LAST = "last.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a training state. Killed at any moment, ``path`` is the whole new state or the whole one before."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict[str, Any]:
    """Read a training state without executing pickled code.

    Raises:
        CheckpointError: there is none, or it is damaged or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"nothing to resume: there is no {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or no training state ({path.stat().st_size} bytes)") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no training state of this program; weights alone are given with --init")
    return state


def resumed_config(state: dict[str, Any], options: dict[str, Any], kind: type = Config):
    """The configuration (a ``kind``) of the run in ``state``, under ``options`` that leave its result as it is.

    Raises:
        ValueError: an option contradicts the run.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    stored = kind(**{name: value for name, value in state["config"].items() if name in names})
    for name, value in options.items():
        if name in stored.fixed() and getattr(stored, name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} contradicts the run to resume, which has {getattr(stored, name)}"
            )
    return dataclasses.replace(stored, **options)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of a process that was killed while it wrote."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


class MetricsLog:
    """A file of JSON lines, each with its ``step``. Lines past ``step`` are dropped: that part is run again."""

    def __init__(self, path: Path, step: int):
        kept = [line for line in self.read(path) if line["step"] <= step] if step else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.path = path

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All complete lines; a process killed while it wrote leaves at most one that is not, the last."""
        lines = []
        for text in path.read_text().splitlines() if path.is_file() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def write(self, **values) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")
