"""Recognizes parts of CRATE by their attributes, and finds the operators that compute the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ISTA, MSSA, OvercompleteISTA
from .constants import routes_by_measurement
from .description import describe
from .modules import Fused
from .names import HEADS, LAMBD, OUTPUT, PROJECTION, SCALE, STEP_SIZE, attribute
from .probe import LONGEST, NotTried, Trial, agree, probing, random_copy, token_width, wiring_copy
from .routes import (
    WIRINGS,
    AttentionRoute,
    ISTARoute,
    LayerRoute,
    PreNormRoute,
    Route,
    StackRoute,
    are_pairs,
    route_of,
)


class Known:
    """Results of numerical tests, for repeated modules that differ only in the values of their parameters."""

    def __init__(self):
        self._results: list[tuple[tuple, Any]] = []

    def result(self, question: str, module: nn.Module, answer: Callable[[], Any]) -> Any:
        """``answer()``, computed once for every kind of module."""
        shapes = [(name, None if p is None else tuple(p.shape)) for name, p in _all_parameters(module)]
        key = (question, describe(module), shapes)
        for known, result in self._results:
            if known == key:
                return result
        result = answer()
        self._results.append((key, result))
        return result


def _all_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor | None]]:
    for name, parameter in module._parameters.items():
        yield prefix + name, parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from _all_parameters(child, f"{prefix}{name}.")


def recognize(module: nn.Module, known: Known) -> Route | str | None:
    """The route of a module. If it looks like CRATE but has no route, the reason as a string. None for other
    modules."""
    if isinstance(module, MSSA | ISTA | OvercompleteISTA):
        return None
    for candidates in (_attention_routes, _ista_routes, _prenorm_routes, _stack_routes, _layer_routes):
        found: Iterable[Route] | str = candidates(module, known)
        if isinstance(found, str):
            return found
        routes = list(found)
        if not routes:
            continue
        if "forward" in module.__dict__:
            return "its forward has been replaced on the instance"
        if isinstance(module, torch.jit.ScriptModule):
            return "it is a scripted module"
        return known.result("route", module, functools.partial(_agreeing, module, routes))
    return None


def _agreeing(module: nn.Module, routes: list[Route]) -> Route | str:
    """The first route with the outputs and gradients of the module's own forward. Without one, the reason as a
    string."""
    try:
        if isinstance(routes[0], AttentionRoute | ISTARoute):
            trial = Trial(module, token_width(module), random_copy)
        else:
            trial = Trial(module, next((p.shape[-1] for p in module.parameters() if p.dim()), 4), wiring_copy)
    except NotTried as reason:
        return str(reason)
    for route in routes:
        if trial.agrees(route):
            if isinstance(route, AttentionRoute):
                return replace(route, longest=_longest(module, route, trial))
            return route
    return f"its forward does not compute {routes[0].trial}"


def _longest(module: nn.Module, route: AttentionRoute, trial: Trial) -> int | None:
    """The number of tokens to which the test applies. None means all; a mask or a table of limited size sets a
    limit."""
    limits = [] if trial.longest is None else [trial.longest]
    for buffer in module.buffers():
        if buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2]:
            size = buffer.shape[-1]
            limits = [limit for limit in limits if limit > size]
            limits.append(size if size <= LONGEST or (route.causal and _is_causal(buffer)) else LONGEST)
    return min(limits, default=None)


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask hides exactly the later tokens. Hidden entries are 0, False, or -inf."""
    mask = mask.cpu()
    later = torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1)
    marks = [mask == 0] if not mask.is_floating_point() else [mask == 0, mask == float("-inf")]
    return any(bool((hidden == later).all()) for hidden in (*marks, mask != 0))


def _attention_routes(module: nn.Module, _) -> Iterator[AttentionRoute]:
    projection, heads = attribute(module, PROJECTION, nn.Module), attribute(module, HEADS, int)
    if projection is None or heads is None:
        return
    for names in OUTPUT:
        if isinstance(getattr(module, names[0], None), nn.Module):
            output = tuple(name for name in names if isinstance(getattr(module, name, None), nn.Module))
            break
    else:
        return
    for scale in dict.fromkeys((attribute(module, SCALE, float | int), None)):
        for causal in (False, True):
            yield AttentionRoute(projection, heads, output, scale, causal)


def _ista_routes(module: nn.Module, _) -> Iterable[ISTARoute] | str:
    step_size, lambd = attribute(module, STEP_SIZE), attribute(module, LAMBD)
    weight, dictionary = getattr(module, "weight", None), getattr(module, "D", None)
    matrices = [m for m in (dictionary, weight) if isinstance(m, Tensor) and m.dim() == 2]
    if not matrices:
        return []
    if matrices[0] is dictionary:
        forms: tuple[str, ...] = ("D",)
    else:
        forms = ("complete", "rows") if matrices[0].shape[0] == matrices[0].shape[1] else ("rows",)
    if step_size is None or lambd is None:
        return routes_by_measurement(module, forms, step_size, lambd)
    if not all(isinstance(getattr(module, name), float | int) for name in (step_size, lambd)):
        return "its step size or threshold is a tensor; the operators take numbers"
    return [ISTARoute(form, step_size, lambd) for form in forms]


def _prenorm_routes(module: nn.Module, known: Known) -> Iterator[PreNormRoute]:
    children = dict(module.named_children())
    if children.keys() == {"norm", "fn"} and isinstance(route_of(children["fn"]), AttentionRoute | ISTARoute):
        for eps in epsilons(children["norm"], known):
            yield PreNormRoute(eps)


def _stack_routes(module: nn.Module, _) -> Iterator[StackRoute]:
    children = dict(module.named_children())
    if len(children) != 1 or next(module.parameters(recurse=False), None) is not None:
        return
    ((name, layers),) = children.items()
    if are_pairs(layers) and any(
        isinstance(route_of(m), PreNormRoute) for pair in layers.children() for m in pair.children()
    ):
        for wiring in WIRINGS:
            yield StackRoute(name, wiring)


def _layer_routes(module: nn.Module, known: Known) -> Iterator[LayerRoute]:
    children = {name: m for name, m in module.named_children() if type(m) is not nn.Identity}
    attention = [name for name, m in children.items() if isinstance(route_of(m), AttentionRoute)]
    ista = [name for name, m in children.items() if isinstance(route_of(m), ISTARoute)]
    norms = [name for name in children if name not in (*attention, *ista)]
    if (len(attention), len(ista), len(norms)) == (1, 1, 2):
        for eps_1 in epsilons(children[norms[0]], known):
            for eps_2 in epsilons(children[norms[1]], known):
                for wiring in ("crate", "residual"):
                    yield LayerRoute((norms[0], attention[0], norms[1], ista[0]), (eps_1, eps_2), wiring)


def epsilons(norm: nn.Module, known: Known) -> list[float | None]:
    """Values of eps with which this module is a LayerNorm of the last axis. None means its attribute. Empty if it is
    not one."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return []
    if type(norm) is nn.LayerNorm:
        return [None]
    return known.result("norm", norm, lambda: _epsilons(norm, weight.shape[0]))


def _epsilons(norm: nn.Module, width: int) -> list[float | None]:
    # nanoGPT and similar code write their own LayerNorm, with eps in the code.
    for eps in (None, 1e-5, 1e-6, 1e-12):
        if eps is None and not isinstance(getattr(norm, "eps", None), float):
            continue
        with probing():
            try:
                copy: Any = random_copy(norm).eval()
                arguments: Any = copy.weight, getattr(copy, "bias", None), copy.eps if eps is None else eps
                tokens = [1e-2 * torch.randn(2, n, width, dtype=torch.float64) for n in (3, LONGEST)]
                if all(agree(copy(x), nn.functional.layer_norm(x, x.shape[-1:], *arguments)) for x in tokens):
                    return [eps]
            except Exception:
                break
    return []


def untouched_parts(path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """The largest parts that have their own parameters and contain no fused module."""
    if isinstance(module, Fused) or next(module.parameters(), None) is None:
        return
    if isinstance(module, MSSA | ISTA | OvercompleteISTA):
        yield path, "already runs fused operators"
    elif not any(isinstance(m, Fused | MSSA | ISTA | OvercompleteISTA) for m in module.modules()):
        yield path, f"{type(module).__name__}: no CRATE part in it"
    else:
        for name, child in module.named_children():
            yield from untouched_parts(f"{path}.{name}" if path else name, child)
