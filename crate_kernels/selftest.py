"""A known-answer test of a kernel, before the automatic choice uses it on a device for the first time.

No GPU has run these kernels yet. The test runs an operator forward and backward on a small and on an awkward shape.
It compares the results with the reference equations in float64, by the error budget of all tests (``agreement.py``).
The result is stored for the combination of device, driver, torch, Triton and package. After a failure, one warning
gives the error, and the automatic choice skips the kernel. A requested backend is not tested.

``crate-kernels selftest`` runs the tests of all operators and prints a table. ``CRATE_KERNELS_SELFTEST=0`` skips the
tests of the automatic choice.
"""

from __future__ import annotations

import argparse
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import ops, user_cache
from .agreement import judge
from .ops import backends

ENVIRONMENT_VARIABLE = "CRATE_KERNELS_SELFTEST"

TESTED = {"cuda": ("triton", "cuda")}
"""Device type -> the backends that are tested before the automatic choice takes them."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_lock = threading.RLock()
_failures: dict[tuple[str, int | None, str], str | None] = {}
"""Results of this process: device and kernel -> the error, or None. They are in memory, because a call must not wait
for a file."""

Tensors = tuple[Any, ...]
"""Tensors, or None for an absent one."""
Example = tuple[Tensors, dict[str, Any]]
EXAMPLES = 2
"""Number of calls in a test."""


def examples(operator: str) -> Iterator[Example]:
    """The tensors (float64, on the CPU) and options of two calls of an operator: a small one and an awkward one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def norm(width: int) -> tuple[Tensor, Tensor]:
        return 1 + 0.2 * normal(width), 0.2 * normal(width)

    awkward = dict(causal=True, lengths=torch.tensor([50, 131, 1]))
    for batch, tokens, heads, p, options in ((2, 32, 2, 32, {}), (3, 131, 3, 48, awkward)):
        d = heads * p
        z, matrix = normal(batch, tokens, d), normal(d, d, spread=d**-0.5)
        attention = (*norm(d), normal(d, d, spread=d**-0.5), normal(d, d, spread=d**-0.5), normal(d))
        if operator == "subspace_attention":
            yield (normal(batch, tokens, heads, p), None), options
        elif operator == "ista_step":
            yield (z, matrix), {}
        elif operator == "overcomplete_ista":
            yield (z, normal(d, 4 * d, spread=d**-0.5), normal(d, 4 * d, spread=d**-0.5) if options else None), {}
        elif operator == "mssa_block":
            yield (z, *attention), dict(heads=heads, **options)
        elif operator == "ista_block":
            yield (z, *norm(d), matrix), {}
        elif operator == "crate_layer":
            yield (z, *attention, *norm(d), matrix), dict(heads=heads, **options)
        else:
            raise ValueError(f"{operator}: there is no example of this operator")


def largest_score(operator: str, tensors: Tensors, options: Mapping[str, Any]) -> float:
    """The largest attention score of an example, ``p ** -0.5 · max |w|²``; 0 without attention."""
    if operator == "subspace_attention":
        w = tensors[0]
    elif operator in ("mssa_block", "crate_layer"):
        z, weight, bias, projection, *_ = tensors
        w = torch.nn.functional.layer_norm(z, z.shape[-1:], weight, bias) @ projection.T
        w = w.unflatten(-1, (options["heads"], -1))
    else:
        return 0.0
    return w.shape[-1] ** -0.5 * w.square().sum(-1).max().item()


def known_answer(
    operator: str, backend: str, device: torch.device, dtype: torch.dtype, autocast: bool = False
) -> str | None:
    """Run the test.

    Args:
        autocast: whether the tokens stay float32 while the products are in ``dtype``.

    Returns:
        None if the results are right; otherwise one sentence about the error.

    Raises:
        CannotRun: the backend can run none of the examples.
    """
    function, refused = getattr(ops, operator), []
    state = torch.get_rng_state()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for number, (tensors, options) in enumerate(examples(operator), 1):
                rounded = tuple(None if t is None else t.to(torch.float32 if autocast else dtype) for t in tensors)
                try:
                    exact, reference, got = (
                        _results(function, rounded, options, name, device, kind, dtype if autocast and name else None)
                        for name, kind in (("", torch.float64), ("reference", None), (backend, None))
                    )
                except backends.CannotRun:
                    refused.append(number)
                    if len(refused) < EXAMPLES:
                        continue
                    raise
                score = largest_score(operator, tensors, options)
                kinks = operator not in ("subspace_attention", "mssa_block")
                verdict = judge(got, exact, reference, dtype, kinks=kinks, score=score)
                if not verdict.passed:
                    return f"{verdict.detail} (tokens {tuple(tensors[0].shape)})"
    except backends.CannotRun:
        raise
    except Exception as error:  # compilers, drivers and launches raise errors of many types
        return f"{type(error).__name__}: {error}".split("\n")[0]
    finally:
        torch.set_rng_state(state)
    return None


def _results(
    function: Callable[..., Tensor],
    tensors: Tensors,
    options: Mapping[str, Any],
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """The output and the gradient of every tensor. The backend "" means the reference equations in ``dtype``."""
    leaves = [None if t is None else t.to(device, dtype or t.dtype, copy=True).requires_grad_() for t in tensors]
    options = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        out = function(*leaves, **options, backend=backend or "reference")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, out.dtype)
    gradients = torch.autograd.grad(out, [t for t in leaves if t is not None], weights)
    return [t.detach().cpu() for t in (out, *gradients)]


def trusted(operator: str, backend: str, tensors: tuple) -> bool:
    """Whether the automatic choice may take ``backend`` for a call of ``operator`` with these inputs.

    If there is no result for the kernel, it is tested now. Nothing runs while a graph is captured or a call is traced:
    an earlier result counts then, and without one the answer is no.
    """
    device = tensors[0].device
    if backend not in TESTED.get(device.type, ()) or operator not in ops.OPERATORS:
        return True
    floating = [t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    if torch.float64 in floating:
        return True
    low = [dtype for dtype in floating if dtype != torch.float32]
    dtype = low[0] if low else torch.float32
    autocast = tensors[0].dtype != dtype
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return _verdict(operator, backend, device.type, device.index, dtype, autocast, traced)


@torch.compiler.assume_constant_result
def _verdict(
    operator: str, backend: str, kind: str, index: int | None, dtype: torch.dtype, autocast: bool, traced: bool
) -> bool:
    """The answer of :func:`trusted`. In a traced call this function runs during tracing."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return True
    device, name = torch.device(kind if index is None else f"{kind}:{index}"), _name(operator, backend, dtype, autocast)
    with _lock:
        if (kind, index, name) not in _failures:
            known = user_cache.read("selftest").get(user_cache.combination(device), {})
            if name not in known:
                if traced or _captures(device):
                    return False
                try:
                    known = _remember(device, name, known_answer(operator, backend, device, dtype, autocast))
                except backends.CannotRun:  # the kernel accepts the call, but none of the examples: there is no result
                    return False
            _failures[kind, index, name] = known[name]
            if known[name] is not None:
                warnings.warn(
                    f"the backend {backend!r} computes {operator} wrongly on {user_cache.combination(device)}: "
                    f"{known[name]}. The automatic choice skips this backend. Please report this with the output of "
                    "`crate-kernels selftest`.",
                    stacklevel=2,
                )
    return _failures[kind, index, name] is None


def _name(operator: str, backend: str, dtype: torch.dtype, autocast: bool) -> str:
    return f"{operator}, {backend}, {str(dtype).removeprefix('torch.')}{', autocast' if autocast else ''}"


def _remember(device: torch.device, name: str, failure: str | None) -> dict[str, str | None]:
    content = user_cache.read("selftest")
    known = content.setdefault(user_cache.combination(device), {})
    known[name] = failure
    user_cache.write("selftest", content)
    return known


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


backends.judge = trusted


# -- the command ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="repeat tests that an earlier run has finished")


def run(args: argparse.Namespace) -> int:
    """Test every operator in every dtype on every backend that can run here; the exit code is 1 after a failure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {} if args.all else user_cache.read("selftest").get(user_cache.combination(device), {})
    print(user_cache.combination(device))
    failures = 0
    for operator in ops.OPERATORS:
        for backend in backends.BACKENDS:
            if backend == "reference":
                continue
            for kind, dtype in DTYPES.items():
                for autocast in (False, True) if dtype != torch.float32 else (False,):
                    name = _name(operator, backend, dtype, autocast)
                    try:
                        if name not in known:
                            known = _remember(device, name, known_answer(operator, backend, device, dtype, autocast))
                    except backends.CannotRun as error:
                        if kind == "float32":
                            print(f"{name:48} cannot run: {error.reason}")
                        continue
                    failures += known[name] is not None
                    print(f"{name:48} {'passed' if known[name] is None else f'FAILED: {known[name]}'}", flush=True)
    return min(failures, 1)
