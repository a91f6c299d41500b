import math
import re

import pytest
import torch

from crate_kernels import ops, use_backend
from crate_kernels.models import CrateGPT
from crate_kernels.models.generation import NOTHING, generate, generate_text, sample, stream, stream_text
from crate_kernels.models.tokenizers import ByteTokenizer

VARIANTS = pytest.mark.parametrize("overcomplete", [False, True], ids=["base", "overcomplete"])


def small(overcomplete=False, dtype=torch.float64, **options):
    torch.manual_seed(0)
    sizes = dict(block_size=24, vocab_size=31, n_layer=3, n_head=2, n_embd=16, overcomplete=overcomplete)
    model = CrateGPT(**sizes | options).to(dtype)
    # Embeddings as large as those of a trained model, so that the output depends on the input.
    torch.nn.init.normal_(model.token_embedding.weight)
    torch.nn.init.normal_(model.position_embedding.weight)
    return model


def prompts(*lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(31, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cached_attention_is_the_last_rows_of_causal_attention(dtype):
    torch.manual_seed(0)
    w = torch.randn(2, 9, 3, 5, dtype=dtype)
    positions = torch.tensor([[4, 5, 6], [6, 7, 8]])
    new = w[torch.arange(2)[:, None], positions]
    got = ops.cached_subspace_attention(new, w, positions, scale=0.7)
    full = ops.subspace_attention(w.double(), scale=0.7, causal=True, backend="reference")
    wanted = full[torch.arange(2)[:, None], positions]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance)
    cache = w.clone()
    cache[0, 7:] = 1e3  # after the last new token of this sequence
    assert ops.cached_subspace_attention(new, cache, positions, scale=0.7).equal(got)
    with pytest.raises(ValueError, match="cache: expected shape"):
        ops.cached_subspace_attention(new, w[:, :, :2], positions)
    with pytest.raises(TypeError, match="positions: dtype"):
        ops.cached_subspace_attention(new, w, positions.double())
    for shift, found in ((1, "5..9"), (-5, "-1..3")):
        message = f"positions: values must lie in 0..8 (the last place of the cache), got {found}"
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.cached_subspace_attention(new, w, positions + shift)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_paged_cache_holds_its_tokens_in_blocks(size):
    torch.manual_seed(size)
    w = torch.randn(2, 9, 3, 5, dtype=torch.float64)
    positions = torch.tensor([[2, 3], [7, 8]])
    new = w[torch.arange(2)[:, None], positions]
    used = positions.amax(1) // size + 1
    order = torch.randperm(int(used.sum())).tolist()
    pool, table = torch.full((len(order), size, 3, 5), math.nan, dtype=w.dtype), torch.full((2, int(used.max())), -1)
    for row in range(2):
        for column in range(int(used[row])):
            table[row, column] = order.pop()
            tokens = w[row, column * size : (column + 1) * size]
            pool[table[row, column], : len(tokens)] = tokens
    wanted = ops.cached_subspace_attention(new, w, positions, scale=0.7)
    pool.requires_grad_()
    got = ops.cached_subspace_attention(new, pool, positions, block_table=table.int(), scale=0.7)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    weights = torch.randn_like(got)
    (gradient,) = torch.autograd.grad(got, pool, weights)
    leaf = w.clone().requires_grad_()
    (every,) = torch.autograd.grad(ops.cached_subspace_attention(new, leaf, positions, scale=0.7), leaf, weights)
    for row, last in enumerate(positions[:, -1].tolist()):
        for j in range(last + 1):
            torch.testing.assert_close(gradient[table[row, j // size], j % size], every[row, j], rtol=0, atol=1e-12)


def test_what_a_paged_cache_refuses():
    w, pool, positions = torch.zeros(2, 1, 3, 5), torch.zeros(4, 8, 3, 5), torch.tensor([[3], [15]])
    table = torch.tensor([[0, -1], [1, 2]])
    ops.cached_subspace_attention(w, pool, positions, block_table=table)
    with pytest.raises(
        ValueError, match=re.escape("block_table: values must lie in 0..3 (the last block of the cache)")
    ):
        ops.cached_subspace_attention(w, pool, positions, block_table=table + 2)
    with pytest.raises(
        ValueError, match=re.escape("positions: values must lie in 0..15 (the last place of the cache)")
    ):
        ops.cached_subspace_attention(w, pool, positions + 1, block_table=table)
    with pytest.raises(ValueError, match=re.escape("block_table: expected shape (2, T), got (1, 2)")):
        ops.cached_subspace_attention(w, pool, positions, block_table=table[:1])
    with pytest.raises(ValueError, match="cache, block_table: no room in"):
        ops.cached_subspace_attention(w, pool[:, :0], positions, block_table=table)
    with pytest.raises(TypeError, match="block_table: dtype"):
        ops.cached_subspace_attention(w, pool, positions, block_table=table.float())


def test_positions_that_the_model_has_not_learned_are_an_error():
    model, idx = small(), torch.zeros(1, 4, dtype=torch.int64)
    message = re.escape("positions: values must lie in 0..23 (the last learned position), got ")
    for first, found in ((21, "21..24"), (-1, "-1..2")):
        with pytest.raises(ValueError, match=message + re.escape(found)):
            model.embed(idx, torch.arange(first, first + 4)[None])
    cache = model.new_cache(1, capacity=30)
    for _ in range(6):
        model.step(idx, cache)
    with pytest.raises(ValueError, match=message + "24..27"):
        model.step(idx, cache)


@VARIANTS
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_cached_and_uncached_logits_agree(overcomplete, backend):
    model, (idx,) = small(overcomplete), prompts(24)
    idx = idx[None]
    with use_backend(backend):
        cache = model.new_cache(1)
        logits = [model.step(idx[:, :5], cache)]
        logits += [model.step(idx[:, 5:8], cache)]
        logits += [model.step(idx[:, i : i + 1], cache) for i in range(8, 24)]
        for end, cached in zip([5, 8, *range(9, 25)], logits, strict=True):
            uncached, _ = model(idx[:, :end])
            torch.testing.assert_close(cached, uncached[:, 0], rtol=0, atol=1e-10)
    assert cache.lengths.tolist() == [24]
    with pytest.raises(ValueError, match="1 sequences with 1 more do not fit"):
        model.step(idx[:, :1], cache)


def test_cache_is_half_a_key_value_cache():
    model = small(dtype=torch.float32)
    cache = model.new_cache(4, capacity=20)
    keys_and_values = 2 * torch.empty(3, 4, 20, 2, 8, dtype=cache.w.dtype).nbytes
    assert 2 * cache.nbytes == keys_and_values
    held = [value for value in vars(cache).values() if isinstance(value, torch.Tensor) and value.dim() > 1]
    assert sum(t.untyped_storage().nbytes() for t in held) == cache.nbytes
    with torch.autocast("cpu", torch.bfloat16):
        assert model.new_cache(4, capacity=20).nbytes == cache.nbytes // 2


def greedy_uncached(model, prompt, count):
    idx = prompt[None]
    for _ in range(count):
        logits, _ = model(idx[:, -model.block_size :])
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return idx[0]


@VARIANTS
def test_greedy_generation_past_the_context(overcomplete):
    model = small(overcomplete)
    for prompt in prompts(1, 10, 23, 24, 40):
        got = model.generate(prompt[None], 12, temperature=0)
        assert torch.equal(got[0], greedy_uncached(model, prompt, 12))


@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_k=5), dict(top_p=0.8, temperature=1.3)])
def test_a_batch_of_different_lengths_gives_what_each_gives_alone(options):
    model, batch = small(), prompts(3, 11, 1, 22)
    seeds = [7, 8, 9, 10]
    together = generate(model, batch, 10, seed=7, **options)
    for prompt, seed, got in zip(batch, seeds, together, strict=True):
        (alone,) = generate(model, [prompt], 10, seed=[seed], **options)
        assert torch.equal(got, alone)
        assert torch.equal(got[: len(prompt)], prompt)
        assert len(got) == len(prompt) + 10
    assert len({tuple(got[-10:].tolist()) for got in together}) > 1


def test_seeds_repeat_and_differ():
    model, (prompt,) = small(), prompts(4)
    first, again, other = (model.generate(prompt[None], 15, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    unseeded = model.generate(prompt[None], 15)
    torch.manual_seed(5)
    assert torch.equal(unseeded, model.generate(prompt[None], 15))
    with pytest.raises(ValueError, match="seed: 2 numbers for 1 sequences"):
        model.generate(prompt[None], 1, seed=[1, 2])


def test_streaming_gives_the_same_tokens_and_stops():
    model, batch = small(), prompts(5, 2)
    whole = generate(model, batch, 12, seed=0)
    steps = list(model.stream(batch, 12, seed=0))
    assert torch.equal(torch.stack(steps, 1), torch.stack([row[-12:] for row in whole]))
    first = next(iter(model.stream(batch, 12, seed=0)))
    assert torch.equal(first, steps[0])

    stop = int(steps[3][0])
    stopped = list(stream(model, batch, 12, seed=0, stop_token=stop))
    ends = [row.tolist().index(stop) + 1 if stop in row.tolist() else 12 for row in torch.stack(steps, 1)]
    for row, whole_row, end in zip(torch.stack(stopped, 1), torch.stack(steps, 1), ends, strict=True):
        assert torch.equal(row[:end], whole_row[:end])
        assert (row[end:] == NOTHING).all()
    assert len(stopped) == max(ends)
    listed = generate(model, batch, 12, seed=0, stop_token=stop)
    assert [len(row) for row in listed] == [len(p) + end for p, end in zip(batch, ends, strict=True)]
    square = model.generate(torch.stack(prompts(4, 4)), 0)
    assert square.shape == (2, 4)


def test_cache_follows_autocast():
    model, (prompt,) = small(dtype=torch.float32), prompts(6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.step(prompt[None], cache := model.new_cache(1))
        assert cache.w.dtype == torch.bfloat16
        logits = model.step(prompt[None], cache)
        wanted, _ = model(torch.cat([prompt, prompt])[None])
    torch.testing.assert_close(logits, wanted[:, 0], rtol=0.05, atol=0.5)


def test_dropout_is_not_applied():
    model, (prompt,) = small(dropout=0.5), prompts(6)
    model.train()
    training = model.generate(prompt[None], 8, temperature=0)
    assert model.training
    assert torch.equal(training, model.eval().generate(prompt[None], 8, temperature=0))


def test_prompts_are_checked():
    model = small()
    for wrong in ([], [torch.zeros(0, dtype=torch.long)], torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="prompts: expected"):
            model.generate(wrong, 1)


def counts(logits, draws=4000, **options):
    uniform = (torch.arange(draws) + 0.5) / draws
    return (
        torch.bincount(sample(logits.expand(draws, -1), uniform=uniform, **options), minlength=logits.numel()) / draws
    )


def test_sampling_distribution():
    logits = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7])
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(counts(logits), probabilities, rtol=0, atol=1e-3)
    torch.testing.assert_close(counts(logits, temperature=2.0), (logits / 2).softmax(-1), rtol=0, atol=1e-3)
    kept = probabilities.clone()
    kept[[0, 2, 4]] = 0
    torch.testing.assert_close(counts(logits, top_k=2), kept / kept.sum(), rtol=0, atol=1e-3)
    # 0.49 + 0.29 = 0.78 reach 0.6 together and the first alone does not.
    torch.testing.assert_close(counts(logits, top_p=0.6), kept / kept.sum(), rtol=0, atol=1e-3)
    assert counts(logits, top_p=0.01).argmax() == 1
    assert counts(logits, top_p=0.01).max() == 1
    assert counts(logits, temperature=0).max() == 1
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert sample(logits.expand(2, -1), top_k=2, uniform=edges).tolist() == [1, 3]
    assert sample(logits.expand(2, -1), top_k=99, uniform=edges).tolist() == [1, 2]
    assert sample(logits[None]).shape == (1,)


def test_a_negative_number_of_new_tokens_is_refused():
    model, (prompt,) = small(), prompts(6)
    assert model.generate(prompt[None], 0).shape == (1, 6)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 0, got -1"):
        model.generate(prompt[None], -1)


@pytest.mark.parametrize(
    "wrong", [dict(temperature=-1.0), dict(temperature=math.nan), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)]
)
def test_sampling_errors(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        sample(torch.zeros(1, 3), **wrong)


def test_streamed_text_has_whole_characters():
    tokenizer = ByteTokenizer()
    model = small(vocab_size=tokenizer.vocab_size, dtype=torch.float32)
    text = "é € 𝄞"
    answer = iter([*text.encode(), tokenizer.end_of_text])
    plan = {"step": model.step}

    def scripted(idx, cache, lengths=None):
        logits = plan["step"](idx, cache, lengths)
        return torch.nn.functional.one_hot(torch.tensor([next(answer)]), logits.shape[1]).float()

    model.step = scripted
    pieces = list(stream_text(model, tokenizer, "", 99, temperature=0))
    assert pieces[:2] == ["é", " "]
    assert "".join(pieces).startswith(text)
    answer = iter(text.encode())
    assert generate_text(model, tokenizer, "→", len(text.encode()), temperature=0) == "→" + text
