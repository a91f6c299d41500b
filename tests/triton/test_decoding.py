"""New tokens with a cache: the decoding kernel compared with causal attention in float64."""

import pytest
import torch

from crate_kernels import ops
from crate_kernels.models import CrateGPT
from crate_kernels.ops.triton_kernels import decoding

from ..ops.oracle import DEVICE


def setting(batch, queries, keys, heads, width, dtype, places=None):
    """New tokens, the cache that holds them, and their positions. Later positions of the cache hold NaN."""
    generator = torch.Generator().manual_seed(queries + keys + width)
    w = torch.randn(batch, keys, heads, width, generator=generator, dtype=torch.float64).to(dtype)
    if places is None:
        places = torch.randint(queries, keys + 1, (batch,), generator=generator)
        places[0] = keys
    positions = places[:, None] + torch.arange(-queries, 0)
    new = w[torch.arange(batch)[:, None], positions]
    # A slice of a longer buffer, as the cache of a model is.
    buffer = torch.full((batch, keys + 3, heads, width), float("nan"), dtype=dtype)
    for row, count in enumerate(places):
        buffer[row, :count] = w[row, :count]
    return new.to(DEVICE), buffer.to(DEVICE)[:, :keys], positions.to(DEVICE), w.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width", "scale"),
    [
        (1, 1, 1, 1, 8, 0.3),
        (2, 1, 150, 2, 32, 0.2),
        (3, 1, 70, 1, 80, -0.2),
        (2, 3, 97, 2, 64, 0.2),
        (1, 17, 99, 1, 128, 0.0),
        (1, 1, 33, 9, 9, 0.3),
    ],
)
def test_new_tokens_see_what_causal_attention_shows_them(batch, queries, keys, heads, width, scale, dtype):
    w, cache, positions, all_tokens = setting(batch, queries, keys, heads, width, dtype)
    got = decoding.decode(w, cache, positions, scale)
    full = ops.subspace_attention(all_tokens, scale=scale, causal=True, backend="reference")
    expected = full[torch.arange(batch)[:, None], positions.cpu()]
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def paged(cache, positions, size, dtype=torch.int32):
    """The same cache as a pool of shuffled blocks of ``size`` tokens, its table, and NaN wherever nobody may read.

    Entries of the table beyond the last position of a sequence point outside the pool.
    """
    batch, _, heads, width = cache.shape
    used = positions.amax(1).cpu() // size + 1
    order = torch.randperm(int(used.sum()) + 2, generator=torch.Generator().manual_seed(size)).tolist()
    pool = torch.full((len(order), size, heads, width), float("nan"), dtype=cache.dtype)
    table = torch.full((batch, int(used.max()) + 1), -7, dtype=dtype)
    for row in range(batch):
        for column in range(int(used[row])):
            table[row, column] = order.pop()
            tokens = cache[row, column * size : (column + 1) * size].cpu()
            pool[table[row, column], : len(tokens)] = tokens
    return pool.to(DEVICE), table.to(DEVICE)


# Tiles of 16 keys in the interpreter: blocks of several tiles, of one, of a part of one, and of an odd size.
@pytest.mark.parametrize("size", [64, 16, 8, 5, 1])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width", "dtype"),
    [
        (3, 1, 150, 2, 32, torch.float32),
        (2, 3, 97, 2, 64, torch.bfloat16),
        (2, 1, 70, 1, 80, torch.float16),
        (1, 17, 99, 1, 128, torch.float32),
    ],
    ids=str,
)
def test_a_paged_cache_says_what_a_contiguous_one_says(batch, queries, keys, heads, width, dtype, size):
    w, cache, positions, all_tokens = setting(batch, queries, keys, heads, width, dtype)
    pool, table = paged(cache, positions, size)
    full = ops.subspace_attention(all_tokens, scale=0.2, causal=True, backend="reference")
    expected = full[torch.arange(batch)[:, None], positions.cpu()]
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    with torch.no_grad(), ops.use_backend("triton"):
        got = ops.cached_subspace_attention(w, pool, positions, block_table=table, scale=0.2)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_keys_are_split_over_programs_and_some_splits_see_none():
    kind = (torch.device("cpu"), torch.float32, 2, 1, 300, 16, 0, "ieee")
    splits, span, *_ = decoding._options(*kind)
    assert splits > 4
    w, cache, positions, all_tokens = setting(2, 1, 300, 1, 16, torch.float32, torch.tensor([300, span - 1]))
    got = decoding.decode(w, cache, positions, 0.3).cpu().double()
    full = ops.subspace_attention(all_tokens, scale=0.3, causal=True, backend="reference")
    torch.testing.assert_close(got[0, 0], full[0, 299], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got[1, 0], full[1, span - 2], rtol=2e-6, atol=2e-6)


def test_generation_takes_the_kernel_and_says_the_same(monkeypatch):
    torch.manual_seed(0)
    model = CrateGPT(block_size=40, vocab_size=31, n_layer=2, n_head=2, n_embd=16).to(DEVICE)
    torch.nn.init.normal_(model.token_embedding.weight)
    prompts = [torch.randint(31, (length,), device=DEVICE) for length in (3, 20)]
    calls = []
    monkeypatch.setattr(decoding, "decode", lambda *a, decode=decoding.decode: calls.append(1) or decode(*a))
    said = {}
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            said[backend] = model.generate(prompts, 12, temperature=0)
    assert len(calls) >= 2 * 11
    for one, other in zip(said["reference"], said["triton"], strict=True):
        assert torch.equal(one, other)


def test_calls_that_the_kernel_does_not_take_run_in_stock_pytorch():
    w, cache, positions, _ = setting(1, 1, 30, 1, 8, torch.float32)
    assert decoding.why_not(w, cache) is None
    assert "no gradient" in decoding.why_not(w.clone().requires_grad_(), cache)
    assert "8 to 256, not 7" in decoding.why_not(w[..., :7], cache[..., :7])
    assert "up to 64 new tokens at a time, not 65" in decoding.why_not(w.expand(1, 65, 1, 8), cache)
    leaf = cache.nan_to_num().requires_grad_()
    with ops.use_backend("triton"):
        (gradient,) = torch.autograd.grad(ops.cached_subspace_attention(w, leaf, positions).sum(), leaf)
    assert gradient.abs().sum() > 0
