"""Fused models with DistributedDataParallel and fully_shard on two ranks have the gradients of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from crate_kernels import fuse, unfuse

from ..distributed.ranks import run_on_ranks
from .compare import double
from .twins import CODE_BASES, PreNorm

pytestmark = pytest.mark.slow


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype).view(out[0].shape)).sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name.removeprefix("module.")] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def check_on_ranks():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for build, width in CODE_BASES.values():
        torch.manual_seed(0)
        own = double(build(depth=1))
        x = torch.randn(4, 5, width, dtype=torch.float64)
        want = gradients(own, x)
        for fused_first in (True, False):
            for wrap in (replicated, sharded):
                check_one(own, x.chunk(dist.get_world_size())[dist.get_rank()], want, wrap, mesh, fused_first)


def check_one(own, x, want, wrap, mesh, fused_first):
    model = copy.deepcopy(own)
    if fused_first:
        fuse(model)
    wrapped = wrap(model, mesh)
    if not fused_first:
        assert fuse(wrapped).fused
    for step in range(3):
        if step == 2:
            unfuse(wrapped)
            kinds = [type(m).__name__.removeprefix("FSDP") for m in model.modules()]
            assert kinds == [type(m).__name__ for m in own.modules()]
        for name, gradient in gradients(wrapped, x).items():
            # Ranks average.
            torch.testing.assert_close(gradient * dist.get_world_size(), want[name], rtol=1e-9, atol=1e-9)


def replicated(model, _):
    return nn.parallel.DistributedDataParallel(model)


def sharded(model, mesh):
    for module in model.modules():
        if isinstance(module, PreNorm) or type(module).__name__.endswith("GPTBlock"):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_gradients_of_one_process():
    run_on_ranks(2, check_on_ranks)
