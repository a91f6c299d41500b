"""Eight-bit weights compared with float32: accuracy on the default data set, size, and speed on this CPU.

    crate-kernels train
    python benchmarks/quantization.py runs/mnist5k [--small] [--rounds 15] [--json benchmarks/results/quantization.json]

The accuracy is that of the trained model on all its test images. Interleaved rounds measure the speed of the same
model, and with ``--small`` that of CRATE-S. They time this package's kernels, and the copy of Linear layers under
``torch.compile`` in float32, with int8 weights, and with int8 weights and activations. A ratio above 1 means faster
than this package's kernels in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from functools import partial
from pathlib import Path

import torch

from crate_kernels.analysis.inputs import real_inputs
from crate_kernels.bench.results import environment
from crate_kernels.data.images import ImageSource, load
from crate_kernels.deployment import SCHEMES, Deployable, linear_copy, quantize
from crate_kernels.deployment.quantization import nbytes
from crate_kernels.models import CRATE_small
from crate_kernels.runs.folder import open_model
from crate_kernels.timing import measure, paired_ratio


def variants(model) -> dict[str, torch.nn.Module]:
    """Name -> model that is not yet compiled."""
    quantized = {scheme: quantize(model, scheme) for scheme in SCHEMES}
    return {"kernels": Deployable(model), "float32": linear_copy(model)} | quantized


@torch.no_grad()
def accuracies(model, metadata) -> dict[str, float]:
    """Share of the test images that each variant classifies correctly."""
    labels = torch.from_numpy(load(ImageSource(metadata["data"])).test.labels)
    images, _ = real_inputs(model, metadata, len(labels))
    found = {}
    for name, variant in variants(model).items():
        outputs = torch.cat([variant(part) for part in images.split(500)])
        found[name] = (outputs.argmax(-1) == labels).double().mean().item()
    return found


@torch.no_grad()
def speeds(model, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each variant, and how many times as fast as this package's kernels it is."""
    torch._dynamo.reset()  # otherwise the second size would be compiled for all sizes
    images = torch.randn(batch, model.in_chans, *model.image_size)
    built = variants(model)
    calls = {
        name: partial(variant if name == "kernels" else torch.compile(variant), images)
        for name, variant in built.items()
    }
    for call in calls.values():
        for _ in range(3):
            call()
    samples = measure(calls, torch.device("cpu"), seconds=0, rounds=(rounds, rounds))
    return {
        name: dict(
            milliseconds=1e3 * statistics.median(values),
            ratio=paired_ratio(samples["kernels"], values)["p50"],
            bytes=nbytes(built[name]),
        )
        for name, values in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a run of crate-kernels train")
    parser.add_argument("--small", action="store_true", help="also time CRATE-S with random weights")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model, metadata = open_model(args.run)
    found = {"environment": environment(torch.device("cpu")), "accuracy": accuracies(model, metadata)}
    print(json.dumps(found), flush=True)
    torch.manual_seed(0)
    models = {"run": (model, (1, 64))} | ({"CRATE-S": (CRATE_small().eval(), (1, 8))} if args.small else {})
    for name, (timed, batches) in models.items():
        for batch in batches:
            found[f"{name}, batch {batch}"] = result = speeds(timed, batch, args.rounds)
            print(name, batch, json.dumps(result), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
