"""The content of a module besides its parameters. It is recorded at the numerical test and compared later."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.weak import WeakIdKeyDictionary

from .names import CHECKPOINTING, DROPOUT, FUSION, ORIGINAL

OF_EVERY_MODULE = frozenset(nn.Module().__dict__)

_IGNORED = {FUSION, "keep_folded", "_folded", "_compiled_call_impl", "_gradient_checkpointing_func", *CHECKPOINTING}
_CALLED = "called as a module"
_MISSING = object()

Note = Callable[[Any], None]


@dataclass(frozen=True)
class Description:
    """A module without its parameters. Modules with equal descriptions compute the same function of their weights."""

    kind: type[nn.Module]
    attributes: dict[str, Any]
    buffers: dict[str, Any]
    children: dict[str, Any]

    def kinds(self) -> set[type[nn.Module]]:
        """The classes of the module and of its described parts."""
        return {self.kind}.union(*(c.kinds() for c in self.children.values() if isinstance(c, Description)))

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` has the same plain attributes and kinds of parts. torch.compile can trace this
        comparison."""
        for name, value in self.attributes.items():
            if isinstance(value, bool | int | float | str | None) and getattr(module, name, _MISSING) != value:
                return False
        for name, wanted in self.children.items():
            child = getattr(module, name, None)
            if isinstance(wanted, Description):
                if type(child) is not wanted.kind or hooked(child) or not wanted.matches(child):
                    return False
            elif wanted is None and child is not None:
                return False
        return True


def describe(
    module: nn.Module, reads: Iterable[str] = (), called: Iterable[str] = (), note: Note | None = None
) -> Description:
    """The description of ``module`` and of those parts that are not called as modules.

    Args:
        reads: attributes that the operators read at each call, so they may change; ``"norm.eps"`` belongs to the child.
        called: children that the operators call as modules. Their content is not described.
        note: function that is called with every mutable object in the description: modules, containers, tensors.
    """
    if note is not None:
        note(module)
    reads = {*reads, "p"} if isinstance(module, _DropoutNd) else reads
    attributes = {
        name: _frozen(value, note)
        for name, value in module.__dict__.items()
        if name not in OF_EVERY_MODULE
        and name not in _IGNORED
        and name not in reads
        and not (name in DROPOUT and is_number(value))
    }
    buffers = {name: None if b is None else _tensor(b, note) for name, b in module._buffers.items()}
    children = {
        name: child if child is None else _CALLED if name in called else describe(child, _within(name, reads), (), note)
        for name, child in module._modules.items()
    }
    return Description(getattr(type(module), ORIGINAL, type(module)), attributes, buffers, children)


def _within(child: str, reads: Iterable[str]) -> list[str]:
    return [name.removeprefix(f"{child}.") for name in reads if name.startswith(f"{child}.")]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def hooked(module: nn.Module) -> bool:
    """Whether a hook can observe calls of this module itself, or its ``forward`` is not that of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


# -- values of attributes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Object:
    """An object of any other type. It equals the same object if that object's content is unchanged."""

    value: Any
    held: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value and self.held == other.held

    __hash__ = None  # type: ignore[assignment]


def _frozen(value: Any, note: Note | None, depth: int = 0) -> Any:
    """A copy of ``value`` as it is now. Containers and objects are copied four levels deep."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | type):
        return value
    if isinstance(value, Tensor):
        return _tensor(value, note)
    if isinstance(value, nn.Module) or callable(value) or depth == 4:
        return _Object(value)
    held: Any = value if isinstance(value, dict | list | tuple | set) else getattr(value, "__dict__", None)
    if held is None:
        return _Object(value)
    if note is not None and not isinstance(held, tuple):
        note(held)
    frozen: Any
    if isinstance(held, dict):
        frozen = {key: _frozen(item, note, depth + 1) for key, item in held.items()}
    else:
        frozen = frozenset(held) if isinstance(held, set) else [_frozen(item, note, depth + 1) for item in held]
    return (type(value).__name__, frozen) if held is value else _Object(value, frozen)


_digests = WeakIdKeyDictionary()
"""Tensor -> its version and its digest, so that a mask of millions of entries is read once."""


def _tensor(tensor: Tensor, note: Note | None) -> tuple:
    """Shape and digest of the values. They do not depend on dtype and device."""
    if note is not None:
        note(tensor)
    if tensor.is_meta:
        return tuple(tensor.shape), "meta"
    version = version_of(tensor)
    known = _digests.get(tensor)
    if known is None or known[0] != version or version is None:
        values = tensor.detach().to("cpu", torch.float64).contiguous()
        digest = hashlib.blake2b(ctypes.string_at(values.data_ptr(), values.nbytes), digest_size=16).digest()
        known = _digests[tensor] = version, digest
    return tuple(tensor.shape), known[1]


def version_of(tensor: Tensor) -> int | None:
    """The counter of in-place writes. None for tensors of inference mode, which have no counter."""
    return None if tensor.is_inference() else tensor._version
