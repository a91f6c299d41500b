"""Every option of a training run, in one place, with the defaults that each data set takes."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.batches import Batching
from ..data.images import ImageSource
from ..models.registry import FACTORIES
from ..ops.backends import BACKENDS
from . import recipes

DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    # 5,000 digits: a small model, enough epochs, and no mirror images, which are other characters.
    "mnist5k": dict(
        dim=96, depth=4, heads=4, patch_size=7, pool="mean", epochs=30, learning_rate=3e-3, flip=0.0, crop=0.8
    ),
    # 60,000 garments in under six minutes on two cores: 17 tokens an image.
    "fashion-mnist": dict(
        dim=128, depth=4, heads=4, patch_size=7, pool="mean", epochs=12, learning_rate=3e-3, flip=0.5, crop=0.85
    ),
    "cifar10": dict(dim=192, depth=8, heads=6, patch_size=4, epochs=100, flip=0.5, crop=0.6),
}
"""Data set -> what differs from the defaults of :class:`Config`. Folders of images take ``FOLDER``."""

ALPHA: dict[str, Any] = dict(step_size=0.5, learning_rate=4e-3, batch_size=64, warmup_epochs=3.0)
"""CRATE-alpha's defaults for the data sets of ``DATA_DEFAULTS``: it learns more slowly, so more and larger steps."""

FOLDER: dict[str, Any] = dict(model="crate_tiny_patch16_224", epochs=100, learning_rate=3e-4, flip=0.5, crop=0.3)

ARCHITECTURE = ("dim", "depth", "heads")


def option(default, text: str, group: str, **keywords):
    return dataclasses.field(default=default, metadata={"help": text, "group": group, **keywords})


MAX_BROKEN = "end the run when so many images and one more cannot be read; without it they are only counted and named"
"""The help of ``--max-broken``."""


@dataclass
class EngineOptions:
    """Options of every training command that leave the result as it is."""

    parallel: str = option(
        "auto",
        "under torchrun: ddp copies the model to every rank, fsdp splits it; auto takes ddp",
        "ranks and memory",
        choices=("auto", "ddp", "fsdp"),
    )
    activation_checkpointing: bool = option(
        False, "keep only every layer's input for the backward pass, compute the rest again", "ranks and memory"
    )
    layerwise_steps: int = option(
        100, "steps between two measurements of coding rate and sparsity, layer by layer; 0 for none", "measurement"
    )
    tensorboard: bool = option(False, "write those measurements as TensorBoard scalars, too", "measurement")

    def check_engine(self) -> None:
        """Raise ValueError for a value out of its range."""
        if self.parallel not in ("auto", "ddp", "fsdp"):
            raise ValueError(f"--parallel is auto, ddp or fsdp, got {self.parallel}")
        if self.layerwise_steps < 0:
            raise ValueError(f"--layerwise-steps must not be negative, got {self.layerwise_steps}")


@dataclass
class Config(EngineOptions):
    """What a run does. Two runs with equal ``fixed()`` values on one machine end with equal weights."""

    data: str = option(
        "mnist5k", "mnist5k, fashion-mnist, cifar10, photos, a folder of class folders, or shards", "data"
    )
    root: str | None = option(None, "where the named data set's files are, in torchvision's layout", "data")
    num_classes: int | None = option(None, "size of the head; must be the number of classes in the data", "data")
    crop: float = option(1.0, "smallest share of an image's area that a random crop keeps; 1 crops nothing", "data")
    flip: float = option(0.0, "probability of mirroring an image", "data")
    auto_augment: str | None = option(None, "timm's policy, such as rand-m9-mstd0.5", "data")
    mixup: float = option(0.0, "mixup's alpha", "data")
    cutmix: float = option(0.0, "cutmix's alpha", "data")

    model: str | None = option(None, "a registered model, instead of dim, depth and heads", "model", choices=FACTORIES)
    architecture: str = option("crate", "family of a model given by its sizes", "model", choices=("crate", "alpha"))
    dim: int | None = option(None, "width of the tokens", "model")
    depth: int | None = option(None, "number of layers", "model")
    heads: int | None = option(None, "number of attention heads", "model")
    patch_size: int | None = option(None, "pixels along a patch", "model")
    image_size: int | None = option(None, "pixels along an image; images of another size are resized", "model")
    pool: str = option("cls", "what the head reads", "model", choices=("cls", "mean"))
    step_size: float | None = option(None, "step size of the ISTA steps", "model")
    dropout: float = option(0.0, "dropout in the layers", "model")
    init: str | None = option(None, "checkpoint whose weights to start from", "model")
    new_head: bool = option(False, "leave the head of --init out, for other classes", "model")

    epochs: int = option(30, "passes over the training images", "optimisation")
    batch_size: int = option(128, "images of all ranks together, per optimiser step and accumulation", "optimisation")
    accumulate: int = option(1, "batches whose gradients make one optimiser step", "optimisation")
    optimizer: str = option("adamw", "any of timm's, such as adamw or lion", "optimisation")
    learning_rate: float = option(1e-3, "after the warm-up", "optimisation")
    beta2: float | None = option(
        None, "of adamw and the like: how slowly the second moment forgets, instead of timm's default", "optimisation"
    )
    weight_decay: float = option(0.05, "of matrices, not of biases and norms", "optimisation")
    schedule: str = option("cosine", "timm's learning-rate schedule", "optimisation")
    warmup_epochs: float = option(1.0, "epochs of linear warm-up", "optimisation")
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 does not clip", "optimisation")
    label_smoothing: float = option(0.1, "share of the target given to all classes", "optimisation")
    ema: float = option(
        0.0, "decay of a moving average of the weights, used for evaluation; 0 keeps none", "optimisation"
    )
    seed: int = option(0, "of weights, data order and augmentation", "optimisation")

    precision: str = option(
        "auto", "auto takes bf16 where a short measurement finds it faster", "machine", choices=("auto", "fp32", "bf16")
    )
    backend: str | None = option(
        None, "backend of the operators, instead of the automatic choice", "machine", choices=BACKENDS
    )
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one", "machine")
    compile: bool = option(False, "train through torch.compile", "machine")
    workers: int | None = option(None, "processes that prepare batches", "machine")
    max_broken: int | None = option(None, MAX_BROKEN, "machine")

    output: str = option("runs/{data}", "folder of everything the run writes", "output")
    checkpoint_seconds: float = option(30.0, "write the state this often, besides after every epoch", "output")
    log_steps: int = option(50, "optimiser steps between two records of the metrics log", "output")

    def fixed(self) -> dict[str, Any]:
        """The values that decide the result: a resumed run must agree on them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}

    def source(self) -> ImageSource:
        """The images that the run reads."""
        return ImageSource(self.data, self.root, self.image_size, self.num_classes, self.seed)

    def batching(self) -> Batching:
        """How they are put together."""
        return Batching(
            batch_size=self.batch_size, accumulate=self.accumulate, epochs=self.epochs, seed=self.seed,
            workers=self.workers, crop=self.crop, flip=self.flip, auto_augment=self.auto_augment,
            mixed=bool(self.mixup or self.cutmix), max_broken=self.max_broken,
        )  # fmt: skip


FREE = (
    "device", "workers", "output", "checkpoint_seconds", "log_steps", "root", "parallel", "activation_checkpointing",
    "layerwise_steps", "tensorboard", "max_broken",
)  # fmt: skip
"""Options that do not change the resulting weights."""

_FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def add_arguments(parser: argparse.ArgumentParser, kind: type = Config) -> None:
    """An argument for each field of ``kind``. Arguments not given stay out of the parsed namespace."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        metadata = dict(field.metadata)
        title = metadata.pop("group")
        group = groups.setdefault(title, parser.add_argument_group(title))
        kind = str(field.type).removesuffix(" | None")
        if kind == "bool":
            metadata["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        else:
            metadata["type"] = {"int": int, "float": float, "str": str}[kind]
            metadata["metavar"] = None if "choices" in metadata else field.name.upper()
            if field.default is not None:
                metadata["help"] += f" (default {field.default})"
        group.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, default=argparse.SUPPRESS, **metadata)
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe", metavar="NAME_OR_FILE", help="take the options of a recipe; those given here go before them"
    )
    group.add_argument(
        "--smoke", action="store_true", help="the recipe with a small model on small real data, in about a minute"
    )


def given(args: argparse.Namespace, kind: type = Config) -> dict[str, Any]:
    """The fields of ``kind`` that the command line names, over those of the recipe that it names.

    Raises:
        ValueError: there is no such recipe, or it does not fit the command; or the data to train on is not named.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    options = {name: value for name, value in vars(args).items() if name in names}
    if args.recipe is None:
        if args.smoke:
            raise ValueError("--smoke makes a recipe small: give one with --recipe")
        return options
    recipe = recipes.options(args.recipe, args.command, kind, args.smoke)
    data = "data" if "data" in names else "text"
    if not args.smoke and args.resume is None and data not in recipe | options:
        raise ValueError(f"--recipe {args.recipe} trains on {recipes.read(args.recipe).data}: say where with --{data}")
    if not args.resume:
        recipe["output"] = f"runs/{Path(args.recipe).stem}{'-smoke' if args.smoke else ''}"
    return recipe | options


def resolve(options: dict[str, Any]) -> Config:
    """The configuration of a new run: the data set's defaults under the given ``options``.

    Raises:
        ValueError: a value is out of its range, or two exclude each other.
    """
    data = options.get("data", _FIELDS["data"].default)
    defaults = dict(DATA_DEFAULTS.get(data, FOLDER))
    if data in DATA_DEFAULTS and options.get("architecture") == "alpha":
        defaults |= ALPHA
    if options.get("model") is not None:
        if named := [name for name in ARCHITECTURE if options.get(name) is not None]:
            raise ValueError(f"--model fixes the architecture; leave out {', '.join('--' + name for name in named)}")
        defaults = {name: value for name, value in defaults.items() if name not in (*ARCHITECTURE, "patch_size")}
    elif any(options.get(name) is not None for name in ARCHITECTURE):
        defaults.pop("model", None)
    config = Config(**defaults | options)
    if config.model is None and None in (config.dim, config.depth, config.heads, config.patch_size):
        raise ValueError("a model needs --dim, --depth, --heads and --patch-size, or --model")
    for name in (
        "dim",
        "depth",
        "heads",
        "patch_size",
        "image_size",
        "epochs",
        "batch_size",
        "accumulate",
        "log_steps",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name, low, high in (("crop", 0.01, 1), ("flip", 0, 1), ("label_smoothing", 0, 0.99), ("ema", 0, 0.99999),
                            ("dropout", 0, 0.99)):  # fmt: skip
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} must lie in {low}..{high}, got {getattr(config, name)}")
    for name in ("learning_rate", "weight_decay", "warmup_epochs", "clip_grad", "mixup", "cutmix", "seed", "workers",
                 "max_broken"):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {value}")
    if config.beta2 is not None and not 0 <= config.beta2 < 1:
        raise ValueError(f"--beta2 must lie in 0..1, below 1, got {config.beta2}")
    if config.dim and config.dim % config.heads:
        raise ValueError(f"--heads {config.heads} does not divide --dim {config.dim}")
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise ValueError(f"mixup and cutmix pair the images of a batch: --batch-size {config.batch_size} must be even")
    config.check_engine()
    return config
