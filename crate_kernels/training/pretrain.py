"""Shared by the self-supervised vision commands: views cut on the device, and probes of the features."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, log_softmax, normalize, one_hot

from ..data.batches import (
    Batching,
    Normalization,
    TrainingOrder,
    evaluation_batches,
    loader_speed,
    seed_for,
    training_batches,
)
from ..data.images import ImageSource, load
from ..distributed import launch
from ..models import CrateModel
from ..options import option
from ..version import __version__
from .config import BATCH_SIZE, DATA, DATA_DEFAULTS, ImageOptions, data_variants
from .engine import Engine, Meter
from .progress import Report, clock


@dataclass
class PretrainConfig(ImageOptions):
    """Options that every self-supervised run has."""

    data: str = option("photos", DATA, "data")

    dim: int = option(128, "width of the tokens", "model", least=1, most=1 << 16)
    depth: int = option(4, "number of layers", "model", least=1, most=1000)
    heads: int = option(4, "number of attention heads", "model", least=1)
    patch_size: int = option(8, "pixels along a patch", "model", least=1)

    epochs: int = option(20, "passes over the training images", "optimization", least=1, most=1_000_000)
    batch_size: int = option(64, BATCH_SIZE, "optimization", least=1)
    accumulate: int = option(1, "batches whose gradients make one optimizer step", "optimization", least=1)
    learning_rate: float = option(1e-3, "after the warm-up; falls to zero along a cosine", "optimization", above=0)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up", "optimization", least=0)
    weight_decay: float = option(0.05, "of matrices, not of biases and norms", "optimization", least=0)
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 does not clip", "optimization", least=0)
    seed: int = option(0, "of weights, views and masks", "optimization", least=0, most=2**32 - 1)

    log_steps: int = option(25, "optimizer steps between two records of the metrics log", "output", least=1)

    def check(self, given: Iterable[str] = ()) -> None:
        super().check(given)
        if self.dim % self.heads:
            raise ValueError(f"--heads {self.heads} does not divide --dim {self.dim}")

    def source(self) -> ImageSource:
        """The images that the run reads."""
        return ImageSource(self.data, self.root, self.image_size, seed=self.seed)

    def batching(self) -> Batching:
        """How they are put together. Views are cut on the device, so the loader augments nothing."""
        return Batching(
            self.batch_size, self.accumulate, self.epochs, self.seed, self.workers, max_broken=self.max_broken
        )


# -- views -------------------------------------------------------------------------------------------------------------


def random_crops(
    images: Tensor, size: int, scale: tuple[float, float], flip: float, generator: torch.Generator
) -> Tensor:
    """A random square of every image, resized: ``(B, C, H, W)`` -> ``(B, C, size, size)``, on the images' device.

    Args:
        scale: smallest and largest share of the image's area.
        flip: probability of mirroring.
        generator: on the CPU, in the same state on all ranks. They draw the same numbers as a single process.
    """
    batch = len(images)
    draw = launch.rand(4, batch, dim=1, generator=generator)
    side = (scale[0] + (scale[1] - scale[0]) * draw[0]).sqrt()
    mirror = torch.where(draw[1] < flip, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side * mirror, side
    theta[:, :, 2] = ((2 * draw[2:] - 1) * (1 - side)).T
    grid = affine_grid(theta.to(images.device, images.dtype), [batch, images.shape[1], size, size], align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


# -- probes ------------------------------------------------------------------------------------------------------------


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Accuracy on ``test (n, d)`` of a vote of the ``k`` nearest neighbors in ``train (m, d)``.

    The similarity is the cosine; a vote has the weight ``exp(cosine / temperature)``: DINO's evaluation (arXiv
    2104.14294).
    """
    classes = int(train_labels.max()) + 1
    train, right = normalize(train, dim=-1), 0
    for part, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        cosine, nearest = (normalize(part, dim=-1) @ train.T).topk(min(k, len(train)), dim=-1)
        votes = (one_hot(train_labels[nearest], classes) * (cosine / temperature).exp().unsqueeze(-1)).sum(dim=1)
        right += int((votes.argmax(-1) == labels).sum())
    return right / len(test)


def probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, decay: float = 1e-3, iterations: int = 100
) -> float:
    """Accuracy on ``test (n, d)`` of a logistic regression on ``train (m, d)``; features are standardized."""
    mean, deviation = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = (train - mean) / deviation, (test - mean) / deviation
    classes = int(train_labels.max()) + 1
    weight = train.new_zeros(classes, train.shape[1] + 1).requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=iterations, line_search_fn="strong_wolfe")

    def logits(x: Tensor) -> Tensor:
        return x @ weight[:, :-1].T + weight[:, -1]

    def closure() -> Tensor:
        optimizer.zero_grad()
        nll = -log_softmax(logits(train), dim=-1).gather(1, train_labels[:, None]).mean()
        loss = nll + decay * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        return float((logits(test).argmax(-1) == test_labels).double().mean())


# -- loop --------------------------------------------------------------------------------------------------------------


class Pretrainer(Engine):
    """A model in self-supervised training. A subclass builds the model and defines the loss of a batch."""

    settings: PretrainConfig

    def __init__(self, settings: PretrainConfig, output: Path, device: torch.device):
        super().__init__(settings, output, device)
        self.data, self.batching = load(settings.source()), settings.batching()
        side = settings.image_size
        self.size = (side, side) if side else self.data.image_size or (224, 224)
        if any(pixels % settings.patch_size for pixels in self.size):
            raise ValueError(
                f"--patch-size {settings.patch_size} does not divide images of {self.size[0]} x {self.size[1]} pixels"
            )
        self.normalize = Normalization(self.data, device)
        self.steps_per_epoch = TrainingOrder(len(self.data.train), self.batching).per_epoch // settings.accumulate
        self.steps = settings.epochs * self.steps_per_epoch
        self.meter = Meter(device)
        torch.manual_seed(settings.seed)
        self.model = self.build().to(device)

    @classmethod
    def resolve(cls, options: dict[str, Any]) -> PretrainConfig:
        # The patches of `train`, which divide the images of each data set.
        known = DATA_DEFAULTS.get(options.get("data", cls.options().data), {})
        settings = cls.options(**{name: known[name] for name in ("patch_size",) if name in known} | options)
        settings.check(options)
        settings.name_output()
        return settings

    @classmethod
    def variants(cls) -> dict[str, PretrainConfig]:
        labels: dict[str, dict[str, Any]] = {"": {}, **data_variants(cls.options().data)}
        return {label: cls.resolve(given) for label, given in labels.items()}

    def build(self) -> CrateModel:
        raise NotImplementedError

    def view_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of normalized ``images (B, C, H, W)``; all random numbers come from ``generator``."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Metrics that distinguish a trained model from an untrained one. Every rank calls it."""
        raise NotImplementedError

    def draw(self) -> list[Path]:
        """Write pictures and the like, on rank 0; return what was written."""
        return []

    def prepare(self, state: dict[str, Any] | None = None) -> None:
        self.untrained = self.evaluate()
        super().prepare(state)

    def make_optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": s.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.95))

    @property
    def progress(self) -> float:
        """Finished fraction of the run, 0..1."""
        return self.step / self.steps

    def test_images(self, shared: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalized test images and their labels, batch by batch; of each this rank's part if ``shared``."""
        for images, labels in evaluation_batches(self.data, self.batching, self.size, self.device, shared=shared):
            yield self.normalize(images), labels.to(self.device)

    @torch.no_grad()
    def features(self, encode: Callable[[Tensor], Tensor], most: int = 10000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features and labels of the training images and of the test images, at most ``most`` of each."""
        self.model.eval()
        once = dataclasses.replace(self.batching, epochs=1, accumulate=1, batch_size=min(256, len(self.data.train)))
        parts = []
        for batches in (
            training_batches(self.data, once, self.size, 0, self.device, shared=True),
            evaluation_batches(self.data, once, self.size, self.device, shared=True),
        ):
            features, labels, count = [], [], 0
            for images, label in batches:
                with self.autocast():
                    encoded = encode(self.normalize(images)).float()
                features.append(launch.gather(encoded))
                labels.append(launch.gather(label.to(self.device)))
                count += len(labels[-1])
                if count >= most:
                    break
            parts += [torch.cat(features), torch.cat(labels)]
        first, second, third, fourth = parts
        return first, second, third, fourth

    def learning_rate(self) -> float:
        s = self.settings
        warmup = min(s.warmup_epochs, s.epochs / 5) * self.steps_per_epoch
        if self.step < warmup:
            return s.learning_rate * (self.step + 1) / (warmup + 1)
        return s.learning_rate * 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, self.steps - warmup)))

    def batches(self, start: int) -> Iterator[Tensor]:
        for images, _ in training_batches(self.data, self.batching, self.size, start, self.device, shared=True):
            yield images

    def loss(self, batch: Tensor, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_for(self.settings.seed, number))
        with self.autocast():
            loss = self.view_loss(self.normalize(batch), generator)
        self.meter.add(len(batch), loss.detach().double() * len(batch))
        return loss

    def probe_inputs(self, count: int) -> tuple[Tensor, dict[str, Any]]:
        return next(iter(self.test_images()))[0][:count], {}

    def fingerprint(self) -> str:
        return self.data.fingerprint

    def metadata(self) -> dict[str, Any]:
        return {"data": self.data.name, "mean": self.data.mean, "std": self.data.std}

    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def describe(self) -> str:
        return (
            f"{self.data.name}: {len(self.data.train)} training and {len(self.data.test)} test images, "
            f"{self.size[0]} x {self.size[1]}; {self.trained_parameters():,} trained parameters, {self.precision} on "
            f"{self.device} ({self.precision_reason})"
        )

    def next_steps(self) -> dict[str, str]:
        folder = shlex.quote(str(self.output))
        return super().next_steps() | {
            f"crate-kernels segment IMAGE --checkpoint {folder}": "what its attention separates in an image",
            f"crate-kernels train --init {folder}": "a classifier that starts from these weights",
        }

    def finish(self, report: Report, began: float) -> None:
        """Evaluate once more, save the model, and write what the subclass draws."""
        metrics, parameters = self.evaluate(), self.trained_parameters()
        model = self.plain(self.model)
        if model is None:
            return
        self.model = model
        for name, value in metrics.items():
            trained, untrained = (
                f"{100 * number:.2f} %" if name.endswith("accuracy") else f"{number:.4f}"
                for number in (value, self.untrained[name])
            )
            report.line(f"{name.replace('_', ' ')}: {trained} (untrained {untrained})")
        path = self.output / "model.safetensors"
        model.save(path, **self.metadata())
        written = [path, *self.draw(), *self.plot_probe()]
        loader = loader_speed(self.data, self.batching, self.size)
        rate = self.steps * self.per_step() / max(self.seconds, 1e-9) / launch.size()
        report.line(f"loader alone: {loader:.0f} images/s; training took {rate:.0f} images/s")
        self.write_summary(
            {
                "trained": metrics,
                "untrained": self.untrained,
                "training_seconds": self.seconds,
                "parameters": parameters,
                "config": dataclasses.asdict(self.settings),
                "precision": self.precision,
                "precision_reason": self.precision_reason,
                "device": str(self.device),
                "ranks": launch.size(),
                "broken_images": list(self.data.broken.found),
                "loader_images_per_second": loader,
                "version": __version__,
                "torch": torch.__version__,
            }
        )
        report.line(f"{clock(time.monotonic() - began)} in all; {', '.join(map(str, written))}")
