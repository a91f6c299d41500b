"""The operator routes: what a recognized module runs instead of its own ``forward``, and when.

A route is a class that is mixed in before the module's own class. At each call it runs operators where they do all that
the module's own ``forward`` would do, and that ``forward`` otherwise.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..nn import KeepsFolded
from .names import CHECKPOINTING, DROPOUT, HOOKS


class OperatorRoute(nn.Module):
    """Base of the fused routes: mixed in before a module's own class, whose ``forward`` is the unfused route."""

    _original: type[nn.Module]
    _recipe: type[OperatorRoute]
    _fused: Any

    def _describe(self) -> str:
        """What the fused route runs, for the report."""
        raise NotImplementedError

    def _ready(self, x: Tensor) -> bool:
        """Whether the fused route does for ``x`` all that the module's own forward would."""
        raise NotImplementedError

    def _compute(self, x: Tensor) -> Tensor:
        """The fused route."""
        raise NotImplementedError

    def forward(self, *args, **kwargs):
        # More than the tokens is asked for (attention maps, a mask): only the module's own forward knows what.
        if len(args) == 1 and not kwargs and self._ready(args[0]):
            return self._compute(args[0])
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        # The class is made at run time; a pickle names the two classes it is made of.
        made: Any = super().__reduce_ex__(protocol)
        _, (_, *arguments), *rest = made
        return _new, (self._recipe, self._original, *arguments), *rest


class AttentionRoute(OperatorRoute):
    """``output(subspace_attention(projection(x)))``. Projection and output are called as modules: their hooks fire."""

    @dataclass(frozen=True)
    class Plan:
        projection: str
        heads: str
        output: tuple[str, ...]
        scale: str | None
        causal: bool

    def _describe(self) -> str:
        return "subspace_attention" + (", causal" if self._fused.causal else "")

    def _ready(self, x: Tensor) -> bool:
        # What the fused route leaves out must not be asked for: dropout, hooks on the softmax, a learned scale.
        plan = self._fused
        bypassed = (m for name, m in self.named_children() if name not in (plan.projection, *plan.output))
        return (
            x.dim() == 3
            and not drops_out(self)
            and not _has_any_global_hook()
            and (plan.scale is None or isinstance(getattr(self, plan.scale), float | int))
            and all(plain(m) for m in bypassed)
        )

    def _scale(self) -> float | None:
        name = self._fused.scale
        return None if name is None else getattr(self, name)

    def _compute(self, x: Tensor) -> Tensor:
        plan = self._fused
        w = getattr(self, plan.projection)(x).unflatten(-1, (getattr(self, plan.heads), -1))
        o = ops.subspace_attention(w, scale=self._scale(), causal=plan.causal).flatten(2)
        for name in plan.output:
            o = getattr(self, name)(o)
        return o

    def _block(self, norm: Any, eps: float | None, z: Tensor, sign: float) -> Tensor | None:
        """``z + sign·self(norm(z))`` as one operator; None where only the modules themselves may do it."""
        plan = self._fused
        projection = getattr(self, plan.projection)
        outputs = [m for name in plan.output for m in _leaves(getattr(self, name))]
        linears = [m for m in outputs if type(m) is nn.Linear]
        simple = all(type(m) in (nn.Linear, nn.Identity, nn.Dropout) for m in outputs) and len(linears) <= 1
        if not (
            simple
            and type(projection) is nn.Linear
            and projection.bias is None
            and self._ready(z)
            and plain(norm)
            and plain(self)
        ):
            return None
        return ops.mssa_block(
            z,
            *_affine(norm),
            projection.weight,
            linears[0].weight if linears else None,
            linears[0].bias if linears else None,
            heads=getattr(self, plan.heads),
            scale=self._scale(),
            causal=plan.causal,
            step_size=sign,
            eps=norm.eps if eps is None else eps,
        )


class ISTARoute(KeepsFolded, OperatorRoute):
    """One ISTA step, or two against an overcomplete dictionary."""

    D: nn.Parameter

    @dataclass(frozen=True)
    class Plan:
        form: str
        step_size: str | float
        lambd: str | float
        """The attribute's name, or the number that stands in the code."""

    def _describe(self) -> str:
        plan = self._fused
        values = (("step_size", plan.step_size), ("lambd", plan.lambd))
        numbers = [f"{name} = {value:.10g}" for name, value in values if not isinstance(value, str)]
        operator = "ista_step" if plan.form == "complete" else "overcomplete_ista"
        return operator + (f", with {', '.join(numbers)} as in its code" if numbers else "")

    def _step(self) -> dict[str, Any]:
        plan = self._fused
        return {
            name: getattr(self, value) if isinstance(value, str) else value
            for name, value in (("step_size", plan.step_size), ("lambd", plan.lambd))
        }

    def _ready(self, x: Tensor) -> bool:
        numbers = all(isinstance(v, float | int) for v in self._step().values())
        return numbers and not drops_out(self) and not _has_any_global_hook()

    def _compute(self, x: Tensor) -> Tensor:
        form = self._fused.form
        if form == "complete":
            return ops.ista_step(x, self.weight, folded=self.folded(), **self._step())
        if form == "rows":
            return ops.overcomplete_ista(x, self.weight.T, **self._step())
        return ops.overcomplete_ista(x, self.D, getattr(self, "D1", None), **self._step())

    def _block(self, norm: Any, eps: float | None, z: Tensor) -> Tensor | None:
        """``self(norm(z))`` as one operator; None where only the modules themselves may do it."""
        if self._fused.form != "complete" or not (self._ready(z) and plain(norm) and plain(self)):
            return None
        eps = norm.eps if eps is None else eps
        return ops.ista_block(z, *_affine(norm), self.weight, eps=eps, folded=self.folded(), **self._step())


class PreNormRoute(OperatorRoute):
    """``fn(norm(x))``: one operator where ``fn`` is an ISTA step; around attention, it waits for its layer's sum."""

    fn: Any
    norm: Any

    @dataclass(frozen=True)
    class Plan:
        eps: float | None

    def _describe(self) -> str:
        if isinstance(self.fn, AttentionRoute):
            return "mssa_block, where its layer adds the residual"
        return "ista_block" if self.fn._fused.form == "complete" else "its norm, then overcomplete_ista"

    def _ready(self, x: Tensor) -> bool:
        return True

    def _compute(self, x: Tensor) -> Tensor:
        out = self.fn._block(self.norm, self._fused.eps, x) if isinstance(self.fn, ISTARoute) else None
        return self.fn(self.norm(x)) if out is None else out

    def _residual_block(self, z: Tensor, sign: float) -> Tensor | None:
        """``z + sign·self(z)`` as one operator; None where only the modules themselves may do it."""
        if isinstance(self.fn, AttentionRoute) and not hooked(self):
            return self.fn._block(self.norm, self._fused.eps, z, sign)
        return None


class StackRoute(OperatorRoute):
    """Layers ``[PreNorm, PreNorm]`` in a ModuleList, run one after the other."""

    @dataclass(frozen=True)
    class Plan:
        layers: str
        wiring: str

    def _describe(self) -> str:
        return f"{len(getattr(self, self._fused.layers))} × {WIRINGS[self._fused.wiring]}"

    def _ready(self, x: Tensor) -> bool:
        return not any(getattr(self, name, False) for name in CHECKPOINTING)

    def _compute(self, x: Tensor) -> Tensor:
        for first, second in getattr(self, self._fused.layers):
            x = _layer(self._fused.wiring, first, second, x)
        return x


class LayerRoute(OperatorRoute):
    """One layer whose norms, attention and ISTA step are its own children."""

    @dataclass(frozen=True)
    class Plan:
        names: tuple[str, str, str, str]
        eps: tuple[float | None, float | None]
        wiring: str

    def _describe(self) -> str:
        return WIRINGS[self._fused.wiring]

    def _ready(self, x: Tensor) -> bool:
        return not any(getattr(self, name, False) for name in CHECKPOINTING)

    def _compute(self, x: Tensor) -> Tensor:
        norm_1, attention, norm_2, ista = (getattr(self, name) for name in self._fused.names)
        y = attention._block(norm_1, self._fused.eps[0], x, 1.0) if isinstance(attention, AttentionRoute) else None
        if y is None:
            y = x + attention(norm_1(x))
        coded = ista._block(norm_2, self._fused.eps[1], y) if isinstance(ista, ISTARoute) else None
        if coded is None:
            coded = ista(norm_2(y))
        return coded if self._fused.wiring == "crate" else y + coded


WIRINGS = {
    "crate": "y = x + attn(x); x = ista(y)",
    "residual": "y = x + attn(x); x = y + ista(y)",
    "decoder": "y = linear(x); x = y − attn(y)",
}
"""How a layer joins its two halves: vision CRATE, MAE's encoder and GPT-2; CRATE-alpha; MAE's decoder."""


def _layer(wiring: str, first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    if wiring == "decoder":
        return _residual(second, first(x), -1.0)
    y = _residual(first, x, 1.0)
    return second(y) if wiring == "crate" else y + second(y)


def _residual(module: nn.Module, x: Tensor, sign: float) -> Tensor:
    """``x + sign·module(x)``, fused where that is possible."""
    out = module._residual_block(x, sign) if isinstance(module, PreNormRoute) else None
    if out is not None:
        return out
    return x + module(x) if sign == 1 else x - module(x)


def _class_with_route(recipe: Any, original: Any) -> Any:
    """The class ``original`` with the methods of ``recipe``, an :class:`OperatorRoute`, in front of its own."""
    members = {"__module__": original.__module__, "_original": original, "_recipe": recipe}
    return types.new_class(f"Fused{original.__name__}", (recipe, original), exec_body=lambda ns: ns.update(members))


# As ``Any``: classes have a hash, but not for a type checker.
class_with_route: Any = functools.cache(_class_with_route)


def _new(recipe: type[OperatorRoute], original: type[nn.Module], *arguments):
    cls = class_with_route(recipe, original)
    return cls.__new__(cls, *arguments)


# -- which route a call takes --------------------------------------------------------------------------------------


def hooked(module: nn.Module) -> bool:
    """A call of this very module can be observed, or is not its class's ``forward``."""
    return any(getattr(module, name) for name in HOOKS) or "forward" in module.__dict__


def plain(module: nn.Module) -> bool:
    return not any(hooked(m) for m in module.modules())


def drops_out(module: nn.Module) -> bool:
    for m in module.modules():
        if m.training:
            rates = [m.p] if isinstance(m, _DropoutNd) else [m.__dict__.get(name, 0) for name in DROPOUT]
            if any(isinstance(rate, float | int) and rate > 0 for rate in rates):
                return True
    return False


def _leaves(module: nn.Module) -> list[nn.Module]:
    """The modules that a (nested) Sequential calls in turn; the module itself if it is none."""
    return [leaf for m in module for leaf in _leaves(m)] if type(module) is nn.Sequential else [module]


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    weight, bias = norm.weight, getattr(norm, "bias", None)
    return weight, torch.zeros_like(weight) if bias is None else bias
