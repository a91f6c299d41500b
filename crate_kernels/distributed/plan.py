"""``crate-kernels plan``: predicted memory and communication of a training run on many GPUs, from formulas.

The formulas describe this package's training commands: float32 parameters, AdamW, one operator per CRATE layer
(``ops.crate_layer``), DDP or FSDP2 as in :mod:`crate_kernels.distributed.sharding`. Tests compare each formula with
torch's own meters on 1 to 4 CPU ranks. A number for GPUs is a prediction. It does not include memory of the CUDA
context, of NCCL, of cuBLAS and of fragments in the allocator; ``--reserve`` is for these.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .. import options
from ..models import CRATE, CrateGPT, create_model
from ..models.base import CrateModel
from ..models.vision import PatchSizeError
from ..options import option
from ..terminal import count

FLOAT = 4
"""Bytes of a parameter, of its gradient, and of each of the two moments of AdamW."""

MODELS = (
    "crate_tiny_patch16_224", "crate_small_patch16_224", "crate_base_patch16_224", "crate_large_patch16_224",
    "crate_tiny_patch8_224", "crate_small_patch8_224", "crate_base_patch8_224",
    "crate_gpt2_base", "crate_gpt2_medium", "crate_gpt2_large", "crate_gpt2_xl",
)  # fmt: skip
"""Models with CRATE layers only. The formulas know the tensors that the operator of such a layer saves."""

SHORT = {name.removesuffix("_patch16_224"): name for name in MODELS if name.endswith("_patch16_224")}

WORKING_TENSORS = 8
"""Largest number of float32 tensors of a layer's width that the backward of a layer holds at once."""


@dataclass
class PlanOptions:
    """The options of ``plan``."""

    model: str = option("crate_base", "the model", "model", choices=(*SHORT, *MODELS))
    image_size: int | None = option(None, "pixels along an image, of vision models", "model", least=1, most=8192)
    context: int | None = option(
        None, "tokens of a text, of language models", "model", least=1, most=1 << 20,
        only=("with a language model", lambda s: "gpt2" in s.model),
    )  # fmt: skip
    num_classes: int = option(1000, "classes, of vision models", "model", least=1, most=1 << 24)
    batch_size: int = option(
        1024,
        "images or texts in one batch, over all ranks; --accumulate batches make one optimizer step",
        "optimization",
        least=1,
    )
    accumulate: int = option(
        1, "batches whose gradients make one optimizer step", "optimization", least=1, most=1 << 20
    )
    precision: str = option("bf16", "bf16 autocast, or fp32", "machine", choices=("bf16", "fp32"))
    memory: float = option(80.0, "memory of a GPU in GB (1e9 bytes)", "machine", above=0, most=1e6)
    reserve: float = option(0.1, "share of that memory that the formulas may not use", "machine", least=0, below=1)
    gpus: int = option(8, "ranks, one per GPU", "ranks and memory", least=1, most=1 << 20)
    parallel: str = option(
        "fsdp", "ddp copies the model to every rank, fsdp splits it", "ranks and memory", choices=("ddp", "fsdp")
    )
    activation_checkpointing: bool = option(
        False, "save only the input of every layer for the backward pass, and recompute the rest",
        "ranks and memory",
    )  # fmt: skip

    def check(self, given: Iterable[str] = ()) -> None:
        """Raise ValueError with the name of an option whose value cannot be planned."""
        options.check(self, given)
        if "gpt2" in self.model and (wrong := {"image_size", "num_classes"} & set(given)):
            raise ValueError(f"{options.flag(min(wrong))} applies only with a vision model")
        if self.batch_size % self.gpus:
            raise ValueError(
                f"--batch-size {self.batch_size} is the batch of all ranks together: {self.gpus} ranks do not divide it"
            )

    def build(self) -> CrateModel:
        """The model. Its parameters use no memory."""
        name = SHORT.get(self.model, self.model)
        if "gpt2" in name:
            sizes = {} if self.context is None else {"block_size": self.context}
        else:
            sizes = {"num_classes": self.num_classes}
            sizes |= {} if self.image_size is None else {"image_size": self.image_size}
        try:
            with torch.device("meta"):
                return create_model(name, **sizes)
        except PatchSizeError as error:
            raise ValueError(
                f"--image-size must be a multiple of the patch size {error.patch}, got {self.image_size}"
            ) from error


# -- formulas ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compute:
    """The dtypes in which a layer computes.

    Args:
        size: bytes of an element of a matrix product: 2 under bfloat16 autocast, else 4.
    """

    size: int = FLOAT

    @classmethod
    def of(cls, precision: str) -> Compute:
        return cls(2 if precision == "bf16" else FLOAT)


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass saves for its backward pass: ``fixed + samples·each``."""

    fixed: float
    each: float

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.fixed + other.fixed, self.each + other.each)

    def __mul__(self, times: int) -> Saved:
        return Saved(times * self.fixed, times * self.each)

    def at(self, samples: int) -> float:
        return self.fixed + samples * self.each


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with CRATE layers: N tokens per sample, width d, H heads of width p, L layers."""

    tokens: int
    dim: int
    heads: int
    inner: int
    """H·p."""
    depth: int

    @classmethod
    def of(cls, model: CrateModel, tokens: int) -> Shape:
        mssa = model.blocks[0].mssa
        inner, dim = mssa.projection.weight.shape
        return cls(tokens, dim, mssa.heads, inner, len(model.blocks))

    @property
    def stream(self) -> int:
        """Bytes of a sample's tokens between two layers, in float32."""
        return FLOAT * self.tokens * self.dim

    def layer(self, compute: Compute) -> Saved:
        """The bytes that one layer saves besides its input.

        For each token a layer saves the output in the dtype of the stream. In the dtype of the products it saves ``w``
        and ``o`` (the projected and the attended token) and the token between the two halves. In float32 it saves the
        log-normalizer of each head and the statistics of two LayerNorms. It saves no cast copies of weights: the
        backward casts them again.
        """
        token = FLOAT * self.dim + compute.size * (2 * self.inner + self.dim) + FLOAT * (self.heads + 4)
        return Saved(0, self.tokens * token)

    def layers(self, compute: Compute, checkpointing: bool = False) -> Saved:
        """The bytes that all layers save, with the input of the first. With checkpointing: all inputs, and the rest of
        one layer."""
        if checkpointing:
            return Saved(0, self.depth * self.stream) + self.layer(compute)
        return Saved(0, self.stream) + self.layer(compute) * self.depth

    def working(self, compute: Compute) -> Saved:
        """An upper bound of the additional memory in the backward of a layer: gradients and recomputed rows."""
        matrices = 3 * FLOAT * (2 * self.dim * self.inner + self.dim**2)
        return Saved(matrices, WORKING_TENSORS * FLOAT * self.tokens * max(self.dim, self.inner))


def vision_ends(model: CRATE, compute: Compute) -> Saved:
    """The bytes that patch embedding, last LayerNorm and classifier of a vision model save.

    For each patch with q pixel values they save the patch before and after its LayerNorm, its embedding before the next
    LayerNorm, and two statistics of each LayerNorm. For each sample they save the pooled token before and after the
    last LayerNorm. This holds on the CPU. CUDA's autocast computes LayerNorm in float32, which adds 2·d per patch.
    """
    (rows, columns), embedding = model.grid_size, model.patch_embedding
    dim, pixels = embedding.projection.weight.shape
    low = compute.size < FLOAT
    patch = FLOAT * pixels + compute.size * pixels + compute.size * dim + 4 * FLOAT
    pooled = (FLOAT if model.pool == "mean" else 0) * dim + compute.size * dim + 2 * FLOAT
    casts = compute.size * (dim * pixels + dim * model.num_classes) if low else 0
    return Saved(casts, rows * columns * patch + pooled)


def language_ends(model: CrateGPT, tokens: int, compute: Compute) -> Saved:
    """The bytes that embeddings, tied head and cross-entropy of a language model save.

    For each token they save its number and that of the next token (int64), and float32 log-probabilities of the whole
    vocabulary. Under autocast they also save the cast tokens, and once the cast embeddings.
    """
    words, dim = model.token_embedding.weight.shape
    low = compute.size < FLOAT
    token = 2 * 8 + FLOAT * words + (compute.size * dim if low else 0)
    return Saved(8 * tokens + FLOAT + (compute.size * words * dim if low else 0), tokens * token)


def saved_for_backward(model: CrateModel, compute: Compute, tokens: int, checkpointing: bool = False) -> Saved:
    """Bytes that the forward pass of ``model`` saves without parameters. A language model includes its loss.

    The loss of a classifier is left out. It needs a few floats per class and sample.
    """
    shape = Shape.of(model, tokens)
    if isinstance(model, CrateGPT):
        return language_ends(model, tokens, compute) + shape.layers(compute, checkpointing)
    assert isinstance(model, CRATE)
    return vision_ends(model, compute) + shape.layers(compute, checkpointing)


def sample_tokens(model: CrateModel) -> int:
    """Tokens of one sample."""
    return model.block_size if isinstance(model, CrateGPT) else 1 + math.prod(model.grid_size)


def padded(parameter: nn.Parameter, ranks: int) -> int:
    """Elements of one rank's shard under FSDP2. Rows are divided into equal parts, and the last part is padded."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return -(-rows // ranks) * (parameter.numel() // max(rows, 1))


def shard_bytes(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """Bytes of the largest shard, which is that of rank 0."""
    return FLOAT * sum(padded(p, ranks) for p in parameters)


@dataclass(frozen=True)
class Collective:
    """One kind of communication in an optimizer step.

    Args:
        name: torch's name.
        bytes: bytes of the whole tensors, summed over the calls, as torch counts them.
        passes: how often a ring sends these bytes over each link, less one part in ``ranks``: 2 for an all-reduce.
    """

    name: str
    bytes: int
    passes: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a ring. No algorithm without switches can send less."""
        return self.passes * self.bytes * (ranks - 1) / ranks


def collectives(model: CrateModel, parallel: str, ranks: int, accumulate: int = 1) -> list[Collective]:
    """The communication of the ranks in one optimizer step, without messages of a few bytes.

    DDP averages the gradients once per step. FSDP2 gathers the parameters of each layer for the forward pass of every
    batch, gathers them again for the backward pass, and scatters the gradients.
    """
    if ranks == 1:
        return []
    if parallel == "ddp":
        return [Collective("all_reduce", FLOAT * sum(p.numel() for p in model.parameters() if p.requires_grad), 2)]
    whole = ranks * shard_bytes(model.parameters(), ranks)
    gradients = ranks * shard_bytes((p for p in model.parameters() if p.requires_grad), ranks)
    return [
        Collective("all_gather", 2 * accumulate * whole, 1),
        Collective("reduce_scatter", accumulate * gradients, 1),
    ]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. ``saved`` and ``working`` grow with the batch."""

    parameters: int
    gradients: int
    optimizer: int
    communication: int
    """Buffers of DDP, or gathered parameters and whole gradients of FSDP."""
    saved: Saved
    working: Saved

    def at(self, samples: int) -> float:
        """The peak with ``samples`` per rank: the sum, as if all terms were largest at the same time."""
        return self.fixed + samples * (self.saved.each + self.working.each)

    @property
    def fixed(self) -> float:
        states = self.parameters + self.gradients + self.optimizer + self.communication
        return states + self.saved.fixed + self.working.fixed

    def largest_batch(self, limit: float) -> int:
        """Samples per rank that fit into ``limit`` bytes; 0 if no sample fits."""
        return max(0, math.floor((limit - self.fixed) / (self.saved.each + self.working.each)))


def memory(model: CrateModel, parallel: str, ranks: int, compute: Compute, checkpointing: bool = False) -> Memory:
    """The memory of rank 0, whose shards are the largest."""
    tokens = sample_tokens(model)
    shape = Shape.of(model, tokens)
    split = parallel == "fsdp" and ranks > 1
    own = shard_bytes(model.parameters(), ranks if split else 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = shard_bytes(trained, ranks if split else 1)
    communication = 0
    if split:
        layer = ranks * shard_bytes(model.blocks[0].parameters(), ranks)
        rest = ranks * shard_bytes(model.parameters(), ranks) - shape.depth * layer
        # For a layer: its parameters gathered as one piece and as parameters, those of the next layer, and its gradient
        # in both forms. For the rest, which stays gathered: parameters and gradient, and one of them as one piece.
        communication = 6 * layer + 3 * rest
    elif ranks > 1:
        communication = gradients  # DDP's buckets
    working = shape.working(compute)
    if isinstance(model, CrateGPT):  # gradients of log-probabilities and logits exist before the layers' backward
        words = model.token_embedding.weight.shape[0]
        working = Saved(working.fixed, max(working.each, (2 * FLOAT + compute.size) * tokens * words))
    # The two moments of AdamW, and its step count for each parameter.
    optimizer = 2 * gradients + FLOAT * len(trained)
    return Memory(
        own, gradients, optimizer, communication, saved_for_backward(model, compute, tokens, checkpointing), working
    )


# -- the command -------------------------------------------------------------------------------------------------------


def report(settings: PlanOptions) -> str:
    """The prediction in words."""
    s, model = settings, settings.build()
    ranks, samples = s.gpus, s.batch_size // s.gpus
    found = memory(model, s.parallel, ranks, Compute.of(s.precision), s.activation_checkpointing)
    parameters = sum(p.numel() for p in model.parameters())
    unit = "texts" if isinstance(model, CrateGPT) else "images"
    lines = [
        f"PREDICTION from formulas, not a measurement: {s.model}, {parameters:,} parameters, "
        f"{sample_tokens(model):,} tokens a sample",
        f"{count(ranks, 'rank')}, {s.parallel}, {s.precision}, batch {s.batch_size} ({samples} {unit} a "
        f"rank){', activation checkpointing' if s.activation_checkpointing else ''}",
        "",
        "memory of rank 0, GB",
    ]
    rows = [
        ("parameters", found.parameters),
        ("gradients", found.gradients),
        ("optimizer", found.optimizer),
        ("communication buffers", found.communication),
        ("saved for backward", found.saved.at(samples)),
        ("working memory, at most", found.working.at(samples)),
        ("sum", found.at(samples)),
    ]
    lines += [f"  {name:<26}{size / 1e9:>10.3f}" for name, size in rows]
    lines += ["", "communication of one optimizer step, GB"]
    exchanged = collectives(model, s.parallel, ranks, s.accumulate)
    lines += [
        f"  {c.name:<26}{c.bytes / 1e9:>10.3f}   each rank sends {c.sent(ranks) / 1e9:.3f} in a ring" for c in exchanged
    ] or ["  none: there is one rank"]
    limit = s.memory * 1e9 * (1 - s.reserve)
    most = found.largest_batch(limit)
    fits = "fits" if found.at(samples) <= limit else "does not fit"
    lines += [
        "",
        f"batch {s.batch_size:,} {fits}: {found.at(samples) / 1e9:.1f} GB a rank, of {limit / 1e9:.1f} GB "
        f"({s.memory:g} GB less {100 * s.reserve:g} % in reserve).",
        f"The largest batch that fits is {most * ranks:,} ({most:,} a rank)."
        if most
        else "Not one sample a rank fits.",
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of :class:`PlanOptions`."""
    parser.epilog = "The formulas, and what tests compare them with: docs/scale.md."
    options.add_arguments(parser, PlanOptions)


def run(args: argparse.Namespace) -> int:
    """Print the prediction."""
    given = options.given(args, PlanOptions)
    settings = PlanOptions(**given)
    settings.check(given)
    print(report(settings))
    return 0
