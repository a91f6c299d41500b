"""Tiny runs of every training command, in float64, so that a difference between ranks is a mistake and not rounding."""

from __future__ import annotations

from pathlib import Path

import torch

from crate_kernels.distributed import sharding
from crate_kernels.runs import checkpoints
from crate_kernels.training.classifier import Trainer
from crate_kernels.training.dino import DINOTrainer
from crate_kernels.training.mae import MAETrainer
from crate_kernels.training.text import TextTrainer

IMAGES = dict(image_size=16, patch_size=8, dim=16, heads=2, batch_size=8, epochs=3, seed=3, workers=0, warmup_epochs=0)
TEXT = dict(context=16, dim=16, depth=2, heads=2, batch_size=8, steps=12, warmup_steps=2, seed=3)

RUNS = {
    "classifier": (
        Trainer,
        IMAGES | dict(depth=2, accumulate=2, mixup=0.4, ema=0.9, crop=0.5, flip=0.5, precision="fp32", clip_grad=0.5),
    ),
    "mae": (MAETrainer, IMAGES | dict(depth=1, decoder_depth=1)),
    "dino": (DINOTrainer, IMAGES | dict(depth=1, hidden=16, bottleneck=8, prototypes=12, local_crops=1)),
    "simdino": (DINOTrainer, IMAGES | dict(depth=1, hidden=16, bottleneck=8, simdino=True, accumulate=2)),
    "gpt2": (TextTrainer, TEXT | dict(model="gpt2", accumulate=2)),
    "lm": (TextTrainer, TEXT | dict(model="lm")),
    "bert": (TextTrainer, TEXT | dict(model="bert", whole_words=True, accumulate=2)),
}


def in_float64(trainer) -> None:
    trainer.model.double()
    if not isinstance(trainer, TextTrainer):
        trainer.normalize.mean, trainer.normalize.std = trainer.normalize.mean.double(), trainer.normalize.std.double()
    if isinstance(trainer, DINOTrainer):
        trainer.criterion.double()
    cast = torch.Tensor.float
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else cast(self)


def follow(name: str, data: tuple[str, str], output: Path, parallel: str = "auto", *, stop: int = 6,
           resume: Path | None = None, double: bool = True, **options) -> dict:  # fmt: skip
    """Train up to step ``stop``, from the start or from the checkpoint in ``resume``, and write a checkpoint to
    ``output``.

    Args:
        data: a folder of images, a file of text.

    Returns:
        The losses, the metrics before and after, the layer-wise measurements, the weights.
    """
    kind, settings = RUNS[name]
    settings = settings | {"text" if kind is TextTrainer else "data": data[kind is TextTrainer]}
    settings = kind.resolve(settings | {"parallel": parallel, "layerwise_steps": 3} | options)
    trainer = kind(settings, output, torch.device("cpu"))
    trainer.check_ranks()
    cast = torch.Tensor.float
    try:
        if double:
            in_float64(trainer)
        trainer.prepare(None if resume is None else checkpoints.load(checkpoints.locate(resume)))
        trainer.start_probe()
        batches, losses = trainer.batches(trainer.step * settings.accumulate), []
        while trainer.step < stop:
            trainer.train_step(batches)
            losses.append(trainer.metrics()["loss"])
            trainer.meter.reset()
            trainer.measure()
        trainer.save_state()
        return {
            "losses": losses,
            "before": getattr(trainer, "untrained", {}),
            "after": trainer.evaluate(),
            "layers": trainer.probe.records if trainer.probe else None,
            "weights": sharding.whole_state(getattr(trainer, "evaluated", trainer.model)),
            "sharded": trainer.sharded,
        }
    finally:
        torch.Tensor.float = cast
