"""Models by name, and models rebuilt from their files."""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable
from functools import partial

from . import alpha, bert, checkpoint, crate, dino, gpt, mae
from .base import CrateModel

FACTORIES: dict[str, Callable[..., CrateModel]] = {
    "crate_tiny_patch16_224": crate.CRATE_tiny,
    "crate_small_patch16_224": crate.CRATE_small,
    "crate_base_patch16_224": crate.CRATE_base,
    "crate_large_patch16_224": crate.CRATE_large,
    "crate_tiny_patch8_224": crate.CRATE_tiny_patch8,
    "crate_small_patch8_224": crate.CRATE_small_patch8,
    "crate_base_patch8_224": crate.CRATE_base_patch8,
    "crate_alpha_base_patch16_224": alpha.CRATE_alpha_base,
    "crate_alpha_large_patch14_224": alpha.CRATE_alpha_large,
    "crate_alpha_huge_patch14_224": alpha.CRATE_alpha_huge,
    "crate_alpha_large_patch14_clipa_224": alpha.CRATE_alpha_clipa_large,
    "crate_alpha_huge_patch14_clipa_224": alpha.CRATE_alpha_clipa_huge,
    "crate_mae_tiny_patch16_224": mae.mae_crate_tiny,
    "crate_mae_small_patch16_224": mae.mae_crate_small,
    "crate_mae_base_patch16_224": mae.mae_crate_base,
    "crate_mae_large_patch16_224": mae.mae_crate_large,
    **{f"crate_gpt2_{size}": partial(gpt.crate_gpt2, size) for size in gpt.SIZES},
    **{f"crate_lm_{size}": partial(gpt.crate_lm, size) for size in gpt.SIZES},
    "crate_bert_base": bert.CrateBert,
}
"""Name -> factory. A factory takes every constructor argument of its class. Those of vision models take ``num_classes``
first."""

CLASSES: dict[str, type[CrateModel]] = {
    cls.__name__: cls
    for cls in (
        crate.CRATE,
        alpha.CrateAlpha,
        mae.CrateMAE,
        mae.CrateMAEClassifier,
        dino.CrateDINO,
        gpt.CrateGPT,
        bert.CrateBert,
    )
}
"""Class name in files -> class."""


def registered(*kinds: type[CrateModel]) -> list[str]:
    """The registered names of the models of these classes. A factory that is a function names its class."""
    found = []
    for name, factory in FACTORIES.items():
        made = typing.get_type_hints(factory)["return"] if inspect.isfunction(factory) else None
        if made is not None and issubclass(made, kinds):
            found.append(name)
    return found


def create_model(name: str, **options) -> CrateModel:
    """Build a model by its registered name; ``options`` override the constructor arguments."""
    if name not in FACTORIES:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(FACTORIES)}")
    return FACTORIES[name](**options)


def load_model(path: str | os.PathLike) -> CrateModel:
    """Rebuild a model from a safetensors file that :meth:`CrateModel.save` wrote: architecture and weights."""
    state, metadata = checkpoint.read(path)
    name = metadata.get("model")
    if name not in CLASSES:
        raise checkpoint.CheckpointError(
            f"{path} does not say which model it holds (found {name!r}); build the model and call load_checkpoint"
        )
    model = CLASSES[name](**metadata["config"])
    model.load_state_dict(state)
    return model
