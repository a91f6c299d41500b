"""``crate-kernels analyze``: every layer's coding rate and sparsity on real test data, as pictures and JSON."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import options
from ..models import CrateMAE, CrateModel
from ..models.checkpoint import write_atomically
from ..models.registry import FACTORIES
from ..options import option
from ..runs.folder import open_model
from .half_steps import HalfSteps, half_steps
from .inputs import real_inputs
from .plots import plot_half_steps, plot_layerwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="the folder of a training run, or a model's safetensors file"
    )
    options.add_arguments(parser, Settings, needed="CHECKPOINT")


@dataclass
class DataOptions:
    """The options that name the model and the data."""

    model: str | None = option(
        None, "registered name of the model, for a public checkpoint that does not name it", choices=FACTORIES
    )
    data: str | None = option(None, "images: a data set's name or a folder; default: what the file records")
    root: str | None = option(
        None, "folder with the files of fashion-mnist or cifar10",
        only=("without --text", lambda s: s.text is None),
    )  # fmt: skip
    text: str | None = option(
        None, "a UTF-8 text file or a folder of prepare-text, for a language model; default: what the file records",
        only=("without --data", lambda s: s.data is None),
    )  # fmt: skip
    samples: int = option(64, "images, or pieces of text, to measure", least=1, most=1_000_000)


@dataclass
class Settings(DataOptions):
    """The options of ``analyze``."""

    output: str | None = option(None, "folder of the pictures and analysis.json; default: the checkpoint's folder")
    eps: float = option(0.1, "distortion of the coding rates", above=0)
    lam: float = option(0.1, "weight of the sparsity in the objective", least=0)


def run(args: argparse.Namespace) -> int:
    return analyze(Path(args.checkpoint), options.parse(args, Settings))


def analyze(path: Path, settings: Settings) -> int:
    """Measure the model at ``path``, and write pictures and numbers."""
    began = time.monotonic()
    model, metadata = open_model(path, settings.model)
    inputs, what = real_inputs(
        model, metadata, settings.samples, data=settings.data, root=settings.root, text=settings.text
    )
    output = Path(settings.output) if settings.output else path if path.is_dir() else path.parent
    measurement = measure(model, inputs, settings.eps, settings.lam)
    output.mkdir(parents=True, exist_ok=True)
    title = f"{type(model).__name__}: {what}"
    pictures = [
        plot_layerwise(measurement.published(), output / "layerwise.png", title),
        plot_half_steps(measurement, output / "half_steps.png", title),
    ]
    record = {
        "checkpoint": str(path), "model": type(model).__name__, "data": what,
        **measurement.summary(), "published": measurement.published().summary(),
    }  # fmt: skip
    write_atomically(output / "analysis.json", (json.dumps(record, indent=2) + "\n").encode())
    where = "In the encoder: " if measurement.layers[0].startswith("encoder") else ""
    print(f"{title}\n{table(measurement)}\n{where}{measurement.published().compression()}")
    print(f"{time.monotonic() - began:.1f} s; {', '.join(map(str, pictures))}, {output / 'analysis.json'}")
    return 0


def measure(model: CrateModel, inputs: torch.Tensor, eps: float, lam: float) -> HalfSteps:
    """Measure all samples, a few at a time, so that memory does not grow with their number."""
    # A masked autoencoder is measured on unmasked images, because mask tokens are nearly equal.
    keywords = {"mask_ratio": 0.0} if isinstance(model, CrateMAE) else {}
    total: HalfSteps | None = None
    for part in inputs.split(32):
        measurement = half_steps(model, part, eps=eps, lam=lam, **keywords)
        total = measurement if total is None else total + measurement
    assert total is not None
    return total


def table(measurement: HalfSteps) -> str:
    """A summary: mean ± spread before the layer, after its first half and after its second half."""
    columns = (("subspace_coding_rate", "R^c", 1), ("nonzero", "non-zero fraction", 3))
    headings = [f"{heading} before, between, after".rjust(50) for _, heading, _ in columns]
    lines = [f"{'layer':12}" + "".join(headings)]
    for i, layer in enumerate(measurement.layers):
        cells = []
        for name, _, digits in columns:
            values = measurement.values[name][i]
            cells.append(
                "  ".join(f"{v.mean():.{digits}f} ± {v.std(correction=0):.{digits}f}" for v in values).rjust(50)
            )
        lines.append(f"{layer:12}" + "".join(cells))
    return "\n".join(lines)
