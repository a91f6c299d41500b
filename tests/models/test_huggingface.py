"""The language models as Hugging Face models: the checks of transformers for its own models, on tiny models."""

import functools
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from crate_kernels.models import CRATE, CrateBert, CrateGPT
from crate_kernels.models.tokenizers import ByteTokenizer, GPT2Tokenizer

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    pipeline,
)
from transformers.utils import find_labels

from crate_kernels.models import huggingface


def gpt(overcomplete=False):
    torch.manual_seed(0)
    model = CrateGPT(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=16, overcomplete=overcomplete)
    torch.nn.init.normal_(model.token_embedding.weight)
    torch.nn.init.normal_(model.position_embedding.weight)
    return model.eval()


def bert(num_classes=0):
    torch.manual_seed(0)
    return CrateBert(vocab_size=31, max_length=24, dim=16, depth=2, heads=2, num_classes=num_classes).eval()


GPT_OPTIONS = dict(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=16, num_labels=3)
BERT_OPTIONS = dict(vocab_size=31, max_position_embeddings=24, dim=16, depth=2, heads=2, emb_dropout=0.0, num_labels=3)
CLASSES = [
    huggingface.CrateGPTModel,
    huggingface.CrateGPTForCausalLM,
    huggingface.CrateGPTForSequenceClassification,
    huggingface.CrateBertModel,
    huggingface.CrateBertForMaskedLM,
    huggingface.CrateBertForSequenceClassification,
]
EVERY = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__.removeprefix("Crate"))


def build(cls, **options):
    """A tiny model of ``cls`` in float64, its attention far from uniform."""
    torch.manual_seed(0)
    is_gpt = cls.config_class is huggingface.CrateGPTHubConfig
    model = cls(cls.config_class(**(GPT_OPTIONS if is_gpt else BERT_OPTIONS) | options)).double().eval()
    with torch.no_grad():
        for embedding in (model.crate.token_embedding, model.crate.position_embedding):
            embedding.weight.normal_()
        for block in model.crate.blocks:
            block.mssa.projection.weight.mul_(20)
    return model


def result(model, *arguments, **options):
    """The tokens or logits that ``model`` returns."""
    output = model(*arguments, **options)
    return output.logits if "logits" in output else output.last_hidden_state


def tokens(*shape, seed=1):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("model", "auto"),
    [
        (gpt(), AutoModelForCausalLM),
        (gpt(overcomplete=True), AutoModelForCausalLM),
        (bert(), AutoModelForMaskedLM),
        (bert(num_classes=5), AutoModelForSequenceClassification),
    ],
    ids=["gpt2", "lm", "bert", "classifier"],
)
def test_saved_models_load_through_auto_classes(tmp_path, model, auto):
    wrapped = huggingface.wrap(model)
    assert wrapped.crate is model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(wrapped)
    assert loaded.crate.config == model.config
    for key, value in loaded.crate.state_dict().items():
        assert torch.equal(value, before[key]), key
    idx = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(idx).logits, wrapped(idx).logits)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 16


@pytest.mark.parametrize(
    ("kind", "given"),
    [(huggingface.CrateGPTHubConfig, GPT_OPTIONS), (huggingface.CrateBertHubConfig, BERT_OPTIONS)],
    ids=["gpt", "bert"],
)
def test_configurations(kind, given, tmp_path, caplog):
    """The checks of transformers' own ConfigTester."""
    # Options of every configuration, with values that are not the defaults.
    common = dict(return_dict=False, output_hidden_states=True, dtype=torch.float16, chunk_size_feed_forward=5,
                  architectures=["Model"], id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1},
                  problem_type="regression")  # fmt: skip
    config = kind(**common)
    assert {name: getattr(config, name) for name in common} == common
    config = kind(**given)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size) == (
        16, 2, 2, 31,
    )  # fmt: skip
    assert given.items() - {("num_labels", 3)} <= json.loads(config.to_json_string()).items()
    config.to_json_file(tmp_path / "config.json")
    assert kind.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    config.save_pretrained(tmp_path / "sub")
    assert kind.from_pretrained(tmp_path, subfolder="sub").to_dict() == config.to_dict()
    assert kind.from_pretrained(tmp_path / "sub", vocab_size=20).to_dict() == config.to_dict() | {"vocab_size": 20}
    with pytest.raises(OSError):
        kind.from_pretrained(tmp_path / "nowhere")
    for labels in (5, 3):
        config.num_labels = labels
        assert len(config.id2label) == len(config.label2id) == labels
    assert kind().num_labels == 2
    assert not caplog.records


def test_new_models_have_our_initialization():
    torch.manual_seed(0)
    config = huggingface.CrateGPTHubConfig(
        block_size=8, vocab_size=300, n_layer=2, n_head=2, n_embd=256, overcomplete=True
    )
    model = AutoModelForCausalLM.from_config(config).crate
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].mssa.output.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.blocks[0].ista.D.abs().max().item() == pytest.approx((6 / 256) ** 0.5, rel=0.01)


def test_causal_logits_and_loss():
    model, idx = gpt(), tokens(2, 9)
    wrapped = huggingface.wrap(model)
    output = wrapped(idx, labels=idx)
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(output.logits[:, :-1], logits)
    torch.testing.assert_close(output.loss, loss)
    assert isinstance(wrapped(idx, return_dict=False), tuple)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side):
    wrapped = huggingface.wrap(gpt()).double()
    idx, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    real = slice(4, 9) if side == "left" else slice(0, 5)
    mask[1] = 0
    mask[1, real] = 1
    labels = idx.clone()
    output = wrapped(idx, attention_mask=mask, labels=labels)
    alone = wrapped(idx[1:, real])
    torch.testing.assert_close(output.logits[1:, real], alone.logits, rtol=0, atol=1e-12)
    first, second = wrapped(idx[:1], labels=idx[:1]).loss, wrapped(idx[1:, real], labels=idx[1:, real]).loss
    torch.testing.assert_close(output.loss, (8 * first + 4 * second) / 12)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "uncached"])
def test_generate(options):
    model = gpt()
    wrapped = huggingface.wrap(model)
    calls = []
    layer = model.cached_layer
    model.cached_layer = lambda i, *arguments: (
        (calls.append(arguments[0].shape[1]) if i == 0 else None) or layer(i, *arguments)
    )
    idx, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :4] = 0
    generated = wrapped.generate(
        idx, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    assert calls == ([] if "use_cache" in options else [7, 1, 1, 1, 1, 1])
    assert torch.equal(generated[:, :7], idx)
    if "num_beams" in options:
        again = wrapped.generate(
            idx, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None,
            use_cache=False, **options,
        )  # fmt: skip
        assert torch.equal(generated, again)
    else:
        alone = model.generate([idx[0], idx[1, 4:]], 6, temperature=0)
        assert torch.equal(generated[:, 7:], torch.stack([row[-6:] for row in alone]))


def test_bert_masks_and_losses():
    model, idx = bert(), tokens(2, 9)
    wrapped = huggingface.wrap(model)
    mask = (torch.arange(9) < torch.tensor([[9], [4]])).long()
    labels = idx.masked_fill(torch.arange(9) % 3 > 0, -100)
    output = wrapped(idx, attention_mask=mask, labels=labels)
    logits, loss = model(idx, torch.tensor([9, 4]), targets=labels.masked_fill(labels == -100, -1))
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, loss)


def test_a_classifier_takes_what_a_masked_model_saved(tmp_path):
    pretrained = huggingface.wrap(bert())
    pretrained.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    idx = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(classifier.crate.forward_features(idx), pretrained.crate.forward_features(idx))
        assert classifier(idx).logits.shape == (2, 4)
    assert classifier.crate.pooler.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert classifier.crate.classifier.weight.abs().max() < 0.1
    assert not classifier.crate.classifier.bias.any()


# -- every argument is honored or refused ------------------------------------------------------------------------------


@EVERY
def test_unknown_keywords_are_refused(cls):
    assert find_labels(cls) in ([], ["labels"])  # what the trainer of transformers demands of every batch
    with pytest.raises(TypeError, match="head_mask"):
        build(cls)(tokens(2, 9), head_mask=None)


@EVERY
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_mask=torch.ones(2, 9)), r"attention_mask: expected shape \(2, 10\), got \(2, 9\)"),
        (dict(attention_mask=torch.ones(2, 1, 10, 10)), r"attention_mask: expected shape \(2, 10\)"),
        (dict(position_ids=torch.arange(9)), r"position_ids: expected shape \(2, 10\), got \(9,\)"),
        (dict(position_ids=torch.arange(20, 30)), r"position_ids: expected positions in 0\.\.23"),
        (dict(inputs_embeds=torch.ones(2, 10, 16)), "input_ids, inputs_embeds: give exactly one"),
        (dict(input_ids=None), "input_ids, inputs_embeds: give exactly one"),
        (dict(input_ids=None, inputs_embeds=torch.ones(2, 10, 8)), r"inputs_embeds: expected shape \(B, N, 16\)"),
        (dict(input_ids=tokens(10)), r"input_ids: expected shape \(B, N\)"),
        (dict(input_ids=tokens(2, 10) - 100), r"input_ids: values must lie in 0\.\."),
        (dict(input_ids=tokens(2, 10).float()), r"input_ids: dtype torch\.float32 is not supported"),
        (dict(input_ids=[[1, 2]]), r"input_ids: expected a torch\.Tensor, got list"),
        (dict(input_ids=tokens(2, 10).to("meta")), "input_ids: is on meta, but the model is on cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(cls, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build(cls)(**{"input_ids": tokens(2, 10)} | options)


@EVERY
def test_padding_may_stand_anywhere(cls):
    model = build(cls)
    idx, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, [2, 5, 8]] = 0
    is_gpt = isinstance(model.crate, CrateGPT)
    got = result(model, idx, attention_mask=mask)
    for row, real in enumerate(mask.bool()):
        # CRATE-GPT2 counts real tokens, CRATE-BERT's positions are those of the row, as of any BERT.
        positions = None if is_gpt else torch.arange(9)[real]
        if positions is not None and got.dim() == 2 and not real[0]:
            continue  # a BERT classifier reads the first token, whatever it is
        alone = result(model, idx[row : row + 1, real], position_ids=positions)
        wanted = got[row] if got.dim() == 2 else got[row, real]
        torch.testing.assert_close(wanted, alone[0], rtol=0, atol=1e-12)
    # The content of padding changes nothing. NaN in padding reaches no other token.
    embeddings = model.get_input_embeddings()(idx).detach()
    broken = embeddings.masked_fill(mask[..., None] == 0, 1e6)
    again = result(model, inputs_embeds=broken, attention_mask=mask)
    keep = torch.ones(3, dtype=torch.bool) if got.dim() == 2 else mask.bool()
    if got.dim() == 2 and not is_gpt:
        keep = mask[:, 0].bool()
    torch.testing.assert_close(again[keep], got[keep], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="attention_mask: row 2 has no real token"):
        model(idx, attention_mask=mask * torch.tensor([[1], [1], [0]]))


@EVERY
def test_embeddings_and_positions(cls):
    model, idx = build(cls), tokens(2, 9)
    got = result(model, idx)
    torch.testing.assert_close(result(model, inputs_embeds=model.get_input_embeddings()(idx)), got, rtol=0, atol=0)
    for positions in (torch.arange(9), torch.arange(9)[None], torch.arange(9).expand(2, 9)):
        torch.testing.assert_close(result(model, idx, position_ids=positions), got, rtol=0, atol=0)
    moved = result(model, idx, position_ids=torch.arange(9) + 5)
    assert (moved - got).abs().max() > 1e-3


@EVERY
def test_hidden_states_and_attentions(cls):
    model, idx, mask = build(cls), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    crate = model.crate
    with torch.no_grad():
        plain = result(model, idx, attention_mask=mask)
        output = model(idx, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(output[0], plain, rtol=0, atol=1e-12)
    assert [h.shape for h in output.hidden_states] == [(2, 9, 16)] * 3
    assert [a.shape for a in output.attentions] == [(2, 2, 9, 9)] * 2
    # The first layer of the unpadded row, from its own parts.
    block, (first, second, last) = crate.blocks[0], (h[:1] for h in output.hidden_states)
    torch.testing.assert_close(block(first), second, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.attentions[0][:1], block.mssa.attention(block.mssa_norm(first)))
    wanted = crate.blocks[1](second)
    torch.testing.assert_close(last, crate.norm(wanted) if isinstance(crate, CrateGPT) else wanted)
    # Real tokens of the padded row see real tokens only.
    maps = output.attentions[1][1, :, 4:]
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 5, dtype=maps.dtype))
    assert not maps[..., :4].any()
    model.config.output_hidden_states = True
    assert len(model(idx).hidden_states) == 3
    assert model(idx, output_hidden_states=False).hidden_states is None


@EVERY
def test_gradients_reach_what_is_returned(cls):
    model, idx, mask = build(cls), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    output = model(idx, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    kept = [*output.hidden_states[:-1], *output.attentions]
    for tensor in kept:
        tensor.retain_grad()
    output[0].square().sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in kept)


@EVERY
def test_tuples(cls):
    model, idx = build(cls), tokens(2, 9)
    whole = model(idx, output_hidden_states=True)
    as_tuple = model(idx, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], whole[0])
    model.config.return_dict = False
    assert isinstance(model(idx), tuple)
    assert not isinstance(model(idx, return_dict=True), tuple)


@EVERY
@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing(cls, options):
    idx = tokens(2, 9)
    gradients, layers = [], []
    for recompute in (False, True):
        model = build(cls, dropout=0.0).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            assert model.is_gradient_checkpointing
        calls = []
        for block in model.crate.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        result(model, idx).square().sum().backward()
        layers.append(len(calls))
        gradients.append([p.grad for p in model.parameters()])
    assert layers == [2, 4]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-10, atol=1e-10)


@EVERY
def test_vocabularies_can_be_resized(cls, tmp_path):
    model, idx = build(cls), tokens(2, 9)
    before = result(model, idx)
    for size in (40, 31):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.vocab_size == model.crate.vocab_size == model.crate.config["vocab_size"] == size
        after = result(model, idx)
        torch.testing.assert_close(after[..., :31] if "LM" in cls.__name__ else after, before, rtol=0, atol=1e-12)
        model.save_pretrained(tmp_path)
        again = cls.from_pretrained(tmp_path, dtype=torch.float64)
        assert torch.equal(result(again, idx), after)
    model.crate.save(tmp_path / "crate.safetensors")


@EVERY
def test_base_weights_go_into_heads_and_back(cls, tmp_path):
    model, idx = build(cls), tokens(2, 9)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(base) is (model if isinstance(model, type(base)) else type(model.model)) or type(base) is type(model)
    features = model(idx, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(base(idx).last_hidden_state, features)
    base.save_pretrained(tmp_path / "base")
    again = cls.from_pretrained(tmp_path / "base", dtype=torch.float64)
    assert torch.equal(again(idx, output_hidden_states=True).hidden_states[-1], features)
    assert all(torch.isfinite(p).all() and p.abs().max() < 1e3 for p in again.parameters())


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [CLASSES[2], CLASSES[5]], ids=["gpt", "bert"])
def test_classes_numbers_and_several_labels(cls):
    model, idx = build(cls), tokens(4, 9)
    losses = torch.nn.functional
    for problem, labels, loss in (
        ("single_label_classification", torch.tensor([0, 2, 1, 0]), losses.cross_entropy),
        ("multi_label_classification", torch.rand(4, 3).round().double(), losses.binary_cross_entropy_with_logits),
        ("regression", torch.randn(4, 3, dtype=torch.float64), losses.mse_loss),
    ):
        for named in (True, False):
            model.config.problem_type = problem if named else None
            if problem == "regression" and not named:
                model, labels = build(cls, num_labels=1), labels[:, :1]
            output = model(idx, labels=labels)
            assert output.logits.shape == (4, model.config.num_labels)
            torch.testing.assert_close(output.loss, loss(output.logits, labels))
            assert model.config.problem_type == problem
    with pytest.raises(ValueError, match="labels: expected 4 rows"):
        model(idx, labels=labels[:3])


def test_a_causal_classifier_reads_the_last_real_token():
    model, idx = build(huggingface.CrateGPTForSequenceClassification, pad_token_id=0), tokens(2, 9) % 30 + 1
    plain = model.score(model.model(idx).last_hidden_state[:, -1])
    torch.testing.assert_close(model(idx).logits, plain)
    right, left = (torch.nn.functional.pad(idx, pad) for pad in ((0, 3), (3, 0)))
    for padded in (right, left):
        torch.testing.assert_close(model(padded).logits, plain, rtol=0, atol=1e-12)  # by pad_token_id
        torch.testing.assert_close(model(padded, attention_mask=padded != 0).logits, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [CLASSES[1], CLASSES[4]], ids=["gpt", "bert"])
def test_token_losses(cls):
    model, idx = build(cls), tokens(2, 9)
    labels = idx.masked_fill(torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.4, -100)
    output = model(idx, labels=labels)
    shifted = cls is CLASSES[1]
    logits, asked = (output.logits[:, :-1], labels[:, 1:]) if shifted else (output.logits, labels)
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), asked.flatten(), reduction="sum")
    torch.testing.assert_close(output.loss, total / (asked != -100).sum())
    torch.testing.assert_close(model(idx, labels=labels, num_items_in_batch=100).loss, total / 100)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, 9\), got \(2, 8\)"):
        model(idx, labels=labels[:, 1:])
    if shifted:
        aligned = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        torch.testing.assert_close(model(idx, shift_labels=aligned).loss, output.loss)
        assert torch.equal(model(idx, logits_to_keep=2).logits, output.logits[:, -2:])
        assert torch.equal(model(idx, logits_to_keep=torch.tensor([1, 4])).logits, output.logits[:, [1, 4]])
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(idx, labels=labels, logits_to_keep=1)


def test_a_causal_classifier_takes_what_a_language_model_saved(tmp_path):
    model = build(huggingface.CrateGPTForCausalLM)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4, dtype=torch.float64)
    assert type(loaded) is huggingface.CrateGPTForSequenceClassification
    assert loaded.score.weight.std().item() == pytest.approx(0.02, rel=0.4)
    assert torch.equal(loaded.model(tokens(2, 9)).last_hidden_state, model.model(tokens(2, 9)).last_hidden_state)


def test_only_language_models_can_be_wrapped():
    model = CRATE(image_size=8, patch_size=4, num_classes=3, dim=8, depth=1, heads=1, dim_head=8)
    with pytest.raises(TypeError, match=r"wrap: takes a CrateGPT or a CrateBert, got CRATE; vision models are timm's"):
        huggingface.wrap(model)


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overcomplete", [False, True])
def test_a_cache_goes_in_and_out_of_forward(overcomplete):
    model = build(huggingface.CrateGPTForCausalLM, overcomplete=overcomplete)
    idx, mask = tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, [1, 6]] = 0
    with torch.no_grad():
        whole = model(idx, attention_mask=mask, use_cache=False)
        assert whole.past_key_values is None
        assert model(idx).past_key_values is not None  # as the configuration says
        cache, logits = None, []
        for start, stop in ((0, 5), (5, 6), (6, 10), (10, 14)):
            output = model(idx[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            assert cache.get_seq_length() == stop
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, 1)[mask.bool()], whole.logits[mask.bool()], rtol=0, atol=1e-11)
        # Cropping and selecting rows, as assisted and beam search do.
        cache.crop(-4)
        cache.batch_select_indices(torch.tensor([2, 0]))
        again = model(idx[[2, 0], 10:], attention_mask=mask[[2, 0]], past_key_values=cache).logits
        torch.testing.assert_close(again, logits[-1][[2, 0]], rtol=0, atol=1e-11)
    assert model(idx).past_key_values is None  # gradients are recorded
    assert model(idx, use_cache=True).past_key_values.get_seq_length() == 14


def test_gradients_with_a_new_cache():
    model, idx = build(huggingface.CrateGPTForCausalLM), tokens(2, 9)
    gradients = []
    for use_cache in (False, True):
        model.zero_grad()
        model(idx, labels=idx, use_cache=use_cache).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, cached in zip(*gradients, strict=True):
        torch.testing.assert_close(cached, plain, rtol=1e-10, atol=1e-10)


def test_caches_that_do_not_fit_are_refused():
    model, idx = build(huggingface.CrateGPTForCausalLM), tokens(2, 9)
    cache = model(idx, use_cache=True).past_key_values
    with pytest.raises(TypeError, match="past_key_values: expected a CrateCache, got DynamicCache"):
        model(idx, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="past_key_values: holds 2 sequences, but input_ids has 3"):
        model(tokens(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: 25 tokens with the new ones, but block_size"):
        model(tokens(2, 16), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 10\) \(9 tokens in past_key_values"):
        model(tokens(2, 1), past_key_values=cache, attention_mask=torch.ones(2, 1))
    with pytest.raises(ValueError, match="output_attentions: not available with a cache"):
        model(tokens(2, 1), past_key_values=cache, output_attentions=True)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(idx, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="25 tokens, but block_size"):
        model(tokens(2, 25))


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_text_too_long_for_the_model_is_refused_before_the_first_token(use_cache, monkeypatch):
    model, idx = build(huggingface.CrateGPTForCausalLM), tokens(2, 9)
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=use_cache)
    assert model.generate(idx, max_new_tokens=16, **options).shape == (2, 25)  # the last token is not read

    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError, match="the text would have 26 tokens, but the model takes 24"):
        model.generate(idx, max_new_tokens=17, **options)
    with pytest.raises(ValueError, match="attention_mask: row 0 has no real token"):
        model.generate(idx, max_new_tokens=1, attention_mask=torch.zeros_like(idx), **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(prompt_lookup_num_tokens=3),
        dict(num_return_sequences=2, num_beams=2),
        dict(inputs_embeds=True),
        dict(logits_to_keep=None),
        dict(return_dict_in_generate=True, output_hidden_states=True, output_scores=True),
        dict(return_dict_in_generate=True, output_attentions=True, use_cache=False),
    ],
    ids=["prompt-lookup", "sequences", "embeddings", "plain", "hidden-states", "attentions"],
)
def test_other_ways_to_generate(options):
    model = build(huggingface.CrateGPTForCausalLM)
    idx = tokens(1, 4, seed=3).repeat(1, 2)
    common = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    wanted = model.crate.generate(idx, 8, temperature=0)
    options = {name: value for name, value in options.items() if value is not None}
    if options.pop("inputs_embeds", False):
        got = model.generate(inputs_embeds=model.get_input_embeddings()(idx), **common)
        assert torch.equal(got, wanted[:, 8:])
        return
    got = model.generate(idx, **common, **options)
    if "num_beams" in options:
        assert got.shape == (2, 16)
        return
    assert torch.equal(got if isinstance(got, torch.Tensor) else got.sequences, wanted)
    if "output_hidden_states" in options:
        assert len(got.hidden_states) == 8
        assert got.hidden_states[0][0].shape == (1, 8, 16)
        more = model.generate(got.sequences, past_key_values=got.past_key_values, **common | {"max_new_tokens": 2})
        assert torch.equal(more, model.crate.generate(idx, 10, temperature=0))
    if "output_attentions" in options:
        assert got.attentions[-1][0].shape == (1, 2, 15, 15)


def test_a_stop_string_ends_a_text():
    model, tokenizer = build(huggingface.CrateGPTForCausalLM), huggingface.tokenizer("bytes")
    idx = tokens(1, 4, seed=3)
    common = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    whole = model.generate(idx, **common)
    stop = tokenizer.decode(whole[0, 4:6])
    assert torch.equal(model.generate(idx, **common, stop_strings=[stop], tokenizer=tokenizer), whole[:, :6])


# -- tokenizers and pipelines ------------------------------------------------------------------------------------------

TEXTS = ["", "Hello world, it's 2024!", "  spaces\n\n\ttabs ", "naïve Ελληνικά 漢字 𝄞", "a" * 300]


def test_the_byte_tokenizer_has_our_tokens(tmp_path):
    ours, theirs = ByteTokenizer(), huggingface.tokenizer("bytes")
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == theirs.pad_token_id == ours.end_of_text
    assert theirs.decode([72, 256, 300], skip_special_tokens=True) == "H"
    assert theirs.decode("é".encode()[:1]) == "\ufffd"
    masked = huggingface.tokenizer("bytes", masked=True)
    assert masked("a<|mask|>c").input_ids == [256, 97, 257, 99]
    masked.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a<|mask|>c").input_ids == [256, 97, 257, 99]
    with pytest.raises(ValueError, match="tokenizer: expected 'bytes' or 'gpt2', got 'words'"):
        huggingface.tokenizer("words")


def test_merges_follow_from_ranks():
    """A small table of ranks. Merges always take the pair with the lowest rank, as tiktoken does."""
    ranks = {bytes([b]): b for b in range(256)}
    for token in (b"he", b"ll", b"or", b"hell", b" w", b"hello", b" wor"):
        ranks[token] = len(ranks)
    vocabulary, merges = huggingface.tokenizing._from_ranks(ranks)
    assert merges == [("h", "e"), ("l", "l"), ("o", "r"), ("he", "ll"), ("Ġ", "w"), ("hell", "o"), ("Ġw", "or")]
    assert vocabulary["Ġwor"] == 262


@pytest.mark.skipif(
    not (importlib.util.find_spec("tiktoken") and importlib.util.find_spec("whisper")),
    reason="tiktoken or the package with GPT-2's ranks is not installed",
)
def test_the_gpt2_tokenizer_has_our_tokens():
    ours, theirs = GPT2Tokenizer(), huggingface.tokenizer("gpt2")
    for text in [*TEXTS, "don't, naïveté; unbelievableness", "x = [1, 2]\n    return x  # comment"]:
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == 50256


def test_pipelines_of_files_and_folders(tmp_path):
    torch.manual_seed(0)
    causal = CrateGPT(block_size=24, vocab_size=320, n_layer=2, n_head=2, n_embd=16)
    masked = CrateBert(vocab_size=320, max_length=24, dim=16, depth=1, heads=2)
    for name, model in (("text-generation", causal), ("fill-mask", masked)):
        folder = tmp_path / name
        model.save(folder / "model.safetensors", tokenizer="bytes")
        wrapped, tokenizer = huggingface.from_file(folder / "model.safetensors")
        assert len(tokenizer("x" * 99, truncation=True)["input_ids"]) == tokenizer.model_max_length == 24
        wrapped.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        options = dict(max_new_tokens=4, do_sample=False) if name == "text-generation" else dict(top_k=2)
        text = "Hello" if name == "text-generation" else "He<|mask|>lo"
        by_object = pipeline(name, model=wrapped, tokenizer=tokenizer)(text, **options)
        assert pipeline(name, model=str(folder))(text, **options) == by_object
        if name == "text-generation":
            tokens = causal.eval().generate([list(b"Hello")], 4, temperature=0, stop_token=256)[0].tolist()
            assert by_object[0]["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        else:
            idx = torch.tensor([[256, *b"He", 257, *b"lo"]])
            with torch.no_grad():
                best = masked.eval()(idx)[0][0, 3].topk(2).indices.tolist()
            assert [guess["token"] for guess in by_object] == best
    causal.save(tmp_path / "plain.safetensors")
    assert huggingface.from_file(tmp_path / "plain.safetensors")[1] is None


def test_transformers_is_optional():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import crate_kernels.models\n"
        "try:\n    import crate_kernels.models.huggingface\n"
        "except ImportError as error:\n    print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install '.[huggingface]'" in shown
