"""What the self-supervised vision commands share: whole images in, views cut on the device, a resumable loop, probes.

Step ``i`` of a run is a function of the seed and ``i``: a resumed run ends where an uninterrupted one does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, log_softmax, normalize, one_hot

from ..models import CrateModel
from ..models.checkpoint import write_atomically
from ..ops import requested_backend, use_backend
from ..ops.backends import FILES
from ..version import __version__
from . import checkpoints, config
from .config import FREE, Config, option
from .data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    ImageData,
    Split,
    TrainingOrder,
    load,
    seed_for,
    test_batches,
    training_batches,
)
from .progress import Report, clock


@dataclass
class PretrainConfig:
    """Options that every self-supervised run has."""

    data: str = option("photos", "photos, mnist5k, fashion-mnist, cifar10, or a folder of class folders", "data")
    root: str | None = option(None, "where the named data set's files are, in torchvision's layout", "data")
    image_size: int | None = option(None, "pixels along an image", "data")

    dim: int = option(128, "width of the tokens", "model")
    depth: int = option(4, "number of layers", "model")
    heads: int = option(4, "number of attention heads", "model")
    patch_size: int = option(8, "pixels along a patch", "model")

    epochs: int = option(20, "passes over the training images", "optimisation")
    batch_size: int = option(64, "images per optimiser step", "optimisation")
    learning_rate: float = option(1e-3, "after the warm-up; falls to zero along a cosine", "optimisation")
    warmup_epochs: float = option(1.0, "epochs of linear warm-up", "optimisation")
    weight_decay: float = option(0.05, "of matrices, not of biases and norms", "optimisation")
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 does not clip", "optimisation")
    seed: int = option(0, "of weights, views and masks", "optimisation")

    precision: str = option("auto", "auto takes bf16 on a GPU", "machine", choices=("auto", "fp32", "bf16"))
    backend: str | None = option(
        None, "backend of the operators, instead of the automatic choice", "machine", choices=FILES
    )
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one", "machine")
    workers: int | None = option(None, "processes that read image files", "machine")

    output: str = option("runs/pretrain-{data}", "folder of everything the run writes", "output")
    checkpoint_seconds: float = option(30.0, "write the state this often", "output")
    log_steps: int = option(25, "steps between two records of the metrics log", "output")

    def fixed(self) -> dict[str, Any]:
        """The values that decide the result: a resumed run must agree on them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}

    def check(self) -> None:
        """Raise ValueError for a value out of its range."""
        for name in ("dim", "depth", "heads", "patch_size", "epochs", "batch_size", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "warmup_epochs", "weight_decay", "clip_grad", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"--heads {self.heads} does not divide --dim {self.dim}")

    def image_config(self) -> Config:
        """What the readers and loaders of labelled images need to know."""
        return Config(
            data=self.data, root=self.root, batch_size=self.batch_size, epochs=self.epochs, seed=self.seed,
            workers=self.workers,
        )  # fmt: skip


# -- data --------------------------------------------------------------------------------------------------------------

PHOTOS = {
    "skimage": ("data", ("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
                         "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
                         "retina.jpg", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}  # fmt: skip
"""Package -> its folder of pictures, and the photographs among them."""


def photos(size: int, seed: int, train: int = 256, test: int = 32) -> ImageData:
    """Square crops, ``size`` pixels wide, of the photographs inside scikit-image and scikit-learn.

    A crop's label is its photograph. Training crops come from the left 70 % of each, test crops from the rest.

    Raises:
        DataError: neither package is installed.
    """
    from PIL import Image

    files = []
    for package, (folder, names) in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            files += [Path(spec.submodule_search_locations[0], folder, name) for name in names]
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError("the photos are those of scikit-image and scikit-learn: pip install scikit-image scikit-learn")
    generator = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for file in files:
        with Image.open(file) as image:
            image = image.convert("RGB")
        cut = int(image.width * 0.7)
        for part, count, left, right in (("train", train, 0, cut), ("test", test, cut, image.width)):
            for _ in range(count):
                largest = min(right - left, image.height)
                side = generator.integers(min(size, largest), largest + 1)
                x, y = generator.integers(left, right - side + 1), generator.integers(0, image.height - side + 1)
                crop = image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
                parts[part].append(np.asarray(crop))

    def split(part: str, count: int) -> Split:
        return Split(np.stack(parts[part]), np.repeat(np.arange(len(files)), count))

    names = [file.stem for file in files]
    return ImageData("photos", names, split("train", train), split("test", test), IMAGENET_MEAN, IMAGENET_STD,
                     (size, size))  # fmt: skip


def random_crops(
    images: Tensor, size: int, scale: tuple[float, float], flip: float, generator: torch.Generator
) -> Tensor:
    """A random square of every image, resized: ``(B, C, H, W)`` -> ``(B, C, size, size)``, on the images' device.

    Args:
        scale: smallest and largest share of the image's area.
        flip: probability of mirroring.
        generator: on the CPU.
    """
    batch = len(images)
    draw = torch.rand(4, batch, generator=generator)
    side = (scale[0] + (scale[1] - scale[0]) * draw[0]).sqrt()
    mirror = torch.where(draw[1] < flip, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side * mirror, side
    theta[:, :, 2] = ((2 * draw[2:] - 1) * (1 - side)).T
    grid = affine_grid(theta.to(images.device, images.dtype), (batch, images.shape[1], size, size), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


# -- probes ------------------------------------------------------------------------------------------------------------


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """The share of ``test (n, d)`` named right by a vote of its ``k`` nearest in ``train (m, d)``.

    Nearness is the cosine, a vote weighs ``exp(cosine / temperature)``: DINO's evaluation (arXiv 2104.14294).
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
    """The share of ``test (n, d)`` named right by logistic regression on ``train (m, d)``, standardised."""
    mean, deviation = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = (train - mean) / deviation, (test - mean) / deviation
    weight = torch.zeros(int(train_labels.max()) + 1, train.shape[1] + 1, device=train.device, requires_grad=True)
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


class Pretrainer:
    """A model in self-supervised training. A subclass builds the model and says what a batch's loss is.

    Args:
        settings: how.
        output: folder of ``last.pt``, ``metrics.jsonl`` and the results.
        device: where.
    """

    model: CrateModel

    def __init__(self, settings: PretrainConfig, output: Path, device: torch.device):
        self.settings, self.output, self.device = settings, output, device
        self.images = settings.image_config()
        self.data = photos(settings.image_size or 64, settings.seed) if settings.data == "photos" else load(self.images)
        side = settings.image_size
        self.size = (side, side) if side else self.data.image_size or (224, 224)
        if any(pixels % settings.patch_size for pixels in self.size):
            raise ValueError(
                f"--patch-size {settings.patch_size} does not divide images of {self.size[0]} x {self.size[1]} pixels"
            )
        shape = (1, self.data.channels, 1, 1)
        self.mean = torch.tensor(self.data.mean, device=device).view(shape) * 255
        self.std = torch.tensor(self.data.std, device=device).view(shape) * 255
        self.steps_per_epoch = TrainingOrder(len(self.data.train), self.images).per_epoch
        self.steps = settings.epochs * self.steps_per_epoch
        self.step, self.seconds = 0, 0.0
        torch.manual_seed(settings.seed)
        self.model = self.build().to(device)
        self.untrained = self.evaluate()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))

    def build(self) -> CrateModel:
        raise NotImplementedError

    def loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of normalised ``images (B, C, H, W)``; whatever is random comes from ``generator``."""
        raise NotImplementedError

    def after_step(self) -> None:
        """What follows the optimiser's step."""

    def evaluate(self) -> dict[str, float]:
        """Figures that tell a trained model from an untrained one."""
        raise NotImplementedError

    def finish(self) -> list[Path]:
        """Write pictures and the like; return what was written."""
        return []

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0..1."""
        return self.step / self.steps

    def normalize(self, images: Tensor) -> Tensor:
        return (images.to(self.device, non_blocking=True).float() - self.mean) / self.std

    def autocast(self) -> contextlib.AbstractContextManager:
        name = self.settings.precision
        enabled = name == "bf16" or (name == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def features(self, encode: Callable[[Tensor], Tensor], most: int = 10000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features and labels of the training images and of the test images, at most ``most`` of each."""
        self.model.eval()
        once = dataclasses.replace(self.images, epochs=1, batch_size=min(256, len(self.data.train)))
        parts = []
        for batches in (
            training_batches(self.data, once, self.size, 0, self.device),
            test_batches(self.data, once, self.size, self.device),
        ):
            features, labels, count = [], [], 0
            for images, label in batches:
                with self.autocast():
                    features.append(encode(self.normalize(images)).float())
                labels.append(label.to(self.device))
                count += len(label)
                if count >= most:
                    break
            parts += [torch.cat(features), torch.cat(labels)]
        return tuple(parts)

    def learning_rate(self) -> float:
        s = self.settings
        warmup = min(s.warmup_epochs, s.epochs / 5) * self.steps_per_epoch
        if self.step < warmup:
            return s.learning_rate * (self.step + 1) / (warmup + 1)
        return s.learning_rate * 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, self.steps - warmup)))

    def train_step(self, images: Tensor) -> Tensor:
        """One optimiser step -> its loss."""
        s = self.settings
        self.model.train()
        generator = torch.Generator().manual_seed(seed_for(s.seed, self.step))
        with self.autocast():
            loss = self.loss(self.normalize(images), generator)
        loss.backward()
        if s.clip_grad:
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], s.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.after_step()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "config": dataclasses.asdict(self.settings),
            "classes": self.data.classes,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state` made; ValueError if the images are others."""
        if state["classes"] != self.data.classes:
            raise ValueError(f"the run to resume has the classes {state['classes']}, the data has {self.data.classes}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def fit(self, report: Report) -> None:
        """Train to the last step, writing the log and the state."""
        s = self.settings
        log = checkpoints.MetricsLog(self.output / "metrics.jsonl", self.step)
        before, started, first = self.seconds, time.monotonic(), self.step
        saved, total, counted = started, 0.0, 0
        for images, _ in training_batches(self.data, self.images, self.size, self.step, self.device):
            total, counted = total + self.train_step(images), counted + 1
            now = time.monotonic()
            self.seconds = before + now - started
            if self.step % s.log_steps == 0 or self.step == self.steps:
                loss, total, counted = float(total) / counted, 0.0, 0
                if not math.isfinite(loss):
                    raise ValueError(f"the loss is {loss} at step {self.step}; a lower --learning-rate may help")
                rate = (self.step - first) * s.batch_size / (now - started)
                left = (self.steps - self.step) * (now - started) / (self.step - first)
                log.write(step=self.step, loss=loss, learning_rate=self.learning_rate(), images_per_second=rate)
                report.show(self.step, f"step {self.step}  loss {loss:.4f}  {rate:.0f} images/s  {clock(left)} left")
            if now - saved >= s.checkpoint_seconds:
                checkpoints.save(self.output / checkpoints.LAST, self.state())
                saved = now
        checkpoints.save(self.output / checkpoints.LAST, self.state())


# -- command -----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, kind: type[PretrainConfig]) -> None:
    """All options of ``kind``, and ``--resume``."""
    config.add_arguments(parser, kind)
    parser.add_argument("--resume", metavar="FOLDER", help="continue the run in this folder to the same result")


def run(args: argparse.Namespace, kind: type[PretrainConfig], trainer_type: type[Pretrainer]) -> int:
    """Train as the command line says; every file lands in the output folder."""
    began = time.monotonic()
    options = config.given(args, kind)
    state = None
    if args.resume is None:
        settings = kind(**options)
    else:
        state = checkpoints.load(Path(args.resume) / checkpoints.LAST)
        settings = checkpoints.resumed_config(state, {"output": args.resume, **options}, kind)
    settings.check()
    output = Path(settings.output.format(data=Path(settings.data).name))
    if state is None and (output / checkpoints.LAST).exists() and not (output / "summary.json").exists():
        raise ValueError(f"{output} holds an unfinished run: continue it with --resume {output}, or choose another")
    name = settings.device
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)

    with use_backend(settings.backend or requested_backend()):
        trainer = trainer_type(settings, output, device)
        if state is not None:
            trainer.load_state(state)
        output.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_leftovers(output)
        (output / "summary.json").unlink(missing_ok=True)
        parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        with Report(trainer.steps) as report:
            report.line(
                f"{trainer.data.name}: {len(trainer.data.train)} training and {len(trainer.data.test)} test images, "
                f"{trainer.size[0]} x {trainer.size[1]}; {parameters:,} trained parameters on {device}"
            )
            trainer.fit(report)
            figures = trainer.evaluate()
            for figure, value in figures.items():
                report.line(f"{figure.replace('_', ' ')}: {value:.4f} (untrained {trainer.untrained[figure]:.4f})")
            model = output / "model.safetensors"
            trainer.model.save(model, data=trainer.data.name, mean=trainer.data.mean, std=trainer.data.std)
            written = [model, *trainer.finish()]
            summary = {
                "trained": figures,
                "untrained": trainer.untrained,
                "training_seconds": trainer.seconds,
                "parameters": parameters,
                "config": dataclasses.asdict(settings),
                "device": str(device),
                "version": __version__,
                "torch": torch.__version__,
            }
            write_atomically(output / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
            report.line(f"{clock(time.monotonic() - began)} in all; {', '.join(map(str, written))}")
    return 0
