"""``crate-kernels train``: data, model, loop, then accuracy, speed against the reference backend, and the picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path

import torch

from ..analysis import layerwise, plot_layerwise
from ..models.checkpoint import write_atomically
from ..ops import requested_backend, use_backend
from ..version import __version__
from . import checkpoints, config
from .build import build_model, image_size
from .config import Config
from .data import load, seed_everything
from .loop import Trainer
from .progress import Report, clock
from .speed import against_reference, faster_precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of :class:`~crate_kernels.training.config.Config`, and ``--resume``."""
    parser.epilog = "Without options: 5,000 digits that come with the package's dependencies, in about a minute."
    config.add_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue the run in --output, or the given folder or state file, to the same result",
    )


def run(args: argparse.Namespace) -> int:
    """Train as the command line says; every file lands in the output folder."""
    began = time.monotonic()
    options = config.given(args)
    state = None
    if args.resume is None:
        settings = config.resolve(options)
    else:
        path = state_path(args.resume, options)
        state = checkpoints.load(path)
        options.setdefault("output", str(path.parent))
        settings = checkpoints.resumed_config(state, options)
    output = output_folder(settings)
    if state is None and (output / checkpoints.LAST).exists() and not (output / "summary.json").exists():
        raise ValueError(f"{output} holds an unfinished run: continue it with --resume, or choose another --output")

    data = load(settings)
    device = torch.device(
        settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    seed_everything(settings.seed)
    # A resumed run has its own weights: the file it started from may be gone.
    model = build_model(settings if state is None else dataclasses.replace(settings, init=None), data).to(device)
    with use_backend(settings.backend or requested_backend()):
        trainer = Trainer(model, data, settings, output)
        if state is not None:
            trainer.load_state(state)
        elif settings.precision == "auto":
            trainer.precision = "bf16" if device.type == "cuda" else faster_precision(model, *trainer.example())
        output.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_leftovers(output)
        (output / "summary.json").unlink(missing_ok=True)
        with Report(trainer.total_steps) as report:
            report.line(describe(trainer))
            try:
                trainer.fit(report)
            except KeyboardInterrupt:
                report.line(
                    f"continue with --resume; {output} holds the state of at most {settings.checkpoint_seconds:g} s ago"
                )
                raise
        finish(trainer, report, began)
    return 0


def output_folder(settings: Config) -> Path:
    """``settings.output`` with the data set's name in it."""
    return Path(settings.output.format(data=Path(settings.data).name))


def state_path(resume: str, options: dict) -> Path:
    """The state file that ``--resume [PATH]`` means."""
    if resume:
        path = Path(resume)
    else:
        default = Config()
        path = output_folder(
            Config(data=options.get("data", default.data), output=options.get("output", default.output))
        )
    return path / checkpoints.LAST if path.is_dir() or not path.suffix else path


def describe(trainer: Trainer) -> str:
    """One line on what is about to run."""
    data, size = trainer.data, image_size(trainer.model)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    going_on = f", going on from step {trainer.step} of {trainer.total_steps}" if trainer.step else ""
    return (
        f"{data.name}: {len(data.train)} training and {len(data.test)} test images of {len(data.classes)} classes, "
        f"{size[0]} x {size[1]}; {parameters:,} parameters, {trainer.precision} on {trainer.device}{going_on}"
    )


def finish(trainer: Trainer, report: Report, began: float) -> None:
    """Save the model, then measure and record: test accuracy, speed, the layer-wise picture."""
    output = trainer.output
    path = trainer.save_model("model.safetensors")
    summary = {
        "test_accuracy": trainer.test["accuracy"],
        "test_loss": trainer.test["loss"],
        "best": trainer.best,
        "training_seconds": trainer.seconds,
        "precision": trainer.precision,
        "backend": requested_backend() or "automatic",
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": trainer.config.seed,
        "config": dataclasses.asdict(trainer.config),
        "versions": versions(),
    }
    images, labels = trainer.example()
    measurement = layerwise(trainer.evaluated, images)
    picture = plot_layerwise(measurement, output / "layerwise.png", title=f"{trainer.data.name}, layer by layer")
    summary["layerwise"] = measurement.summary()
    report.line(f"test accuracy {100 * summary['test_accuracy']:.2f} % (best {100 * trainer.best['accuracy']:.2f} % "
                f"after epoch {trainer.best['epoch']})")  # fmt: skip
    # On the CPU a run in bf16 is compared in float32, too: there the reference may well be faster in float32.
    for precision in dict.fromkeys([trainer.precision, "fp32"]):
        speed = against_reference(trainer.evaluated, images, labels, precision)
        summary.setdefault("speed", {})[precision] = speed
        for what, rate in speed.items():
            report.line(
                f"{what}, {precision}, batch {len(images)}: {rate['images_per_second']:.0f} images/s, "
                f"reference {rate['reference_images_per_second']:.0f} images/s: {rate['ratio']:.2f} times as fast"
            )
    summary["total_seconds"] = time.monotonic() - began
    write_atomically(output / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    report.line(f"{clock(summary['total_seconds'])} in all; model {path}, picture {picture}")


def versions() -> dict[str, str]:
    """Versions of everything that shapes a result."""
    import timm
    import torchvision

    return {
        "crate_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "timm": timm.__version__, "torchvision": torchvision.__version__,
    }  # fmt: skip
