"""Which modules look like parts of CRATE, by the attributes they have, and which operators they might equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ISTA, MSSA, OvercompleteISTA
from .constants import plans_by_measurement
from .names import HEADS, LAMBD, OUTPUT, PROJECTION, SCALE, STEP_SIZE, attribute
from .probe import agree, agreeing_plan, probing, random_copy, random_tensor, signature, token_width, wiring_copy
from .routes import WIRINGS, AttentionRoute, ISTARoute, LayerRoute, OperatorRoute, PreNormRoute, StackRoute


def recognize(module: nn.Module, known: dict) -> tuple[type[OperatorRoute], Any] | str | None:
    """The recipe and plan for a module; the reason why it has none if it looks like one; None if it does not."""
    if isinstance(module, MSSA | ISTA | OvercompleteISTA):
        return None
    for recipe, candidates in (
        (AttentionRoute, _attention_plans),
        (ISTARoute, _ista_plans),
        (PreNormRoute, _prenorm_plans),
        (StackRoute, _stack_plans),
        (LayerRoute, _layer_plans),
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
        if recipe in (AttentionRoute, ISTARoute):
            # Layers repeat: one probe for all that differ in their weights' values alone.
            key = (recipe, signature(module))
            if key not in known:
                known[key] = agreeing_plan(recipe, module, plans, token_width(module), random_copy)
            result = known[key]
        else:
            width = next((p.shape[-1] for p in module.parameters()), 4)
            result = agreeing_plan(recipe, module, plans, width, wiring_copy)
        return result if isinstance(result, str) else (recipe, result)
    return None


def _attention_plans(module: nn.Module, _) -> Iterator:
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
            yield AttentionRoute.Plan(projection, heads, output, scale, causal)


def _ista_plans(module: nn.Module, _) -> list | str:
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
        return plans_by_measurement(module, forms, step_size, lambd)
    if not all(isinstance(getattr(module, name), float | int) for name in (step_size, lambd)):
        return "its step size or threshold is a tensor; the operators take numbers"
    return [ISTARoute.Plan(form, step_size, lambd) for form in forms]


def _prenorm_plans(module: nn.Module, known: dict) -> Iterator:
    children = dict(module.named_children())
    if children.keys() == {"norm", "fn"} and isinstance(children["fn"], AttentionRoute | ISTARoute):
        for eps in epsilons(children["norm"], known):
            yield PreNormRoute.Plan(eps)


def _stack_plans(module: nn.Module, _) -> Iterator:
    children = dict(module.named_children())
    if len(children) != 1 or next(module.parameters(recurse=False), None) is not None:
        return
    ((name, layers),) = children.items()
    if (
        isinstance(layers, nn.ModuleList)
        and len(layers)
        and all(isinstance(pair, nn.ModuleList) and len(pair) == 2 for pair in layers)
        and any(isinstance(m, PreNormRoute) for pair in layers for m in pair.children())
    ):
        for wiring in WIRINGS:
            yield StackRoute.Plan(name, wiring)


def _layer_plans(module: nn.Module, known: dict) -> Iterator:
    children = {name: m for name, m in module.named_children() if type(m) is not nn.Identity}
    attention = [name for name, m in children.items() if isinstance(m, AttentionRoute)]
    ista = [name for name, m in children.items() if isinstance(m, ISTARoute)]
    norms = [name for name in children if name not in (*attention, *ista)]
    if (len(attention), len(ista), len(norms)) == (1, 1, 2):
        for eps_1 in epsilons(children[norms[0]], known):
            for eps_2 in epsilons(children[norms[1]], known):
                for wiring in ("crate", "residual"):
                    yield LayerRoute.Plan((norms[0], attention[0], norms[1], ista[0]), (eps_1, eps_2), wiring)


def epsilons(norm: nn.Module, known: dict) -> list[float | None]:
    """The eps with which this module is a LayerNorm of the last axis: None for its attribute; empty if it is not."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return []
    if type(norm) is nn.LayerNorm:
        return [None]
    key = ("norm", signature(norm))
    if key not in known:
        known[key] = []
        # nanoGPT and its kin write their own, with eps in the code.
        for eps in (None, 1e-5, 1e-6, 1e-12):
            if eps is None and not isinstance(getattr(norm, "eps", None), float):
                continue
            with probing():
                try:
                    copy: Any = random_copy(norm)
                    x = 1e-2 * random_tensor(2, 3, weight.shape[0])
                    bias, used = getattr(copy, "bias", None), copy.eps if eps is None else eps
                    if agree(copy(x), nn.functional.layer_norm(x, x.shape[-1:], copy.weight, bias, used)):
                        known[key] = [eps]
                        break
                except Exception:
                    break
    return known[key]


def untouched_parts(path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """The largest parts with parameters of their own in which nothing is fused."""
    if isinstance(module, OperatorRoute) or next(module.parameters(), None) is None:
        return
    if isinstance(module, MSSA | ISTA | OvercompleteISTA):
        yield path, "runs fused operators already"
    elif not any(isinstance(m, OperatorRoute | MSSA | ISTA | OvercompleteISTA) for m in module.modules()):
        yield path, f"{type(module).__name__}: no CRATE part in it"
    else:
        for name, child in module.named_children():
            yield from untouched_parts(f"{path}.{name}" if path else name, child)
