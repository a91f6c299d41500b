"""Measures the step size and the threshold of ISTA modules that have them as numbers in their code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .description import OF_EVERY_MODULE
from .probe import probing, random_copy, token_width
from .routes import ISTARoute


def routes_by_measurement(module: nn.Module, forms: tuple[str, ...], step_size: str | None, lambd: str | None):
    """Routes for a module without attributes for its step size or threshold. The numbers in its code are measured.

    The numerical test confirms these numbers on random tokens and parameters, as for every route. If a number may come
    from anywhere else than the code, it could change later. Such a module is left alone.
    """
    matrices = {"weight", "D", "D1"}
    if type(module).__module__.startswith("torch.") or not matrices.issuperset(dict(module.named_parameters())):
        return []
    unknown = {name: value for name, value in _constants(module).items() if name not in (step_size, lambd)}
    routes = []
    with probing():
        for form in forms:
            found = measure(random_copy(module), form)
            if found is None:
                continue
            for name, value in unknown.items():
                if not isinstance(value, int | float | str | None) or (type(value) is int and value in found):
                    return f"its step size or threshold has no attribute, and may come from its {name}"
            moved = random_copy(module)
            moved.__dict__.update({name: _perturbed(value) for name, value in unknown.items()})
            moved._buffers = {name: _perturbed(value) for name, value in moved._buffers.items()}
            if measure(moved, form) != found:
                return "its step size or threshold comes from an attribute whose name is not known here"
            routes.append(ISTARoute(form, *(n or v for n, v in zip((step_size, lambd), found, strict=True))))
    return routes


def measure(module: nn.Module, form: str) -> tuple[float, float] | None:
    """Step size and threshold of a module that computes an ISTA step of this form. None if it does not.

    With ``½ I`` as its matrices, an ISTA step maps each channel of a large positive token ``x`` to a line ``s·x + c``.
    The line is ``x + η(x/4 − λ)`` for the complete step, and ``η(2 − η/4)(x/2 − λ)/2`` for the two steps with a
    dictionary. A negative token becomes zero.
    """
    low, high = 64.0, 128.0
    try:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.5 * torch.eye(*parameter.shape))
            x = torch.tensor([low, high, -high], dtype=torch.float64)[:, None].expand(1, 3, token_width(module))
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
    """The short decimal in the source code, if ``value`` equals one up to rounding errors."""
    short = float(f"{value:.9g}")
    return short if abs(short - value) < 1e-12 else value


def _constants(module: nn.Module) -> dict[str, Any]:
    """Objects of a module or its classes from which its forward could read a number."""
    classes = [c for c in type(module).__mro__ if not c.__module__.startswith("torch.") and c is not object]
    held = {name: value for c in reversed(classes) for name, value in vars(c).items() if isinstance(value, float)}
    return held | {name: value for name, value in module.__dict__.items() if name not in OF_EVERY_MODULE}


def _perturbed(value: Any) -> Any:
    """Scale floats by 1.25. Return anything else unchanged."""
    number = isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
    return 1.25 * value if number else value
