import pytest
import torch

from crate_kernels import use_backend
from crate_kernels.models import CheckpointError, CrateBert, create_model, load_model
from crate_kernels.models.bert import mask_tokens
from crate_kernels.models.tokenizers import ByteTokenizer, word_starts

HEADS = pytest.mark.parametrize("num_classes", [0, 3], ids=["masked", "classifier"])


def small(num_classes=0, dtype=torch.float64, **options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=29, max_length=16, dim=12, depth=2, heads=3, emb_dropout=0.0, num_classes=num_classes)
    return CrateBert(**sizes | options).to(dtype)


def batch(num_classes=0, shape=(3, 11)):
    generator = torch.Generator().manual_seed(1)
    idx, targets = (torch.randint(29, shape, generator=generator) for _ in range(2))
    targets[:, ::2] = -1
    types = (torch.arange(shape[1]) > 5).long().expand(shape)
    lengths = torch.tensor([11, 4, 7])
    return idx, lengths, types, torch.tensor([2, 0, 1]) if num_classes else targets


def test_parameter_count():
    with torch.device("meta"):
        model = create_model("crate_bert_base")
    assert sum(p.numel() for p in model.parameters()) == 60_912_729


def reference_tokens(model, idx, lengths, types):
    """The encoder of the public description, written out with the public keys."""
    state = model.upstream_state_dict()
    heads, width = model.config["heads"], model.config["dim"]

    def norm(x, name, eps):
        return torch.nn.functional.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    e = "crate.embeddings"
    x = state[f"{e}.word_embeddings.weight"][idx] + state[f"{e}.position_embeddings.weight"][: idx.shape[1]]
    x = norm(x + state[f"{e}.token_type_embeddings.weight"][types], f"{e}.LayerNorm", 1e-12)
    padding = torch.arange(idx.shape[1]) >= lengths[:, None]
    mask = torch.zeros(padding.shape, dtype=x.dtype).masked_fill(padding, -torch.inf)[:, None, None]
    for i in range(model.config["depth"]):
        h = f"crate.encoder.layer.{i}"
        w = norm(x, f"{h}.attention.self.prenorm", 1e-5) @ state[f"{h}.attention.self.qkv.weight"].T
        w = w.unflatten(-1, (heads, -1)).transpose(1, 2)
        o = ((w @ w.transpose(-1, -2) * (width // heads) ** -0.5 + mask).softmax(-1) @ w).transpose(1, 2).flatten(2)
        x = x + o @ state[f"{h}.attention.output.dense.weight"].T
        x, weight = norm(x, f"{h}.output.prenorm", 1e-5), state[f"{h}.output.weight"]
        x = torch.relu(x + 0.1 * (x @ weight - x @ weight.T @ weight) - 0.01)
    return x


@HEADS
def test_forward_is_the_public_architecture(num_classes):
    model = small(num_classes)
    idx, lengths, types, targets = batch(num_classes)
    tokens, state = reference_tokens(model, idx, lengths, types), model.upstream_state_dict()
    if num_classes:
        pooled = torch.tanh(tokens[:, 0] @ state["crate.pooler.dense.weight"].T + state["crate.pooler.dense.bias"])
        wanted = pooled @ state["classifier.weight"].T + state["classifier.bias"]
    else:
        p = "cls.predictions"
        x = tokens @ state[f"{p}.transform.dense.weight"].T + state[f"{p}.transform.dense.bias"]
        names = (state[f"{p}.transform.LayerNorm.weight"], state[f"{p}.transform.LayerNorm.bias"])
        x = torch.nn.functional.layer_norm(torch.nn.functional.gelu(x), (12,), *names, 1e-12)
        wanted = x @ state[f"{p}.decoder.weight"].T + state[f"{p}.decoder.bias"]
    logits, loss = model(idx, lengths, types, targets)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-11)
    asked = targets != -1
    torch.testing.assert_close(loss, -wanted.log_softmax(-1)[asked].gather(1, targets[asked][:, None]).mean())
    assert model(idx, lengths, types)[1] is None


@HEADS
def test_reference_and_eager_agree(num_classes):
    model = small(num_classes)
    results = {}
    for backend in ("reference", "eager"):
        model.zero_grad()
        with use_backend(backend):
            logits, loss = model(*batch(num_classes))
        loss.backward()
        results[backend] = [logits, loss, *(p.grad.clone() for p in model.parameters())]
    torch.testing.assert_close(results["eager"], results["reference"], rtol=0, atol=1e-10)


def test_padding_changes_nothing():
    model = small()
    idx, lengths, types, _ = batch()
    other = torch.where(torch.arange(11) < lengths[:, None], idx, 28 - idx)
    assert not torch.equal(idx, other)
    first, second = (model(i, lengths, types)[0] for i in (idx, other))
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(first[row, :length], second[row, :length])
        alone, _ = model(idx[row : row + 1, :length], token_types=types[row : row + 1, :length])
        torch.testing.assert_close(first[row, :length], alone[0], rtol=0, atol=1e-12)


@HEADS
def test_public_layout_goes_in_and_out_bit_for_bit(tmp_path, num_classes):
    model = small(num_classes, dtype=torch.float32)
    public = {key: value.clone() for key, value in model.upstream_state_dict().items()}
    for i in range(2):
        for name in (
            "attention.self.prenorm.weight",
            "attention.self.prenorm.bias",
            "attention.self.qkv.weight",
            "attention.output.dense.weight",
            "output.prenorm.weight",
            "output.prenorm.bias",
            "output.weight",
        ):
            assert f"crate.encoder.layer.{i}.{name}" in public
    assert sum(key.startswith("crate.encoder") for key in public) == 14
    assert ("cls.predictions.decoder.weight" in public) == (not num_classes)
    other = small(num_classes, dtype=torch.float32)
    for parameter in other.parameters():
        torch.nn.init.ones_(parameter)
    other.load_state_dict(public | {"crate.embeddings.position_ids": torch.arange(16)[None]})
    assert all(torch.equal(value, public[key]) for key, value in other.upstream_state_dict().items())
    with pytest.raises(CheckpointError, match=r"missing keys.*crate\.encoder\.layer\.1\.output\.weight"):
        other.load_state_dict({k: v for k, v in public.items() if k != "crate.encoder.layer.1.output.weight"})
    model.save(tmp_path / "bert.safetensors")
    assert torch.equal(load_model(tmp_path / "bert.safetensors")(batch()[0])[0], model(batch()[0])[0])


def test_classifier_takes_a_pretrained_encoder():
    pretrained, classifier = small(), small(3)
    for state in (pretrained.state_dict(), pretrained.upstream_state_dict()):
        for parameter in classifier.parameters():
            torch.nn.init.zeros_(parameter)
        missing = classifier.load_state_dict(state, strict=False).missing_keys
        assert sorted(missing) == ["classifier.bias", "classifier.weight", "pooler.bias", "pooler.weight"]
        idx, lengths, types, _ = batch()
        features = (m.forward_features(idx, lengths, types) for m in (pretrained, classifier))
        torch.testing.assert_close(*features, rtol=0, atol=0)


@HEADS
def test_exports(num_classes):
    model = small(num_classes).eval()
    idx, lengths, types, _ = batch(num_classes)
    length = torch.export.Dim("length", min=2, max=16)
    shapes = {"idx": {1: length}, "lengths": None, "token_types": {1: length}}
    with use_backend("eager"):
        program = torch.export.export(model, (idx, lengths, types), dynamic_shapes=shapes)
    shorter = (idx[:, :8], lengths.clamp(max=8), types[:, :8])
    torch.testing.assert_close(program.module()(*shorter)[0], model(*shorter)[0], rtol=0, atol=0)


def test_errors():
    with pytest.raises(ValueError, match=r"N in 1..16, got torch.int64 \(1, 17\)"):
        small()(torch.zeros(1, 17, dtype=torch.long))
    model, idx = small(), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="idx: expected integers"):
        model(idx.float())
    with pytest.raises(ValueError, match=r"idx: values must lie in 0\.\."):
        model(idx - 1)
    with pytest.raises(ValueError, match=r"token_types: values must lie in 0\.\.1 \(the last type\), got 2\.\.2"):
        model(idx, token_types=idx + 2)
    with pytest.raises(ValueError, match=r"targets: expected shape \(2, 3\), got \(3, 2\)"):
        model(idx, targets=idx.T)
    with pytest.raises(ValueError, match=r"targets: values must lie in -1\.\."):
        model(idx, targets=idx - 100)
    with pytest.raises(ValueError, match=r"positions: values must lie in 0\.\.15 \(the last learned .*, got 16\.\.16"):
        model.add_embeddings(torch.zeros(1, 1, model.config["dim"]), torch.tensor([[16]]))
    with pytest.raises(ValueError, match="heads: 5 does not divide"):
        small(heads=5)
    with pytest.raises(ValueError, match=r"lengths: values must lie in 1\.\.11"):
        small()(batch()[0], torch.tensor([12, 1, 1]))


def masked(shape=(200, 100), seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, shape, generator=generator)
    return tokens, *mask_tokens(tokens, mask_token=20, vocab_size=20, generator=generator, **options)


def test_masking_shares():
    tokens, inputs, targets = masked()
    chosen = targets != -1
    assert chosen.double().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert (inputs[chosen] == 20).double().mean().item() == pytest.approx(0.8, abs=0.02)
    # A random token is the true one once in twenty.
    assert (inputs[chosen] == tokens[chosen]).double().mean().item() == pytest.approx(0.105, abs=0.02)
    again = masked()
    assert torch.equal(again[1], inputs)
    assert torch.equal(again[2], targets)


def test_masking_respects_padding_and_protected_tokens():
    lengths = torch.arange(1, 201).clamp(max=100)
    tokens, inputs, targets = masked(lengths=lengths, protected=(3, 7))
    chosen = targets != -1
    assert not chosen[torch.arange(100) >= lengths[:, None]].any()
    assert not chosen[(tokens == 3) | (tokens == 7)].any()
    maskable = (torch.arange(100) < lengths[:, None]) & (tokens != 3) & (tokens != 7)
    assert torch.equal(chosen.any(1), maskable.any(1))
    assert torch.equal(inputs[~chosen], tokens[~chosen])


def test_whole_words_are_masked_together():
    tokenizer = ByteTokenizer()
    text = "The quick brown fox, it's said, jumps over the lazy dog " * 4
    tokens = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(text)]).expand(64, -1)
    starts = word_starts(tokenizer)
    generator = torch.Generator().manual_seed(0)
    _, targets = mask_tokens(
        tokens, mask_token=257, vocab_size=257, protected=(256,), word_starts=starts, generator=generator
    )
    chosen = targets != -1
    assert not chosen[:, 0].any()
    continuing = ~starts[tokens[:, 2:]]
    assert torch.equal(chosen[:, 2:][continuing], chosen[:, 1:-1][continuing])
    assert chosen.double().mean().item() == pytest.approx(0.15, abs=0.03)


@HEADS
def test_loss_falls(num_classes):
    model = small(num_classes, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        _, loss = model(*batch(num_classes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
