"""The numerical trial: does an operator route give the outputs and gradients of the module's own ``forward``?

Both run in float64 on the CPU, on copies with random parameters.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .. import ops
from .names import DROPOUT, HOOKS, LAMBD, PROJECTION, SCALE, STEP_SIZE, attribute
from .routes import AttentionRoute, ISTARoute, LayerRoute, OperatorRoute, PreNormRoute, StackRoute, class_with_route


def agreeing_plan(recipe: type[OperatorRoute], module: nn.Module, plans: list, width: int, copy) -> Any | str:
    """The first plan whose fused route gives the outputs and gradients of the module's own forward; else the reason."""
    with probing():
        try:
            probe, x = copy(module), random_tensor(2, 3, width)
            want = []
            for training in (False, True):
                probe.train(training)
                before = held(probe)
                want += outcome(probe.forward, probe, x)
                if held(probe) != before:
                    return "its forward keeps something on the module"
        except Exception as error:
            return f"its forward could not be tried ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        for plan in plans:
            candidate = copy(module)
            candidate.__class__ = class_with_route(recipe, type(module))
            candidate.__dict__["_fused"] = plan
            try:
                got = outcome(candidate._compute, candidate, x)
            except Exception:
                continue
            if len(got) * 2 == len(want) and all(map(agree, got * 2, want)):
                return plan
    return f"its forward does not compute {_NAMES[recipe]}"


_NAMES = {
    AttentionRoute: "subspace attention",
    ISTARoute: "an ISTA step known here",
    PreNormRoute: "fn(norm(x))",
    StackRoute: "a known succession of its layers",
    LayerRoute: "a known succession of its parts",
}


@contextlib.contextmanager
def probing() -> Iterator[None]:
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


def outcome(function, module: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The output and the gradients of ``x`` and of all parameters."""
    x = x.detach().requires_grad_()
    out = function(x)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returns a {type(out).__name__}, not one tensor")
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()], allow_unused=True)]


def agree(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def random_copy(module: nn.Module) -> nn.Module:
    """The same module with random float64 parameters, no dropout, no hooks, and constants that are nobody's default."""
    generator, memo = torch.Generator().manual_seed(1), {}

    def parameter(p: Tensor | None) -> nn.Parameter | None:
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


def wiring_copy(module: nn.Module) -> nn.Module:
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


def held(module: nn.Module) -> list:
    """All that the modules hold, by identity."""
    return [{name: id(value) for name, value in {**m.__dict__, **m._buffers}.items()} for m in module.modules()]


def signature(module: nn.Module) -> tuple:
    """Equal for modules whose forwards differ in nothing but the values of their parameters."""
    held = {name: value for name, value in module.__dict__.items() if name not in OF_EVERY_MODULE}
    tensors = {**module._parameters, **module._buffers}
    return (
        type(module),
        tuple((n, v if isinstance(v, int | float | str | None) else id(v)) for n, v in sorted(held.items())),
        tuple((n, None if t is None else tuple(t.shape)) for n, t in sorted(tensors.items())),
        tuple((n, None if m is None else signature(m)) for n, m in module._modules.items()),
    )


OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def token_width(module: Any) -> int:
    """Width of the tokens that an attention or ISTA module takes."""
    projection, dictionary = attribute(module, PROJECTION, nn.Module), getattr(module, "D", None)
    if projection is not None:
        return next(getattr(module, projection).parameters()).shape[-1]
    return module.weight.shape[-1] if dictionary is None else dictionary.shape[0]
