"""Fused routes for models that people already have: ``fuse(model)`` and its inverse ``unfuse(model)``.

A module is found by its structure (the attributes it has, never where its class comes from), and taken only after its
own ``forward`` and the fused one agreed, outputs and gradients, on a random probe in float64. What then changes is its
class: to a subclass of its own class with another ``forward``. Everything else (parameters, buffers, hooks, children,
the module object itself) stays where it is, so state dicts, optimisers and references held elsewhere notice nothing.
``docs/fuse.md`` has the rules and their reasons.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import types
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _has_any_global_hook

from . import ops
from .nn import ISTA, MSSA, KeepsFolded, OvercompleteISTA

HEADS = ("heads", "n_head", "num_heads")
PROJECTION = ("qkv", "c_attn", "to_qkv")
OUTPUT = (("to_out",), ("c_proj", "resid_dropout"), ("proj", "proj_drop"))
SCALE = ("scale",)
STEP_SIZE = ("step_size", "eta")
LAMBD = ("lambd", "lmbda", "lam")
DROPOUT = ("dropout", "attn_dropout", "resid_dropout", "attn_drop", "dropout_p")
CHECKPOINTING = ("gradient_checkpointing", "use_checkpoint", "grad_checkpointing")
"""The attribute names that public CRATE code uses for one thing, in the order they are looked for."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    report, known = FuseReport(), {}  # known: what probes found out, for layers that repeat
    reasons: dict[str, str] = {}
    # Children first: a layer is recognised by the parts that were recognised in it.
    for path, module in reversed(list(model.named_modules())):
        if not isinstance(module, _Fused):
            result = _recognise(module, known)
            if isinstance(result, str):
                reasons[path] = result
            elif result is not None:
                recipe, plan = result
                module.__class__ = _fused_class(recipe, type(module))
                module.__dict__["_fused"] = plan
    for path, module in model.named_modules():
        if isinstance(module, _Fused):
            report.fused[path] = f"{type(module)._original.__name__}: {module._describe()}"
    report.left = reasons | {path: reason for path, reason in _bystanders("", model) if path not in reasons}
    report.left = dict(sorted(report.left.items()))
    return report


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`, in place and exactly: every module has its own class again."""
    for module in model.modules():
        if isinstance(module, _Fused):
            for name in ("_fused", "keep_folded", "_folded"):
                module.__dict__.pop(name, None)
            module.__class__ = type(module)._original


# -- the fused classes ---------------------------------------------------------------------------------------------


class _Fused:
    """Base of the fused routes: mixed in before a module's own class, whose ``forward`` is the unfused route."""

    _original: type[nn.Module]
    _recipe: type[_Fused]
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
        _, (_, *arguments), *rest = super().__reduce_ex__(protocol)
        return _new, (self._recipe, self._original, *arguments), *rest


class _FusedAttention(_Fused):
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
            and not _drops_out(self)
            and not _has_any_global_hook()
            and (plan.scale is None or isinstance(getattr(self, plan.scale), float | int))
            and all(_plain(m) for m in bypassed)
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

    def _block(self, norm: nn.Module, eps: float | None, z: Tensor, sign: float) -> Tensor | None:
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
            and _plain(norm)
            and _plain(self)
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


class _FusedISTA(KeepsFolded, _Fused):
    """One ISTA step, or two against an overcomplete dictionary."""

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

    def _step(self) -> dict[str, float]:
        plan = self._fused
        return {
            name: getattr(self, value) if isinstance(value, str) else value
            for name, value in (("step_size", plan.step_size), ("lambd", plan.lambd))
        }

    def _ready(self, x: Tensor) -> bool:
        numbers = all(isinstance(v, float | int) for v in self._step().values())
        return numbers and not _drops_out(self) and not _has_any_global_hook()

    def _compute(self, x: Tensor) -> Tensor:
        form = self._fused.form
        if form == "complete":
            return ops.ista_step(x, self.weight, folded=self.folded(), **self._step())
        if form == "rows":
            return ops.overcomplete_ista(x, self.weight.T, **self._step())
        return ops.overcomplete_ista(x, self.D, getattr(self, "D1", None), **self._step())

    def _block(self, norm: nn.Module, eps: float | None, z: Tensor) -> Tensor | None:
        """``self(norm(z))`` as one operator; None where only the modules themselves may do it."""
        if self._fused.form != "complete" or not (self._ready(z) and _plain(norm) and _plain(self)):
            return None
        eps = norm.eps if eps is None else eps
        return ops.ista_block(z, *_affine(norm), self.weight, eps=eps, folded=self.folded(), **self._step())


class _FusedPreNorm(_Fused):
    """``fn(norm(x))``: one operator where ``fn`` is an ISTA step; around attention, it waits for its layer's sum."""

    @dataclass(frozen=True)
    class Plan:
        eps: float | None

    def _describe(self) -> str:
        if isinstance(self.fn, _FusedAttention):
            return "mssa_block, where its layer adds the residual"
        return "ista_block" if self.fn._fused.form == "complete" else "its norm, then overcomplete_ista"

    def _ready(self, x: Tensor) -> bool:
        return True

    def _compute(self, x: Tensor) -> Tensor:
        out = self.fn._block(self.norm, self._fused.eps, x) if isinstance(self.fn, _FusedISTA) else None
        return self.fn(self.norm(x)) if out is None else out

    def _residual_block(self, z: Tensor, sign: float) -> Tensor | None:
        """``z + sign·self(z)`` as one operator; None where only the modules themselves may do it."""
        if isinstance(self.fn, _FusedAttention) and not _hooked(self):
            return self.fn._block(self.norm, self._fused.eps, z, sign)
        return None


class _FusedStack(_Fused):
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


class _FusedLayer(_Fused):
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
        y = attention._block(norm_1, self._fused.eps[0], x, 1.0) if isinstance(attention, _FusedAttention) else None
        if y is None:
            y = x + attention(norm_1(x))
        coded = ista._block(norm_2, self._fused.eps[1], y) if isinstance(ista, _FusedISTA) else None
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
    out = module._residual_block(x, sign) if isinstance(module, _FusedPreNorm) else None
    if out is not None:
        return out
    return x + module(x) if sign == 1 else x - module(x)


@functools.cache
def _fused_class(recipe: type[_Fused], original: type[nn.Module]) -> type[nn.Module]:
    members = {"__module__": original.__module__, "_original": original, "_recipe": recipe}
    return types.new_class(f"Fused{original.__name__}", (recipe, original), exec_body=lambda ns: ns.update(members))


def _new(recipe: type[_Fused], original: type[nn.Module], *arguments):
    cls = _fused_class(recipe, original)
    return cls.__new__(cls, *arguments)


# -- which route a call takes --------------------------------------------------------------------------------------


def _hooked(module: nn.Module) -> bool:
    """A call of this very module can be observed, or is not its class's ``forward``."""
    return any(getattr(module, name) for name in HOOKS) or "forward" in module.__dict__


def _plain(module: nn.Module) -> bool:
    return not any(_hooked(m) for m in module.modules())


def _drops_out(module: nn.Module) -> bool:
    for m in module.modules():
        if m.training:
            rates = [m.p] if isinstance(m, _DropoutNd) else [m.__dict__.get(name, 0) for name in DROPOUT]
            if any(isinstance(rate, float | int) and rate > 0 for rate in rates):
                return True
    return False


def _leaves(module: nn.Module) -> list[nn.Module]:
    """The modules that a (nested) Sequential calls in turn; the module itself if it is none."""
    return [leaf for m in module for leaf in _leaves(m)] if type(module) is nn.Sequential else [module]


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = norm.weight, getattr(norm, "bias", None)
    return weight, torch.zeros_like(weight) if bias is None else bias


# -- recognition ---------------------------------------------------------------------------------------------------


def _recognise(module: nn.Module, known: dict) -> tuple[type[_Fused], Any] | str | None:
    """The recipe and plan for a module; the reason why it has none if it looks like one; None if it does not."""
    if isinstance(module, MSSA | ISTA | OvercompleteISTA):
        return None
    for recipe, candidates in (
        (_FusedAttention, _attention_plans),
        (_FusedISTA, _ista_plans),
        (_FusedPreNorm, _prenorm_plans),
        (_FusedStack, _stack_plans),
        (_FusedLayer, _layer_plans),
    ):
        plans = candidates(module, known)
        if isinstance(plans, str):
            return plans
        plans = list(plans)
        if not plans:
            continue
        if "forward" in module.__dict__:
            return "its forward has been replaced on the instance"
        if isinstance(module, torch.jit.ScriptModule):
            return "it is a scripted module"
        if recipe in (_FusedAttention, _FusedISTA):
            # Layers repeat: one probe for all that differ in their weights' values alone.
            key = (recipe, _signature(module))
            if key not in known:
                known[key] = _agreeing(recipe, module, plans, _width(module), _random_copy)
            result = known[key]
        else:
            width = next((p.shape[-1] for p in module.parameters()), 4)
            result = _agreeing(recipe, module, plans, width, _wiring_copy)
        return result if isinstance(result, str) else (recipe, result)
    return None


def _attribute(module: nn.Module, names: tuple[str, ...], kind=object) -> str | None:
    return next((n for n in names if hasattr(module, n) and isinstance(getattr(module, n), kind)), None)


def _attention_plans(module: nn.Module, _) -> Iterator:
    projection, heads = _attribute(module, PROJECTION, nn.Module), _attribute(module, HEADS, int)
    if projection is None or heads is None:
        return
    for names in OUTPUT:
        if isinstance(getattr(module, names[0], None), nn.Module):
            output = tuple(name for name in names if isinstance(getattr(module, name, None), nn.Module))
            break
    else:
        return
    for scale in dict.fromkeys((_attribute(module, SCALE, float | int), None)):
        for causal in (False, True):
            yield _FusedAttention.Plan(projection, heads, output, scale, causal)


def _ista_plans(module: nn.Module, _) -> list | str:
    step_size, lambd = _attribute(module, STEP_SIZE), _attribute(module, LAMBD)
    weight, dictionary = getattr(module, "weight", None), getattr(module, "D", None)
    matrices = [m for m in (dictionary, weight) if isinstance(m, Tensor) and m.dim() == 2]
    if not matrices:
        return []
    if matrices[0] is dictionary:
        forms = ("D",)
    else:
        forms = ("complete", "rows") if weight.shape[0] == weight.shape[1] else ("rows",)
    if step_size is None or lambd is None:
        return _plans_by_measurement(module, forms, step_size, lambd)
    if not all(isinstance(getattr(module, name), float | int) for name in (step_size, lambd)):
        return "its step size or threshold is a tensor; the operators take numbers"
    return [_FusedISTA.Plan(form, step_size, lambd) for form in forms]


def _plans_by_measurement(module: nn.Module, forms: tuple[str, ...], step_size: str | None, lambd: str | None):
    """Plans for a module without an attribute for its step size or threshold: the numbers in its code, measured.

    The probe that follows confirms them, like every plan, on random tokens and parameters. A number that comes from
    anywhere else than the code could be another one tomorrow: such a module is left alone.
    """
    matrices = {"weight", "D", "D1"}
    if type(module).__module__.startswith("torch.") or not matrices.issuperset(dict(module.named_parameters())):
        return []
    unknown = {name: value for name, value in _constants(module).items() if name not in (step_size, lambd)}
    plans = []
    with _probing():
        for form in forms:
            found = _measure(_random_copy(module), form)
            if found is None:
                continue
            for name, value in unknown.items():
                if not isinstance(value, int | float | str | None) or (type(value) is int and value in found):
                    return f"its step size or threshold has no attribute, and may come from its {name}"
            moved = _random_copy(module)
            moved.__dict__.update({name: _moved(value) for name, value in unknown.items()})
            moved._buffers = {name: _moved(value) for name, value in moved._buffers.items()}
            if _measure(moved, form) != found:
                return "its step size or threshold comes from an attribute whose name is not known here"
            plans.append(_FusedISTA.Plan(form, *(n or v for n, v in zip((step_size, lambd), found, strict=True))))
    return plans


def _measure(module: nn.Module, form: str) -> tuple[float, float] | None:
    """Step size and threshold of a module that computes an ISTA step of this form; None if it certainly does not.

    With ``½ I`` as its matrices an ISTA step is, in each channel of a large positive token ``x``, the line ``s·x + c``:
    ``x + η(x/4 − λ)`` the complete one, ``η(2 − η/4)(x/2 − λ)/2`` the two steps against a dictionary. Of a negative
    token nothing is left.
    """
    low, high = 64.0, 128.0
    try:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.5 * torch.eye(*parameter.shape))
            x = torch.tensor([low, high, -high], dtype=torch.float64)[:, None].expand(1, 3, _width(module))
            at_low, at_high, at_negative = module.forward(x)[0, :, 0].tolist()
    except Exception:
        return None
    s = (at_high - at_low) / (high - low)
    c = at_low - s * low
    if form == "complete":
        step_size, scale = 4 * (s - 1), 4 * (s - 1)
    else:
        step_size, scale = 4 - 4 * math.sqrt(1 - s) if s < 1 else math.nan, 2 * s
    if at_negative != 0 or not step_size > 1e-9 or not -c / scale > -1e-9:
        return None
    return _short(step_size), _short(abs(c) / scale)


def _short(value: float) -> float:
    """The short decimal that somebody wrote, where ``value`` is one but for its rounding errors."""
    short = float(f"{value:.9g}")
    return short if abs(short - value) < 1e-12 else value


def _constants(module: nn.Module) -> dict[str, Any]:
    """What a module holds, on itself or its classes, that its forward could read a number from."""
    classes = [c for c in type(module).__mro__ if not c.__module__.startswith("torch.") and c is not object]
    held = {name: value for c in reversed(classes) for name, value in vars(c).items() if isinstance(value, float)}
    return held | {name: value for name, value in module.__dict__.items() if name not in _OF_EVERY_MODULE}


def _moved(value: Any) -> Any:
    """Another number; what is none, or an integer (a size, most likely), as it is."""
    number = isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
    return 1.25 * value if number else value


def _prenorm_plans(module: nn.Module, known: dict) -> Iterator:
    children = dict(module.named_children())
    if children.keys() == {"norm", "fn"} and isinstance(children["fn"], _FusedAttention | _FusedISTA):
        for eps in _epsilons(children["norm"], known):
            yield _FusedPreNorm.Plan(eps)


def _stack_plans(module: nn.Module, _) -> Iterator:
    children = dict(module.named_children())
    if len(children) != 1 or next(module.parameters(recurse=False), None) is not None:
        return
    ((name, layers),) = children.items()
    if (
        isinstance(layers, nn.ModuleList)
        and len(layers)
        and all(isinstance(pair, nn.ModuleList) and len(pair) == 2 for pair in layers)
        and any(isinstance(m, _FusedPreNorm) for pair in layers for m in pair)
    ):
        for wiring in WIRINGS:
            yield _FusedStack.Plan(name, wiring)


def _layer_plans(module: nn.Module, known: dict) -> Iterator:
    children = {name: m for name, m in module.named_children() if type(m) is not nn.Identity}
    attention = [name for name, m in children.items() if isinstance(m, _FusedAttention)]
    ista = [name for name, m in children.items() if isinstance(m, _FusedISTA)]
    norms = [name for name in children if name not in (*attention, *ista)]
    if (len(attention), len(ista), len(norms)) == (1, 1, 2):
        for eps_1 in _epsilons(children[norms[0]], known):
            for eps_2 in _epsilons(children[norms[1]], known):
                for wiring in ("crate", "residual"):
                    yield _FusedLayer.Plan((norms[0], attention[0], norms[1], ista[0]), (eps_1, eps_2), wiring)


def _epsilons(norm: nn.Module, known: dict) -> list[float | None]:
    """The eps with which this module is a LayerNorm of the last axis: None for its attribute; empty if it is not."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return []
    if type(norm) is nn.LayerNorm:
        return [None]
    key = ("norm", _signature(norm))
    if key not in known:
        known[key] = []
        # nanoGPT and its kin write their own, with eps in the code.
        for eps in (None, 1e-5, 1e-6, 1e-12):
            if eps is None and not isinstance(getattr(norm, "eps", None), float):
                continue
            with _probing():
                try:
                    copy, x = _random_copy(norm), 1e-2 * _random(2, 3, weight.shape[0])
                    arguments = copy.weight, getattr(copy, "bias", None), copy.eps if eps is None else eps
                    if _close(copy(x), nn.functional.layer_norm(x, x.shape[-1:], *arguments)):
                        known[key] = [eps]
                        break
                except Exception:
                    break
    return known[key]


def _bystanders(path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """The largest parts with parameters of their own in which nothing is fused."""
    if isinstance(module, _Fused) or next(module.parameters(), None) is None:
        return
    if isinstance(module, MSSA | ISTA | OvercompleteISTA):
        yield path, "runs fused operators already"
    elif not any(isinstance(m, _Fused | MSSA | ISTA | OvercompleteISTA) for m in module.modules()):
        yield path, f"{type(module).__name__}: no CRATE part in it"
    else:
        for name, child in module.named_children():
            yield from _bystanders(f"{path}.{name}" if path else name, child)


# -- probes: does the fused route do what the module's own forward does? -------------------------------------------


def _agreeing(recipe: type[_Fused], module: nn.Module, plans: list, width: int, copy) -> Any | str:
    """The first plan whose fused route gives the outputs and gradients of the module's own forward; else the reason."""
    with _probing():
        try:
            probe, x = copy(module), _random(2, 3, width)
            want = []
            for training in (False, True):
                probe.train(training)
                before = _held(probe)
                want += _outcome(probe.forward, probe, x)
                if _held(probe) != before:
                    return "its forward keeps something on the module"
        except Exception as error:
            return f"its forward could not be tried ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        for plan in plans:
            candidate = copy(module)
            candidate.__class__ = _fused_class(recipe, type(module))
            candidate.__dict__["_fused"] = plan
            try:
                got = _outcome(candidate._compute, candidate, x)
            except Exception:
                continue
            if len(got) * 2 == len(want) and all(map(_close, got * 2, want)):
                return plan
    return f"its forward does not compute {_NAMES[recipe]}"


_NAMES = {
    _FusedAttention: "subspace attention",
    _FusedISTA: "an ISTA step known here",
    _FusedPreNorm: "fn(norm(x))",
    _FusedStack: "a known succession of its layers",
    _FusedLayer: "a known succession of its parts",
}


@contextlib.contextmanager
def _probing() -> Iterator[None]:
    """Whatever mode the caller is in: float64 on the CPU, with gradients, and without touching the random state."""
    with (
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        ops.use_backend("eager"),
    ):
        torch.manual_seed(0)
        yield


def _outcome(function, module: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The output and the gradients of ``x`` and of all parameters."""
    x = x.detach().requires_grad_()
    out = function(x)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returns a {type(out).__name__}, not one tensor")
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()], allow_unused=True)]


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _random_copy(module: nn.Module) -> nn.Module:
    """The same module with random float64 parameters, no dropout, no hooks, and constants that are nobody's default."""
    generator, memo = torch.Generator().manual_seed(1), {}

    def parameter(p: Tensor | None) -> Tensor | None:
        if p is not None and id(p) not in memo:
            values = torch.randn(p.shape, dtype=torch.float64, generator=generator)
            memo[id(p)] = nn.Parameter(values / p.shape[-1] ** 0.5 if p.dim() > 1 else 1 + values / 2)
        return None if p is None else memo[id(p)]

    def copy(m: nn.Module) -> nn.Module:
        clone = _shallow(m, copy)
        clone._parameters = {name: parameter(p) for name, p in m._parameters.items()}
        clone._buffers = {
            name: b.to("cpu", torch.float64 if b.is_floating_point() else b.dtype)
            for name, b in m.named_buffers("", False)
        }
        for name in (*SCALE, *STEP_SIZE, *LAMBD):
            # If the forward does not read the attribute but has the same number in its code, this tells.
            if isinstance(m.__dict__.get(name), float):
                clone.__dict__[name] *= 1.25
        for name in ("p",) if isinstance(m, _DropoutNd) else DROPOUT:
            if isinstance(m.__dict__.get(name), float):
                clone.__dict__[name] = 0.0
        return clone

    return copy(module)


def _wiring_copy(module: nn.Module) -> nn.Module:
    """The same module with every part in it replaced by a function of its own, to see how they are joined."""
    number = iter(range(1, 1 << 30))

    def part(m: nn.Module) -> nn.Module:
        if type(m) is nn.ModuleList:
            return _shallow(m, part)
        return m if type(m) is nn.Identity else _Part(next(number))

    return _shallow(module, part)


class _Part(nn.Module):
    """A function of its tokens, different for every number."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x + 0.7 * self.number) * (1 + 0.1 * (self.number % 5))


def _shallow(module: nn.Module, child) -> nn.Module:
    """A module that shares what ``module`` holds, has no hooks, and the children ``child(m)``."""
    clone = type(module).__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__.update({name: OrderedDict() for name in HOOKS})
    clone.__dict__["_modules"] = {name: m if m is None else child(m) for name, m in module._modules.items()}
    return clone


def _held(module: nn.Module) -> list:
    """All that the modules hold, by identity."""
    return [{name: id(value) for name, value in {**m.__dict__, **m._buffers}.items()} for m in module.modules()]


def _signature(module: nn.Module) -> tuple:
    """Equal for modules whose forwards differ in nothing but the values of their parameters."""
    held = {name: value for name, value in module.__dict__.items() if name not in _OF_EVERY_MODULE}
    tensors = {**module._parameters, **module._buffers}
    return (
        type(module),
        tuple((n, v if isinstance(v, int | float | str | None) else id(v)) for n, v in sorted(held.items())),
        tuple((n, None if t is None else tuple(t.shape)) for n, t in sorted(tensors.items())),
        tuple((n, None if m is None else _signature(m)) for n, m in module._modules.items()),
    )


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _width(module: nn.Module) -> int:
    """Width of the tokens that an attention or ISTA module takes."""
    projection, dictionary = _attribute(module, PROJECTION, nn.Module), getattr(module, "D", None)
    if projection is not None:
        return next(getattr(module, projection).parameters()).shape[-1]
    return module.weight.shape[-1] if dictionary is None else dictionary.shape[0]


def _grouped(entries: dict[str, str]) -> list[str]:
    """One line for each kind of path: layer numbers written as ``*``, a number behind one (a place in it) kept."""
    groups: dict[tuple[str, str], int] = {}
    for path, text in entries.items():
        key = (re.sub(r"(?<![^.])(?<!\d\.)\d+(?![^.])", "*", path) or "(the model)", text)
        groups[key] = groups.get(key, 0) + 1
    return [f"{path}{f' ({count} times)' if count > 1 else ''}: {text}" for (path, text), count in groups.items()]
