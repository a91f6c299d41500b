"""The vision models under timm's names and conventions.

Importing this module registers them. ``timm.create_model("crate_small_patch16_224", num_classes=10)`` then works, with
``features_only=True``, ``in_chans``, ``img_size``, ``global_pool`` and ``checkpoint_path`` in timm's meaning. timm
finds models by import only. A script that does not import this package, such as timm's own ``train.py``, must be
started through this module::

    python -m crate_kernels.models.timm_registry train.py DATA --model crate_tiny_patch16_224
"""

from __future__ import annotations

import contextlib
import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..extras import needs

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.layers import is_scriptable
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
except ImportError as error:
    raise ImportError(needs("a model in timm's registry", "timm")) from error

import torch
from torch import Tensor

from ..nn import CrateBlock, CrateDecoderBlock
from .crate import pool_name
from .registry import FACTORIES
from .vision import Patches, VisionModel

MODELS: dict[str, Callable[..., Any]] = {name: factory for name, factory in FACTORIES.items() if "_patch" in name}
"""Names of the registered models: those that take images."""

CLASSES = {"_mae_": 0, "_clipa_": 1024, "_patch8_": 21842}
"""Part of a name -> number of classes of the published weights; 1000 for all others."""

_IMAGE_SIZE = re.compile(r"_(\d+)$")


def _is_autoencoder(name: str) -> bool:
    return "_mae_" in name


def _default_cfg(name: str) -> dict:
    size = int(_IMAGE_SIZE.findall(name)[0])
    embedding = "patch_embedding.projection"
    return dict(
        input_size=(3, size, size),
        # These models take other sizes as they are. If this were True, timm's validate.py would build the model for its
        # --img-size, which train.py does not do, and the checkpoint would not fit.
        fixed_input_size=False,
        num_classes=next((count for part, count in CLASSES.items() if part in name), 1000),
        crop_pct=0.9,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        # Weights for other channels can be adapted if the embedding is a convolution. Other models begin with a
        # LayerNorm over the pixels of a patch, whose weights cannot be adapted.
        first_conv=embedding if "_alpha_" in name or _is_autoencoder(name) else (),
        classifier=None if _is_autoencoder(name) else "head",
        license="mit",
    )


default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in MODELS})


def _construct(name: str, **options) -> VisionModel:
    """The model of a name, from timm's constructor arguments and those of the model's class."""
    if is_scriptable():
        raise ValueError("scriptable: TorchScript cannot compile CRATE; torch.compile and torch.export can")
    device, dtype = options.pop("device", None), options.pop("dtype", None)
    dynamic = options.pop("dynamic_img_size", True)
    with contextlib.nullcontext() if device is None else torch.device(device):
        model = _build(name, options).to(dtype=dtype)
    model.dynamic_img_size = dynamic
    model._traits = {"fixed_input_size": not dynamic}  # newer versions of timm read it here
    return model


def _build(name: str, options: dict) -> VisionModel:
    for unsupported, meaning in (
        ("drop_rate", "dropout before the classifier; dropout= acts in the layers"),
        ("drop_path_rate", "stochastic depth"),
        ("drop_block_rate", "DropBlock"),
    ):
        if options.pop(unsupported, 0.0):
            raise ValueError(f"{unsupported}: CRATE has no {meaning}")
    if _is_autoencoder(name):
        if options.pop("num_classes", 0):
            raise ValueError(f"num_classes: {name} is a masked autoencoder and has no classifier")
        return MODELS[name](**options)
    if "global_pool" in options:
        options["pool"] = pool_name(options.pop("global_pool"), "global_pool")
    for theirs, ours in (("img_size", "image_size"), ("in_chans", "channels")):
        if theirs in options:
            options[ours] = options.pop(theirs)
    if isinstance(options.get("image_size"), list):
        options["image_size"] = tuple(options["image_size"])
    return MODELS[name](**options)


def _native_keys(state: dict[str, Tensor], model: VisionModel) -> dict[str, Tensor]:
    """Weights in either layout, under this package's names, because timm looks for the classifier by name."""
    wanted, layout = model.state_dict(), model.layout
    assert layout is not None
    return {key if key in wanted else layout.native(key) or key: value for key, value in state.items()}


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **options) -> VisionModel:
        return build_model_with_cfg(
            partial(_construct, name),
            name,
            pretrained,
            pretrained_filter_fn=_native_keys,
            feature_cfg=dict(out_indices=3, feature_cls="getter"),
            **options,
        )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"``{name}`` of the CRATE family."
    globals()[name] = register_model(entrypoint)


for _name in MODELS:
    _register(_name)

# Features by torch.fx end at whole layers. Inside a layer Python code depends on shapes, which cannot be traced.
for _module in (CrateBlock, *CrateBlock.__subclasses__(), CrateDecoderBlock, *Patches.__subclasses__()):
    register_notrace_module(_module)


def main(arguments: list[str]) -> None:
    """Register the models, then run the Python script ``arguments[0]`` with the remaining arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m crate_kernels.models.timm_registry SCRIPT [ARGUMENT ...]")
        return
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
