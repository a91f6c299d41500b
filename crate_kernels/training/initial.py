"""Weights from which a classifier starts: the model in a run's folder or in a file, turned into a classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models import CheckpointError, CrateMAE, CrateModel, checkpoint
from ..options import flag
from ..runs import folder

HEADS = ("hidden", "bottleneck", "prototypes")
"""The arguments of CrateDINO for its heads. All others are those of the backbone."""

SAME = {"dim": "dim", "depth": "depth", "heads": "heads", "patch_size": "patch_size", "image_size": "image_size",
        "step_size": "ista"}  # fmt: skip
"""Option of ``train`` -> argument of the model's constructor, where the weights fix it."""


def describe(path: str) -> dict[str, Any] | None:
    """Class, configuration and metadata of the classifier that starts from the model at ``path``.

    None for a file that does not name its model; the options must then name it.

    Raises:
        ValueError, CheckpointError, FileNotFoundError: there is no model, or none of images.
    """
    found = folder.describe(path)
    if found is None:
        return None
    config = dict(found.config)
    match found.model:
        case "CRATE" | "CrateAlpha" | "CrateMAEClassifier" as name:
            pass
        case "CrateDINO":
            name, config = "CRATE", {key: value for key, value in config.items() if key not in HEADS}
        case "CrateMAE":
            name = "CrateMAEClassifier"
            config = dict(
                image_size=config["img_size"], patch_size=config["patch_size"], channels=config["in_chans"],
                dim=config["embed_dim"], depth=config["depth"], heads=config["num_heads"], lambd=config["lambd"],
                pool="mean",
            )  # fmt: skip
        case other:
            raise ValueError(f"--init {path} holds a {other}, which takes no images")
    return {"model": name, "config": config, "metadata": found.metadata}


def merge(given: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """The options ``given``, completed by what the model to start from fixes.

    Raises:
        ValueError: an option contradicts the model.
    """
    config, fixed = start["config"], {}
    for name, argument in SAME.items():
        if argument not in config:
            continue
        value = config[argument]
        if isinstance(value, tuple | list):
            value = value[0] if len(set(value)) == 1 else None
        if given.get(name) is not None and value != given[name]:
            raise ValueError(f"{flag(name)} {given[name]} contradicts --init {given['init']}, whose model has {value}")
        fixed[name] = value
    return (
        {"pool": config.get("pool", "cls")}
        | given
        | fixed
        | {"start": {key: start[key] for key in ("model", "config")}}
    )


def load(model: CrateModel, path: str, new_head: bool) -> None:
    """Load the initial weights. With ``new_head``, or if the file has no head, the head starts at random.

    Raises:
        CheckpointError: they do not fit.
    """
    if folder.describe(path) is None:
        state = checkpoint.read(path)[0]
    else:
        source = folder.open_model(path)[0]
        state = encoder(source) if isinstance(source, CrateMAE) else source.state_dict()
        if not source.num_classes:
            state |= head(model)
    for name, own in head(model).items():
        for key in {name, (model.layout and model.layout.public(name)) or name} & state.keys():
            if new_head:
                state[key] = own
            elif state[key].shape[0] != own.shape[0]:
                raise CheckpointError(
                    f"--init {path} was trained for {state[key].shape[0]} classes, the data has {own.shape[0]}; "
                    "--new-head starts the head anew"
                )
    model.load_state_dict(state)


def head(model: CrateModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.startswith("head.")}


def encoder(model: CrateMAE) -> dict[str, Tensor]:
    """The weights of a masked autoencoder's encoder, under the names of its classifier."""
    parts = ("cls_token", "patch_embedding.", "blocks.", "norm.")
    state = {name: value for name, value in model.state_dict().items() if name.startswith(parts)}
    return state | {"position_embedding": model.position_table}


def check_channels(path: str, start: dict[str, Any], channels: int) -> None:
    """Raise ValueError if the initial model expects images with another number of channels than the data has."""
    expected = start["config"].get("channels", 3)
    if expected != channels:
        raise ValueError(f"--init {path} expects images with {expected} channels, the data has {channels}")
