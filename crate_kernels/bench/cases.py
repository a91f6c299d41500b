"""The cases of the operator suite: the shapes of every model family, and the implementations for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops
from ..ops import backends
from ..ops.subspace_attention.cached import TRITON
from . import cost

SDPA = {
    "sdpa math": SDPBackend.MATH,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
COMPILED = "reference compiled"
SLICE_ELEMENTS = 1 << 28
"""Largest number of attention scores for the float64 reference. Larger cases are judged on some heads and samples."""


@dataclass(frozen=True)
class Case:
    """One operator at one shape: ``batch`` sequences of ``tokens`` tokens of width ``dim``, ``heads`` of ``width``."""

    operator: str
    family: str
    batch: int
    tokens: int
    heads: int
    width: int
    causal: bool = False
    compiled: bool = False
    """Also time ``torch.compile`` of the reference equations. Compilation takes long, so few cases set this."""

    @property
    def dim(self) -> int:
        return self.heads * self.width

    @property
    def attends(self) -> bool:
        return self.operator in ("subspace_attention", "mssa_block", "crate_layer")

    @property
    def decodes(self) -> bool:
        return self.operator == "cached_subspace_attention"

    @property
    def name(self) -> str:
        shape = f"B{self.batch} N{self.tokens} d{self.dim} H{self.heads}" + (" causal" if self.causal else "")
        return f"{self.operator} {self.family} {shape}"

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward",) if self.decodes else cost.DIRECTIONS

    def shape(self) -> dict:
        return dict(
            batch=self.batch, tokens=self.tokens, heads=self.heads, width=self.width, causal=self.causal, dim=self.dim
        )

    def tensors(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """New inputs. The plain operators get normalized tokens, as after LayerNorm and projection."""
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, spread: float = 1.0) -> Tensor:
            return (spread * torch.randn(*shape, generator=generator, device=device)).to(dtype)

        d, tokens = self.dim, (self.batch, self.tokens)
        if self.operator == "subspace_attention":
            return [normal(*tokens, self.heads, self.width)]
        if self.decodes:
            cache = normal(*tokens, self.heads, self.width)
            return [cache[:, -1:].clone(), cache]
        if self.operator == "ista_step":
            return [normal(*tokens, d), normal(d, d, spread=d**-0.5)]
        if self.operator == "overcomplete_ista":
            return [normal(*tokens, d), normal(d, 4 * d, spread=d**-0.5), normal(d, 4 * d, spread=d**-0.5)]
        norm = [1 + normal(d, spread=0.1), normal(d, spread=0.1)]
        matrices = [normal(d, d, spread=d**-0.5)]
        if self.operator in ("mssa_block", "crate_layer"):
            matrices += [normal(d, d, spread=d**-0.5), normal(d, spread=0.1)]
        if self.operator == "crate_layer":
            matrices += [1 + normal(d, spread=0.1), normal(d, spread=0.1), normal(d, d, spread=d**-0.5)]
        return [normal(*tokens, d), *norm, *matrices]

    def call(self, backend: str) -> Callable[..., Tensor]:
        """The public operator with the options of this case and one backend."""
        if self.decodes:
            return _reference_decode if backend == "reference" else functools.partial(_decode, backend=backend)
        options: dict = {"backend": backend}
        if self.attends:
            options["causal"] = self.causal
        if self.operator in ("mssa_block", "crate_layer"):
            options["heads"] = self.heads
        return functools.partial(getattr(ops, self.operator), **options)

    def cost(self, direction: str, itemsize: int) -> cost.Cost:
        shape = dict(batch=self.batch, tokens=self.tokens, heads=self.heads, width=self.width, itemsize=itemsize)
        if self.decodes:
            return cost.cached_subspace_attention(**shape)
        if self.operator == "subspace_attention":
            return cost.subspace_attention(direction, causal=self.causal, **shape)
        if self.operator in ("mssa_block", "crate_layer"):
            return getattr(cost, self.operator)(direction, dim=self.dim, causal=self.causal, **shape)
        rows = dict(rows=self.batch * self.tokens, dim=self.dim, itemsize=itemsize)
        if self.operator == "overcomplete_ista":
            return cost.overcomplete_ista(direction, atoms=4 * self.dim, tied=False, **rows)
        return getattr(cost, self.operator)(direction, **rows)

    def implementations(self, device: torch.device) -> dict[str, Callable[..., Tensor]]:
        """Name -> call, the reference equations first. Some of the calls may fail when they run."""
        if self.decodes:
            ours = {name: self.call(name) for name in ("reference", "eager", "triton")}
            return ours | {"sdpa key-value": _decode_twice}
        found = {"reference": self.call("reference")}
        found |= {name: self.call(name) for name in backends.BACKENDS if name != "reference"}
        if self.compiled:
            # A compiled backward can run repeatedly only if it does not free its saved tensors.
            torch._functorch.config.donated_buffer = False
            found[COMPILED] = torch.compile(self.call("reference"), dynamic=False)
        if self.operator == "subspace_attention":
            found |= {name: functools.partial(_sdpa, backend=kind, causal=self.causal) for name, kind in SDPA.items()}
        return found

    def judged(self, tensors: list[Tensor]) -> list[Tensor]:
        """The part of the attention's inputs or gradients that is judged. Heads and samples are independent."""
        if self.operator != "subspace_attention":
            return tensors
        scores = self.tokens**2
        heads = max(1, min(self.heads, SLICE_ELEMENTS // scores))
        samples = max(1, min(self.batch, SLICE_ELEMENTS // (scores * heads)))
        return [t[:samples, :, :heads] for t in tensors]

    def largest_score(self, tensors: list[Tensor]) -> float:
        """The largest ``scale·‖w‖²`` of the attention in this call, or 0 for an operator without attention."""
        if not self.attends:
            return 0.0
        w = tensors[0].float()
        if self.operator in ("mssa_block", "crate_layer"):
            x = torch.nn.functional.layer_norm(w, w.shape[-1:], tensors[1].float(), tensors[2].float())
            w = (x @ tensors[3].float().T).unflatten(-1, (self.heads, self.width))
        return self.width**-0.5 * w.square().sum(-1).max().item()


def _sdpa(w: Tensor, *, backend: SDPBackend, causal: bool) -> Tensor:
    """Stock attention with one tensor as query, key and value. autograd adds dq, dk and dv."""
    heads = w.transpose(1, 2)
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=causal).transpose(1, 2)


def _decode(w: Tensor, cache: Tensor, *, backend: str) -> Tensor:
    """Raises RuntimeError where Triton's kernel cannot run: the operator would take stock PyTorch instead."""
    if backend == "triton":
        if not TRITON:
            raise RuntimeError("Triton is not installed")
        from ..ops.triton_kernels import decoding

        if (reason := decoding.why_not(w, cache)) is not None:
            raise RuntimeError(reason)
    positions = torch.full((w.shape[0], 1), cache.shape[1] - 1, device=w.device)
    with ops.use_backend(backend):
        return ops.cached_subspace_attention(w, cache, positions)


def _reference_decode(w: Tensor, cache: Tensor) -> Tensor:
    keys = cache.transpose(1, 2)
    scores = w.transpose(1, 2) @ keys.transpose(-1, -2) * w.shape[-1] ** -0.5
    return (scores.softmax(-1) @ keys).transpose(1, 2)


def _decode_twice(w: Tensor, cache: Tensor) -> Tensor:
    """Decoding with a key cache and a value cache: two tensors of the same size are read."""
    if not _values or _values[0] is not cache:
        _values[:] = cache, cache.clone()
    q, k, v = (t.transpose(1, 2) for t in (w, cache, _values[1]))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


_values: list[Tensor] = []
"""The last cache of :func:`_decode_twice`, and a copy of it."""

IMPLEMENTATIONS = (*backends.BACKENDS, COMPILED, *SDPA, "sdpa key-value")
"""All names of implementations of an operator."""

OPERATORS = (*ops.OPERATORS, "cached_subspace_attention")
VISION = {"T": (6, 64), "S": (12, 48), "B": (12, 64), "L": (16, 64)}


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The shapes to measure on a kind of device. ``quick`` gives one tiny shape for each operator."""
    on_gpu = device.type == "cuda"
    if quick:
        width = 64 if on_gpu else 16  # 64 is a width for which the GPU kernels are made
        tiny = [Case(name, "tiny", 2, 20, 2, width, compiled=name == "ista_step") for name in OPERATORS]
        return [*tiny, Case("subspace_attention", "tiny", 1, 33, 2, width, causal=True)]
    images = 256 if on_gpu else 4
    found: list[Case] = []
    for size in VISION if on_gpu else ("T", "S", "B"):
        heads, width = VISION[size]
        for operator in ("subspace_attention", "mssa_block", "ista_step", "ista_block", "crate_layer"):
            found.append(Case(operator, f"CRATE-{size}/16", images, 197, heads, width, compiled=size == "B"))
    if not on_gpu:
        # Short sequences: the default model of `crate-kernels train`, and small images.
        for operator in ("subspace_attention", "crate_layer"):
            found.append(Case(operator, "28 x 28 images", 128, 17, 4, 24))
        found += [
            Case("subspace_attention", "64 x 64 images", 8, 65, heads, width) for heads, width in ((12, 48), (12, 64))
        ]
    sequences = 32 if on_gpu else 1
    found.append(Case("subspace_attention", "CRATE-B/8", images // 4, 785, 12, 64))
    found.append(Case("overcomplete_ista", "CRATE-alpha-B/16", images // 2, 197, 12, 64, compiled=True))
    if on_gpu:
        found.append(Case("subspace_attention", "CRATE-alpha-L/14", images, 257, 16, 64))
        found.append(Case("subspace_attention", "CRATE-alpha-H/14", images, 257, 16, 80))
        found.append(Case("overcomplete_ista", "CRATE-alpha-L/14", images // 4, 257, 16, 64))
    for operator in ("subspace_attention", "mssa_block"):
        found.append(Case(operator, "CRATE-GPT2", sequences, 1024, 12, 64, causal=True, compiled=on_gpu))
    found.append(Case("subspace_attention", "CRATE-BERT", sequences, 512, 12, 64))
    for past in (1024, 32768) if on_gpu else (1024, 8192):
        found.append(Case("cached_subspace_attention", "CRATE-GPT2 decode", sequences, past, 12, 64))
    for tokens in (2048, 4096, 8192, 16384, 32768) if on_gpu else (1024, 2048, 4096):
        for causal in (False, True):
            batch, heads = (32768 // tokens, 12) if on_gpu else (1, 2)
            found.append(Case("subspace_attention", "long", batch, tokens, heads, 64, causal=causal))
    return found
