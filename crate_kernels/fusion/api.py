"""``fuse(model)`` and its inverse ``unfuse(model)``: operators for models that already exist.

``fuse`` finds a module by the attributes that it has, never by its class's name. A numerical test then compares the
module's own ``forward`` with the operators on a random input in float64: outputs and gradients must agree. Only then
the class of the module changes, to a subclass of its own class with another ``forward``. Everything else stays
unchanged: parameters, buffers, hooks, children and the module object itself. State dicts, optimizers and other
references to the module therefore keep working. ``docs/fuse.md`` has the rules and their reasons.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import nn

from ..ops import checks
from .modules import Fused, attach, detach, is_as_tried, set_residual_dtype
from .names import FUSION, ORIGINAL
from .recognition import Known, recognize, untouched_parts


@dataclass
class FuseReport:
    """The result of :func:`fuse`: module path -> what it runs now, and module path -> why it was left as it is."""

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} modules"]
        lines += [f"  {line}" for line in _grouped(self.fused)]
        if self.left:
            lines += ["left as they are", *(f"  {line}" for line in _grouped(self.left))]
        return "\n".join(lines)


def fuse(model: nn.Module, *, residual_dtype: torch.dtype | None = None) -> FuseReport:
    """Run the CRATE parts of ``model`` as operators, in place.

    ``fuse`` recognizes the public code's ``Attention``, ``CausalSelfAttention``, ``FeedForward``, ``MLP`` and
    ``OvercompleteISTABlock``, the ``PreNorm`` around them, and the layers and stacks that join them (vision CRATE,
    CRATE-MAE's encoder and decoder blocks, CRATE-alpha, CRATE-GPT2). It also recognizes copies under other class names.

    Outputs and all gradients stay the same up to rounding. Parameters stay the same objects under the same names. The
    optimizer, ``state_dict``, ``deepcopy``, pickling, ``torch.compile`` and data-parallel wrappers work as before.

    A module runs its own ``forward`` whenever the operators might compute something else: in training with dropout, if
    it is called with more than one argument (for attention maps, or with a mask), and if something that the operators
    skip has hooks or has changed. Call ``fuse`` again after a change: it tests changed modules again and leaves all
    others unchanged.

    Args:
        model: any ``nn.Module``.
        residual_dtype: dtype of the residual stream in fused layers and stacks under autocast. None keeps the dtype of
            the model's own code: float32 for float32 parameters. ``torch.bfloat16`` saves memory and rounds the stream
            after each half of a layer; ``docs/numerics.md`` has both errors. It has no effect without autocast.

    Returns:
        A printable :class:`FuseReport`: what was fused, what was left alone, and why.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``residual_dtype`` no floating dtype.
    """
    _check(model)
    checks.residual_dtype(residual_dtype)
    report, known = FuseReport(), Known()
    reasons: dict[str, str] = {}
    # Children come first, because a layer is recognized by its recognized parts.
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, Fused):
            if is_as_tried(module):
                continue
            detach(module)
        route = recognize(module, known)
        if isinstance(route, str):
            reasons[path] = route
        elif route is not None:
            attach(module, route)
    for path, module in model.named_modules():
        if isinstance(module, Fused):
            set_residual_dtype(module, residual_dtype)
            route = getattr(module, FUSION).route
            report.fused[path] = f"{getattr(module, ORIGINAL).__name__}: {route.describe(module)}"
    report.left = reasons | {path: reason for path, reason in untouched_parts("", model) if path not in reasons}
    report.left = dict(sorted(report.left.items()))
    return report


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`, in place and exactly. Every module gets its own class back.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check(model)
    for module in model.modules():
        detach(module)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model: expected a torch.nn.Module, got {got}")


def _grouped(entries: dict[str, str]) -> list[str]:
    """One line for each kind of path. Layer numbers become ``*``. A number after a layer number is a position and
    stays."""
    groups: dict[tuple[str, str], int] = {}
    for path, text in entries.items():
        key = (re.sub(r"(?<![^.])(?<!\d\.)\d+(?![^.])", "*", path) or "(the model)", text)
        groups[key] = groups.get(key, 0) + 1
    return [f"{path}{f' ({count} times)' if count > 1 else ''}: {text}" for (path, text), count in groups.items()]
