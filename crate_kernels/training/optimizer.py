"""timm's optimizers and schedules, as the options of ``train`` ask for them."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn


def make_optimizer(settings: Any, model: nn.Module) -> torch.optim.Optimizer:
    betas: dict[str, Any] = {} if settings.beta2 is None else {"betas": (0.9, settings.beta2)}
    return create_optimizer_v2(
        model, opt=settings.optimizer, lr=settings.learning_rate, weight_decay=settings.weight_decay, **betas
    )


def make_schedule(settings: Any, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """The learning rate by the step: ``step_update(step)`` sets it."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=settings.schedule,
        num_epochs=settings.epochs,
        warmup_epochs=min(settings.warmup_epochs, settings.epochs / 5),  # a short run must reach its learning rate
        warmup_lr=settings.learning_rate / 100,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return schedule


def check_optimizer(settings: Any) -> None:
    """Raise ValueError for an optimizer that is unknown or cannot take a step on a small test matrix."""
    layer = nn.Linear(2, 2)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = make_optimizer(settings, layer)
        optimizer.step()
    except Exception as error:
        name, known = settings.optimizer, list_optimizers()
        if name.lower() not in known:
            nearest = ", ".join(difflib.get_close_matches(name.lower(), known, n=5, cutoff=0))
            raise ValueError(f"--optimizer must be one of timm's, such as {nearest}; got {name}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        beta2 = "" if settings.beta2 is None else f" with --beta2 {settings.beta2}"
        raise ValueError(f"--optimizer {name}{beta2} cannot take a step here: {reason}") from error
    if settings.beta2 is not None and settings.beta2 not in optimizer.defaults.get("betas", ()):
        raise ValueError(
            f"--beta2 applies only with an optimizer that has it, not with --optimizer {settings.optimizer}"
        )


def check_augmentation(policy: str) -> None:
    """Raise ValueError for a policy of ``--auto-augment`` that fails on a small test image."""
    from PIL import Image
    from timm.data import create_transform

    try:
        transform = create_transform((3, 16, 16), is_training=True, use_prefetcher=True, auto_augment=policy)
        transform(Image.new("RGB", (16, 16)))
    except Exception as error:
        raise ValueError(
            "--auto-augment must be a policy of timm's, such as rand-m9-mstd0.5, augmix-m3-w3, 3a or original; got "
            f"{policy}"
        ) from error
