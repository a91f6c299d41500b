"""The layer-wise measurement, repeated during training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..runs.logs import read_records
from .layerwise import Layerwise, layerwise


class LayerwiseProbe:
    """Measure R^c and sparsity of every layer at intervals during training, on the first samples of a batch.

    ::

        probe = LayerwiseProbe(output / "layerwise.jsonl")
        for step, batch in enumerate(batches):
            ...
            probe.step(step, model, batch)
        probe.plot(output / "layerwise_training.png")

    With the default period and number of samples it takes well under 3 % of the training time (``docs/analysis.md``).

    Args:
        path: file of JSON lines, one for each measurement: the step and :meth:`Layerwise.summary`. Existing lines stay,
            up to the step from which a run resumes. None keeps the measurements in memory.
        every: measure when ``step`` is a multiple of this number.
        samples: number of samples of the batch to measure.
        writer: a TensorBoard ``SummaryWriter``, or any object with its method ``add_scalar(tag, value, step)``.
    """

    def __init__(self, path: str | os.PathLike | None = None, *, every: int = 100, samples: int = 16, writer=None):
        if every < 1 or samples < 1:
            raise ValueError(f"every and samples: expected at least 1, got {every} and {samples}")
        self.path, self.every, self.samples, self.writer = path and Path(path), every, samples, writer
        self.records: list[dict] = read_records(self.path) if self.path else []
        self._resumed = bool(self.records)

    def step(self, step: int, model: nn.Module, batch: Tensor, **keywords) -> Layerwise | None:
        """Measure ``model(batch[:samples], **keywords)`` if a measurement is due, without gradient and in evaluation
        mode.

        Args:
            step: number of the training step.
            batch: ``(B, ...)``, the model's input on its device.
            keywords: further arguments of the model that do not depend on the batch.
        """
        if step % self.every:
            return None
        measurement = layerwise(model, batch[: self.samples], **keywords)
        summary = measurement.summary()
        if self._resumed:  # a resumed run repeats the steps after its checkpoint
            self.records = [record for record in self.records if record["step"] < step]
            if self.path:
                self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            self._resumed = False
        self.records.append({"step": step, **summary})
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(self.records[-1]) + "\n")
        if self.writer is not None:
            for name in ("coding_rate", "sparsity"):
                for layer, value in enumerate(summary[f"{name}_mean"], 1):
                    self.writer.add_scalar(f"{name}/layer_{layer:02}", value, step)
        return measurement

    def values(self, name: str) -> Tensor:
        """The values over time of ``"coding_rate_mean"`` or another key of the summary: ``(measurements, layers)``."""
        return torch.tensor([record[name] for record in self.records])

    def plot(self, path: str | os.PathLike, title: str | None = None) -> Path:
        """Plot the layer-wise curves of all measurements. Needs matplotlib."""
        from .plots import plot_training

        return plot_training(self.records, path, title)
