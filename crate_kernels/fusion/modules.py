"""Fused modules: their class, and the choice between operators and the module's own ``forward``."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..nn import KeepsFolded
from .description import Description, describe
from .look import Look, TracedLook
from .names import FUSION, ORIGINAL
from .routes import ISTARoute, LayerRoute, Route, StackRoute, Step
from .watch import Watch, class_bodies


class Fused(nn.Module):
    """Base of the class of a fused module, before the module's own class. Each call runs the operators or its own
    ``forward``."""

    _crate_original: type[nn.Module] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # An additional argument asks for something else, such as attention maps or a mask.
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            step = _step(self)
            out = None if step is None else step(self, args[0])
            if out is not None:
                return out
        return super().forward(*args, **kwargs)

    forward.takes_operators = True  # type: ignore[attr-defined]  # tells it from the forward of a subclass

    def __reduce_ex__(self, protocol):
        # The class is created at run time. A pickle therefore names the original class.
        made: Any = super().__reduce_ex__(protocol)
        _, (_, *arguments), *rest = made
        return _new, (self._crate_original, isinstance(self, KeepsFolded), *arguments), *rest


class FusedISTA(KeepsFolded, Fused):
    """A fused module with a dictionary. It may keep its folded matrix between calls."""


@dataclass(eq=False)
class Fusion:
    """The additional state of a fused module."""

    route: Route
    description: Description
    """The description of the module at the numerical test."""
    bodies: dict[type, dict[str, Any]]
    """The classes whose code was tested: class -> its methods and attributes."""
    decision: tuple[Watch, Step | None] | None = None
    """The last decision about the step, and the watch that tells whether the decision still holds."""

    def decide(self, module: nn.Module) -> Step | None:
        watch = Watch(module)
        step = self.route.decide(module, Look(watch.note))
        self.decision = watch.close(), step
        return step

    def __deepcopy__(self, memo):
        return Fusion(self.route, copy.deepcopy(self.description, memo), self.bodies)

    def __getstate__(self):
        return self.route, self.description

    def __setstate__(self, state):
        self.route, self.description = state
        self.bodies = class_bodies(self.description.kinds())


def _step(module: Any) -> Step | None:
    """The step that replaces ``module.forward`` in this call. None if only that ``forward`` may run."""
    fusion = module._crate_fusion
    if torch.compiler.is_compiling():
        return fusion.route.decide(module, TracedLook())
    # The operators have no rules for vmap, jvp and similar transforms. torch can transform the module's own forward.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    decision = fusion.decision
    if decision is not None and decision[0].holds(module):
        return decision[1]
    return fusion.decide(module)


def set_residual_dtype(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Set the dtype of the residual stream of a fused layer or stack under autocast. Other modules have no stream."""
    fusion = module.__dict__[FUSION]
    if isinstance(fusion.route, StackRoute | LayerRoute) and fusion.route.residual_dtype != dtype:
        fusion.route = replace(fusion.route, residual_dtype=dtype)
        fusion.decision = None


def is_as_tried(module: nn.Module) -> bool:
    """Whether a fused module, and the parts that its operators skip, are unchanged since the numerical test."""
    fusion = module.__dict__[FUSION]
    return fusion.route.complete(module) and Look(lambda _: None)._same(module, fusion)


# -- classes -------------------------------------------------------------------------------------------------------


def attach(module: nn.Module, route: Route) -> None:
    """Give ``module`` the fused class for ``route``."""
    base = FusedISTA if isinstance(route, ISTARoute) else Fused
    module.__class__ = _rebased(type(module), lambda original: _fused_class(base, original))
    description = describe(module, route.reads, route.called(module))
    module.__dict__[FUSION] = Fusion(route, description, class_bodies(description.kinds()))


def detach(module: nn.Module) -> None:
    """Give ``module`` its own class back. A module that is not fused stays unchanged."""
    if module.__dict__.pop(FUSION, None) is not None and isinstance(module, Fused):
        for name in ("keep_folded", "_folded"):
            module.__dict__.pop(name, None)
        module.__class__ = _rebased(type(module), lambda fused: getattr(fused, ORIGINAL))


def _rebased(kind: type, change: Callable[[type], type]) -> type:
    """``change(kind)``. Classes that torch creates at run time (for parametrizations, for FSDP) stay outermost."""
    if kind.__module__.partition(".")[0] == "torch":
        inner = [b for b in kind.__bases__ if issubclass(b, nn.Module) and b.__module__.partition(".")[0] != "torch"]
        if inner:
            body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            bases = tuple(_rebased(b, change) if b in inner else b for b in kind.__bases__)
            name = kind.__name__.replace(inner[0].__name__, bases[kind.__bases__.index(inner[0])].__name__)
            return type(kind)(name, bases, body)
    return change(kind)


def _make_class(base: Any, original: Any) -> Any:
    members = {"__module__": original.__module__, ORIGINAL: original}
    return types.new_class(f"Fused{original.__name__}", (base, original), exec_body=lambda body: body.update(members))


# The arguments are ``Any`` because a type checker does not know that classes can be hashed.
_fused_class: Any = functools.cache(_make_class)


def _new(original: type[nn.Module], folds: bool, *arguments):
    kind = _fused_class(FusedISTA if folds else Fused, original)
    return kind.__new__(kind, *arguments)
