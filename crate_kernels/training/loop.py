"""The training loop: plain, resumable at every step, the same result for the same seed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..models import CrateModel
from ..version import __version__
from . import checkpoints
from .build import image_size
from .config import Config
from .data import ImageData, TrainingOrder, seed_everything, test_batches, training_batches
from .progress import Report


class Trainer:
    """A model in training: everything the next step depends on, and the files that keep it.

    Args:
        model: on its device.
        data, config: what to train on, and how. ``precision`` must be set where ``config.precision`` is ``"auto"``.
        output: folder of ``last.pt``, ``best.safetensors``, ``metrics.jsonl``.
    """

    def __init__(self, model: CrateModel, data: ImageData, config: Config, output: Path):
        self.model, self.data, self.config, self.output = model, data, config, output
        self.precision = config.precision
        self.device = next(model.parameters()).device
        self.steps_per_epoch = TrainingOrder(len(data.train), config).per_epoch // config.accumulate
        self.total_steps = config.epochs * self.steps_per_epoch
        self.optimizer = create_optimizer_v2(
            model, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=config.schedule,
            num_epochs=config.epochs,
            warmup_epochs=min(config.warmup_epochs, config.epochs / 5),  # a short run must reach its learning rate
            warmup_lr=config.learning_rate / 100,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        self.ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema else None
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=len(data.classes)
            )
            self.criterion = SoftTargetCrossEntropy()
        else:
            self.criterion = LabelSmoothingCrossEntropy(config.label_smoothing)
        self.forward = torch.compile(model) if config.compile else model
        shape = (1, data.channels, 1, 1)
        # Pixels come as bytes: (x / 255 - mean) / std.
        self.mean = torch.tensor(data.mean, device=self.device).view(shape) * 255
        self.std = torch.tensor(data.std, device=self.device).view(shape) * 255
        self.step = 0
        self.best: dict[str, float] = {}
        self.test: dict[str, float] = {}
        self.seconds = 0.0
        self.meter = Meter(self.device)

    @property
    def evaluated(self) -> CrateModel:
        """The model that is tested and saved: the moving average where one is kept."""
        return self.model if self.ema is None else self.ema.module

    def normalize(self, images: Tensor) -> Tensor:
        """Bytes as they come from the loader -> the model's input, on its device."""
        return (images.to(self.device, non_blocking=True).float() - self.mean) / self.std

    def example(self) -> tuple[Tensor, Tensor]:
        """The first batch of test images, normalised, and its labels: what is measured and drawn."""
        batches = test_batches(self.data, self.config, image_size(self.model), self.device)
        images, labels = next(iter(batches))
        count = min(self.config.batch_size, len(labels))
        return self.normalize(images[:count]), labels[:count].to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "config": dataclasses.asdict(self.config),
            "precision": self.precision,
            "classes": self.data.classes,
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "seconds": self.seconds,
            "best": self.best,
            "test": self.test,
            "meter": self.meter.totals.cpu(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema and self.ema.module.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state` made.

        Raises:
            ValueError: it was trained on other classes.
        """
        if state["classes"] != self.data.classes:
            raise ValueError(f"the run to resume has the classes {state['classes']}, the data has {self.data.classes}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.precision = state["precision"]
        self.step, self.seconds, self.best, self.test = state["step"], state["seconds"], state["best"], state["test"]
        self.meter.totals = state["meter"].to(self.device)

    def save_state(self) -> None:
        checkpoints.save(self.output / checkpoints.LAST, self.state())

    def save_model(self, name: str) -> Path:
        """Write the evaluated weights as safetensors, with what is needed to use them on other images."""
        path = self.output / name
        self.evaluated.save(
            path,
            data=self.data.name,
            classes=self.data.classes,
            mean=self.data.mean,
            std=self.data.std,
            test_accuracy=self.test.get("accuracy"),
        )
        return path

    # -- training --------------------------------------------------------------------------------------------------

    def fit(self, report: Report) -> None:
        """Train from the present step to the last, testing and saving after every epoch."""
        config = self.config
        log = checkpoints.MetricsLog(self.output / "metrics.jsonl", self.step)
        batches = training_batches(
            self.data, config, image_size(self.model), self.step * config.accumulate, self.device
        )
        first, resumed, started = self.step, self.seconds, time.monotonic()
        saved = marked = started
        images = 0
        while self.step < self.total_steps:
            epoch = self.step // self.steps_per_epoch
            self.train_step(batches, epoch)
            images += config.batch_size * config.accumulate
            now = time.monotonic()
            self.seconds = resumed + now - started
            epoch_ends = self.step % self.steps_per_epoch == 0
            if self.step % config.log_steps == 0 or epoch_ends:
                loss, accuracy = self.meter.read()
                if not math.isfinite(loss):
                    raise ValueError(f"the loss is {loss} at step {self.step}; a lower --learning-rate may help")
                rate, images, marked = images / (now - marked), 0, now
                left = (now - started) / (self.step - first) * (self.total_steps - self.step)
                report.update(self.step, epoch + 1, loss, accuracy, rate, left)
                log.write(
                    step=self.step, epoch=self.step / self.steps_per_epoch, loss=loss, accuracy=accuracy,
                    learning_rate=self.optimizer.param_groups[0]["lr"], images_per_second=rate,
                )  # fmt: skip
            if epoch_ends:
                self.end_epoch(log, report, epoch + 1)
                marked = time.monotonic()
                self.seconds = resumed + marked - started
            if epoch_ends or now - saved >= config.checkpoint_seconds:
                self.save_state()
                saved = time.monotonic()

    def train_step(self, batches, epoch: int) -> None:
        """One optimiser step; whatever it draws at random depends on the seed and the step alone."""
        config = self.config
        self.model.train()
        for i in range(config.accumulate):
            images, labels = next(batches)
            # After the batch is there: augmentation without loader processes seeds the same generators.
            seed_everything(config.seed, self.step, i)
            images, labels = self.normalize(images), labels.to(self.device, non_blocking=True)
            target = labels
            if self.mixup is not None:
                images, target = self.mixup(images, labels)
            with self.autocast():
                logits = self.forward(images)
            loss = self.criterion(logits.float(), target)
            (loss / config.accumulate).backward()
            self.meter.add(loss.detach(), logits.detach(), labels)
        if config.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)

    def end_epoch(self, log: checkpoints.MetricsLog, report: Report, epoch: int) -> None:
        loss, accuracy = self.meter.read()
        self.test = self.evaluate()
        self.meter.reset()
        log.write(step=self.step, epoch=epoch, **{f"test_{name}": value for name, value in self.test.items()})
        report.line(
            f"epoch {epoch}/{self.config.epochs}: loss {loss:.4f}, accuracy {100 * accuracy:.2f} %, "
            f"test loss {self.test['loss']:.4f}, test accuracy {100 * self.test['accuracy']:.2f} %"
        )
        if self.test["accuracy"] > self.best.get("accuracy", -1.0):
            self.best = {"accuracy": self.test["accuracy"], "epoch": epoch}
            self.save_model("best.safetensors")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss (without label smoothing) and accuracy on all test images."""
        model = self.evaluated
        training = model.training
        model.eval()
        meter = Meter(self.device)
        for images, labels in test_batches(self.data, self.config, image_size(model), self.device):
            labels = labels.to(self.device)
            with self.autocast():
                logits = model(self.normalize(images))
            meter.add(cross_entropy(logits.float(), labels), logits, labels)
        model.train(training)
        loss, accuracy = meter.read()
        return {"loss": loss, "accuracy": accuracy}


class Meter:
    """Mean loss and accuracy over the images added; stays on the device until it is read."""

    def __init__(self, device: torch.device):
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)

    def reset(self) -> None:
        self.totals.zero_()

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.argmax(-1) == labels).sum()
        count = len(labels)
        self.totals += torch.stack([loss.double() * count, correct.double(), correct.new_tensor(count).double()])

    def read(self) -> tuple[float, float]:
        loss, correct, count = self.totals.tolist()
        return loss / max(count, 1), correct / max(count, 1)
