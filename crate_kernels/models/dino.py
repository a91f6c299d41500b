"""CRATE-DINO: a vision backbone trained by self-distillation (DINO, arXiv 2104.14294; SimDINO, arXiv 2502.10385).

The networks are here; the losses and the multi-crop views are in :mod:`crate_kernels.training.dino`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ..ops import checks
from .base import CrateModel
from .crate import CRATE


class ProjectionHead(nn.Module):
    """``(B, dim)`` -> scores of ``prototypes (B, prototypes)``, or unit vectors ``(B, bottleneck)`` without prototypes.

    Three linear layers with GELU between them, then length one, then cosines with the prototypes, which have length
    one as well.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.layers:
            if not isinstance(layer, nn.Linear):
                continue
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck)) if prototypes else None

    def forward(self, x: Tensor) -> Tensor:
        # In half precision the eps of normalize would be below the smallest number.
        x = normalize(self.layers(x).float() if x.dtype in (torch.float16, torch.bfloat16) else self.layers(x), dim=-1)
        return x if self.prototypes is None else linear(x, normalize(self.prototypes, dim=-1).to(x.dtype))


class Branch(nn.Module):
    """A backbone without classifier, followed by a head."""

    def __init__(self, backbone: CRATE, head: ProjectionHead):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Views ``(B, C, H, W)``, of any sizes -> ``(V, B, K)``. Neighboring views of one size run as one batch."""
        features, start = [], 0
        while start < len(views):
            stop = start + 1
            while stop < len(views) and views[stop].shape == views[start].shape:
                stop += 1
            features.append(self.backbone(torch.cat(list(views[start:stop]))))
            start = stop
        return self.head(torch.cat(features)).unflatten(0, (len(views), -1))


class CrateDINO(CrateModel):
    """Self-distillation: from every view the student predicts the output of the teacher for the global views.

    The teacher is a moving average of the student and gets no gradient. ``prototypes = 0`` is SimDINO: the outputs of
    the heads are unit vectors, and a coding-rate term replaces centering and sharpening.

    Args:
        hidden, bottleneck, prototypes: sizes of both heads, see :class:`ProjectionHead`.
        residual_dtype: see :attr:`CrateModel.residual_dtype`.
        backbone: arguments of :class:`crate_kernels.models.CRATE`.
    """

    def __init__(
        self,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 65536,
        residual_dtype: torch.dtype | None = None,
        **backbone,
    ):
        checks.positive_ints(hidden=hidden, bottleneck=bottleneck)
        checks.integer("prototypes", prototypes)
        if backbone.get("num_classes", 0) != 0:
            raise ValueError(
                f"num_classes: the backbone has no classifier, so expected 0, got {backbone['num_classes']}"
            )
        backbone = dict(backbone, num_classes=0)
        super().__init__(dict(backbone, hidden=hidden, bottleneck=bottleneck, prototypes=prototypes))
        network = CRATE(**backbone)
        self.student = Branch(network, ProjectionHead(network.num_features, hidden, bottleneck, prototypes))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.residual_dtype = residual_dtype

    @property
    def backbone(self) -> CRATE:
        """The backbone of the teacher, which is the result of the training."""
        return self.teacher.backbone

    def forward(self, images: Tensor) -> Tensor:
        """The teacher's features ``(B, dim)`` of ``images (B, C, H, W)``: pooled and normalized."""
        return self.backbone(images)

    @torch.no_grad()
    def teach(self, views: Sequence[Tensor]) -> Tensor:
        """The output of the teacher for ``views``, without gradient: ``(V, B, K)``."""
        return self.teacher(views)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """``teacher = momentum·teacher + (1 − momentum)·student``, parameter by parameter."""
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)
