"""A model on several ranks: copied (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..nn import CrateBlock, CrateDecoderBlock
from . import launch

LAYERS = (CrateBlock, CrateDecoderBlock)
"""Modules that FSDP gathers, and that checkpointing recomputes, one at a time."""


def shard(networks: list[nn.Module], device: torch.device, entries: tuple[str, ...] = ()) -> None:
    """Split the parameters of ``networks`` over all ranks, in place. FSDP2 splits every layer, and the rest.

    Each network is a root, so it must be called as a whole. The parameters of a network or layer are whole only while
    it runs. Create the optimizer afterwards, from the sharded parameters.

    Mixed precision is autocast's, as on one rank. LayerNorms need float32 parameters beside bfloat16 products, but FSDP
    gathers all parameters of a layer in one dtype.

    Args:
        entries: methods of the networks that are called instead of ``forward``.
    """
    # The warning is about models that modify a layer's output in place. No model here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (launch.size(),))
    for network in networks:
        for layer in layers(network):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # The root is resharded too, so that its parameters are DTensors outside of a forward.
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        for name in entries:
            register_fsdp_forward_method(network, name)


def copy_to_ranks(network: nn.Module, device: torch.device, unused: bool = False) -> DistributedDataParallel:
    """DDP: gradients of ``network`` become their mean over the ranks during the backward pass.

    Args:
        unused: whether the loss does not depend on some of the parameters.
    """
    return DistributedDataParallel(
        network, device_ids=[device.index] if device.type == "cuda" else None, find_unused_parameters=unused
    )


def layers(model: nn.Module) -> list[nn.Module]:
    """The CRATE layers of ``model``."""
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def checkpoint_activations(model: nn.Module) -> None:
    """Save only the input of every layer for backward, and recompute the rest. Parameter names do not change."""
    for layer in layers(model):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep the gathered parameters of layers that run in the block until its end, for hooks."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def is_finite(model: nn.Module) -> bool:
    """Whether this rank's part of every parameter is finite."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return all(bool(part.isfinite().all()) for part in parts)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model`` with full values, on the CPU if they were sharded. Every rank must call this
    function.

    Returns:
        The state dict on rank 0, an empty dictionary on the other ranks.
    """
    state = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor().cpu() if isinstance(value, DTensor) else value
        if launch.is_main():  # the other ranks do not need it
            state[name] = value
    return state


def place(value: Tensor, like: Tensor | None) -> Tensor:
    """A full ``value``, sharded like ``like``. Each rank has the full value and keeps its own part."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
