"""What depends on weights alone and stays from call to call, in a model that is prepared for inference."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_results: dict[int, tuple[weakref.ref, tuple, Any]] = {}
"""By the identity of the owner: the owner, the state of the weights, the result. An entry ends with its owner."""


def prepared(owner: Tensor, weights: Sequence[Tensor], options: tuple, make: Callable[[], Any]) -> Any:
    """``make()``, computed again if one of ``weights`` has moved or has been written to, or if ``options`` differ.

    Args:
        owner: the folded matrix that :func:`crate_kernels.nn.prepare_for_inference` keeps. Preparing the model again
            makes another one, so results from before are not taken.
        weights: all that ``make`` reads.
    """
    if any(weight.is_inference() for weight in weights):  # they have no version counter
        return make()
    state = (*options, *((t._version, t.data_ptr(), t.dtype, t.stride()) for t in weights))
    key = id(owner)
    found = _results.get(key)
    if found is None or found[0]() is not owner or found[1] != state:
        result = make()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return result  # its memory belongs to the graph
        found = _results[key] = (weakref.ref(owner, lambda _: _results.pop(key, None)), state, result)
    return found[2]
