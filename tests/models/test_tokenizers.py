import importlib.util
import sys

import pytest

from crate_kernels.models import tokenizers
from crate_kernels.models.tokenizers import ByteTokenizer, GPT2Tokenizer, create_tokenizer, word_starts

needs_gpt2 = pytest.mark.skipif(
    not (importlib.util.find_spec("tiktoken") and importlib.util.find_spec("whisper")),
    reason="tiktoken or the package with GPT-2's ranks is not installed",
)
TEXTS = ["", "Hello world, it's 2024!", "  spaces\n\n\ttabs ", "naïve Ελληνικά 漢字 𝄞", "<|endoftext|>", "a" * 300]


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_texts_come_back(name):
    tokenizer = create_tokenizer(name)
    assert tokenizer.name == name
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert all(0 <= token < tokenizer.end_of_text for token in tokens)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.to_bytes(tokens) == text.encode()
    assert tokenizer.decode([tokenizer.end_of_text, tokenizer.vocab_size + 5]) == ""


@needs_gpt2
def test_gpt2_tokens_are_the_published_ones():
    tokenizer = GPT2Tokenizer()
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("The quick brown fox jumps over the lazy dog") == [
        464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290,
    ]  # fmt: skip
    assert tokenizer.encode("don't") == [9099, 470]


def test_half_a_character_is_marked():
    assert ByteTokenizer().decode("é".encode()[:1]) == "\ufffd"


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_word_starts(name):
    tokenizer = create_tokenizer(name)
    starts = word_starts(tokenizer)
    assert starts.shape == (tokenizer.vocab_size,)
    assert starts[tokenizer.end_of_text]
    tokens = tokenizer.encode(" unbelievableness don't, naïveté")
    words, current = [], []
    for token in tokens:
        if starts[token] and current:
            words.append(tokenizer.decode(current))
            current = []
        current.append(token)
    words.append(tokenizer.decode(current))
    assert words == [" unbelievableness", " don't", ",", " naïveté"]


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="known are bytes, gpt2"):
        create_tokenizer("words")
    monkeypatch.setattr(tokenizers, "GPT2_RANKS", (("no_such_package_here", "ranks"),))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps openai-whisper"):
        tokenizers.find_gpt2_ranks()
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[gpt2-tokenizer\]'"):
        GPT2Tokenizer()


@needs_gpt2
def test_another_file_is_refused(tmp_path):
    (tmp_path / "ranks").write_text("IQ== 0\n")
    with pytest.raises(ValueError, match="holds 1 ranks"):
        GPT2Tokenizer(tmp_path / "ranks")
