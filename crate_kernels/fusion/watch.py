"""Detects changes in microseconds: has anything changed on which a decision was based?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..nn import KeepsFolded
from .description import version_of
from .names import FUSION, ORIGINAL

GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
"""Places where torch stores the hooks for all modules."""

_WRITTEN_BY_PYTHON = {"__annotations__", "__annotations_cache__", "__annotate_func__", "__slotnames__", "__doc__"}


class Watch:
    """Every mutable object that a decision about ``module`` looked at, with a copy of its content.

    ``holds`` compares all of it in a few calls into C: attributes, children and buffers; hooks; classes and their
    methods; versions of tensors. The watch has no reference to ``module``, because ``module`` has a reference to the
    decision. A cycle would keep the weights of a deleted model in memory.
    """

    def __init__(self, module: nn.Module):
        self._own = {**module.__dict__, FUSION: _ANYTHING}
        self._own_parts = dict(module._modules), dict(module._buffers)
        self._seen_ids = {id(module)}
        self._live: list[Any] = []
        self._seen: list[Any] = []
        self._modules: list[nn.Module] = []
        self._types: list[type] = []
        self._hooks = list(GLOBAL_HOOKS)
        self._torch_classes: list[type] = []
        self._tensors: list[Tensor] = []
        self._versions: list[int | None] = []
        self._add_class(type(module))

    def note(self, thing: Any) -> None:
        """Watch a module (not the parts in it), a container, or a tensor."""
        if id(thing) in self._seen_ids:
            return
        self._seen_ids.add(id(thing))
        if isinstance(thing, nn.Module):
            self._modules.append(thing)
            self._add_class(type(thing))
            for held in (thing.__dict__, thing._modules, thing._buffers):
                self._add(held, dict(held))
            self._hooks += [
                thing._forward_hooks,
                thing._forward_pre_hooks,
                thing._backward_hooks,
                thing._backward_pre_hooks,
            ]
        elif not isinstance(thing, Tensor):
            self._add(thing, thing.copy())
        elif not thing.is_inference():
            self._tensors.append(thing)

    def _add(self, live: Any, seen: Any) -> None:
        self._live.append(live)
        self._seen.append(seen)

    def _add_class(self, kind: type) -> None:
        for c in _classes(kind):
            if id(c) not in self._seen_ids:
                self._seen_ids.add(id(c))
                if _is_torchs(c):
                    self._torch_classes.append(c)
                else:
                    self._add(vars(c), dict(vars(c)))

    def close(self) -> Watch:
        """Finish the watch after everything has been noted."""
        self._types = [*map(type, self._modules)]
        self._versions = [version_of(t) for t in self._tensors]
        self._forwards = _forwards(self._torch_classes)
        self._was_hooked = [*map(bool, self._hooks)] if any(self._hooks) else None
        return self

    def holds(self, module: nn.Module) -> bool:
        """Whether nothing has changed. ``module`` is the module of the watch, or a copy of it."""
        held = module.__dict__
        try:
            return (
                (not any(self._hooks) if self._was_hooked is None else [*map(bool, self._hooks)] == self._was_hooked)
                and held == self._own
                and (held["_modules"], held["_buffers"]) == self._own_parts
                and self._live == self._seen
                and [*map(type, self._modules)] == self._types
                and _forwards(self._torch_classes) == self._forwards
                and [t._version for t in self._tensors] == self._versions
            )
        except Exception:  # values that cannot be compared count as different
            return False


class _Anything:
    """Equal to everything. It stands for the route itself, which contains the watch."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


_ANYTHING = _Anything()


# -- classes -------------------------------------------------------------------------------------------------------


def class_bodies(kinds: Iterable[type]) -> dict[type, dict[str, Any]]:
    """The methods and attributes of the classes from which modules of these kinds inherit."""
    return {c: class_body(c) for kind in kinds for c in _classes(kind)}


def _classes(kind: type) -> list[type]:
    """The classes whose code a module of class ``kind`` runs, without the classes that ``fuse`` adds."""
    return [c for c in kind.__mro__ if c not in (nn.Module, object, KeepsFolded) and ORIGINAL not in vars(c)]


def _forwards(kinds: list[type]) -> list[Any]:
    return [getattr(c, "forward", None) for c in kinds]  # FSDP's own class has no forward


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def class_body(kind: type) -> dict[str, Any]:
    """Those definitions of ``kind`` itself on which a ``forward`` may depend."""
    if _is_torchs(kind):
        return {"forward": getattr(kind, "forward", None)}
    return {name: value for name, value in vars(kind).items() if name not in _WRITTEN_BY_PYTHON}
