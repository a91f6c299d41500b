"""The choice of the backend that runs an operator, and the reasons why others cannot.

Every operator's folder holds one file per backend. ``implementations`` finds them. ``resolve`` chooses one for given
inputs. A request comes from the argument, from ``use_backend`` or from ``CRATE_KERNELS_BACKEND``, in this order. It is
followed or refused with the reason; another backend never replaces it. Without a request the first backend that accepts
the inputs runs. The order is the one measured for the device (``measured.py``), else that of ``AUTOMATIC``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import measured, tuned

BACKENDS = ("cuda", "triton", "cpu", "eager", "reference")
"""The names of the backends. The file of that name beside an operator's ``op.py`` implements it."""

AUTOMATIC = {"cuda": ("triton", "cuda", "eager"), "cpu": ("cpu", "eager")}
"""Device type -> order of the automatic choice if nothing was measured. All other devices use ``eager``.

The CUDA kernels have run only in the emulator. Until hardware has verified them, they run only on request, or if Triton
is missing."""

EXCEPTIONS = {("cpu", "overcomplete_ista"): ("eager", "cpu")}
"""Device type and operator -> its own order.

Four products with a wide dictionary leave little to fuse, and the products of torch's libraries are faster than those
of the CPU kernels (1.4 to 1.7 times on an Intel processor with AVX-512)."""

ENVIRONMENT_VARIABLE = "CRATE_KERNELS_BACKEND"


class CannotRun(RuntimeError):
    """The requested backend cannot run the inputs; ``reason`` says why."""

    def __init__(self, backend: str, reason: str):
        super().__init__(f"backend {backend!r} cannot run these inputs: {reason}")
        self.reason = reason


def _checked_name(name: str | None, source: str) -> str | None:
    if name is None or (isinstance(name, str) and name in BACKENDS):
        return name
    error = ValueError if isinstance(name, str) else TypeError
    raise error(f"{source}: unknown backend {name!r}; accepted are {', '.join(BACKENDS)}")


_default = _checked_name(os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE)

# A plain threading.local: Dynamo guards its attribute, so that a compiled function follows use_backend. With a subclass
# that has a class attribute, Dynamo would reuse the value of the first call.
_request = threading.local()
_request.name = _default


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Request one backend for every operator that this thread calls inside the ``with`` block.

    ``None`` restores the automatic choice. The choice is made in the forward call; the backward of that call uses the
    same backend in whatever thread it runs.
    """
    previous, _request.name = requested_backend(), _checked_name(name, "use_backend")
    try:
        yield
    finally:
        _request.name = previous


def requested_backend() -> str | None:
    """The backend that ``use_backend`` or ``CRATE_KERNELS_BACKEND`` requests; None if the choice is automatic."""
    return getattr(_request, "name", _default)


def implementations(package: str) -> dict[str, ModuleType | str]:
    """Backend name -> module of an operator's package, or the reason, as a string, why the module is missing."""
    found: dict[str, ModuleType | str] = {}
    operator = package.rpartition(".")[2]
    for backend in BACKENDS:
        if backend == "triton" and importlib.util.find_spec("triton") is None:
            found[backend] = "the package triton is not installed"
        elif importlib.util.find_spec(f"{package}.{backend}") is None:
            found[backend] = f"{operator} has no {backend} kernel yet"
        else:
            found[backend] = importlib.import_module(f"{package}.{backend}")
    return found


def why_not(found: Mapping[str, ModuleType | str], backend: str, *inputs) -> str | None:
    """The reason, in one sentence, why ``backend`` cannot run these inputs; ``None`` if it can."""
    implementation = found[backend]
    return implementation if isinstance(implementation, str) else implementation.why_not(*inputs)


def resolve(
    found: Mapping[str, ModuleType | str],
    requested: str | None,
    *inputs,
    size: int,
    rows: int,
    causal: bool = False,
) -> str:
    """Name of the backend that runs an operator on ``inputs``, which are the arguments of its ``why_not``, a tensor
    first.

    The measured order is looked up by ``size`` (N for the attention operators, d for the others), ``rows`` (B·N) and
    ``causal``.
    """
    name = _checked_name(requested, "backend") or requested_backend()
    if name is not None:
        reason = why_not(found, name, *inputs)
        if reason is not None:
            raise CannotRun(name, reason)
        return name
    for name in automatic_order(found, inputs[0], size, rows, causal):
        if why_not(found, name, *inputs) is None and trusted(_operator(found), name, inputs):
            return name
    return "eager"


def _operator(found: Mapping[str, Any]) -> str:
    return found["eager"].__package__.rpartition(".")[2]


def trusted(operator: str, backend: str, inputs: tuple) -> bool:
    """Whether the automatic choice may take a backend that can run. ``crate_kernels.selftest`` decides this."""
    return judge is None or judge(operator, backend, inputs)


judge: Callable[[str, str, tuple], bool] | None = None
"""The function behind :func:`trusted`. A higher layer sets it, because a test of the operators imports them."""


def automatic_order(found: Mapping[str, Any], tensor: Tensor, size: int, rows: int, causal: bool) -> tuple[str, ...]:
    """The backends to try for a call, fastest first.

    The order is that of ``crate-kernels tune`` on this device, else that of the package's table for this kind of
    device, else ``AUTOMATIC``.
    """
    kind = tensor.device.type
    order = EXCEPTIONS.get((kind, _operator(found)), AUTOMATIC.get(kind, ()))
    dtype = str(tensor.dtype).removeprefix("torch.")
    own = tuned.ranking(tensor.device, _operator(found), dtype, causal, size, rows)
    if own is not None:
        return own + tuple(name for name in order if name not in own)
    if measured.ORDER and tensor.device.type == "cuda":
        capability = "sm_" + "".join(map(str, torch.cuda.get_device_capability(tensor.device)))
        operator = _operator(found)
        for most, most_rows, ranking in measured.ORDER.get((capability, operator, dtype, causal), ()):
            if size <= most and rows <= most_rows:
                # A backend without a measurement (it refused the measured shapes) may still accept these inputs.
                return ranking + tuple(name for name in order if name not in ranking)
    return order


# -- autocast ------------------------------------------------------------------------------------------------------


AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(device)
)
"""Evaluated once, because torch 2.11 cannot trace the call."""


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device. False for devices without autocast (meta)."""
    device = tensor.device.type
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which an operator computes: autocast's where autocast is on for the device, else the tensor's own.

    float64 stays float64, as in torch's own autocast.
    """
    if tensor.dtype != torch.float64 and autocast_is_on(tensor):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """``tensors`` in ``dtype``; differentiable. Tensors of this dtype are returned as they are."""
    return [None if t is None else t.to(dtype) for t in tensors]


def run(function, tensor: Tensor, *arguments):
    """Call ``function(tensor, *arguments)`` with autocast off, because the dtypes are already decided."""
    if autocast_is_on(tensor):
        return without_autocast(tensor.device.type, function, tensor, *arguments)
    return function(tensor, *arguments)


def without_autocast(device: str, function, *arguments):
    """Call ``function(*arguments)`` with autocast off for a device type for which it is on."""
    torch.set_autocast_enabled(device, False)
    try:
        return function(*arguments)
    finally:
        torch.set_autocast_enabled(device, True)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of row statistics and of sums inside kernels: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
