"""``crate-kernels report RUN_FOLDER``: one HTML file with everything about a training run. It opens offline."""

from __future__ import annotations

import argparse
import base64
import html
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import options
from ..collect_env import report as environment_report
from ..models import CrateModel
from ..models.checkpoint import write_atomically
from ..models.vision import VisionModel
from ..options import option
from ..runs.folder import OPTIONS, SUMMARY, open_model, read_json
from ..runs.logs import read_records
from ..terminal import in_bytes
from ..version import __version__
from .command import DataOptions, measure
from .inputs import normalization, real_inputs
from .plots import new_figure, plot_half_steps, plot_training, save
from .segmentation import class_attention

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; } table { border-collapse: collapse; }
td, th { padding: .15em 1em .15em 0; text-align: left; vertical-align: top; } th { font-weight: 600; }
.figures { display: flex; flex-wrap: wrap; gap: 1.2em 2.5em; margin: 1.2em 0; }
.figures b { display: block; font-size: 1.7em; line-height: 1.2; } .figures span, .note { color: #666; }
.columns { columns: 2; } pre { font-size: 12px; overflow-x: auto; background: #f6f6f6; padding: .8em; }
@media print { body { max-width: none; } h2 { break-after: avoid; } img { break-inside: avoid; } }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a training run")
    options.add_arguments(parser, Settings, needed="RUN")


@dataclass
class Settings(DataOptions):
    """The options of ``report``."""

    output: str | None = option(
        None, "the HTML file to write, which replaces an existing one; default: report.html in the run's folder"
    )


def run(args: argparse.Namespace) -> int:
    return write(Path(args.run), options.parse(args, Settings))


def write(folder: Path, settings: Settings) -> int:
    """Write the report on the run in ``folder``."""
    began = time.monotonic()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give the folder of a training run")
    path = Path(settings.output) if settings.output else folder / "report.html"
    options.check_output_file(path)
    model, metadata = open_model(folder, settings.model)
    try:
        inputs, what = real_inputs(
            model, metadata, settings.samples, data=settings.data, root=settings.root, text=settings.text
        )
    except (ValueError, OSError, ImportError) as error:
        if settings.data or settings.text:
            raise
        inputs, what = None, str(error)  # the run may come from another machine; the rest of the report needs no data
    document = build(folder, model, metadata, inputs, what)
    write_atomically(path, document.encode())
    print(f"{path}: {in_bytes(len(document))}, {time.monotonic() - began:.1f} s")
    return 0


def build(folder: Path, model: CrateModel, metadata: dict, inputs: Tensor | None, what: str) -> str:
    """The HTML document.

    Args:
        folder: the folder of the run. All of its files but the model may be missing.
        model, metadata: see :func:`open_model`.
        inputs, what: see :func:`real_inputs`. If there are no inputs, ``what`` gives the reason.
    """
    summary = read_json(folder / SUMMARY)
    metrics = read_records(folder / "metrics.jsonl")
    probe = read_records(folder / "layerwise.jsonl")
    sections = [headline(model, metadata, summary)]
    if not summary:
        sections.append('<p class="note">The run has not finished; these are its metrics so far.</p>')
    if metrics:
        sections += ["<h2>Curves</h2>", figure("curves", lambda path: plot_curves(metrics, path))]
    if speed := summary.get("speed"):
        sections += ["<h2>Speed</h2>", speed_table(speed)]
    sections.append("<h2>Layer by layer</h2>")
    if inputs is None:
        sections.append(f'<p class="note">Not measured: {html.escape(what)}</p>')
    else:
        measurement = measure(model, inputs, 0.1, 0.1)
        sections += [
            f'<p class="note">{html.escape(what)}; mean and standard deviation over the samples. The halves of a layer '
            "are attention and ISTA (in a decoder: dictionary and attention).</p>",
            figure("half-steps", lambda path: plot_half_steps(measurement, path)),
        ]
    if probe:
        sections += [
            "<h2>Layer by layer, during training</h2>",
            figure("probe", lambda path: plot_training(probe, path)),
        ]
    if inputs is not None and isinstance(model, VisionModel):
        averages = model.config.get("pool") == "mean"
        images = inputs[:: -(-len(inputs) // 4)]  # evenly spread, because neighbors often have the same class
        sections += [
            "<h2>Attention of the class token</h2>",
            '<p class="note">The last layer, a column per head; bright patches receive most.'
            + (" The head reads the mean of all tokens, so this token is one among many." if averages else "")
            + "</p>",
            figure("attention", lambda path: plot_maps(model, metadata, images, path), "png"),
        ]
    if (folder / "sample.txt").is_file():
        sample = (folder / "sample.txt").read_text(encoding="utf-8", errors="replace")
        sections += ["<h2>A sample</h2>", f"<pre>{html.escape(sample)}</pre>"]
    architecture = {"model": type(model).__name__, **model.config}
    sections += ["<h2>Model</h2>", rows(architecture)]
    if config := summary.get("config") or read_json(folder / OPTIONS):
        sections += ["<h2>Configuration</h2>", rows(config)]
    environment = {k: summary[k] for k in ("device", "threads", "precision", "backend", "seed") if k in summary}
    sections += [
        "<h2>Environment</h2>",
        rows(environment | summary.get("versions", {})),
        '<p class="note">The machine that wrote this report:</p>',
        f"<pre>{html.escape(environment_report())}</pre>",
    ]
    title = f"{metadata.get('data') or folder.resolve().name}: {type(model).__name__}"
    written = time.strftime("%Y-%m-%d %H:%M")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>\n'
        f'<h1>{html.escape(title)}</h1>\n<p class="note">A training run, reported by crate_kernels {__version__}, '
        f"{written}.</p>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def headline(model: CrateModel, metadata: dict, summary: dict) -> str:
    """The most important numbers of the run."""
    found = {"parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
    accuracy = summary.get("test_accuracy", metadata.get("test_accuracy"))
    if accuracy is not None:
        found["test accuracy"] = f"{100 * accuracy:.2f} %"
    if best := summary.get("best"):
        found[f"best, after epoch {best['epoch']}"] = f"{100 * best['accuracy']:.2f} %"
    for name, value in summary.get("validation", {}).items():
        found[f"validation {name}"] = f"{value:.4g}"
    if "training_seconds" in summary:
        found["of training"] = f"{summary['training_seconds']:.0f} s"
    cells = (f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in found.items())
    return f'<div class="figures">{"".join(cells)}</div>'


def speed_table(speed: dict) -> str:
    """Images per second of the run's backend and of the reference equations."""
    lines = ["<table><tr><th></th><th>images/s</th><th>reference backend</th><th>times as fast</th></tr>"]
    for precision, kinds in speed.items():
        for what, rate in kinds.items():
            lines.append(
                f"<tr><td>{html.escape(what)}, {html.escape(precision)}</td><td>{rate['images_per_second']:.0f}</td>"
                f"<td>{rate['reference_images_per_second']:.0f}</td><td>{rate['ratio']:.2f}</td></tr>"
            )
    return "\n".join(lines) + "</table>"


def rows(values: dict) -> str:
    """A table of names and values in two columns. Values that are not set are left out."""
    cells = (
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
        if value is not None
    )
    return f'<div class="columns"><table>{"".join(cells)}</table></div>'


def figure(name: str, draw: Callable[[Path], object], suffix: str = "svg") -> str:
    """The picture that ``draw(path)`` writes, as an HTML element with embedded data."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.{suffix}")
        draw(path)
        content = base64.b64encode(path.read_bytes()).decode()
    kind = "svg+xml" if suffix == "svg" else suffix
    return f'<p><img alt="{name}" src="data:image/{kind};base64,{content}"></p>'


def plot_curves(metrics: list[dict], path: Path) -> Path:
    """Every metric of the log over the steps. Losses share one plot, accuracies another, and each other metric has its
    own."""
    names = list(dict.fromkeys(name for record in metrics for name in record if name not in ("step", "epoch")))
    panels: dict[str, list[str]] = {}
    for name in names:
        family = next((kind for kind in ("loss", "accuracy") if kind in name), name)
        panels.setdefault(family, []).append(name)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    drawing = new_figure(3.9 * columns, 2.9 * lines)
    grid = drawing.subplots(lines, columns, squeeze=False).flat
    for axes, (family, members) in zip(grid, panels.items(), strict=False):
        for name in members:
            points = [(r["step"], r[name]) for r in metrics if isinstance(r.get(name), int | float)]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1.5) if points else None
        axes.set(title=family.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
        if len(members) > 1:
            axes.legend(fontsize=8)
    for axes in list(drawing.axes)[len(panels) :]:
        axes.remove()
    return save(drawing, path)


def plot_maps(model: VisionModel, metadata: dict, images: Tensor, path: Path) -> Path:
    """A row for each image: the image, then the class attention of every head in the last layer."""
    attention = class_attention(model, images)
    mean, std = normalization(model, metadata)
    pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    heads = min(attention.shape[1], 12)
    drawing = new_figure(1.5 * (heads + 1), 1.55 * len(images))
    grid = drawing.subplots(len(images), heads + 1, squeeze=False)
    for line, image, maps in zip(grid, pixels, attention, strict=True):
        line[0].imshow(image.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        for axes, heat in zip(line[1:], maps, strict=False):
            axes.imshow(heat.numpy(), cmap="magma")
    hide(grid.flat)
    for head, axes in enumerate(grid[0][1:], 1):
        axes.set_title(f"head {head}", fontsize=8)
    return save(drawing, path)


def hide(axes: Iterable) -> None:
    for each in axes:
        each.axis("off")
