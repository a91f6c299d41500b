"""The model suite: latency, throughput, training step and memory of whole vision models."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from .. import agreement, timing
from ..models import CRATE
from ..models.crate import SIZES
from ..nn import prepare_for_inference
from ..ops import use_backend
from ..ops.products import FASTER_WITH_ONEDNN
from . import deployment

REFERENCE, COMPILED, OURS, PREPARED = "reference", "reference compiled", "crate_kernels", "crate_kernels prepared"
OURS_WITH_MKL = "crate_kernels on MKL"
FROZEN = "reference compiled frozen"
ONNX_RUNTIME, OPENVINO, OPENVINO_BF16 = "ONNX Runtime", "OpenVINO", "OpenVINO bf16"
REFERENCE_BF16, OURS_BF16, PREPARED_BF16 = (f"{name} bf16 autocast" for name in (REFERENCE, OURS, PREPARED))
VIT, VIT_COMPILED = "timm ViT", "timm ViT compiled"
IMPLEMENTATIONS = (
    REFERENCE, COMPILED, OURS, PREPARED, OURS_WITH_MKL, FROZEN, ONNX_RUNTIME, OPENVINO, OPENVINO_BF16, REFERENCE_BF16,
    OURS_BF16, PREPARED_BF16, VIT, VIT_COMPILED, "eager", "triton", "cuda",
)  # fmt: skip
"""All names of implementations. None contains a comma, because commas separate the names on the command line."""
TASKS = ("forward", "training step")
JUDGED_IMAGES = 2
JUDGED_STEP = 64
"""Numbers of images in the correctness check of a forward and of a training step."""
LARGEST_STEP = 256
"""Training is timed at one batch size: the largest requested size up to this limit."""
COMPILED_BATCHES = {"cpu": None, "cuda": (1, 2, 256)}
"""Batch sizes for compiled implementations; None means all. Compilation takes a minute for each size."""
TINY = dict(dim=32, depth=2, heads=2)
"""A tiny model for quick runs. It is not one of the published sizes."""


@dataclass
class Implementation:
    """One model with one backend.

    ``backend``: None is the automatic choice. ``onednn``: without it, matrix products on the CPU use MKL, like the
    reference. ``low``: the dtype of the computation, if it differs from that of the run. Autocast sets it, or the
    model's own runtime if ``autocast`` is False.
    """

    model: Any  # an nn.Module, or a runtime's callable
    backend: str | None
    is_crate: bool = True
    onednn: bool = True
    low: torch.dtype | None = None
    autocast: bool = True
    optimizer: torch.optim.Optimizer | None = None

    @contextlib.contextmanager
    def running(self, backward: bool = False) -> Iterator[None]:
        """Set backend, library and autocast inside the ``with`` block. A backward runs without autocast."""
        mkldnn: Any = torch.backends.mkldnn
        before = mkldnn.enabled
        mkldnn.enabled = before and self.onednn
        low = self.low if self.autocast and not backward else None
        try:
            with use_backend(self.backend), torch.autocast("cpu", low) if low else contextlib.nullcontext():
                yield
        finally:
            mkldnn.enabled = before


def build(size: str, quick: bool = False) -> CRATE:
    """CRATE of this size with seeded weights, for 224 x 224 images and 1000 classes. ``quick`` makes it tiny."""
    torch.manual_seed(0)
    if quick:
        tiny: dict[str, Any] = TINY
        return CRATE(image_size=32, patch_size=16, num_classes=10, dim_head=16, **tiny)
    sizes: dict[str, Any] = SIZES[size]
    return CRATE(image_size=224, patch_size=16, num_classes=1000, dim_head=sizes["dim"] // sizes["heads"], **sizes)


def vit(model: CRATE) -> nn.Module | None:
    """timm's ViT of the same width, depth, heads, patches and classes. None if timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        return None
    from timm.models import VisionTransformer

    config = model.config
    return VisionTransformer(
        img_size=config["image_size"], patch_size=config["patch_size"], num_classes=config["num_classes"],
        embed_dim=config["dim"], depth=config["depth"], num_heads=config["heads"],
    )  # fmt: skip


def implementations(
    master: CRATE, task: str, device: torch.device, dtype: torch.dtype, only: Collection[str] | None = None
) -> dict[str, Implementation]:
    """The implementations: name -> model with its own weights, so that a step of one model does not change another.

    Inference uses weights of ``dtype``. Training keeps float32 weights, and uses autocast if ``dtype`` is lower.
    """
    training = task == "training step"

    def fresh(source: nn.Module) -> nn.Module:
        model = copy.deepcopy(source).to(device)
        return model.train() if training else model.eval().to(dtype)

    found = {
        REFERENCE: lambda: Implementation(fresh(master), "reference"),
        COMPILED: lambda: Implementation(torch.compile(fresh(master), dynamic=False), "reference"),
        OURS: lambda: Implementation(fresh(master), None),
    }
    if device.type == "cpu" and dtype == torch.float32 and FASTER_WITH_ONEDNN:
        found[OURS_WITH_MKL] = lambda: Implementation(fresh(master), "eager", onednn=False)
    if not training:
        found[PREPARED] = lambda: Implementation(prepare_for_inference(fresh(master)), None)
    if device.type == "cpu" and dtype == torch.float32:
        low = torch.bfloat16
        found[REFERENCE_BF16] = lambda: Implementation(fresh(master), "reference", low=low)
        found[OURS_BF16] = lambda: Implementation(fresh(master), None, low=low)
        if not training:
            found[PREPARED_BF16] = lambda: Implementation(prepare_for_inference(fresh(master)), None, low=low)
            frozen: dict[str, Any] = {"freezing": True}
            found[FROZEN] = lambda: Implementation(
                torch.compile(fresh(master), dynamic=False, options=frozen), "reference"
            )
            if deployment.missing("onnxscript") is None:
                if deployment.missing("onnxruntime") is None:
                    found[ONNX_RUNTIME] = lambda: Implementation(deployment.onnx_runtime(fresh(master)), None)
                if deployment.missing("openvino") is None:
                    found[OPENVINO] = lambda: Implementation(deployment.openvino(fresh(master), "f32"), None)
                    found[OPENVINO_BF16] = lambda: Implementation(
                        deployment.openvino(fresh(master), "bf16"), None, low=low, autocast=False
                    )
    if device.type == "cuda":
        for backend in ("eager", "triton", "cuda"):
            found[backend] = partial(lambda name: Implementation(fresh(master), name), backend)
    other = vit(master)
    if other is not None:
        found[VIT] = lambda: Implementation(fresh(other), None, is_crate=False)
        found[VIT_COMPILED] = lambda: Implementation(torch.compile(fresh(other), dynamic=False), None, is_crate=False)
    built = {name: make() for name, make in found.items() if only is None or name in only}
    if training:
        for implementation in built.values():
            # With a learning rate of zero a step does all its work, and all implementations keep the same weights.
            parameters = list(implementation.model.parameters())
            implementation.optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    return built


def runner(
    implementation: Implementation, task: str, images: Tensor, targets: Tensor, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """The call to time: logits without gradients, or a whole step (loss, backward, AdamW)."""

    def forward():
        with torch.inference_mode(), implementation.running():
            return implementation.model(images)

    def step():
        loss, _ = training_loss(implementation, images, targets, dtype)
        with implementation.running(backward=True):
            loss.backward()
        if implementation.optimizer is not None:
            implementation.optimizer.step()
            implementation.optimizer.zero_grad()
        return loss

    return forward if task == "forward" else step


def training_loss(
    implementation: Implementation, images: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The loss, and the logits from which it was computed."""
    low = dtype if dtype in (torch.bfloat16, torch.float16) else None
    autocast = torch.autocast(images.device.type, low) if low else contextlib.nullcontext()
    with implementation.running(), autocast:
        logits = implementation.model(images)
        return nn.functional.cross_entropy(logits.float(), targets), logits


def outputs(
    implementation: Implementation, task: str, images: Tensor, targets: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The results to compare: the logits of the first images, or all logits and the gradient of every parameter.

    The loss is not compared: it is one number, so the error of the reference, which sets the budget, may be zero by
    chance.
    """
    if task == "forward":
        with torch.inference_mode(), implementation.running():
            return [implementation.model(images)[:JUDGED_IMAGES]]
    loss, logits = training_loss(implementation, images, targets, dtype)
    parameters = list(implementation.model.parameters())
    return [logits.detach(), *torch.autograd.grad(loss, parameters)]


def judged(
    found: dict[str, Implementation], task: str, images: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[dict[str, Implementation], dict[str, dict]]:
    """Compare every CRATE implementation with the reference model in float64 -> those to time, and the records.

    A forward is compared at the batch size of the timing. A training step is compared up to a batch size that fits into
    memory in float64.
    """
    if task == "training step":
        images, targets = images[:JUDGED_STEP], targets[:JUDGED_STEP]
    part = (images, targets) if task == "training step" else (images[:JUDGED_IMAGES], targets[:JUDGED_IMAGES])
    master = found[REFERENCE]
    exact_model = Implementation(copy.deepcopy(master.model).double(), "reference")
    exact = outputs(exact_model, task, part[0].double(), part[1], torch.float64)
    del exact_model
    errors: dict[torch.dtype | None, list[Tensor]] = {
        None: outputs(master, task, *part, dtype)
    }  # the reference's own results, by the dtype of the computation
    if any(implementation.low for implementation in found.values()):
        errors[torch.bfloat16] = outputs(
            Implementation(master.model, "reference", low=torch.bfloat16), task, *part, dtype
        )
    passed: dict[str, Implementation] = {}
    records: dict[str, dict[str, Any]] = {}
    for name, implementation in found.items():
        try:
            got = outputs(implementation, task, images, targets, dtype)
        except RuntimeError as error:
            records[name] = {"skipped": str(error).strip().splitlines()[0][:300]}
            continue
        if implementation.is_crate:
            low = implementation.low
            verdict = agreement.judge(got, exact, errors[low], low or dtype, kinks=True, together=True)
            records[name] = {"share_of_budget": verdict.share, "check": verdict.detail}
            if not verdict.passed:
                records[name]["refused"] = verdict.detail
                continue
        else:
            # A ViT is another function, so only finite outputs are required.
            records[name] = {"check": "finite" if all(t.isfinite().all() for t in got) else "not finite"}
        passed[name] = implementation
    return passed, records


def run_size(
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batches: Sequence[int],
    tasks: Sequence[str] = TASKS,
    only: Sequence[str] | None = None,
    seconds: float = 20.0,
    rounds: tuple[int, int] = (7, 40),
    quick: bool = False,
    check_only: bool = False,
) -> Iterator[dict]:
    """Records of one model size: one for each task, batch and implementation, and the bytes that each saves for
    backward."""
    master = build(size, quick)
    name = f"CRATE-{'tiny test' if quick else size[0].upper()}"
    base = dict(model=name, family="vision", shape=dict(master.config), dtype=str(dtype).removeprefix("torch."))
    pixels = master.config["image_size"]
    if not check_only:
        yield from saved_records(master, base, device, dtype, pixels)
        if quick or (size == "base" and device.type == "cuda"):
            lengths = (16, 32) if quick else tuple(1024 << i for i in range(8))
            yield from length_records(master, base, device, dtype, lengths)
    torch._functorch.config.donated_buffer = True  # torch's default, which the operator suite changes
    for task in tasks:
        torch.compiler.reset()
        found = implementations(master, task, device, dtype, {REFERENCE, *only} if only else None)
        steps = [max((b for b in batches if b <= LARGEST_STEP), default=min(batches))]
        for batch in batches if task == "forward" else steps:
            generator = torch.Generator().manual_seed(batch)
            images = torch.randn(batch, 3, pixels, pixels, generator=generator).to(device)
            images = images.to(dtype) if task == "forward" else images
            targets = torch.randint(master.config["num_classes"], (batch,), generator=generator).to(device)
            compiling = COMPILED_BATCHES[device.type]
            fit = {n: c for n, c in found.items() if "compiled" not in n or compiling is None or batch in compiling}
            passed, records = judged(fit, task, images, targets, dtype)
            for implementation in records:
                if implementation not in passed or check_only:
                    yield (
                        base
                        | {"task": task, "batch": batch, "implementation": implementation}
                        | records[implementation]
                    )
            if check_only:
                break
            yield from _timed(passed, records, base, task, batch, images, targets, device, dtype, seconds, rounds)
        del found
        gc.collect()


def _timed(passed, records, base, task, batch, images, targets, device, dtype, seconds, rounds) -> Iterator[dict]:
    runs, memory = {}, {}
    for name, implementation in passed.items():
        run = runner(implementation, task, images, targets, dtype)
        try:
            for _ in range(2):  # compiles, and creates the optimizer's state
                run()
            memory[name] = timing.peak_memory(run, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield base | {"task": task, "batch": batch, "implementation": name, "skipped": "out of memory"}
            continue
        runs[name] = run
    modes: dict[bool, Any] = {False: runs}
    if device.type == "cuda" and task == "forward" and batch == 1:
        # At batch 1 the launch takes longer than the computation, so both modes are measured.
        captured = {name: timing.as_graph(run) for name, run in runs.items()}
        modes[True] = {name: run for name, (run, done) in captured.items() if done}
    for graph, calls in modes.items():
        samples = timing.measure(calls, device, seconds=seconds, rounds=rounds)
        reference, compiled = samples.get(REFERENCE), samples.get(COMPILED)
        for name, values in samples.items():
            spread = timing.quantiles(values)
            yield (
                base
                | {
                    "task": task,
                    "batch": batch,
                    "implementation": name,
                    "seconds": spread,
                    "rounds": len(values),
                    "images_per_second": batch / spread["p50"],
                    "speedup": timing.paired_ratio(reference, values) if reference else None,
                    "speedup_over_compiled": timing.paired_ratio(compiled, values) if compiled else None,
                    "peak_memory": memory[name],
                    "graph": graph,
                }
                | records[name]
            )


# -- memory saved for backward -------------------------------------------------------------------------------------


def saved_bytes(blocks: Sequence[nn.Module], tokens: Tensor, dtype: torch.dtype, backend: str | None) -> int:
    """Bytes that the forward of these blocks saves for backward: unique storages, without parameters."""
    own = {p.untyped_storage().data_ptr() for block in blocks for p in block.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    low = dtype if dtype in (torch.bfloat16, torch.float16) else None
    autocast = torch.autocast(tokens.device.type, low) if low else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), use_backend(backend), autocast:
        for block in blocks:
            tokens = block(tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def saved_records(master: CRATE, base: dict, device: torch.device, dtype: torch.dtype, pixels: int) -> Iterator[dict]:
    """Bytes per token-channel that one additional block saves for backward, for the reference and the automatic choice.

    The difference of two depths is counted, because the output of one block is the input of the next, and both save it.
    """
    model = copy.deepcopy(master).to(device).train()
    with torch.no_grad():
        tokens = model.embed(torch.randn(8, 3, pixels, pixels, device=device))
    for name, backend in ((REFERENCE, "reference"), (OURS, None)):
        leaf = tokens.detach().requires_grad_()
        one, two = (saved_bytes(model.blocks[:depth], leaf, dtype, backend) for depth in (1, 2))
        each = (two - one) / leaf.numel()
        yield base | dict(task="saved for backward", batch=8, implementation=name, bytes_per_token_channel=each)


def length_records(
    master: CRATE, base: dict, device: torch.device, dtype: torch.dtype, lengths: Sequence[int]
) -> Iterator[dict]:
    """Peak memory of forward and backward of all blocks on one sequence, for growing lengths until one does not fit.

    Weights and their gradients are counted. On the CPU torch does not count memory, and the record says None.
    """
    blocks = copy.deepcopy(master.blocks).to(device).train()
    low = dtype if dtype in (torch.bfloat16, torch.float16) else None
    for name, backend in ((REFERENCE, "reference"), (OURS, None)):
        for tokens in lengths:
            z = torch.randn(1, tokens, master.embed_dim, device=device)

            def step(z=z, backend=backend):
                blocks.zero_grad()
                with use_backend(backend), torch.autocast(device.type, low) if low else contextlib.nullcontext():
                    for block in blocks:
                        z = block(z)
                z.backward(torch.ones_like(z))

            record = base | dict(task="memory by length", batch=1, implementation=name, tokens=tokens)
            try:
                step()
                weights = sum(p.numel() * p.element_size() for p in blocks.parameters())
                peak = timing.peak_memory(step, device)
            except torch.OutOfMemoryError:
                yield record | dict(skipped="out of memory")
                break
            yield record | dict(peak_memory=None if peak is None else peak + weights)
