"""The questions that a route asks about modules, to decide between operators and the modules' own ``forward``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from .description import describe, hooked
from .names import FUSION
from .watch import GLOBAL_HOOKS, class_body

T = TypeVar("T")


class Look:
    """Answers a route's questions about modules. ``note`` is called with everything on which the answers depend."""

    def __init__(self, note: Callable[[Any], None]):
        self._note = note
        self._bodies: dict[type, dict[str, Any]] = {}

    def unchanged(self, module: nn.Module) -> bool:
        """Whether a fused module, and all parts that its operators skip, are unchanged since the numerical test."""
        fusion = module.__dict__[FUSION]
        return (
            not any(GLOBAL_HOOKS)
            and self._same(module, fusion)
            and not any(hooked(m) for m in self.skipped(module) if m is not module)
        )

    def _same(self, module: nn.Module, fusion: Any) -> bool:
        route = fusion.route
        found = describe(module, route.reads, route.called(module), self._note)
        return found == fusion.description and self._classes_are_same(fusion.bodies)

    def _classes_are_same(self, bodies: dict[type, dict[str, Any]]) -> bool:
        for kind, body in bodies.items():
            if kind not in self._bodies:
                self._bodies[kind] = class_body(kind)
            if self._bodies[kind] != body:
                return False
        return True

    def skipped(self, module: nn.Module) -> Iterator[nn.Module]:
        """A fused module, and the modules in it that its operators do not call."""
        yield module
        called = module.__dict__[FUSION].route.called(module)
        for name, child in module._modules.items():
            if child is not None and name not in called:
                yield from child.modules()

    def hooked(self, module: nn.Module) -> bool:
        """Whether a hook can observe calls of this module itself."""
        self._note(module)
        return hooked(module)

    def plain(self, module: nn.Module, *kinds: type[nn.Module]) -> bool:
        """Whether this is one of torch's own modules, and no hook can observe its calls."""
        self._note(module)
        return type(module) in kinds and not hooked(module)

    def part(self, module: nn.Module) -> None:
        """Record that the decision depends on the content of this module."""
        self._note(module)

    def route(self, module: nn.Module | None, kind: type[T]) -> T | None:
        """The route of a module that was fused with a route of type ``kind`` and still takes it."""
        if module is None:
            return None
        self._note(module)
        fusion = module.__dict__.get(FUSION)
        if fusion is None or not isinstance(fusion.route, kind):
            return None
        return fusion.route if getattr(type(module).forward, "takes_operators", False) else None


class TracedLook(Look):
    """The same questions in a form that ``torch.compile`` can trace. Guards of torch.compile replace the watch."""

    def __init__(self):
        super().__init__(lambda _: None)

    def _same(self, module: nn.Module, fusion: Any) -> bool:
        return fusion.description.matches(module)
