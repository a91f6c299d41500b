"""Properties that the operators have for every input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_kernels import ops

BACKENDS = st.sampled_from(["reference", "eager"])
SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**16)
FEW = settings(max_examples=25, deadline=None)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@FEW
@given(SEEDS, SIZES, SIZES, SIZES, BACKENDS)
def test_attention_is_permutation_equivariant(seed, tokens, heads, width, backend):
    w = normal(seed, 2, tokens, heads, width)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    permuted = ops.subspace_attention(w[:, order], backend=backend)
    torch.testing.assert_close(permuted, ops.subspace_attention(w, backend=backend)[:, order], rtol=1e-10, atol=1e-10)


@FEW
@given(SEEDS, SIZES, st.integers(0, 5), st.booleans(), BACKENDS)
def test_padding_is_invisible(seed, tokens, padding, causal, backend):
    w = normal(seed, 2, tokens, 2, 4)
    padded = torch.cat([w, normal(seed + 1, 2, padding, 2, 4)], dim=1)
    lengths = torch.full((2,), tokens)
    got = ops.subspace_attention(padded, causal=causal, lengths=lengths, backend=backend)[:, :tokens]
    torch.testing.assert_close(got, ops.subspace_attention(w, causal=causal, backend=backend), rtol=1e-10, atol=1e-10)


@FEW
@given(SEEDS, SIZES, BACKENDS)
def test_a_causal_token_ignores_the_future(seed, tokens, backend):
    w = normal(seed, 1, tokens + 3, 2, 4)
    got = ops.subspace_attention(w, causal=True, backend=backend)[:, :tokens]
    expected = ops.subspace_attention(w[:, :tokens], causal=True, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@FEW
@given(SEEDS, SIZES, SIZES, BACKENDS)
def test_attention_stays_in_the_hull_of_its_values(seed, tokens, width, backend):
    w = normal(seed, 1, tokens, 1, width)
    o = ops.subspace_attention(w, backend=backend)
    assert (o <= w.amax(dim=1, keepdim=True) + 1e-12).all()
    assert (o >= w.amin(dim=1, keepdim=True) - 1e-12).all()


@FEW
@given(SEEDS, st.integers(1, 20), SIZES, st.floats(0.01, 1.0), st.floats(0.0, 2.0), BACKENDS)
def test_ista_is_non_negative_and_exactly_zero_below_the_threshold(seed, rows, width, step, lambd, backend):
    x, weight = normal(seed, rows, width), normal(seed + 1, width, width) * width**-0.5
    out = ops.ista_step(x, weight, step_size=step, lambd=lambd, backend=backend)
    before = x + step * (x @ weight - x @ weight.T @ weight)
    assert (out >= 0).all()
    assert (out[before < step * lambd - 1e-9] == 0).all()
    assert (out[before > step * lambd + 1e-9] > 0).all()


@FEW
@given(SEEDS, st.integers(1, 10), st.integers(2, 8), BACKENDS)
def test_blocks_ignore_a_shift_and_a_scale_of_each_token(seed, tokens, width, backend):
    z = normal(seed, 1, tokens, width)
    gamma, beta, weight = 1 + normal(seed + 1, width), normal(seed + 2, width), normal(seed + 3, width, width)
    expected = ops.ista_block(z, gamma, beta, weight, eps=0.0, backend=backend)
    shifted = ops.ista_block(3.0 * z + 1.5, gamma, beta, weight, eps=0.0, backend=backend)
    torch.testing.assert_close(shifted, expected, rtol=1e-6, atol=1e-6)
