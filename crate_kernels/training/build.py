"""The model of a run, and weights to start it from."""

from __future__ import annotations

from ..data.images import ImageData
from ..models import CRATE, CheckpointError, CrateAlpha, CrateModel, checkpoint, create_model
from .config import Config

ARCHITECTURES = {"crate": CRATE, "alpha": CrateAlpha}


def build_model(config: Config, data: ImageData) -> CrateModel:
    """The model that ``config`` describes, with a head for the classes of ``data``.

    Raises:
        ValueError: sizes do not fit each other.
    """
    options = dict(num_classes=len(data.classes), channels=data.channels, pool=config.pool, dropout=config.dropout)
    optional = dict(patch_size=config.patch_size, image_size=config.image_size, ista=config.step_size)
    options |= {name: value for name, value in optional.items() if value is not None}
    if config.model is not None:
        try:
            model = create_model(config.model, **options)
        except TypeError as error:  # language models and autoencoders are registered, too
            raise ValueError(f"{config.model} cannot be trained as an image classifier: {error}") from error
    else:
        options.setdefault("image_size", data.image_size or 224)
        sizes = dict(dim=config.dim, depth=config.depth, heads=config.heads, dim_head=config.dim // config.heads)
        model = ARCHITECTURES[config.architecture](**options, **sizes)
    return model


def load_initial(model: CrateModel, path: str, new_head: bool) -> None:
    """Load weights to start from; with ``new_head`` all but the head's.

    Raises:
        CheckpointError: they do not fit.
    """
    state, _ = checkpoint.read(path)
    for name in ("head.weight", "head.bias"):
        for key in {name, model.layout.public(name)} & state.keys():
            if new_head:
                state[key] = model.state_dict()[name]
            elif state[key].shape[0] != model.num_classes:
                raise CheckpointError(
                    f"{path} was trained for {state[key].shape[0]} classes, the data has {model.num_classes}; "
                    "--new-head starts the head anew"
                )
    model.load_state_dict(state)
