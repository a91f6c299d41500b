"""``crate-kernels analyze``: every layer's coding rate and sparsity on real test data, as pictures and JSON."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from ..models import CrateMAE, CrateModel
from ..models.checkpoint import write_atomically
from .half_steps import HalfSteps, half_steps
from .inputs import open_model, real_inputs
from .plots import plot_half_steps, plot_layerwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a model's safetensors file, or the folder of a training run")
    add_data_arguments(parser)
    parser.add_argument("--output", help="folder of the pictures and analysis.json (default: the checkpoint's)")
    parser.add_argument("--eps", type=float, default=0.1, help="distortion of the coding rates (default 0.1)")
    parser.add_argument("--lam", type=float, default=0.1, help="weight of the sparsity in the objective (default 0.1)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data to measure on."""
    parser.add_argument("--model", help="registered name of the model, for a public checkpoint that does not say")
    parser.add_argument("--data", help="images: a data set's name or a folder; what the file records if not given")
    parser.add_argument("--root", help="where the named data set's files are")
    parser.add_argument("--text", help="a UTF-8 text file for a language model; Python's manual if not given")
    parser.add_argument("--samples", type=int, default=64, help="images, or pieces of text, to measure (default 64)")


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    if args.eps <= 0:
        raise ValueError(f"--eps must be positive, got {args.eps}")
    model, metadata = open_model(args.checkpoint, args.model)
    inputs, what = real_inputs(model, metadata, args.samples, data=args.data, root=args.root, text=args.text)
    path = Path(args.checkpoint)
    output = Path(args.output) if args.output else path if path.is_dir() else path.parent
    measurement = measure(model, inputs, args.eps, args.lam)
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
    print(f"{title}\n{table(measurement)}")
    print(f"{time.monotonic() - began:.1f} s; {', '.join(map(str, pictures))}, {output / 'analysis.json'}")
    return 0


def measure(model: CrateModel, inputs: torch.Tensor, eps: float, lam: float) -> HalfSteps:
    """All samples, a few at a time so that memory does not grow with their number."""
    # A masked autoencoder is measured on whole images: with hidden patches its tokens would be much alike.
    keywords = {"mask_ratio": 0.0} if isinstance(model, CrateMAE) else {}
    total = None
    for part in inputs.split(32):
        measurement = half_steps(model, part, eps=eps, lam=lam, **keywords)
        total = measurement if total is None else total + measurement
    return total


def table(measurement: HalfSteps) -> str:
    """The figures a reader wants first: mean ± spread before the layer, after its first and after its second half."""
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
