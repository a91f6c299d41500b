"""Checkpoints of a run on disk: everything on which the next step depends, replaced atomically.

An unsharded checkpoint is the file ``last.pt``. A checkpoint that is sharded over ranks (FSDP) is a folder
``last-<step>``. Its ``state.pt`` holds everything but the sharded tensors. These are beside it, in the format of
torch.distributed.checkpoint. A run resumes from either on any number of ranks.

Checkpoints contain no random generators: each step seeds them from (seed, epoch, position), see ``data.batches``.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..distributed import launch, sharded_files
from ..distributed.sharding import place
from ..models.checkpoint import CheckpointError, write_atomically

FORMAT = 1
LAST = "last.pt"
PART = "state.pt"
"""The file in the folder of a sharded checkpoint that holds everything but the sharded tensors."""

_SHARDED = "sharded tensor"
"""The key in ``state.pt`` that refers to a tensor in another file."""

Keys = tuple[Any, ...]
"""The keys that lead to a value in nested dictionaries."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint. If the process is killed, ``path`` is either the complete new or the complete old one."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def save_run(folder: Path, state: dict[str, Any]) -> Path:
    """Write ``state`` as the last checkpoint of the run in ``folder``, then remove the previous one. Every rank calls
    it.

    If the process is killed at any moment, the newest checkpoint in the folder is complete.

    Raises:
        OSError: the checkpoint cannot be written; the previous one is still there.
    """
    tensors: dict[str, Tensor] = {}

    def keep_apart(path: Keys, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        name = "/".join(map(str, path))
        tensors[name] = value
        return {_SHARDED: name}

    rest = _walk(state, keep_apart)
    path = folder / (f"last-{state['step']:08}" if tensors else LAST)
    before = [other for other in _checkpoints(folder) if other != path] if launch.is_main() else []
    try:
        if tensors:
            _save_sharded(path, rest, tensors)
        else:
            with launch.together():
                if launch.is_main():
                    save(path, rest)
    except (OSError, RuntimeError) as error:
        cause, found = sharded_files.disk_error(error), find(folder)
        reason = " ".join(str(error).split()) if cause is None else cause.strerror
        previous = f"; the previous checkpoint, {found}, is complete" if found else ""
        raise OSError(
            f"the checkpoint of step {state['step']} could not be written to {folder}: {reason}{previous}"
        ) from error
    for other in before:
        _remove(other)
    return path


def _save_sharded(path: Path, rest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if (path / PART).is_file():
        return  # a step has one checkpoint
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with launch.together():
            if launch.is_main():
                _remove(temporary)
                temporary.mkdir(parents=True)
        with launch.together():
            sharded_files.write(temporary, tensors)
        with launch.together():
            if launch.is_main():
                save(temporary / PART, rest)
                for folder in (temporary, path.parent):
                    _flush(folder)
                _remove(path)  # the rest of an interrupted write, without its state.pt
                os.replace(temporary, path)
                _flush(path.parent)
    finally:
        if launch.is_main():
            _remove(temporary)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        # Rename first. If the process is killed in between, the remaining folder must not count as a checkpoint.
        hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.old.tmp")
        if hidden != path:
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in the folder of a run, the newest last."""
    folders = [path for path in folder.glob("last-*") if re.fullmatch(r"last-\d{8,}", path.name)]
    found = [(int(path.name.removeprefix("last-")), path) for path in folders if (path / PART).is_file()]
    path = folder / LAST
    if path.is_file():
        # Both kinds exist only if the process was killed after it wrote the new one and before it removed the old.
        found.append((load(path)["step"] if found else 0, path))
    return [path for _, path in sorted(found, key=lambda item: item[0])]


def find(folder: Path) -> Path | None:
    """The newest checkpoint in the folder of a run."""
    return next(reversed(_checkpoints(folder)), None)


def locate(path: Path) -> Path:
    """The checkpoint for ``--resume path``: ``path`` itself, or the newest one in the folder ``path``."""
    if path.is_file() or (path / PART).is_file() or path.suffix == Path(LAST).suffix:
        return path
    return find(path) or path / LAST


def discard(folder: Path) -> None:
    """Remove the checkpoints of an earlier run, which a new run replaces."""
    for path in _checkpoints(folder):
        _remove(path)


def _walk(tree: Any, change: Callable[[Keys, Any], Any], path: Keys = ()) -> Any:
    """Nested dictionaries ``tree`` with every value replaced by ``change(path of keys, value)``."""
    if isinstance(tree, dict) and _SHARDED not in tree:
        return {key: _walk(value, change, (*path, key)) for key, value in tree.items()}
    return change(path, tree)


def restore(state: dict[str, Any], like: Callable[[Keys], Tensor | None]) -> dict[str, Any]:
    """The result ``state`` of :func:`load`, with all its tensors in memory. Every rank calls it.

    Args:
        like: keys that lead to a tensor -> the model's tensor with the same sharding; None for an unsharded tensor.
    """
    paths: dict[str, Keys] = {}

    def note(path: Keys, value: Any) -> Any:
        if isinstance(value, dict):
            paths[value[_SHARDED]] = path
        return value

    def sharding(path: Keys) -> Tensor | None:
        template = like(path)
        return template if isinstance(template, DTensor) else None

    def fill(path: Keys, value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value[_SHARDED]]
        return place(value, sharding(path)) if isinstance(value, Tensor) else value

    _walk(state, note)
    tensors = sharded_files.read(Path(state["folder"]), paths, lambda n: sharding(paths[n])) if paths else {}
    return _walk(state, fill)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint without executing pickled code. The tensors of a sharded checkpoint are not read.

    Raises:
        CheckpointError: there is no checkpoint, or the file is damaged or not a checkpoint.
    """
    if path.is_dir():
        return {**load(path / PART), "folder": str(path)}
    if not path.is_file():
        raise CheckpointError(f"nothing to resume: there is no {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint of a run ({path.stat().st_size} bytes)"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a run; give a file of weights with --init")
    return state


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of a process that was killed while it wrote."""
    for path in folder.glob(".*.tmp"):
        _remove(path)
