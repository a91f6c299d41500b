"""Operator routes: what a recognized module computes with operators.

A route belongs to one module. Its ``decide`` looks at the module and at everything that the operators would skip. It
returns a step that gives the result of the module's own ``forward``, or None if only that ``forward`` may run. The
numerical test compares ``assumed`` with the module's own ``forward``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .. import ops
from ..nn import residual_stream
from ..ops.backends import autocast_is_on
from .description import is_number
from .look import Look
from .names import CHECKPOINTING, DROPOUT, FUSION

Step = Callable[[Any, Tensor], Tensor | None]
"""``step(module, x)`` computes ``forward(x)`` of a fused module. None means that its own ``forward`` must run."""

Half = Callable[[Tensor], Tensor]
"""Half of a layer, a function from tokens to tokens."""

REFUSED = (TypeError, ValueError)
"""Errors of an operator for inputs outside of its contract. The modules themselves may accept such inputs."""


@dataclass(frozen=True)
class AttentionRoute:
    """``output(subspace_attention(projection(x)))``. Projection and output are called as modules."""

    trial: ClassVar[str] = "subspace attention"

    projection: str
    heads: str
    output: tuple[str, ...]
    scale: str | None
    causal: bool
    longest: int | None = None
    """The largest number of tokens for which the operator was found to agree. None means no limit."""

    @property
    def reads(self) -> Collection[str]:
        return () if self.scale is None else (self.scale,)

    def called(self, module: Any) -> Collection[str]:
        return self.projection, *self.output

    def describe(self, module: Any) -> str:
        limit = "" if self.longest is None else f", up to {self.longest} tokens"
        return "subspace_attention" + (", causal" if self.causal else "") + limit

    def complete(self, module: Any) -> bool:
        return True

    def decide(self, module: Any, look: Look) -> Step | None:
        return self.step if self._usable(module, look) else None

    def step(self, module: Any, x: Tensor) -> Tensor | None:
        if (
            x.dim() != 3
            or x.shape[1] < 1
            or not x.dtype.is_floating_point
            or _too_long(x, self.longest)
            or not _ordinary(x)
        ):
            return None
        return self.assumed(module, x)

    def assumed(self, module: Any, x: Tensor) -> Tensor:
        w = getattr(module, self.projection)(x).unflatten(-1, (getattr(module, self.heads), -1))
        o = ops.subspace_attention(w, scale=self.scale_of(module), causal=self.causal).flatten(2)
        for name in self.output:
            o = getattr(module, name)(o)
        return o

    def block(self, module: Any, norm: Any, eps: float | None, sign: float, look: Look) -> Half | None:
        """``z + sign·module(norm(z))`` as one operator. None if a part has a hook, or is not a plain torch module."""
        projection = module._modules[self.projection]
        outputs = [m for name in self.output for m in _leaves(module._modules[name], look)]
        linears = [m for m in outputs if type(m) is nn.Linear]
        plain = (
            look.plain(projection, nn.Linear)
            and projection.bias is None
            and all(look.plain(m, nn.Linear, nn.Identity, nn.Dropout) for m in outputs)
            and len(linears) <= 1
            and not any(_drops_out(m) for m in outputs)
        )
        if not plain or look.hooked(norm) or look.hooked(module) or not self._usable(module, look):
            return None
        return _AttentionBlock(self, module, norm, eps, projection, linears[0] if linears else None, sign)

    def _usable(self, module: Any, look: Look) -> bool:
        scale = self.scale_of(module)
        return (
            (scale is None or (is_number(scale) and math.isfinite(scale)))
            and look.unchanged(module)
            and not any(map(_drops_out, look.skipped(module)))
        )

    def scale_of(self, module: Any) -> float | None:
        return None if self.scale is None else getattr(module, self.scale)


class _AttentionBlock:
    """``z + sign·attention(norm(z))`` by ``mssa_block``."""

    def __init__(self, route, attention, norm, eps, projection, linear, sign):
        self.attention, self.norm, self.sign, self.longest = attention, norm, sign, route.longest
        self.weights = (
            *_affine(norm),
            _reader(projection, "weight"),
            _reader(linear, "weight"),
            _reader(linear, "bias"),
        )
        self.options = dict(
            heads=getattr(attention, route.heads),
            scale=route.scale_of(attention),
            causal=route.causal,
            step_size=sign,
            eps=norm.eps if eps is None else eps,
        )

    def __call__(self, z: Tensor) -> Tensor:
        weights: list[Any] = [read() for read in self.weights]
        if _ordinary(z, *weights) and not _too_long(z, self.longest):
            try:
                return ops.mssa_block(z, *weights, **self.options)
            except REFUSED:
                pass
        return _residual(z, self.attention(self.norm(z)), self.sign)


@dataclass(frozen=True)
class ISTARoute:
    """One ISTA step, or two steps with an overcomplete dictionary."""

    trial: ClassVar[str] = "an ISTA step known here"

    form: str
    step_size: str | float
    lambd: str | float
    """The attribute's name, or the number in the code."""

    @property
    def reads(self) -> Collection[str]:
        return tuple(value for value in (self.step_size, self.lambd) if isinstance(value, str))

    def called(self, module: Any) -> Collection[str]:
        return ("parametrizations",)  # they run when the operator reads its arguments

    def describe(self, module: Any) -> str:
        values = (("step_size", self.step_size), ("lambd", self.lambd))
        numbers = [f"{name} = {value:.10g}" for name, value in values if not isinstance(value, str)]
        operator = "ista_step" if self.form == "complete" else "overcomplete_ista"
        return operator + (f", with {', '.join(numbers)} as in its code" if numbers else "")

    def complete(self, module: Any) -> bool:
        return True

    def decide(self, module: Any, look: Look) -> Step | None:
        return self.step if self._usable(module, look) else None

    def step(self, module: Any, x: Tensor) -> Tensor | None:
        # Under autocast the operator returns autocast's dtype. A complete step adds to its tokens and keeps their
        # dtype.
        if self.form == "complete" and autocast_is_on(x):
            return None
        try:
            return self.assumed(module, x) if _ordinary(x, *module.parameters(recurse=False)) else None
        except REFUSED:
            return None

    def assumed(self, module: Any, x: Tensor) -> Tensor:
        if self.form == "complete":
            folded = module.folded() if hasattr(module, "folded") else None
            return ops.ista_step(x, module.weight, folded=folded, **self.numbers(module))
        if self.form == "rows":
            return ops.overcomplete_ista(x, module.weight.T, **self.numbers(module))
        return ops.overcomplete_ista(x, module.D, getattr(module, "D1", None), **self.numbers(module))

    def block(
        self,
        module: Any,
        norm: Any,
        eps: float | None,
        look: Look,
        residual_dtype: torch.dtype | None = None,
    ) -> Half | None:
        """``module(norm(z))`` as one operator. None if a part has a hook."""
        if self.form != "complete" or look.hooked(norm) or look.hooked(module) or not self._usable(module, look):
            return None
        return _ISTABlock(self, module, norm, eps, residual_dtype)

    def _usable(self, module: Any, look: Look) -> bool:
        numbers = self.numbers(module).values()
        return (
            all(is_number(value) and math.isfinite(value) for value in numbers)
            and look.unchanged(module)
            and not any(map(_drops_out, look.skipped(module)))
        )

    def numbers(self, module: Any) -> dict[str, Any]:
        return {
            name: getattr(module, value) if isinstance(value, str) else value
            for name, value in (("step_size", self.step_size), ("lambd", self.lambd))
        }


class _ISTABlock:
    """``ista(norm(z))`` by ``ista_block``."""

    def __init__(self, route, ista, norm, eps, residual_dtype):
        self.ista, self.norm, self.residual_dtype = ista, norm, residual_dtype
        self.weights = *_affine(norm), _reader(ista, "weight")
        self.options = dict(eps=norm.eps if eps is None else eps, **route.numbers(ista))

    def __call__(self, z: Tensor) -> Tensor:
        weights: list[Any] = [read() for read in self.weights]
        if _ordinary(z, *weights):
            try:
                # A public layer returns the dtype of its LayerNorm's weight, even if z is narrower.
                z = residual_stream(z, self.residual_dtype or weights[0].dtype)
                return ops.ista_block(z, *weights, folded=self.ista.folded(), **self.options)
            except REFUSED:
                pass
        return self.ista(self.norm(z))


class _WholeLayer:
    """Both halves by ``crate_layer``."""

    def __init__(self, first: _AttentionBlock, second: _ISTABlock):
        self.first, self.second = first, second
        self.weights = *first.weights, *second.weights
        mssa, ista = dict(first.options), dict(second.options)
        steps = dict(mssa_step_size=mssa.pop("step_size"), mssa_eps=mssa.pop("eps"), ista_eps=ista.pop("eps"))
        self.options = mssa | ista | steps

    def __call__(self, z: Tensor) -> Tensor:
        weights: list[Any] = [read() for read in self.weights]
        if _ordinary(z, *weights) and not _too_long(z, self.first.longest):
            try:
                z = residual_stream(z, self.second.residual_dtype or weights[0].dtype)
                return ops.crate_layer(z, *weights, folded=self.second.ista.folded(), **self.options)
            except REFUSED:
                pass
        return self.second(self.first(z))


@dataclass(frozen=True)
class PreNormRoute:
    """``fn(norm(x))``. Around an ISTA step it is one operator. Around attention it becomes one with the layer's
    residual."""

    trial: ClassVar[str] = "fn(norm(x))"

    eps: float | None

    @property
    def reads(self) -> Collection[str]:
        return ("norm.eps",) if self.eps is None else ()

    def called(self, module: Any) -> Collection[str]:
        return ("fn",)

    def describe(self, module: Any) -> str:
        route = route_of(module.fn)
        if isinstance(route, ISTARoute):
            return "ista_block" if route.form == "complete" else "its norm, then overcomplete_ista"
        return "mssa_block, where its layer adds the residual"

    def complete(self, module: Any) -> bool:
        return isinstance(route_of(module._modules.get("fn")), AttentionRoute | ISTARoute)

    def decide(self, module: Any, look: Look) -> Step | None:
        block = self.coding(module, look)
        return None if block is None else _Halves([block])

    def assumed(self, module: Any, x: Tensor) -> Tensor:
        return module.fn(module.norm(x))

    def coding(self, module: Any, look: Look, residual_dtype: torch.dtype | None = None) -> Half | None:
        """``module(z)`` as one operator, around an ISTA step."""
        route = look.route(module._modules.get("fn"), ISTARoute)
        if route is None or not look.unchanged(module):
            return None
        return route.block(module.fn, module.norm, self.eps, look, residual_dtype)

    def residual(self, module: Any, sign: float, look: Look) -> Half | None:
        """``z + sign·module(z)`` as one operator, around attention."""
        route = look.route(module._modules.get("fn"), AttentionRoute)
        if route is None or not look.unchanged(module):
            return None
        return route.block(module.fn, module.norm, self.eps, sign, look)


@dataclass(frozen=True)
class StackRoute:
    """Layers ``[PreNorm, PreNorm]`` in a ModuleList, run one after the other."""

    trial: ClassVar[str] = "a known succession of its layers"
    reads: ClassVar[Collection[str]] = ()

    layers: str
    wiring: str
    residual_dtype: torch.dtype | None = None
    """Dtype of the residual stream under autocast. None keeps that of the module's own ``forward``."""

    def called(self, module: Any) -> Collection[str]:
        return (self.layers,)

    def describe(self, module: Any) -> str:
        return f"{len(getattr(module, self.layers))} × {WIRINGS[self.wiring]}"

    def complete(self, module: Any) -> bool:
        pairs = module._modules.get(self.layers)
        return are_pairs(pairs) and any(isinstance(route_of(m), PreNormRoute) for pair in pairs for m in pair)

    def decide(self, module: Any, look: Look) -> Step | None:
        layers = module._modules.get(self.layers)
        if _checkpoints(module) or not look.unchanged(module) or not are_pairs(layers):
            return None
        look.part(layers)
        halves: list[Half] = []
        for pair in layers:
            look.part(pair)
            first, second = pair
            if self.wiring == "decoder":
                halves += [first, self._residual(second, -1.0, look)]
            else:
                halves += _joined(self.wiring, self._residual(first, 1.0, look), self._coding(second, look))
        return _Halves(halves, self.residual_dtype)

    def assumed(self, module: Any, x: Tensor) -> Tensor:
        for first, second in getattr(module, self.layers):
            if self.wiring == "decoder":
                x = first(x)
                x = x - second(x)
            else:
                x = x + first(x)
                x = second(x) if self.wiring == "crate" else x + second(x)
        return x

    def _residual(self, module: Any, sign: float, look: Look) -> Half:
        route = look.route(module, PreNormRoute)
        block = None if route is None or look.hooked(module) else route.residual(module, sign, look)
        return _Residual(module, sign) if block is None else block

    def _coding(self, module: Any, look: Look) -> Half:
        route = look.route(module, PreNormRoute)
        block = None if route is None or look.hooked(module) else route.coding(module, look, self.residual_dtype)
        return module if block is None else block


@dataclass(frozen=True)
class LayerRoute:
    """One layer whose norms, attention and ISTA step are its own children."""

    trial: ClassVar[str] = "a known succession of its parts"

    names: tuple[str, str, str, str]
    eps: tuple[float | None, float | None]
    wiring: str
    residual_dtype: torch.dtype | None = None
    """See :class:`StackRoute`."""

    @property
    def reads(self) -> Collection[str]:
        norms = self.names[0], self.names[2]
        return [f"{norm}.eps" for norm, eps in zip(norms, self.eps, strict=True) if eps is None]

    def called(self, module: Any) -> Collection[str]:
        return self.names[1], self.names[3]

    def describe(self, module: Any) -> str:
        return WIRINGS[self.wiring]

    def complete(self, module: Any) -> bool:
        _, attention, _, ista = (route_of(module._modules.get(name)) for name in self.names)
        return isinstance(attention, AttentionRoute) and isinstance(ista, ISTARoute)

    def decide(self, module: Any, look: Look) -> Step | None:
        if _checkpoints(module) or not look.unchanged(module):
            return None
        norm_1, attention, norm_2, ista = (getattr(module, name) for name in self.names)
        mssa, coding = look.route(attention, AttentionRoute), look.route(ista, ISTARoute)
        first = None if mssa is None else mssa.block(attention, norm_1, self.eps[0], 1.0, look)
        second = None if coding is None else coding.block(ista, norm_2, self.eps[1], look, self.residual_dtype)
        first = first or _Residual(_Composition(norm_1, attention))
        return _Halves(_joined(self.wiring, first, second or _Composition(norm_2, ista)), self.residual_dtype)

    def assumed(self, module: Any, x: Tensor) -> Tensor:
        norm_1, attention, norm_2, ista = (getattr(module, name) for name in self.names)
        y = x + attention(norm_1(x))
        coded = ista(norm_2(y))
        return coded if self.wiring == "crate" else y + coded


Route = AttentionRoute | ISTARoute | PreNormRoute | StackRoute | LayerRoute

WIRINGS = {
    "crate": "y = x + attn(x); x = ista(y)",
    "residual": "y = x + attn(x); x = y + ista(y)",
    "decoder": "y = linear(x); x = y − attn(y)",
}
"""How a layer joins its halves: vision CRATE, MAE's encoder and GPT-2; then CRATE-alpha; then MAE's decoder."""


# -- halves of layers that are no operator -------------------------------------------------------------------------


class _Halves:
    """Halves of layers that run one after the other."""

    def __init__(self, halves: list[Half], residual_dtype: torch.dtype | None = None):
        self.halves, self.residual_dtype = halves, residual_dtype

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        x = residual_stream(x, self.residual_dtype)
        for half in self.halves:
            x = half(x)
        return x


def _joined(wiring: str, first: Half, second: Half) -> list[Half]:
    """The two halves of an encoder layer, as one operator if possible."""
    if wiring == "crate" and isinstance(first, _AttentionBlock) and isinstance(second, _ISTABlock):
        return [_WholeLayer(first, second)]
    return [first, second if wiring == "crate" else _Residual(second)]


class _Composition:
    """``second(first(x))``. Both are called as modules."""

    def __init__(self, first: Any, second: Any):
        self.first, self.second = first, second

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class _Residual:
    """``x + sign·half(x)``."""

    def __init__(self, half: Half, sign: float = 1.0):
        self.half, self.sign = half, sign

    def __call__(self, x: Tensor) -> Tensor:
        return _residual(x, self.half(x), self.sign)


def _residual(x: Tensor, y: Tensor, sign: float) -> Tensor:
    return x + y if sign == 1 else x - y


# -- parts of modules ----------------------------------------------------------------------------------------------


def route_of(module: Any) -> Route | None:
    """The route of a fused module; None for any other."""
    fusion = None if module is None else module.__dict__.get(FUSION)
    return None if fusion is None else fusion.route


def are_pairs(layers: Any) -> bool:
    """Whether this is a ModuleList of ModuleLists of two."""
    return (
        isinstance(layers, nn.ModuleList)
        and len(layers) > 0
        and all(isinstance(pair, nn.ModuleList) and len(pair) == 2 for pair in layers)
    )


def _reader(module: Any, name: str) -> Callable[[], Tensor | None]:
    """A function that returns ``module.name``. It is ten times as fast if that is an ordinary parameter."""
    if module is None:
        return _nothing
    if torch.compiler.is_compiling() or name not in module._parameters:
        return functools.partial(getattr, module, name)
    return functools.partial(module._parameters.get, name)


def _nothing() -> None:
    return None


def _affine(norm: Any) -> tuple[Callable[[], Tensor | None], Callable[[], Tensor | None]]:
    """Readers of the weight and the bias of a LayerNorm."""
    weight = _reader(norm, "weight")
    if getattr(norm, "bias", None) is None:
        return weight, lambda: torch.zeros_like(norm.weight)
    return weight, _reader(norm, "bias")


_ORDINARY = {Tensor, nn.Parameter, type(None)}


def _ordinary(*tensors: Tensor | None) -> bool:
    """Whether all tensors are ordinary. The operators have no rules for quantized or distributed tensors."""
    return torch.compiler.is_compiling() or _ORDINARY.issuperset(map(type, tensors))


def _too_long(x: Tensor, longest: int | None) -> bool:
    return longest is not None and x.dim() == 3 and x.shape[1] > longest


def _leaves(module: Any, look: Look) -> Iterator[Any]:
    """The modules that a (nested) Sequential calls in turn. For any other module, the module itself."""
    if look.plain(module, nn.Sequential):
        for child in module:
            yield from _leaves(child, look)
    else:
        yield module


def _drops_out(module: Any) -> bool:
    """Whether this module itself drops values at present."""
    rates = [module.p] if isinstance(module, _DropoutNd) else [module.__dict__.get(name, 0) for name in DROPOUT]
    return module.training and any(is_number(rate) and rate > 0 for rate in rates)


def _checkpoints(module: Any) -> bool:
    return any(getattr(module, name, False) for name in CHECKPOINTING)
