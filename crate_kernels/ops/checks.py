"""Argument checks that the operators share. Every message names the argument, its value and what is accepted."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from . import backends

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int32, torch.int64)


def is_tensor(name: str, value):
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def same_device(name: str, value: Tensor, like: Tensor, beside: str):
    """``value`` is on the device of ``like``, which the message calls ``beside``."""
    if value.device != like.device:
        raise ValueError(f"{name}: is on {value.device}, but {beside} is on {like.device}")


def tensor(
    name: str,
    value,
    shape: tuple[int | str, ...] | None = None,
    *,
    like: Tensor | None = None,
    dtypes=FLOATING,
    beside: str = "the first argument",
):
    """``value`` is a tensor of one of ``dtypes`` and of ``shape``, on the device of ``like``.

    In ``shape`` an integer is an exact size and a string names a free size. ``None`` accepts any shape. ``beside`` is
    the name of ``like`` in the message about the device.
    """
    is_tensor(name, value)
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got a {layout} one")
    if value.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: dtype {value.dtype} is not supported; accepted are {accepted}")
    if shape is not None:
        fits = value.dim() == len(shape)
        for wanted, got in zip(shape, value.shape, strict=False):
            fits = fits and (isinstance(wanted, str) or wanted == got)
        if not fits:
            wanted = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
            raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")
    if like is not None:
        same_device(name, value, like, beside)


def same_dtype(dtype: torch.dtype, also: tuple[torch.dtype, ...] = (), **values: Tensor | None):
    """All given tensors have ``dtype`` (or one of ``also``); nothing is promoted silently.

    Under autocast any mixture is accepted, because autocast decides the dtype. The bfloat16 output of one operator may
    meet the float32 weights of the next.
    """
    for name, value in values.items():
        if value is None or backends.autocast_is_on(value):
            continue
        if value.dtype != dtype and value.dtype not in also:
            extra = "".join(f" or {d}" for d in also)
            raise TypeError(
                f"{name}: has dtype {value.dtype}, but the first argument has {dtype}; expected {dtype}{extra}"
            )


def model_input(name: str, value, weight: Tensor | None):
    """``value`` is a tensor on the device of ``weight``, a parameter of a model. None accepts any device."""
    is_tensor(name, value)
    if weight is not None:
        same_device(name, value, weight, "the model")


def width(name: str, value, wanted: int, *, maps: bool = False):
    """``value`` is a tensor ``(..., wanted)``. With ``maps`` a tensor of four dimensions is ``(B, wanted, rows,
    columns)``."""
    is_tensor(name, value)
    if value.dim():
        got = value.shape[1 if maps and value.dim() == 4 else -1]
        if got != wanted:
            raise ValueError(f"{name}: expected width {wanted}, got {got}")


def model_dtype(name: str, value: Tensor, weight: Tensor | None):
    """``value`` has the dtype of ``weight``, a parameter of a model, if that is a floating one.

    Under autocast every floating dtype but float64 is accepted: autocast does not convert float64.
    """
    if weight is None or value.dtype == weight.dtype or weight.dtype not in FLOATING:
        return
    if torch.float64 in (value.dtype, weight.dtype) or not backends.autocast_is_on(value):
        raise TypeError(
            f"{name}: has dtype {value.dtype}, but the model's parameters have {weight.dtype}; "
            "convert one of them with .to()"
        )


def positive_int(name: str, value):
    """``value`` is an integer of at least 1 (a symbolic size counts)."""
    integer(name, value, minimum=1)


REAL: Any = numbers.Real
"""As ``Any``: numbers.Real has no order for a type checker."""


def number(name: str, value: Any, *, minimum: float | None = None) -> float:
    """``value`` as a float; finite, not a tensor, not below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, REAL):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite cannot be traced
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return float(value)


def integer(name: str, value, *, minimum: int = 0):
    """``value`` is an integer of at least ``minimum`` (a symbolic size counts)."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def positive_ints(**values):
    """Every value, given under its name, is an integer of at least 1."""
    for name, value in values.items():
        positive_int(name, value)


def dropout(name: str, value):
    """``value`` is a probability: a number in 0..1."""
    if not 0 <= number(name, value) <= 1:
        raise ValueError(f"{name}: expected a probability in 0..1, got {value}")


def residual_dtype(value):
    """``value`` is None or a floating dtype."""
    if value is not None and value not in FLOATING:
        raise TypeError(f"residual_dtype: expected None or a floating dtype of torch, got {value!r}")


def flag(name: str, value) -> bool:
    """``value`` is True or False. A number or a string would count as True by mistake."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def rows(name: str, value) -> Tensor:
    """``value (..., d)`` as a matrix ``(n, d)`` of its rows."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    if dense and value.dim() == 2 and value.shape[1] > 0:
        return value
    tensor(name, value)
    if value.dim() < 1 or value.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape (..., d) with d at least 1, got {tuple(value.shape)}")
    return value.reshape(-1, value.shape[-1])


def lengths(value: Tensor | None, batch: int, like: Tensor):
    """``lengths`` is None or an integer tensor (B,). :func:`length_values` checks its values."""
    if value is not None:
        tensor("lengths", value, (batch,), like=like, dtypes=INTEGER)


def length_values(value: Tensor | None, tokens: int):
    """1 <= lengths <= N, see :func:`values_within`."""
    values_within("lengths", value, 1, tokens, "the number of tokens")


def values_within(name: str, value: Tensor | None, least: int, most: int, meaning: str):
    """The integers in ``value`` lie in ``least..most``. Only tensors on the CPU are checked: reading from
    another device would stall it.

    A compiled or exported graph checks when it runs. Tensors without values (fake ones, functorch's) are not checked.
    """
    if value is None or value.device.type != "cpu":
        return
    if torch.compiler.is_compiling():
        inside = ((value >= least) & (value <= most)).all()
        torch._assert_async(inside, f"{name}: values must be at least {least} and at most {meaning}")
        return
    if not readable(value):
        return
    low, high = (int(v) for v in value.aminmax())
    if low < least or high > most:
        raise ValueError(f"{name}: values must lie in {least}..{most} ({meaning}), got {low}..{high}")


def readable(value: Tensor) -> bool:
    """Whether a check may read ``value`` now: a tensor on the CPU with values, outside of graphs and transforms."""
    if value.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return type(value) is Tensor and torch._C._functorch.peek_interpreter_stack() is None and value.numel() > 0


def indices(name: str, value: Tensor, size: int, meaning: str, *, least: int = 0):
    """The integers in ``value`` lie in ``least..size - 1``, as :func:`values_within` checks them outside of a graph.

    A compiled or exported graph has no check of its own: its embedding or loss refuses them.
    """
    if not torch.compiler.is_compiling():
        values_within(name, value, least, size - 1, meaning)


def norm(z: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, prefix: str = ""):
    """``z (..., d)`` and LayerNorm parameters ``(d,)``, which may be float32 while ``z`` has lower precision.

    Messages put ``prefix`` before the names of the parameters.
    """
    tensor("z", z)
    if z.dim() < 1 or z.shape[-1] < 1:
        raise ValueError(f"z: expected shape (..., d) with d at least 1, got {tuple(z.shape)}")
    parameters = {f"{prefix}norm_weight": norm_weight, f"{prefix}norm_bias": norm_bias}
    for name, value in parameters.items():
        tensor(name, value, (z.shape[-1],), like=z)
    same_dtype(z.dtype, (torch.float32,), **parameters)
    number(f"{prefix}eps", eps, minimum=0.0)
