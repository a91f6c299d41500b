"""Plots of the measurements. Needs matplotlib."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import torch

from ..extras import needs
from .half_steps import POINTS, HalfSteps
from .layerwise import Layerwise

COLORS = ("#4477aa", "#cc6677", "#228833")
"""Colors of the three points of a layer. Color-blind readers can distinguish them."""


def plot_layerwise(measurement: Layerwise, path: str | os.PathLike, title: str | None = None) -> Path:
    """Draw both layer-wise curves with mean and spread over the samples. The ending of ``path`` sets the format.

    If ``compressed_rate`` was measured, the plot also shows R^c after the attention, and the sentences of
    :meth:`Layerwise.compression` below.
    """
    figure = new_figure(9, 3.6 if not measurement.compressed_rate.numel() else 4.0)
    panels = (
        (measurement.coding_rate, "subspace coding rate $R^c$ (nats)", "compression: tokens entering attention", "C0"),
        (measurement.sparsity, "non-zero fraction", "sparsification: output of the ISTA step", "C1"),
    )
    for axes, (values, label, name, color) in zip(figure.subplots(1, 2), panels, strict=True):
        _curve(axes, range(1, values.shape[0] + 1), values, color)
        axes.set(xlabel="layer", ylabel=label, title=name)
        _whole_numbers(axes)
    if measurement.compressed_rate.numel():
        axes = figure.axes[0]
        axes.lines[0].set_label("entering attention (as published)")
        _curve(axes, range(1, len(measurement.compressed_rate) + 1), measurement.compressed_rate, "C3", "leaving it")
        axes.set_title("compression: tokens before and after attention")
        axes.legend(fontsize=8)
        figure.supxlabel("\n".join(textwrap.wrap(measurement.compression(), 130)), fontsize=8)
    return save(figure, path, title)


def plot_half_steps(measurement: HalfSteps, path: str | os.PathLike, title: str | None = None) -> Path:
    """Draw every quantity before and after each half-step, layer by layer, and the coherence of the subspaces."""
    figure = new_figure(12, 6.6)
    panels = (
        ("subspace_coding_rate", "$R^c$ (nats)", "rate within the subspaces, $R^c$"),
        ("nonzero", "non-zero fraction", "sparsity"),
        ("coding_rate", "$R$ (nats)", "rate of the tokens, $R$"),
        ("effective_rank", "effective rank", "effective rank of the tokens"),
        (
            "objective",
            "objective",
            rf"objective $R - R^c - \lambda\Vert Z\Vert_0$, $\lambda$ = {measurement.lam:g}",
        ),
    )
    published = {"subspace_coding_rate": 0, "nonzero": 2}
    grid = figure.subplots(2, 3)
    layers = range(1, len(measurement.layers) + 1)
    decoder = sum(not name.startswith("decoder") for name in measurement.layers) + 0.5
    for axes, (name, label, heading) in zip(grid.flat, panels, strict=False):
        for point, (where, color) in enumerate(zip(POINTS, COLORS, strict=True)):
            as_published = published.get(name) == point
            label_of_curve = f"{where} (as published)" if as_published else where
            _curve(axes, layers, measurement.values[name][:, point], color, label_of_curve, 2.2 if as_published else 1)
        axes.set(xlabel="layer", ylabel=label, title=heading)
        if name in published or name == "coding_rate":
            axes.legend(fontsize=7, framealpha=0.6)
    axes = grid.flat[-1]
    heads = measurement.coherence.shape[-1]
    if heads > 1:
        others = measurement.coherence[:, ~torch.eye(heads, dtype=torch.bool)]
        _curve(axes, layers, others, COLORS[0], "two heads, mean and spread")
        axes.axhline(measurement.chance, color="gray", linestyle="--", linewidth=1, label="random subspaces, p/d")
        axes.legend(fontsize=7)
    else:
        axes.text(0.5, 0.5, "one head", ha="center", va="center", transform=axes.transAxes)
    axes.set(xlabel="layer", ylabel="mean squared cosine", title="coherence between subspaces", ylim=(0, None))
    for axes in grid.flat:
        _whole_numbers(axes)
        if decoder < len(measurement.layers):
            axes.axvline(decoder, color="black", linewidth=0.8, linestyle=":")
    return save(figure, path, title)


def plot_training(records: list[dict], path: str | os.PathLike, title: str | None = None) -> Path:
    """Draw the layer-wise means of a probe's records: one curve for each measurement, from early (light) to late
    (dark)."""
    if not records:
        raise ValueError("the probe has not measured anything yet")
    import matplotlib
    from matplotlib.colors import Normalize

    figure = new_figure(9.6, 3.6)
    steps = [record["step"] for record in records]
    scale = Normalize(steps[0] - 0.15 * (steps[-1] - steps[0] + 1), steps[-1])
    shades = matplotlib.colormaps["viridis_r"]
    grid = figure.subplots(1, 2)
    for axes, (name, label) in zip(
        grid, (("coding_rate", "subspace coding rate $R^c$ (nats)"), ("sparsity", "non-zero fraction")), strict=True
    ):
        for record in records:
            values = record[f"{name}_mean"]
            axes.plot(range(1, len(values) + 1), values, "-", color=shades(scale(record["step"])), linewidth=1.2)
        axes.set(xlabel="layer", ylabel=label)
        _whole_numbers(axes)
    key = matplotlib.cm.ScalarMappable(Normalize(steps[0], steps[-1]), shades)
    figure.colorbar(key, ax=grid, label="training step")
    return save(figure, path, title)


def new_figure(width: float, height: float):
    """An empty figure of ``width`` by ``height`` inches, independent of any window system."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(needs("a picture", "matplotlib")) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: str | os.PathLike, title: str | None = None) -> Path:
    """Write the figure in the format of the ending of ``path``. Create the folder if it is missing."""
    if title:
        figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


def _curve(axes, layers, values, color, label: str | None = None, linewidth: float = 1.5) -> None:
    mean, spread = values.mean(dim=1), values.std(dim=1, correction=0)
    axes.fill_between(layers, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    axes.plot(layers, mean, "o-", color=color, markersize=3.5, linewidth=linewidth, label=label)


def _whole_numbers(axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
