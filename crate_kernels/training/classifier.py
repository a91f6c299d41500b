"""``crate-kernels train``: a classifier, then its accuracy, its speed against the reference backend, and pictures."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..analysis import plot_layerwise
from ..analysis.layerwise import layerwise_compression
from ..data.batches import (
    Normalization,
    TrainingOrder,
    evaluation_batches,
    loader_speed,
    seed_everything,
    seed_for,
    training_batches,
)
from ..data.images import load
from ..distributed import launch
from ..models import CrateModel
from ..ops import requested_backend
from ..version import __version__
from . import command, config, initial
from .build import build_model
from .config import Config
from .engine import Engine, Meter
from .optimizer import make_optimizer, make_schedule
from .progress import Report, clock
from .speed import against_reference


class Trainer(Engine):
    """A classifier in training: its data, moving average, schedule, and the tests after every epoch."""

    command, options = "train", Config
    settings: Config

    def __init__(self, settings: Config, output: Path, device: torch.device):
        super().__init__(settings, output, device)
        self.data = data = load(settings.source())
        self.batching = settings.batching()
        self.steps_per_epoch = TrainingOrder(len(data.train), self.batching).per_epoch // settings.accumulate
        self.steps = settings.epochs * self.steps_per_epoch
        seed_everything(settings.seed)
        self.model = build_model(settings, data).to(device)
        self.ema: ModelEmaV3 | None = None
        self.mixup = None
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(
                settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=len(data.classes)
            )
            self.criterion: torch.nn.Module = SoftTargetCrossEntropy()
        else:
            self.criterion = LabelSmoothingCrossEntropy(settings.label_smoothing)
        self.normalize = Normalization(data, device)
        self.best: dict[str, float] = {}
        self.test: dict[str, float] = {}
        self.meter = Meter(device, ("loss", "accuracy"))

    @classmethod
    def resolve(cls, options: dict[str, Any]) -> Config:
        return config.resolve(options)

    @classmethod
    def variants(cls) -> dict[str, Config]:
        return config.variants()

    def initialize(self) -> None:
        if self.settings.init is not None:
            initial.load(self.model, self.settings.init, self.settings.new_head)

    def prepare(self, state: dict[str, Any] | None = None) -> None:
        if self.settings.ema:  # before the model is sharded: a sharded model cannot be copied
            self.ema = ModelEmaV3(self.model, decay=self.settings.ema, use_warmup=True)
        super().prepare(state)

    def roots(self) -> list[nn.Module]:
        return [self.model] if self.ema is None else [self.model, self.ema.module]

    def check_ranks(self) -> None:
        super().check_ranks()
        if self.mixup is not None and self.settings.batch_size % (2 * launch.size()):
            raise ValueError(
                f"mixup and cutmix pair the images of a batch, so --batch-size {self.settings.batch_size} must be a "
                f"multiple of {2 * launch.size()}, twice the ranks"
            )

    def make_optimizer(self) -> torch.optim.Optimizer:
        optimizer = make_optimizer(self.settings, self.model)
        self.scheduler = make_schedule(self.settings, optimizer, self.steps_per_epoch)
        return optimizer

    @property
    def evaluated(self) -> CrateModel:
        """The model that is tested and saved: the moving average if there is one, else the trained model."""
        return self.model if self.ema is None else self.ema.module

    def example(self) -> tuple[Tensor, Tensor]:
        """The first batch of test images, normalized, and its labels. The speed and the picture of the layers use
        it."""
        images, labels = next(iter(evaluation_batches(self.data, self.batching, self.model.image_size, self.device)))
        count = min(self.settings.batch_size, len(labels))
        return self.normalize(images[:count]), labels[:count].to(self.device)

    def probe_inputs(self, count: int) -> tuple[Tensor, dict[str, Any]]:
        return self.example()[0][:count], {}

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "epoch": self.step / self.steps_per_epoch,
            "best": self.best,
            "test": self.test,
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema and self.ema.module.state_dict(),
        }

    def fingerprint(self) -> str:
        return self.data.fingerprint

    def metadata(self) -> dict[str, Any]:
        data = self.data
        return {"data": data.name, "classes": data.classes, "mean": data.mean, "std": data.std}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.best, self.test = state["best"], state["test"]

    def sharded_like(self, keys: tuple) -> Tensor | None:
        match keys:
            case ("ema", name):
                return None if self.ema is None else self.ema.module.state_dict().get(name)
        return super().sharded_like(keys)

    # -- training --------------------------------------------------------------------------------------------------

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return training_batches(self.data, self.batching, self.model.image_size, start, self.device, shared=True)

    def loss(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        images, labels = batch
        # The seed is set here, because augmentation without loader processes also seeds these generators. Mixup uses
        # NumPy's generator, with the same seed on all ranks.
        seed = (self.settings.seed, *divmod(number, self.settings.accumulate))
        seed_everything(*seed)
        self.seed_dropout(seed_for(*seed))
        images, labels = self.normalize(images), labels.to(self.device, non_blocking=True)
        target = labels
        if self.mixup is not None:
            images, target = self.mixup(images, labels)
        with self.autocast():
            logits = self.network(images)
        loss = self.criterion(logits.float(), target)
        self.count(self.meter, loss, logits, labels)
        return loss

    @staticmethod
    def count(meter: Meter, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        meter.add(len(labels), loss.detach().double() * len(labels), (logits.argmax(-1) == labels).sum())

    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def set_learning_rate(self) -> None:
        """The schedule set it after the previous step."""

    def after_step(self) -> None:
        self.scheduler.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)

    def metrics(self) -> dict[str, float]:
        """Means over the epoch so far."""
        return self.meter.read()

    def position(self) -> dict[str, float]:
        return {"epoch": self.step / self.steps_per_epoch}

    def epoch_ends(self) -> bool:
        return self.step % self.steps_per_epoch == 0

    def status(self, metrics: dict[str, float], rate: float, left: float) -> str:
        epoch = (self.step - 1) // self.steps_per_epoch + 1
        return (
            f"epoch {epoch}  loss {metrics['loss']:.4f}  accuracy {100 * metrics['accuracy']:.1f} %  "
            f"{rate:.0f} images/s  {clock(left)} left"
        )

    def evaluate_if_due(self, report: Report) -> bool:
        """Test after every epoch, and save the best weights."""
        if not self.epoch_ends():
            return False
        epoch, train = self.step // self.steps_per_epoch, self.meter.read()
        self.test = self.evaluate()
        self.meter.reset()
        self.log.write(step=self.step, epoch=epoch, **{f"test_{name}": value for name, value in self.test.items()})
        report.line(
            f"epoch {epoch}/{self.settings.epochs}: loss {train['loss']:.4f}, "
            f"accuracy {100 * train['accuracy']:.2f} %, "
            f"test loss {self.test['loss']:.4f}, test accuracy {100 * self.test['accuracy']:.2f} %"
        )
        if self.test["accuracy"] > self.best.get("accuracy", -1.0):
            self.best = {"accuracy": self.test["accuracy"], "epoch": epoch}
            self.save_model(self.plain(self.evaluated), "best.safetensors")
        return True

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss (without label smoothing) and accuracy on all test images."""
        model = self.evaluated
        training = model.training
        model.eval()
        meter = Meter(self.device, ("loss", "accuracy"))
        for images, labels in evaluation_batches(self.data, self.batching, model.image_size, self.device, shared=True):
            labels = labels.to(self.device)
            with self.autocast():
                logits = model(self.normalize(images))
            if len(labels):  # an empty batch has no mean
                self.count(meter, cross_entropy(logits.float(), labels), logits, labels)
        model.train(training)
        return meter.read()

    def save_model(self, model: CrateModel | None, name: str) -> Path:
        """Write the weights of an unsharded model on rank 0, with the metadata that later commands need."""
        path = self.output / name
        with launch.together():
            if model is not None:
                model.save(path, **self.metadata(), test_accuracy=self.test.get("accuracy"))
        return path

    # -- output of a run ----------- --------------------------------------------------------------------------------

    def describe(self) -> str:
        data, size = self.data, self.model.image_size
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"{data.name}: {len(data.train)} training and {len(data.test)} test images of {len(data.classes)} classes, "
            f"{size[0]} x {size[1]}; {parameters:,} parameters, {self.precision} on {self.device} "
            f"({self.precision_reason})"
        )

    def next_steps(self) -> dict[str, str]:
        segment = f"crate-kernels segment IMAGE --checkpoint {shlex.quote(str(self.output))}"
        others = [name for name in ("fashion-mnist", "photos") if name != self.settings.data]
        return super().next_steps() | {
            segment: "what its attention separates in an image",
            f"crate-kernels train --data {others[0]}": "other images; or a folder of your own",
        }

    def finish(self, report: Report, began: float) -> None:
        """Save the model, then measure and record: test accuracy, speed, the layer-wise picture."""
        model, settings = self.plain(self.evaluated), self.settings
        path = self.save_model(model, "model.safetensors")
        if model is None:
            return
        summary: dict[str, Any] = {
            "test_accuracy": self.test["accuracy"],
            "test_loss": self.test["loss"],
            "best": self.best,
            "training_seconds": self.seconds,
            "precision": self.precision,
            "precision_reason": self.precision_reason,
            "backend": requested_backend() or "automatic",
            "device": str(self.device),
            "ranks": launch.size(),
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seed": settings.seed,
            "config": dataclasses.asdict(settings),
            "versions": versions(),
        }
        loader = loader_speed(self.data, self.batching, self.model.image_size)
        rate = self.steps * self.per_step() / max(self.seconds, 1e-9) / launch.size()
        summary |= {"broken_images": list(self.data.broken.found), "loader_images_per_second": loader}
        report.line(f"loader alone: {loader:.0f} images/s; training took {rate:.0f} images/s")
        images, labels = self.example()
        measurement = layerwise_compression(model, images)
        picture = plot_layerwise(measurement, self.output / "layerwise.png", title=f"{self.data.name}, layer by layer")
        pictures = ", ".join(map(str, [picture, *self.plot_probe()]))
        summary["layerwise"] = measurement.summary()
        report.line(
            f"test accuracy {100 * summary['test_accuracy']:.2f} % (best {100 * self.best['accuracy']:.2f} % "
            f"after epoch {self.best['epoch']})"
        )
        report.line(f"{picture}: {measurement.compression()}")
        summary["total_seconds"] = time.monotonic() - began
        self.write_summary(summary)  # the run is finished, even if the measurement below fails
        # A run in bf16 is compared in float32, too: on a CPU the reference may be faster in float32.
        for precision in dict.fromkeys([self.precision, "fp32"]):
            try:
                speed = against_reference(model, images, labels, precision)
            except RuntimeError as error:
                summary.setdefault("warnings", []).append(f"no speed was measured in {precision}: {error}")
                report.line(f"warning: {summary['warnings'][-1]}")
                continue
            summary.setdefault("speed", {})[precision] = speed
            for what, measured in speed.items():
                report.line(
                    f"{what}, {precision}, batch {len(images)}: {measured['images_per_second']:.0f} images/s, "
                    f"reference {measured['reference_images_per_second']:.0f} images/s: "
                    f"{measured['ratio']:.2f} times as fast"
                )
        summary["total_seconds"] = time.monotonic() - began
        self.write_summary(summary)
        report.line(f"{clock(summary['total_seconds'])} in all; model {path}, pictures {pictures}")


def versions() -> dict[str, str]:
    """Versions of all packages that influence the result."""
    import timm
    import torchvision

    return {
        "crate_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "timm": timm.__version__, "torchvision": torchvision.__version__,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of :class:`~crate_kernels.training.config.Config`, and ``--resume``."""
    parser.epilog = (
        "Without options: 5,000 digits that come with the package's dependencies, in about two minutes on two cores."
    )
    command.add_arguments(parser, Trainer)


def run(args: argparse.Namespace) -> int:
    """Train with the options of the command line; all files are written to the output folder."""
    return command.run(args, Trainer)
