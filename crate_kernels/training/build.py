"""The model of a run."""

from __future__ import annotations

from typing import Any

from ..data.images import ImageData
from ..models import CRATE, CrateAlpha, CrateModel, create_model
from ..models.registry import CLASSES
from ..models.vision import PatchSizeError
from . import initial
from .config import Config

ARCHITECTURES = {"crate": CRATE, "alpha": CrateAlpha}


def build_model(config: Config, data: ImageData) -> CrateModel:
    """The model that ``config`` describes, with a head for the classes of ``data``.

    Raises:
        ValueError: sizes do not fit each other.
    """
    try:
        return _build(config, data)
    except PatchSizeError as error:
        patch = error.patch if config.patch_size is None else config.patch_size
        raise ValueError(f"--patch-size {patch} does not divide the images' {error.image} pixels") from error


def _build(config: Config, data: ImageData) -> CrateModel:
    if config.start is not None:
        initial.check_channels(str(config.init), config.start, data.channels)
        given = dict(num_classes=len(data.classes), pool=config.pool, dropout=config.dropout)
        return CLASSES[config.start["model"]](**config.start["config"] | given)
    options: dict[str, Any] = dict(
        num_classes=len(data.classes), channels=data.channels, pool=config.pool, dropout=config.dropout
    )
    optional = dict(patch_size=config.patch_size, image_size=config.image_size, ista=config.step_size)
    options |= {name: value for name, value in optional.items() if value is not None}
    if config.model is not None:
        return create_model(config.model, **options)
    options.setdefault("image_size", data.image_size or 224)
    assert config.dim is not None  # Config.check has filled these in
    assert config.heads is not None
    sizes: dict[str, Any] = dict(
        dim=config.dim, depth=config.depth, heads=config.heads, dim_head=config.dim // config.heads
    )
    return ARCHITECTURES[config.architecture](**options, **sizes)
