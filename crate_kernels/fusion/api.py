"""``fuse(model)`` and its inverse ``unfuse(model)``: operators for models that people already have.

A module is found by its structure (the attributes it has, never where its class comes from), and taken only after its
own ``forward`` and the operators agreed, outputs and gradients, on a random probe in float64. What then changes is its
class: to a subclass of its own class with another ``forward``. Everything else (parameters, buffers, hooks, children,
the module object itself) stays where it is, so state dicts, optimizers and references held elsewhere notice nothing.
``docs/fuse.md`` has the rules and their reasons.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .recognition import recognize, untouched_parts
from .routes import OperatorRoute, class_with_route


@dataclass
class FuseReport:
    """What :func:`fuse` did: module path -> what runs now, and module path -> why it was left as it is."""

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} modules"]
        lines += [f"  {line}" for line in _grouped(self.fused)]
        if self.left:
            lines += ["left as they are", *(f"  {line}" for line in _grouped(self.left))]
        return "\n".join(lines)


def fuse(model: nn.Module) -> FuseReport:
    """Let the CRATE parts of ``model`` run as fused operators, in place; calling it again changes nothing.

    Recognised are the public code's ``Attention``, ``CausalSelfAttention``, ``FeedForward``, ``MLP`` and
    ``OvercompleteISTABlock``, the ``PreNorm`` around them, and the layers and stacks that join them (vision CRATE,
    CRATE-MAE's encoder and decoder blocks, CRATE-alpha, CRATE-GPT2), also as copies under other class names.

    Outputs and all gradients stay the same up to rounding. Parameters stay the same objects under the same names; the
    optimiser, ``state_dict``, ``deepcopy``, pickling, ``torch.compile`` and data-parallel wrappers go on working. A
    module takes its own, unfused ``forward`` wherever the fused one could not be seen to do the same: in training
    with dropout, when it is called with more than one tensor (attention maps asked for, a mask), and when something
    that it would bypass has hooks.

    Returns:
        A printable :class:`FuseReport` of what was fused, and of what was left alone and why.
    """
    report = FuseReport()
    known: dict = {}  # what probes found out, for layers that repeat
    reasons: dict[str, str] = {}
    # Children first: a layer is recognised by the parts that were recognised in it.
    for path, module in reversed(list(model.named_modules())):
        if not isinstance(module, OperatorRoute):
            result = recognize(module, known)
            if isinstance(result, str):
                reasons[path] = result
            elif result is not None:
                recipe, plan = result
                module.__class__ = class_with_route(recipe, type(module))
                module.__dict__["_fused"] = plan
    for path, module in model.named_modules():
        if isinstance(module, OperatorRoute):
            report.fused[path] = f"{type(module)._original.__name__}: {module._describe()}"
    report.left = reasons | {path: reason for path, reason in untouched_parts("", model) if path not in reasons}
    report.left = dict(sorted(report.left.items()))
    return report


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`, in place and exactly: every module has its own class again."""
    module: Any
    for module in model.modules():
        if isinstance(module, OperatorRoute):
            for name in ("_fused", "keep_folded", "_folded"):
                module.__dict__.pop(name, None)
            module.__class__ = type(module)._original  # type: ignore[assignment]


def _grouped(entries: dict[str, str]) -> list[str]:
    """One line for each kind of path: layer numbers written as ``*``, a number behind one (a place in it) kept."""
    groups: dict[tuple[str, str], int] = {}
    for path, text in entries.items():
        key = (re.sub(r"(?<![^.])(?<!\d\.)\d+(?![^.])", "*", path) or "(the model)", text)
        groups[key] = groups.get(key, 0) + 1
    return [f"{path}{f' ({count} times)' if count > 1 else ''}: {text}" for (path, text), count in groups.items()]
