"""``crate-kernels export``: write a trained model as a file for another runtime, and compare the file with the
model."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .. import options
from ..agreement import relative
from ..extras import install
from ..models import CrateModel
from ..models.registry import FACTORIES
from ..models.vision import VisionModel
from ..options import option
from ..runs import folder
from ..terminal import in_bytes
from ..timing import medians
from .formats import COMPILER, FORMATS, Run, files, size
from .program import Deployable, example

ROUNDS = 20
"""Number of calls in the measurement of the speed."""

LARGEST_ERROR = {False: 1e-3, True: 5e-2}
"""Largest relative error of a file with float32 weights, and with float16 weights: far above rounding, far below that
of a wrong program."""


@dataclass
class Settings:
    """The options of ``export``."""

    format: str = option("onnx", "what to write", choices=FORMATS)
    model: str | None = option(
        None, "registered name of the model, for a public checkpoint that does not name it", choices=FACTORIES
    )
    half: bool = option(False, "weights in float16")
    image_size: int | None = option(
        None, "pixels of the images, square; default: the model's own size", least=1, most=8192
    )
    any_size: bool = option(
        False, "take images of any size that the patches divide, from two patches up in each direction",
        only=("with --format onnx, openvino or aoti", lambda s: s.format != "safetensors"),
    )  # fmt: skip
    batch_size: int = option(8, "inputs per call when the speed is measured", "measurement", least=1, most=4096)
    output: str | None = option(None, "the file to write; default: a name beside the checkpoint", "output")
    overwrite: bool = option(False, "replace the file if it exists", "output")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="the folder of a training run, or a model's safetensors file"
    )
    options.add_arguments(parser, Settings, needed="CHECKPOINT")


def run(args: argparse.Namespace) -> int:
    return export(Path(args.checkpoint), options.parse(args, Settings))


def export(checkpoint: Path, settings: Settings) -> int:
    """Write the model of ``checkpoint`` as a file. Check and measure the file."""
    kind = FORMATS[settings.format]
    if missing := kind.missing():
        remedy = "" if missing == [COMPILER] else f": {install(settings.format)}"  # the extras have the formats' names
        raise ValueError(f"--format {settings.format} needs {', '.join(missing)}{remedy}")
    model, metadata = folder.open_model(checkpoint, settings.model)
    if isinstance(model, VisionModel):
        if settings.image_size:
            _resize(model, settings.image_size)
    elif settings.image_size or settings.any_size:
        name = "--image-size" if settings.image_size else "--any-size"
        raise ValueError(f"{name} applies only to models of images, and {checkpoint} holds a {type(model).__name__}")
    path = _path(checkpoint, settings, kind.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about their own internals
        kind.write(model, path, half=settings.half, any_size=settings.any_size, metadata=metadata)
    print(f"{' and '.join(map(str, files(path)))}: {in_bytes(size(path))}", flush=True)
    print(f"takes {_inputs(model, metadata, settings)}", flush=True)
    compare(model, kind.open(path), settings)
    return 0


def _resize(model: VisionModel, pixels: int) -> None:
    height, width = model.patch_embedding.patch_size
    if pixels % height or pixels % width:
        raise ValueError(f"--image-size must be a multiple of the patch size {height} x {width}, got {pixels}")
    model.set_input_size(pixels)


def _path(checkpoint: Path, settings: Settings, suffix: str) -> Path:
    if settings.output is None:
        parent, name = (checkpoint, "model") if checkpoint.is_dir() else (checkpoint.parent, checkpoint.stem)
        path = parent / f"{name}{'-exported' if suffix == '.safetensors' else ''}{suffix}"
    else:
        path = Path(settings.output)
        if path.suffix != suffix:
            raise ValueError(f"--output must end in {suffix} with --format {settings.format}, got {path}")
    options.check_output_file(path)
    if path.exists() and path.samefile(checkpoint):
        raise ValueError(f"--output {path} is the checkpoint itself")
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if checkpoint.is_dir() or (run / folder.OPTIONS).is_file():
        for own in (run / name for name in folder.FILES):
            if path.exists() and own.exists() and path.samefile(own):
                raise ValueError(f"--output {path} is a file of the run: choose another")
    for file in files(path):
        if file.exists() and not (settings.overwrite and file.is_file()):
            raise ValueError(f"{file} already exists: give --overwrite, or another --output")
    return path


def _inputs(model: CrateModel, metadata: dict, settings: Settings) -> str:
    """The inputs of the file in words."""
    if not isinstance(model, VisionModel):
        return ", ".join(f"{name} int64" for name in Deployable(model).names) + (
            f" of the tokenizer {metadata['tokenizer']}" if "tokenizer" in metadata else ""
        )
    height, width = ("H", "W") if settings.any_size else model.image_size
    words = f"images (B, {model.in_chans}, {height}, {width}) float32"
    if "mean" in metadata and "std" in metadata:
        words += f", pixels of 0..1 less the mean {metadata['mean']}, divided by {metadata['std']}"
    return words


def compare(model: CrateModel, run: Run, settings: Settings) -> None:
    """Print the error of a file relative to ``model``, and the speed of both, for one input and for several.

    Raises:
        RuntimeError: the outputs of the file and of the model differ by more than rounding.
    """
    deployed = Deployable(model)
    generator = torch.Generator().manual_seed(0)
    for count in dict.fromkeys((1, settings.batch_size)):
        inputs = example(deployed, count, generator)
        calls = {"file": partial(run, *inputs), "model": partial(deployed, *inputs)}
        with torch.no_grad():
            got, wanted = (call() for call in calls.values())
            error = relative(got, wanted)
            if not error <= LARGEST_ERROR[settings.half]:
                raise RuntimeError(
                    f"the file does not compute what the model computes: relative error {error:.1e} on {count} inputs"
                )
            seconds = medians(calls, torch.device("cpu"), ROUNDS)
        same, total = int((got.argmax(-1) == wanted.argmax(-1)).sum()), wanted[..., 0].numel()
        print(
            f"batch {count}: relative error {error:.1e}, the same greatest output in {same} of {total};"
            f" {1e3 * seconds['file']:.2f} ms, this package {1e3 * seconds['model']:.2f} ms"
        )
