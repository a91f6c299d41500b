import subprocess
import sys

import pytest
import torch

from crate_kernels.models import CrateBert, CrateGPT

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

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
    assert wrapped.model is model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(wrapped)
    assert loaded.model.config == model.config
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    idx = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(idx).logits, wrapped(idx).logits)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 16


def test_new_models_have_our_initialisation():
    torch.manual_seed(0)
    config = huggingface.CrateGPTHubConfig(
        block_size=8, vocab_size=300, n_layer=2, n_head=2, n_embd=256, overcomplete=True
    )
    model = AutoModelForCausalLM.from_config(config).model
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
    step = model.step
    model.step = lambda *arguments: calls.append(arguments[0].shape[1]) or step(*arguments)
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
    with pytest.raises(ValueError, match="padding must stand after the text"):
        wrapped(idx, attention_mask=mask.flip(1))


def test_a_classifier_takes_what_a_masked_model_saved(tmp_path):
    pretrained = huggingface.wrap(bert())
    pretrained.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    idx = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(classifier.model.forward_features(idx), pretrained.model.forward_features(idx))
        assert classifier(idx).logits.shape == (2, 4)
    assert classifier.model.pooler.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert classifier.model.classifier.weight.abs().max() < 0.1
    assert not classifier.model.classifier.bias.any()


def test_transformers_is_optional():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import crate_kernels.models\n"
        "try:\n    import crate_kernels.models.huggingface\n"
        "except ImportError as error:\n    print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'crate_kernels[huggingface]'" in shown
