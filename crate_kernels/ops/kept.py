"""Cache of values that depend on one weight alone (its cast, its packed form), valid until the weight changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_made: dict[tuple[int, Hashable], tuple[weakref.ref, tuple, Tensor]] = {}
"""The cached values by identity of the weight and by purpose. An entry is removed with its weight."""


def kept(weight: Tensor, purpose: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor | None:
    """``make(weight)``, from the cache if the weight has not changed.

    None for a tensor that does not persist between calls, or that has no version counter to show changes.
    """
    if weight.is_inference() or not (isinstance(weight, torch.nn.Parameter) or weight.is_leaf):
        return None
    key = id(weight), purpose
    state = weight._version, weight.data_ptr(), weight.dtype, weight.stride()
    found = _made.get(key)
    if found is None or found[1] != state:
        with torch.inference_mode(False):
            made = make(weight.detach())
        found = _made[key] = weakref.ref(weight, _forget(key)), state, made
    return found[2]


def _forget(key: tuple[int, Hashable]) -> Callable[[object], object]:
    """What runs when a weight ends. It holds the table itself: at the interpreter's end the module's names are gone."""
    made = _made
    return lambda _: made.pop(key, None)
