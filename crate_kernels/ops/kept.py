"""Cache of values that depend only on weights (a cast, a packed form, a folded norm). They are valid until a weight
changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

_made: dict[tuple[int, Hashable], tuple[weakref.ref, tuple, Any]] = {}
"""The owner, the state of the weights, and the cached value, by identity of the owner and by purpose."""


def kept(owner: Tensor, purpose: Hashable, make: Callable[[], Made], weights: Sequence[Tensor] = ()) -> Made | None:
    """The result of ``make()``, cached while neither ``owner`` nor one of ``weights`` changes.

    Args:
        owner: a weight. The cached value is removed together with it.
        purpose: identifies the value, with all numbers on which it depends.
        make: runs without gradients, and reads no tensors but ``owner`` and ``weights``.

    Returns:
        None if the value cannot be cached: ``owner`` does not persist between calls, a tensor has no version counter,
        or a CUDA graph is being captured (it would own the memory of a new value).
    """
    read = (owner, *weights)
    if any(t.is_inference() for t in read) or not (isinstance(owner, torch.nn.Parameter) or owner.is_leaf):
        return None
    key = id(owner), purpose
    state = tuple((t._version, t.data_ptr(), t.dtype, t.stride()) for t in read)
    found = _made.get(key)
    if found is None or found[0]() is not owner or found[1] != state:
        if owner.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        found = _made[key] = weakref.ref(owner, _remover(key)), state, made
    return found[2]


def forget(owners: Iterable[Tensor]) -> None:
    """Remove the values of these weights, because they may have been changed without a change of the version
    counter."""
    ids = set(map(id, owners))
    for key in [key for key in _made if key[0] in ids]:
        _made.pop(key, None)


def _remover(key: tuple[int, Hashable]) -> Callable[[object], object]:
    """The function that runs when an owner ends. It holds the table, because at exit the module's names no longer
    exist."""
    made = _made
    return lambda _: made.pop(key, None)
