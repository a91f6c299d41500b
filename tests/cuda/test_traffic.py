"""What the kernels were designed to cost, counted while they run: global bytes, tensor-core products, exponentials,
barriers and bank conflicts. The predictions are those of ``docs/cuda.md``."""

import pytest
import torch

WIDTHS = (16, 32, 48, 64, 80, 96, 128)


def head(tokens, width):
    generator = torch.Generator().manual_seed(tokens + width)
    return torch.randn(2, 1, tokens, 1, width, generator=generator).bfloat16()


def bands(tokens, rows):
    return -(-tokens // rows)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [64, 197, 257])
def test_forward(simt, tokens, width):
    w, _ = head(tokens, width)
    _, _, counters = simt.attention(w, count_banks=True)
    assert counters.global_bytes_read == w.nbytes
    assert counters.global_bytes_written == w.nbytes + 4 * tokens
    rows = 32 if tokens > 208 or width <= 64 else 16
    # Free of conflicts but for two accesses: whole rows, zeros of the padding and the output, move eight chunks at a
    # time, and where eight does not divide the row, the eight straddle two rows and may meet one bank twice.
    moved = (bands(tokens, rows) + 1) * rows * width // 64
    assert counters.bank_conflicts <= (0 if width in (64, 128) else moved)
    passes = 2 if tokens > 208 and width > 80 else 1
    n = bands(tokens, rows)
    exponentials = n * (n + 1) // 2 * rows * rows
    if rows == 32 and 0 < tokens % 32 <= 16:
        # The second row tile of the last band is empty: who meets that band computes half, once a step.
        exponentials -= (n // 2 + 1) * rows * 16
    assert counters.exp2 == passes * exponentials
    # All rows are there; the head's maximum; a barrier a step after the first, and one before the output.
    assert counters.barriers == 2 + passes * (n // 2 + 1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [64, 197, 257])
def test_backward(simt, tokens, width):
    w, grad = head(tokens, width)
    o, lse, _ = simt.attention(w)
    _, counters = simt.attention_backward(grad, w, o, lse, count_banks=True)
    assert counters.global_bytes_read == 3 * w.nbytes + 4 * tokens
    assert counters.global_bytes_written == w.nbytes
    passes = 2 if tokens > 208 and width > 80 else 1
    n = bands(tokens, 16)
    # Two n8 halves of every k16 step: three products a pair for scores and D, four to use them; five on the diagonal.
    scores, use = 2 * width // 16, 2 * width // 16 // passes
    pairs = n * (n - 1) // 2
    assert counters.mma == passes * (pairs * (3 * scores + 4 * use) + n * (3 * scores + 2 * use))
    assert counters.exp2 == passes * (pairs + n) * 2 * 256


def test_causal_attention_does_half_the_products_that_use_the_scores(simt):
    w, _ = head(192, 48)
    _, _, full = simt.attention(w)
    _, _, causal = simt.attention(w, causal=True)
    assert causal.exp2 == full.exp2
    bands_of_32 = 6
    pair = 2 * 2 * (48 // 8 + 1)  # 32 x 32 x 48 and the row sums, in m16n8k16
    assert full.mma - causal.mma == bands_of_32 * (bands_of_32 - 1) // 2 * pair
