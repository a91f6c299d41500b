"""The options of a training run: those of every command, those of ``train``, and the defaults of each data set."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .. import options
from ..data.batches import Batching
from ..data.images import READERS, ImageSource
from ..models import CRATE, CrateAlpha
from ..models.registry import registered
from ..ops.backends import BACKENDS
from ..options import option
from . import initial, optimizer, recipes

DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    # 5,000 digits. A mirrored digit is another character, so images are not flipped.
    "mnist5k": dict(
        dim=96, depth=4, heads=4, patch_size=7, pool="mean", epochs=30, learning_rate=3e-3, flip=0.0, crop=0.8
    ),
    # 60,000 garments in under five minutes on two cores: 17 tokens an image.
    "fashion-mnist": dict(
        dim=128, depth=4, heads=4, patch_size=7, pool="mean", epochs=12, learning_rate=3e-3, flip=0.5, crop=0.85
    ),
    "cifar10": dict(dim=192, depth=8, heads=6, patch_size=4, epochs=100, flip=0.5, crop=0.6),
    # 3,840 crops of 15 photographs, which differ in texture.
    "photos": dict(
        dim=128, depth=4, heads=4, patch_size=8, image_size=64, pool="mean", epochs=10, flip=0.5, crop=0.5
    ),
}  # fmt: skip
"""Data set -> what differs from the defaults of :class:`Config`. Folders of images take ``FOLDER``."""

ALPHA: dict[str, Any] = dict(step_size=0.5, learning_rate=4e-3, batch_size=64, warmup_epochs=3.0)
"""Defaults of CRATE-alpha for the data sets of ``DATA_DEFAULTS``. It learns more slowly: more and larger steps."""

FOLDER: dict[str, Any] = dict(model="crate_tiny_patch16_224", epochs=100, learning_rate=3e-4, flip=0.5, crop=0.3)

ARCHITECTURE = ("dim", "depth", "heads")

PRECISIONS = ("auto", "fp32", "bf16")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly")
"""timm's learning-rate schedules that need no metric of the run."""


PHOTOS = "photos (crops of 15 photographs inside scikit-image and scikit-learn)"
DATA = f"{', '.join(PHOTOS if name == 'photos' else name for name in READERS)}, a folder of class folders, or shards"
"""The help of ``--data``."""

BATCH_SIZE = "images in one batch, over all ranks; --accumulate batches make one optimizer step"
"""The help of ``--batch-size``."""

MAX_BROKEN = "stop if more than N images cannot be read; default: name the first ones, count all, and continue"
"""The help of ``--max-broken``."""


@dataclass
class EngineOptions:
    """Options of every training command. Only the precision and the backend change the result."""

    precision: str = option(
        "auto", "auto takes bf16 on a GPU that computes in it, else fp32", "machine", choices=PRECISIONS
    )
    backend: str | None = option(
        None, "backend of the operators, instead of the automatic choice", "machine", choices=BACKENDS
    )
    device: str = option("auto", "cpu, cuda, or cuda:1 and so on; auto takes a GPU if there is one", "machine")

    parallel: str = option(
        "auto", "under torchrun: ddp copies the model to every rank, fsdp splits it; auto takes ddp",
        "ranks and memory", choices=("auto", "ddp", "fsdp"),
    )  # fmt: skip
    activation_checkpointing: bool = option(
        False, "save only the input of every layer for the backward pass, and compute the rest again",
        "ranks and memory",
    )  # fmt: skip
    layerwise_steps: int = option(
        100, "steps between two measurements of coding rate and sparsity, layer by layer; 0 for none", "measurement",
        least=0,
    )  # fmt: skip
    tensorboard: bool = option(
        False, "write those measurements as TensorBoard scalars, too", "measurement",
        only=("with --layerwise-steps above 0", lambda s: s.layerwise_steps > 0),
    )  # fmt: skip
    output: str | None = option(None, "folder of everything the run writes", "output")
    checkpoint_seconds: float = option(30.0, "seconds between two checkpoints", "output", least=0)
    log_steps: int = option(50, "optimizer steps between two records of the metrics log", "output", least=1)

    free: ClassVar[tuple[str, ...]] = (
        "device", "parallel", "activation_checkpointing", "layerwise_steps", "tensorboard", "output",
        "checkpoint_seconds", "log_steps",
    )  # fmt: skip
    """Options that do not change the resulting weights."""

    def fixed(self) -> dict[str, Any]:
        """The values that decide the result: a resumed run must agree on them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in self.free}

    def default_output(self) -> str:
        """The folder of a run without ``--output``."""
        raise NotImplementedError

    def name_output(self) -> None:
        """Replace option names in braces in ``output`` by their values. Without ``output`` use the default folder."""
        if self.output is None:
            self.output = self.default_output()
            return
        values = dataclasses.asdict(self)
        if "data" in values:
            values["data"] = data_name(values["data"])
        try:
            self.output = self.output.format(**values)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"--output {self.output}: what stands in braces must be an option ({error})") from error

    def check(self, given: Iterable[str] = ()) -> None:
        """Raise ValueError, naming the option, for an unusable value; ``given`` are the options that the user gave."""
        options.check(self, given)
        options.check_device(self.device)


def data_name(data: str) -> str:
    """The name of a data set or of its folder, for the name of an output folder."""
    return Path(data).resolve().name if data not in READERS else data


@dataclass
class ImageOptions(EngineOptions):
    """Options of every command that trains on images."""

    data: str = option("mnist5k", DATA, "data")
    root: str | None = option(
        None, "folder with the files of fashion-mnist or cifar10, in torchvision's layout", "data",
        only=("with --data fashion-mnist or cifar10", lambda s: s.data in ("fashion-mnist", "cifar10")),
    )  # fmt: skip
    image_size: int | None = option(
        None, "pixels along an image; images of another size are resized", "data", least=1, most=8192
    )
    workers: int | None = option(None, "processes that prepare batches; 0 for none", "machine", least=0, most=1024)
    max_broken: int | None = option(None, MAX_BROKEN, "machine", least=0)

    free: ClassVar[tuple[str, ...]] = (*EngineOptions.free, "workers", "root", "max_broken")


@dataclass
class Config(ImageOptions):
    """The options of ``train``. Two runs with equal ``fixed()`` values on one machine end with equal weights."""

    num_classes: int | None = option(
        None, "size of the head; must be the number of classes in the data", "data", least=1
    )
    crop: float = option(
        1.0, "smallest share of an image's area that a random crop keeps; 1 crops nothing", "data", least=0.01, most=1
    )
    flip: float = option(0.0, "probability of mirroring an image", "data", least=0, most=1)
    auto_augment: str | None = option(None, "timm's policy, such as rand-m9-mstd0.5", "data")
    mixup: float = option(0.0, "mixup's alpha", "data", least=0)
    cutmix: float = option(0.0, "cutmix's alpha", "data", least=0)

    model: str | None = option(
        None, "a named model, instead of --dim, --depth and --heads", "model", choices=registered(CRATE, CrateAlpha),
    )  # fmt: skip
    architecture: str = option(
        "crate", "family of a model that is given by its sizes", "model", choices=("crate", "alpha"),
        only=("without --model and --init", lambda s: s.model is None and s.start is None),
    )  # fmt: skip
    dim: int | None = option(None, "width of the tokens", "model", least=1, most=1 << 16)
    depth: int | None = option(None, "number of layers", "model", least=1, most=1000)
    heads: int | None = option(None, "number of attention heads", "model", least=1)
    patch_size: int | None = option(None, "pixels along a patch", "model", least=1)
    pool: str = option("cls", "what the head reads", "model", choices=("cls", "mean"))
    step_size: float | None = option(None, "step size of the ISTA steps", "model", above=0)
    dropout: float = option(0.0, "dropout in the layers", "model", least=0, most=0.99)
    init: str | None = option(
        None, "weights to start from: the folder of a run of train, train-mae or train-dino, or a checkpoint", "model"
    )
    new_head: bool = option(
        False, "do not load the classification head of --init: the data has other classes", "model",
        only=("with --init", lambda s: s.init is not None),
    )  # fmt: skip

    epochs: int = option(30, "passes over the training images", "optimization", least=1, most=1_000_000)
    batch_size: int = option(128, BATCH_SIZE, "optimization", least=1)
    accumulate: int = option(1, "batches whose gradients make one optimizer step", "optimization", least=1)
    optimizer: str = option("adamw", "any of timm's, such as adamw or lion", "optimization")
    learning_rate: float = option(1e-3, "after the warm-up", "optimization", above=0)
    beta2: float | None = option(
        None, "of adamw and the like: how slowly the second moment forgets, instead of timm's default",
        "optimization", least=0, below=1,
    )  # fmt: skip
    weight_decay: float = option(0.05, "of matrices, not of biases and norms", "optimization", least=0)
    schedule: str = option("cosine", "timm's learning-rate schedule", "optimization", choices=SCHEDULES)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up", "optimization", least=0)
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 does not clip", "optimization", least=0)
    label_smoothing: float = option(0.1, "share of the target given to all classes", "optimization", least=0, most=0.99)
    ema: float = option(
        0.0, "decay of a moving average of the weights, used for evaluation; 0 keeps none", "optimization", least=0,
        most=0.99999,
    )  # fmt: skip
    seed: int = option(0, "of weights, data order and augmentation", "optimization", least=0, most=2**32 - 1)
    compile: bool = option(False, "train through torch.compile", "machine")

    start: dict | None = None
    """Class and configuration of the model that ``init`` names, so that a resumed run does not need its file."""

    def check(self, given: Iterable[str] = ()) -> None:
        super().check(given)
        if self.start is None and self.model is None and None in (self.dim, self.depth, self.heads, self.patch_size):
            raise ValueError("a model needs --dim, --depth, --heads and --patch-size, or --model")
        if self.dim and self.heads and self.dim % self.heads:
            raise ValueError(f"--heads {self.heads} does not divide --dim {self.dim}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"mixup and cutmix pair the images of a batch: --batch-size {self.batch_size} must be even"
            )
        if self.auto_augment is not None:
            optimizer.check_augmentation(self.auto_augment)
        optimizer.check_optimizer(self)

    def default_output(self) -> str:
        if self.model is not None and self.data in DATA_DEFAULTS:
            family = f"{self.model}-"
        else:
            family = "" if self.architecture == "crate" or self.start is not None else f"{self.architecture}-"
        origin = "" if self.init is None else f"-from-{Path(self.init).resolve().stem}"
        return f"runs/{family}{data_name(self.data)}{origin}"

    def source(self) -> ImageSource:
        """The images that the run reads."""
        return ImageSource(self.data, self.root, self.image_size, self.num_classes, self.seed)

    def batching(self) -> Batching:
        """How the images form batches."""
        return Batching(
            batch_size=self.batch_size, accumulate=self.accumulate, epochs=self.epochs, seed=self.seed,
            workers=self.workers, crop=self.crop, flip=self.flip, auto_augment=self.auto_augment,
            mixed=bool(self.mixup or self.cutmix), max_broken=self.max_broken,
        )  # fmt: skip


# -- the command line --------------------------------------------------------------------------------------------------


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe",
        metavar="NAME_OR_FILE",
        help="take the options of a recipe; options on the command line override the recipe",
    )
    group.add_argument("--smoke", action="store_true", help="the recipe with a small model on small real data")


def given(args: argparse.Namespace, kind: type = Config) -> dict[str, Any]:
    """The options of ``kind`` that the command line names, over those of the recipe that it names.

    Raises:
        ValueError: there is no such recipe, or it does not fit the command; or the data to train on is not named.
    """
    named = options.given(args, kind)
    if args.recipe is None:
        if args.smoke:
            raise ValueError("--smoke applies only with --recipe: it makes a recipe small")
        return named
    recipe = recipes.options(args.recipe, args.command, kind, args.smoke)
    data = "data" if "data" in {field.name for field in options.fields(kind)} else "text"
    if not args.smoke and args.resume is None and data not in recipe | named:
        raise ValueError(f"--recipe {args.recipe} trains on {recipes.read(args.recipe).data}: say where with --{data}")
    if not args.resume:
        recipe["output"] = f"runs/{Path(args.recipe).stem}{'-smoke' if args.smoke else ''}"
    return recipe | named


# -- settings of ``train`` ---------------------------------------------------------------------------------------------


SIZES = (*ARCHITECTURE, "patch_size", "image_size", "model")
"""Options that define the model."""


def complete(given: dict[str, Any]) -> Config:
    """The options ``given``, completed by the defaults of the data set, or by what the model of ``--init`` fixes."""
    start = None if given.get("init") is None else initial.describe(given["init"])
    if start is not None:
        recorded = start["metadata"].get("data")
        known = recorded in READERS or (isinstance(recorded, str) and Path(recorded).is_dir())
        given = initial.merge(({"data": recorded} if known else {}) | given, start)
    data = given.get("data", Config.data)
    defaults = dict(DATA_DEFAULTS.get(data, FOLDER))
    if data in DATA_DEFAULTS and given.get("architecture") == "alpha":
        defaults |= ALPHA
    if start is not None or given.get("model") is not None:
        defaults = {name: value for name, value in defaults.items() if name not in SIZES}
    elif any(given.get(name) is not None for name in ARCHITECTURE):
        defaults.pop("model", None)
    return Config(**defaults | given)


def resolve(given: dict[str, Any]) -> Config:
    """The settings of a new run of ``train`` with the options ``given``.

    Raises:
        ValueError: an option has a value that it does not take, or contradicts another.
    """
    if given.get("model") is not None and (sizes := [name for name in ARCHITECTURE if given.get(name) is not None]):
        raise ValueError(f"--model fixes the architecture; leave out {', '.join(map(options.flag, sizes))}")
    config = complete(given)
    config.check(given)
    config.name_output()
    return config


def data_variants(default: str) -> dict[str, dict[str, Any]]:
    """Options that name each data set but ``default``, by the label in the help."""
    return {name: {"data": name} for name in DATA_DEFAULTS if name != default} | {"folders": {"data": "images"}}


def variants() -> dict[str, Config]:
    """The settings whose defaults ``train --help`` shows, by label."""
    labels = {"": {}, "alpha": {"architecture": "alpha"}} | data_variants(Config.data)
    found = {label: complete(given) for label, given in labels.items()}
    for config in found.values():
        config.name_output()
    return found
