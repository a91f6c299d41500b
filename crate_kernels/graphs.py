"""CUDA graphs of a prepared model: one launch for a whole forward, instead of some hundred launches.

Without a graph, the host limits the speed of a forward of a few images, because it launches kernels more slowly than
the device runs them. :func:`crate_kernels.nn.prepare_for_inference` with ``cuda_graph=True`` replaces the model's
``forward`` by :class:`Graphs`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .ops import backends

MOST_GRAPHS = 8
"""Largest number of graphs of a model. Each holds the memory of its activations. The least recently used is dropped
first."""

WARM_UP = 2
"""Number of forwards before a capture. They choose backends, compile kernels and fill caches of modules."""

DEVICE = "cuda"


class Captured(NamedTuple):
    """A graph, its input tensors, the output that it overwrites, and the other tensors that it reads."""

    graph: Any
    inputs: list[Tensor]
    output: Any
    cached: list[Any]


class Graphs:
    """The forward of ``model``, replayed from a CUDA graph for each kind of input.

    A kind of input consists of shapes, dtypes and devices of the tensors among the arguments, the values of all other
    arguments, autocast, and the requested backend. The first call of a kind runs the model a few times on a side stream
    and then captures it. Later calls copy their tensors into the input of the graph, replay it and return a copy of its
    output.

    Calls run the plain forward if a graph would compute something else: in training, if a gradient is needed, under
    ``torch.compile``, during another capture, with tensors that are not on a CUDA device, and if a module inside the
    model has forward hooks. Changed weights (in-place writes, ``load_state_dict``, ``.to``) drop all graphs.
    """

    def __init__(self, model: nn.Module):
        if not torch.cuda.is_available():
            raise RuntimeError("cuda_graph=True needs a CUDA device, and torch finds none; prepare without it")
        forward = model.forward
        self.__setstate__({"plain": forward.plain if isinstance(forward, Graphs) else forward, "model": model})

    def __getstate__(self):
        # Graphs belong to this process and to these weights. A copy captures its own graphs.
        return {"plain": self.plain, "model": self.model}

    def __setstate__(self, state):
        self.plain: Callable = state["plain"]
        self.model: nn.Module = state["model"]
        self.__wrapped__ = self.plain  # for inspect.signature
        self._forget()

    def _forget(self) -> None:
        self.captured: OrderedDict[tuple, Captured] = OrderedDict()
        self._modules: list[nn.Module] = []
        self._weights: list[tuple[int, int]] = []
        self._held: list[Tensor] = []

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if self.model.training:
            self._forget()
        if not tensors or not self._replays(tensors):
            return self.plain(*args, **kwargs)
        key = (
            tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items()),
            torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE), backends.requested_backend(),
        )  # fmt: skip
        try:
            captured = self.captured.get(key)
        except TypeError:  # an argument is neither a tensor nor hashable
            return self.plain(*args, **kwargs)
        with torch.cuda.device(tensors[0].device):
            if captured is None:
                captured = self.captured[key] = self._capture(tensors, args, kwargs)
                if len(self.captured) > MOST_GRAPHS:
                    self.captured.popitem(last=False)
            self.captured.move_to_end(key)
            for static, tensor in zip(captured.inputs, tensors, strict=True):
                static.copy_(tensor)
            captured.graph.replay()
            return pytree.tree_map(lambda out: out.clone() if isinstance(out, Tensor) else out, captured.output)

    def _replays(self, tensors: list[Tensor]) -> bool:
        """Whether a graph computes the same as the model. Drops the graphs of changed weights."""
        if self.model.training or any(t.device.type != DEVICE for t in tensors):
            return False
        if torch.cuda.is_current_stream_capturing():
            return False
        if not self._modules:
            self._modules = list(self.model.modules())
        if any(m._forward_hooks or m._forward_pre_hooks for m in self._modules[1:]):
            return False
        weights = [t for m in self._modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *weights)):
            return False
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in weights]
        if state != self._weights:
            self.captured.clear()
            # The aliases keep the storages alive, so that no other weight can get the same address.
            self._weights, self._held = state, [t.detach() for t in weights]
        return True

    def _capture(self, tensors: list[Tensor], args: tuple, kwargs: dict) -> Captured:
        # Tensors made in inference mode cannot be written outside of it.
        # Autocast's cache of narrow weights ends with its context, so the graph itself must contain the casts.
        autocast = torch.autocast(
            DEVICE, torch.get_autocast_dtype(DEVICE), enabled=torch.is_autocast_enabled(DEVICE), cache_enabled=False
        )
        with torch.inference_mode(False), torch.no_grad(), autocast:
            static = [torch.empty_like(t).copy_(t) for t in tensors]
            given = iter(static)
            args = tuple(next(given) if isinstance(a, Tensor) else a for a in args)
            kwargs = {name: next(given) if isinstance(a, Tensor) else a for name, a in kwargs.items()}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.plain(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=side):
                    output = self.plain(*args, **kwargs)
            except RuntimeError as error:
                raise RuntimeError(
                    "the forward cannot be captured in a CUDA graph; prepare the model without cuda_graph=True"
                ) from error
        # A module may drop its folded matrix before the graph is dropped, so the graph holds a reference to it.
        return Captured(graph, static, output, [getattr(m, "_folded", None) for m in self._modules])


def _kind(argument):
    if isinstance(argument, Tensor):
        return type(argument), argument.shape, argument.dtype, argument.device
    return type(argument), argument
