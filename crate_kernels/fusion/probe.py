"""The numerical test: do the operators give the outputs and gradients of the module's own ``forward``?

Both run in float64 on the CPU, on copies with random parameters and with several numbers of tokens.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .. import ops
from .description import is_number
from .names import DROPOUT, LAMBD, PROJECTION, SCALE, STEP_SIZE, attribute
from .routes import Route

SHAPES = ((2, 3), (1, 1), (1, 17), (1, 65), (1, 257))
"""(images or sequences, tokens) of the test. The first is tested in training too, the others in evaluation only."""

LONGEST = max(tokens for _, tokens in SHAPES)


class NotTried(Exception):
    """The reason why a module could not be tested."""


class Trial:
    """Results of a module's own ``forward``: outputs and gradients, in training and in evaluation, for every shape.

    Args:
        width: width of the tokens.
        copy: ``copy(module, rate)`` makes the module to test. ``rate`` is the rate of all its dropout.
    """

    def __init__(self, module: nn.Module, width: int, copy: Callable[[nn.Module, float], nn.Module]):
        self.module, self.copy, self.width = module, copy, width
        self.longest: int | None = None
        with probing():
            # Dropout must have no effect in evaluation with any rate, and no effect in training with rate 0.
            self._training = self._own(copy(module, 0.0).train(), SHAPES[:1])
            self._evaluation = self._own(copy(module, 0.5).eval(), SHAPES)
            tried = len(self._evaluation)
            if tried < len(SHAPES):
                self.longest = SHAPES[tried - 1][1]

    def agrees(self, route: Route) -> bool:
        """Whether ``route`` gives the same results."""
        with probing():
            for training, wanted in ((True, self._training), (False, self._evaluation)):
                copy = self.copy(self.module, 0.0).train(training)
                for shape, want in zip(SHAPES, wanted, strict=False):
                    try:
                        got = outcome(lambda x: route.assumed(copy, x), copy, self._tokens(shape))  # noqa: B023
                    except Exception:
                        return False
                    if len(got) != len(want) or not all(map(agree, got, want)):
                        return False
        return True

    def _own(self, probe: nn.Module, shapes: tuple[tuple[int, int], ...]) -> list[list[Tensor | None]]:
        outcomes: list[list[Tensor | None]] = []
        before = held(probe)
        for shape in shapes:
            try:
                outcomes.append(outcome(probe.forward, probe, self._tokens(shape)))
            except Exception as error:
                # A position table or a mask limits the length. Longer sequences are left to the module itself.
                if len(outcomes) >= 2:
                    break
                text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise NotTried(f"its forward could not be tried ({text})") from error
            if held(probe) != before:
                raise NotTried("its forward stores something on the module")
        with torch.no_grad():
            if not agree(probe.forward(self._tokens(shapes[0])), outcomes[0][0]):
                raise NotTried("its forward is random, or differs without gradients")
        return outcomes

    def _tokens(self, shape: tuple[int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(shape[1])
        return torch.randn((*shape, self.width), dtype=torch.float64, generator=generator)


@contextlib.contextmanager
def probing() -> Iterator[None]:
    """Compute in float64 on the CPU, with gradients, whatever mode the caller has set. The random state does not
    change."""
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


def outcome(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The output and the gradients of ``x`` and of all parameters."""
    x = x.detach().requires_grad_()
    out = function(x)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returns a {type(out).__name__}, not one tensor")
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()], allow_unused=True)]


def agree(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are equal up to rounding in float64."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)


# -- copies to try -------------------------------------------------------------------------------------------------


def random_copy(module: nn.Module, rate: float = 0.0) -> nn.Module:
    """A copy with random float64 parameters, no hooks, one dropout rate, and numbers that differ from the defaults."""
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
        for name in (*SCALE, *STEP_SIZE, *LAMBD, "eps"):
            # The difference shows whether the forward reads the attribute, or has the same number in its code.
            if isinstance(m.__dict__.get(name), float):
                clone.__dict__[name] *= 1.25
        for name in ("p",) if isinstance(m, _DropoutNd) else DROPOUT:
            if is_number(m.__dict__.get(name)):
                clone.__dict__[name] = rate
        return clone

    return copy(module)


def wiring_copy(module: nn.Module, rate: float = 0.0) -> nn.Module:
    """A copy in which a function replaces every part. The result shows how the parts are joined."""
    number = iter(range(1, 1 << 30))

    def part(m: nn.Module) -> nn.Module:
        if type(m) is nn.ModuleList:
            return _shallow(m, part)
        return m if type(m) is nn.Identity else _Part(next(number))

    return _shallow(module, part)


class _Part(nn.Module):
    """A function of tokens that differs for every ``number``."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x + 0.7 * self.number) * (1 + 0.1 * (self.number % 5))


def _shallow(module: nn.Module, child: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A module with the same content as ``module``, without hooks, and with the children ``child(m)``."""
    clone = object.__new__(type(module))  # FSDP's classes have their own __new__
    clone.__dict__.update(module.__dict__)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    clone.__dict__.update({name: OrderedDict() for name in hooks})
    clone.__dict__["_modules"] = {name: m if m is None else child(m) for name, m in module._modules.items()}
    return clone


def held(module: nn.Module) -> list[dict[str, int]]:
    """All objects that the modules hold, by identity."""
    return [{name: id(value) for name, value in {**m.__dict__, **m._buffers}.items()} for m in module.modules()]


def token_width(module: Any) -> int:
    """Width of the tokens of an attention or ISTA module."""
    projection, dictionary = attribute(module, PROJECTION, nn.Module), getattr(module, "D", None)
    if projection is not None:
        return next(getattr(module, projection).parameters()).shape[-1]
    return module.weight.shape[-1] if dictionary is None else dictionary.shape[0]
