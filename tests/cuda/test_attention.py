"""The attention kernels, thread for thread on the CPU, against the float64 oracle."""

import pytest
import torch

from ..ops import oracle
from . import budget

WIDTHS = (16, 32, 48, 64, 80, 96, 128)
TOKENS = (1, 2, 63, 64, 65, 196, 197, 257, 272)


def inputs(dtype, batch, tokens, heads, width, spread=1.0):
    generator = torch.Generator().manual_seed(1000 * tokens + width)
    w, grad = torch.randn(2, batch, tokens, heads, width, generator=generator)
    return (spread * w).to(dtype), grad.to(dtype)


def check(simt, w, grad, lengths=None, **options):
    """Forward and backward, each against the oracle; returns what the kernels counted."""
    call = {**options, "lengths": lengths}
    exact_o, exact_dw = budget.attention(w.double(), grad.double(), **call)
    reference_o, reference_dw = budget.attention(w, grad, **call)
    o, lse, forward = simt.attention(w, lengths, **options)
    budget.check(o, exact_o, reference_o)
    torch.testing.assert_close(lse.double(), log_normalizer(w, **call), rtol=1e-6, atol=1e-5)
    dw, backward = simt.attention_backward(grad, w, o, lse, lengths, **options)
    budget.check(dw, exact_dw, reference_dw)
    return forward, backward


def log_normalizer(w, lengths=None, scale=None, causal=False):
    heads = w.double().transpose(1, 2)
    scores = (w.shape[-1] ** -0.5 if scale is None else scale) * heads @ heads.mT
    index = torch.arange(w.shape[1])
    if causal:
        scores = scores.masked_fill(index[None, :] > index[:, None], -torch.inf)
    if lengths is not None:
        scores = scores.masked_fill((index >= lengths[:, None])[:, None, None], -torch.inf)
    return scores.logsumexp(-1)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_values_and_gradients(simt, width, tokens, dtype, causal):
    check(simt, *inputs(dtype, 1, tokens, 1, width), causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_lengths_batch_and_heads(simt, width, dtype, causal):
    w, grad = inputs(dtype, 4, 70, 2, width)
    check(simt, w, grad, torch.tensor([1, 33, 64, 70]), causal=causal)


def test_lengths_of_a_large_head(simt):
    w, grad = inputs(torch.bfloat16, 2, 257, 1, 64)
    check(simt, w, grad, torch.tensor([100, 241]))


@pytest.mark.parametrize("tokens", [40, 230])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("width", [48, 64, 96, 128])
def test_wide_norms_take_the_online_softmax(simt, width, dtype, tokens):
    w, grad = inputs(dtype, 2, tokens, 1, width)
    w[:, ::7] *= 6
    for options in ({}, {"causal": True}, {"lengths": torch.tensor([tokens // 2, tokens])}):
        forward, _ = check(simt, w, grad, **options)
        # Every score of its own, masked ones included, and a rescaling factor a row and step: more than all pairs once.
        assert forward.exp2 > (0.5 if options.get("causal") else 1) * tokens * tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_huge_equal_norms_take_the_online_softmax(simt, dtype):
    w = torch.full((1, 40, 1, 16), 1e4, dtype=dtype)
    o, _, forward = simt.attention(w)
    assert torch.equal(o, w)
    assert forward.exp2 > 40 * 40


@pytest.mark.parametrize("lengths", [None, torch.tensor([40, 17, 33])], ids=["all tokens", "lengths"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.usefixtures("emulated")
def test_the_gradient_of_huge_scores_stays_in_bounds(dtype, causal, lengths):
    oracle.check_huge_scores("cuda", dtype, causal, lengths, "cpu")


def test_small_weights_of_float16_are_not_flushed(simt):
    # One long token, and many equal short ones that matter to another short one only together.
    w = torch.zeros(1, 197, 1, 64)
    w[0, 0, 0, 0] = (39.9 * 8 * 0.6931) ** 0.5
    w[0, 1, 0, 1] = w[0, 2:, 0, 2] = (16.1 * 8 * 0.6931) ** 0.5
    w = w.half()
    o, _, _ = simt.attention(w)
    exact, _ = budget.attention(w.double(), w.double())
    torch.testing.assert_close(o[0, 1].double(), exact[0, 1], rtol=2**-9, atol=0)


def test_ordinary_norms_take_the_symmetric_path(simt):
    w, grad = inputs(torch.bfloat16, 1, 192, 1, 64)
    forward, _ = check(simt, w, grad)
    assert forward.exp2 == 21 * 32 * 32  # six bands: every pair once, and each band with itself


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_scale(simt, scale):
    check(simt, *inputs(torch.bfloat16, 1, 50, 1, 32), scale=scale)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_tokens(simt, value):
    w = torch.full((1, 197, 1, 48), value, dtype=torch.bfloat16)
    o, lse, _ = simt.attention(w)
    assert torch.equal(o, w)
    expected = torch.full_like(lse, value * 48**0.5) + torch.tensor(197.0).log()
    torch.testing.assert_close(lse, expected)
    dw, _ = simt.attention_backward(torch.ones_like(w), w, o, lse)
    torch.testing.assert_close(dw.float(), torch.ones(w.shape), rtol=2**-7, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_values_reach_what_they_reach_in_the_reference(simt, bad):
    w, grad = inputs(torch.bfloat16, 1, 65, 2, 16)
    w[0, 3, 1, 2] = bad
    o, _, _ = simt.attention(w)
    expected, _ = budget.attention(w, grad)
    assert torch.equal(o.isfinite().all(-1), expected.isfinite().all(-1))
    assert o[:, :, 0].isfinite().all()
    assert not o[:, :, 1].isfinite().all()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, -torch.inf, 30.0])
@pytest.mark.parametrize(("tokens", "length"), [(40, 21), (65, 32), (50, 1), (257, 200)])
@pytest.mark.parametrize("width", [48, 80])
def test_hidden_tokens_may_hold_anything(simt, width, tokens, length, hidden, dtype, causal):
    w, grad = inputs(dtype, 1, tokens, 1, width)
    visible = w[:, :length].contiguous(), grad[:, :length].contiguous()
    w[:, length:], grad[:, length:] = hidden, 0
    lengths = torch.tensor([length])
    o, lse, _ = simt.attention(w, lengths, causal=causal)
    dw, _ = simt.attention_backward(grad, w, o, lse, lengths, causal=causal)
    exact = budget.attention(*(t.double() for t in visible), causal=causal)
    reference = budget.attention(*visible, causal=causal)
    for got, *expected in zip((o, dw), exact, reference, strict=True):
        budget.check(got[:, :length], *expected)
        assert got.isfinite().all()
    expected_lse = log_normalizer(visible[0], causal=causal)
    torch.testing.assert_close(lse[..., :length].double(), expected_lse, rtol=1e-6, atol=1e-5)


def test_rows_are_permutation_equivariant(simt):
    w, _ = inputs(torch.bfloat16, 1, 100, 1, 48)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    o, lse, _ = simt.attention(w)
    shuffled, shuffled_lse, _ = simt.attention(w[:, order])
    torch.testing.assert_close(shuffled, o[:, order], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(shuffled_lse, lse[..., order])


def test_padding_changes_nothing(simt):
    w, _ = inputs(torch.bfloat16, 1, 60, 1, 48)
    o, lse, _ = simt.attention(w[:, :37])
    padded, padded_lse, _ = simt.attention(w, torch.tensor([37]))
    torch.testing.assert_close(padded[:, :37], o, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(padded_lse[..., :37], lse)


@pytest.mark.parametrize("width", [48, 64, 128])
@pytest.mark.parametrize("tokens", [65, 272])
def test_any_schedule_gives_the_same_bits(simt, tokens, width):
    w, grad = inputs(torch.bfloat16, 1, tokens, 1, width)
    o, lse, _ = simt.attention(w)
    dw, _ = simt.attention_backward(grad, w, o, lse)
    for seed in (1, 2):
        shuffled_o, shuffled_lse, _ = simt.attention(w, shuffle_seed=seed)
        shuffled_dw, _ = simt.attention_backward(grad, w, o, lse, shuffle_seed=seed)
        assert torch.equal(shuffled_o, o)
        assert torch.equal(shuffled_lse, lse)
        assert torch.equal(shuffled_dw, dw)
