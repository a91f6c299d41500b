"""The files in a run's folder, and the model in them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import safetensors

from ..models import CheckpointError, CrateDINO, CrateModel, create_model, load_model
from ..models.checkpoint import METADATA_KEY, read, write_atomically
from ..models.registry import CLASSES
from . import checkpoints

SUMMARY = "summary.json"
"""The last file that a run writes. A folder without it contains an unfinished run."""

MODELS = ("backbone.safetensors", "model.safetensors")
"""Files of a finished model. A self-distilled model leaves its backbone."""

BEST = "best.safetensors"
"""The best weights so far, which ``crate-kernels train`` writes while it trains."""

OPTIONS = "options.json"
"""Every option of the run, written when it starts."""

FILES = (
    SUMMARY, OPTIONS, *MODELS, BEST, "metrics.jsonl", "layerwise.jsonl", "layerwise.png", "layerwise_training.png",
    "sample.txt", "reconstruction.png", "analysis.json", "half_steps.png", "report.html",
)  # fmt: skip
"""All files that the commands write into a run's folder, besides checkpoints and TensorBoard's."""


@dataclasses.dataclass(frozen=True)
class Description:
    """The architecture of a model and what its file says about the data.

    ``model``: name of the class. ``config``: its constructor's arguments. ``metadata``: data set, mean, tokenizer ...
    """

    model: str
    config: dict[str, Any]
    metadata: dict[str, Any]

    def build(self) -> CrateModel:
        return CLASSES[self.model](**self.config)


def occupied(folder: Path) -> str | None:
    """Describes the results that a new run in this folder would overwrite; None if there are none of value.

    The logs of a run that ended before its first checkpoint have no value.
    """
    if checkpoints.find(folder) is not None and not (folder / SUMMARY).exists():
        return "an unfinished run"
    if (folder / SUMMARY).exists():
        return "a finished run"
    found = next((name for name in (*MODELS, BEST) if (folder / name).exists()), None)
    return None if found is None else f"another run's {found}"


def write_options(folder: Path, options: dict[str, Any]) -> None:
    """Record every option of the run that starts in this folder."""
    write_atomically(folder / OPTIONS, (json.dumps(options, indent=2) + "\n").encode())


def has_options(folder: Path, options: dict[str, Any]) -> bool:
    """Whether the run in this folder started with these options."""
    return read_json(folder / OPTIONS) == json.loads(json.dumps(options))


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, empty if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def clear(folder: Path) -> None:
    """Remove the files of an earlier run in this folder, and no others."""
    checkpoints.discard(folder)
    # The summary is removed last. Without it the earlier run would look like an unfinished one.
    for name in (*FILES[1:], SUMMARY):
        (folder / name).unlink(missing_ok=True)


def open_model(path: str | os.PathLike, name: str | None = None) -> tuple[CrateModel, dict[str, Any]]:
    """The model in a file or in a run's folder, in evaluation mode, and the file's metadata about the data.

    A finished run gives its final model. A run that is interrupted or in progress gives the model of its newest
    checkpoint.

    Args:
        path: a safetensors file of :meth:`CrateModel.save`, the folder of a run of any training command, or, with
            ``name``, a public checkpoint.
        name: registered name of the model, for files that do not name it.

    Raises:
        CheckpointError, FileNotFoundError: there is no model. The message says what the function looked for.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / file for file in MODELS if (path / file).is_file()), None)
        newest = checkpoints.find(path)
        if found is None and newest is not None and name is None:
            return _from_checkpoint(newest)
        found = path / BEST if found is None and (path / BEST).is_file() else found
        if found is None:
            raise CheckpointError(
                f"{path} is not the folder of a training run: it has neither a checkpoint nor one of "
                f"{', '.join((*MODELS, BEST))}"
            )
        path = found
    if name is None:
        model = load_model(path)
        return _useful(model), read(path)[1]
    state, metadata = read(path)
    if metadata.get("config"):
        raise CheckpointError(f"{path} already names its model ({metadata['model']}): leave --model out")
    model = create_model(name)
    model.load_state_dict(state)
    return model.eval(), metadata


def describe(path: str | os.PathLike) -> Description | None:
    """The description of the model that :func:`open_model` would open, without weights. None if the file has none.

    Raises:
        CheckpointError, FileNotFoundError: as :func:`open_model`.
    """
    path = Path(path)
    if path.is_dir():
        model, metadata = open_model(path)
        return Description(type(model).__name__, model.config, metadata)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("model") not in CLASSES:
        return None
    return Description(metadata["model"], metadata["config"], metadata)


def _from_checkpoint(path: Path) -> tuple[CrateModel, dict[str, Any]]:
    state = checkpoints.load(path)
    if "description" not in state:
        raise CheckpointError(
            f"{path} was written by crate_kernels {state.get('version')}, which did not record its model"
        )
    description = Description(**state["description"])
    name = "ema" if state.get("ema") else "model"  # training tests and saves the moving average
    part = {name: state[name]} | ({"folder": state["folder"]} if "folder" in state else {})
    model = description.build()
    model.load_state_dict(checkpoints.restore(part, lambda keys: None)[name])
    return _useful(model), description.metadata


def _useful(model: CrateModel) -> CrateModel:
    """The part of a model that other commands use, in evaluation mode."""
    return (model.backbone if isinstance(model, CrateDINO) else model).eval()
