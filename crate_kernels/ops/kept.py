"""What a weight alone decides (its cast, its packed form): made once, and made again when the weight has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_made: dict[tuple[int, Hashable], tuple[weakref.ref, tuple, Tensor]] = {}
"""What was made, by the identity of the weight and by purpose; an entry ends with its weight."""


def kept(weight: Tensor, purpose: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor | None:
    """``make(weight)``, from an earlier call if the weight has not changed since.

    None for a tensor that does not stay from call to call, or that has no version counter to tell a change by.
    """
    if weight.is_inference() or not (isinstance(weight, torch.nn.Parameter) or weight.is_leaf):
        return None
    key = id(weight), purpose
    state = weight._version, weight.data_ptr(), weight.dtype, weight.stride()
    found = _made.get(key)
    if found is None or found[1] != state:
        with torch.inference_mode(False):
            made = make(weight.detach())
        found = _made[key] = weakref.ref(weight, lambda _: _made.pop(key, None)), state, made
    return found[2]
