"""Pictures of what was measured. Needs matplotlib."""

from __future__ import annotations

import os
from pathlib import Path

from .layerwise import Layerwise


def plot_layerwise(measurement: Layerwise, path: str | os.PathLike, title: str | None = None) -> Path:
    """Draw both layer-wise curves, mean and standard deviation over the samples, as a PNG (or what ``path`` ends in)."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'crate_kernels[train]'") from error

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = (
        (measurement.coding_rate, "subspace coding rate $R^c$ (nats)", "compression: tokens entering attention", "C0"),
        (measurement.sparsity, "non-zero fraction", "sparsification: output of the ISTA step", "C1"),
    )
    for axes, (values, label, name, colour) in zip(figure.subplots(1, 2), panels, strict=True):
        layers = range(1, values.shape[0] + 1)
        mean, spread = values.mean(dim=1), values.std(dim=1, correction=0)
        axes.fill_between(layers, mean - spread, mean + spread, color=colour, alpha=0.25, linewidth=0)
        axes.plot(layers, mean, "o-", color=colour, markersize=4)
        axes.set(xlabel="layer", ylabel=label, title=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if title:
        figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path
