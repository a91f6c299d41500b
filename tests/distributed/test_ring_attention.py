"""Ring attention equals attention on one device, and sends as many bytes as documented."""

import pytest
import torch
import torch.distributed as dist

from crate_kernels import ops
from crate_kernels.distributed import ring_attention, ring_subspace_attention

from .ranks import run_on_ranks

SHAPE = (2, 3, 5)  # B, H, p


def whole(tokens, seed):
    batch, heads, width = SHAPE
    return torch.randn(batch, tokens, heads, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equal_to_one_device(shards):
    rank = dist.get_rank()
    start, stop = sum(shards[:rank]), sum(shards[: rank + 1])
    w, value, grad = (whole(sum(shards), seed) for seed in (0, 1, 2))
    for causal in (False, True):
        for tensors in ((w,), (w, value)):
            full = [t.clone().requires_grad_() for t in tensors]
            expected = ops.subspace_attention(*full, causal=causal, scale=0.6, backend="reference")
            expected_gradients = torch.autograd.grad(expected, full, grad)
            local = [t[:, start:stop].clone().requires_grad_() for t in tensors]
            got = ring_subspace_attention(*local, causal=causal, scale=0.6)
            torch.testing.assert_close(got, expected[:, start:stop], rtol=1e-10, atol=1e-10)
            gradients = torch.autograd.grad(got, local, grad[:, start:stop])
            for ours, theirs in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(ours, theirs[:, start:stop], rtol=1e-10, atol=1e-10)


def sends_one_tensor(tokens):
    sent = []
    original = dist.P2POp

    def counting(operation, tensor, *arguments):
        if operation is dist.isend:
            sent.append(tensor.numel())
        return original(operation, tensor, *arguments)

    ring_attention.dist.P2POp = counting
    batch, heads, width = SHAPE
    w = whole(tokens, dist.get_rank()).requires_grad_()
    out = ring_subspace_attention(w)
    others = dist.get_world_size() - 1
    assert sum(sent) == others * batch * tokens * heads * width
    sent.clear()
    out.sum().backward()
    assert sum(sent) == others * batch * tokens * heads * (2 * width + 2)


def refuses_other_shapes():
    width = 5 + dist.get_rank()
    with pytest.raises(ValueError, match="the same B, H, p and at least one token on every rank"):
        ring_subspace_attention(torch.randn(1, 2, 1, width))


def everything_on_three_ranks():
    # One start of the processes for all checks, because the start takes longer than the checks.
    for shards in ([4, 4, 4], [3, 1, 6]):
        equal_to_one_device(shards)
    sends_one_tensor(tokens=4)
    refuses_other_shapes()


def test_equals_one_device_and_sends_one_tensor():
    run_on_ranks(3, everything_on_three_ranks)


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        ring_subspace_attention(torch.randn(1, 2, 1, 4))
