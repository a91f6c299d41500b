"""Training of the language models on a text file: causal (CRATE-GPT2, overcomplete CRATE-LM) or masked (CRATE-BERT).

Without options it trains a small causal model on the Python manual that comes with Python. The text of a
step depends only on the seed and the number of the step, so a resumed run ends with the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.text import Corpus, open_corpus
from ..data.text_shards import Manifest, is_prepared
from ..distributed import launch
from ..models import CrateBert, CrateGPT, CrateModel
from ..models.bert import mask_tokens
from ..models.checkpoint import write_atomically
from ..models.generation import stream_text
from ..models.gpt import IGNORED_TARGET
from ..models.tokenizers import TOKENIZERS, word_starts
from ..options import option
from ..terminal import printable
from ..version import __version__
from . import command
from .config import EngineOptions
from .engine import Engine, Meter
from .progress import Report, clock

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    # Only one token in seven is predicted. With fewer texts per step the model learns nothing but token frequencies.
    "bert": dict(dim=128, batch_size=32, warmup_steps=100, steps=2000),
}
"""Model -> what differs from the defaults of :class:`TextConfig`."""


CAUSAL = ("with --model gpt2 or lm", lambda s: s.model != "bert")


@dataclass
class TextConfig(EngineOptions):
    """The options of ``train-text``. Two runs with equal ``fixed()`` values on one machine end with equal weights."""

    text: str | None = option(None, "a UTF-8 text file or a folder of prepare-text; default: the Python manual", "data")
    tokenizer: str = option("bytes", "bytes, or GPT-2's byte pairs", "data", choices=TOKENIZERS)
    whole_words: bool = option(
        False, "hide whole words, not tokens", "data", only=("with --model bert", lambda s: s.model == "bert")
    )

    model: str = option("gpt2", "gpt2, lm (overcomplete), or bert (masked)", "model", choices=("gpt2", "lm", "bert"))
    context: int = option(64, "tokens the model sees", "model", least=8, most=1 << 20)
    dim: int = option(192, "width of the tokens", "model", least=1, most=1 << 16)
    depth: int = option(4, "number of layers", "model", least=1, most=1000)
    heads: int = option(4, "number of attention heads", "model", least=1)
    dropout: float = option(0.0, "dropout", "model", least=0, most=0.99)

    steps: int = option(6000, "optimizer steps", "optimization", least=1)
    batch_size: int = option(
        12, "texts in one batch, over all ranks; --accumulate batches make one step", "optimization", least=1
    )
    accumulate: int = option(1, "batches whose gradients make one optimizer step", "optimization", least=1)
    learning_rate: float = option(2e-3, "after the warm-up; falls to a tenth along a cosine", "optimization", above=0)
    warmup_steps: int = option(500, "steps of linear warm-up", "optimization", least=0)
    weight_decay: float = option(0.1, "of matrices, not of biases and norms", "optimization", least=0)
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 does not clip", "optimization", least=0)
    seed: int = option(0, "of weights, texts and masks", "optimization", least=0, most=2**32 - 1)

    evaluate_steps: int = option(1000, "steps between two evaluations on the validation text", "output", least=1)
    prompt: str = option("The ", "what the sample at the end begins with", "output", only=CAUSAL)
    sample_tokens: int = option(400, "tokens of the sample at the end", "output", least=0, most=1 << 20, only=CAUSAL)
    temperature: float = option(
        0.7, "of the sample at the end; 0 takes the likeliest token", "output", least=0, only=CAUSAL
    )
    top_p: float = option(
        0.95, "the sample draws from the likeliest tokens that together reach this probability", "output", above=0,
        most=1, only=CAUSAL,
    )  # fmt: skip

    free: ClassVar[tuple[str, ...]] = (
        *EngineOptions.free, "evaluate_steps", "prompt", "sample_tokens", "temperature", "top_p",
    )  # fmt: skip

    def check(self, given: Iterable[str] = ()) -> None:
        super().check(given)
        if self.dim % self.heads:
            raise ValueError(f"--heads {self.heads} does not divide --dim {self.dim}")

    def default_output(self) -> str:
        return f"runs/text-{self.model}"


# -- tasks -------------------------------------------------------------------------------------------------------------


def batch_seed(seed: int, number: int) -> int:
    """The seed of batch ``number`` in a run with ``seed``."""
    return seed * 1_000_003 + number


class Task:
    """A task of a language model. Batches are arguments of the model's forward, with ``targets``."""

    def __init__(self, settings: TextConfig, corpus: Corpus):
        self.settings, self.corpus = settings, corpus

    def batch(self, number: int, rows: slice) -> tuple[dict[str, Tensor], float]:
        """The ``rows`` of batch ``number``, and the weight of their mean loss among the means of all ranks' rows.

        A loss is a mean over the target tokens, and their number may differ between ranks. The mean of the weights
        is 1.
        """
        raise NotImplementedError

    def generator(self, number: int) -> torch.Generator:
        """The random generator of batch ``number``, the same on all ranks."""
        return torch.Generator().manual_seed(batch_seed(self.settings.seed, number))

    def validation(self) -> Iterator[dict[str, Tensor]]:
        raise NotImplementedError

    def build_model(self) -> CrateModel:
        raise NotImplementedError

    def sample(self, model: CrateModel) -> Iterator[str]:
        """Sample text that shows the quality of the model, piece by piece."""
        raise NotImplementedError


class NextToken(Task):
    """Predict each token from those before it."""

    def build_model(self) -> CrateGPT:
        s = self.settings
        return CrateGPT(
            block_size=s.context, vocab_size=self.corpus.vocab_size, n_layer=s.depth, n_head=s.heads, n_embd=s.dim,
            dropout=s.dropout, overcomplete=s.model == "lm",
        )  # fmt: skip

    def batch(self, number: int, rows: slice) -> tuple[dict[str, Tensor], float]:
        s, generator = self.settings, self.generator(number)
        # The last token of a window is only a target; the next window begins with it.
        windows = self.corpus.windows(number, rows, s.batch_size, s.context + 1, s.context, generator)
        return self._asked(windows), 1.0

    def validation(self) -> Iterator[dict[str, Tensor]]:
        windows = self.corpus.validation_windows(self.settings.context + 1)
        return map(self._asked, windows.split(self.settings.batch_size))

    @staticmethod
    def _asked(windows: Tensor) -> dict[str, Tensor]:
        return {"idx": windows[:, :-1], "targets": windows[:, 1:]}

    def sample(self, model: Any) -> Iterator[str]:
        s = self.settings
        yield s.prompt
        options = dict(temperature=s.temperature, top_p=s.top_p, seed=s.seed)
        yield from stream_text(model, self.corpus.tokenizer, s.prompt, s.sample_tokens, **options)


class MaskedToken(Task):
    """Predict masked tokens from all others. Texts begin with the end-of-text token and have different lengths."""

    def __init__(self, settings: TextConfig, corpus: Corpus):
        super().__init__(settings, corpus)
        self.starts = word_starts(corpus.tokenizer) if settings.whole_words else None

    def build_model(self) -> CrateBert:
        s = self.settings
        return CrateBert(
            vocab_size=self.corpus.vocab_size, max_length=s.context, dim=s.dim, depth=s.depth, heads=s.heads,
            dropout=s.dropout, emb_dropout=s.dropout,
        )  # fmt: skip

    def batch(self, number: int, rows: slice) -> tuple[dict[str, Tensor], float]:
        s, generator = self.settings, self.generator(number)
        lengths = torch.randint(s.context // 2, s.context + 1, (s.batch_size,), generator=generator)
        # Of all rows: the weight needs the number of hidden tokens in the whole batch.
        windows = self.corpus.windows(number, slice(None), s.batch_size, s.context - 1, s.context - 1, generator)
        batch = self._asked(windows, lengths, generator)
        asked = (batch["targets"] != IGNORED_TARGET).sum(dim=1)
        mine = {name: value[rows] for name, value in batch.items()}
        return mine, int(asked[rows].sum()) * len(asked) / (len(mine["idx"]) * int(asked.sum()))

    def validation(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for windows in self.corpus.validation_windows(self.settings.context - 1).split(self.settings.batch_size):
            lengths = torch.full((len(windows),), self.settings.context)
            yield self._asked(windows, lengths, generator)

    def _asked(self, windows: Tensor, lengths: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        first = self.corpus.tokenizer.end_of_text
        tokens = torch.nn.functional.pad(windows, (1, 0), value=first)
        tokens = tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], first)
        idx, targets = mask_tokens(
            tokens, lengths, mask_token=self.corpus.mask_token, vocab_size=self.corpus.tokenizer.vocab_size,
            protected=(first,), word_starts=self.starts, generator=generator,
        )  # fmt: skip
        return {"idx": idx, "lengths": lengths, "targets": targets}

    @torch.no_grad()
    def sample(self, model: Any) -> Iterator[str]:
        """A validation text with the predictions for masked tokens: ``[right]``, or ``[wrong|true]``."""
        batch = next(iter(self.validation()))
        idx, targets = batch["idx"][:2], batch["targets"][:2]
        device = model.token_embedding.weight.device
        logits, _ = model(idx.to(device), batch["lengths"][:2].to(device))
        decode = self.corpus.tokenizer.decode
        for tokens, guesses, truths in zip(idx.tolist(), logits.argmax(-1).tolist(), targets.tolist(), strict=True):
            for token, guess, truth in zip(tokens, guesses, truths, strict=True):
                if truth == IGNORED_TARGET:
                    yield decode([token])
                else:
                    yield f"[{decode([guess])}]" if guess == truth else f"[{decode([guess])}|{decode([truth])}]"
            yield "\n\n"


TASKS: dict[str, type[Task]] = {"gpt2": NextToken, "lm": NextToken, "bert": MaskedToken}


# -- loop --------------------------------------------------------------------------------------------------------------


class TextTrainer(Engine):
    """A language model in training.

    Args:
        settings, output, device: see :class:`~crate_kernels.training.engine.Engine`.
        corpus: the training text; the one that ``settings.text`` names if None.
    """

    command, options, unit = "train-text", TextConfig, "tokens"
    settings: TextConfig

    def __init__(self, settings: TextConfig, output: Path, device: torch.device, corpus: Corpus | None = None):
        super().__init__(settings, output, device)
        if corpus is None:
            corpus = open_corpus(settings.text, settings.tokenizer, settings.context, settings.seed)
        self.corpus = corpus
        self.task = TASKS[settings.model](settings, corpus)
        self.steps = settings.steps
        self.meter = Meter(device)
        torch.manual_seed(settings.seed)
        self.model = self.task.build_model().to(device)

    @classmethod
    def resolve(cls, options: dict[str, Any]) -> TextConfig:
        shards = Path(options["text"]) if options.get("text") is not None else None
        made_with = {"tokenizer": Manifest.read(shards).tokenizer} if shards is not None and is_prepared(shards) else {}
        settings = TextConfig(**MODEL_DEFAULTS.get(str(options.get("model")), {}) | made_with | options)
        settings.check(options)
        settings.name_output()
        return settings

    @classmethod
    def variants(cls) -> dict[str, TextConfig]:
        return {"": cls.resolve({})} | {name: cls.resolve({"model": name}) for name in MODEL_DEFAULTS}

    def metadata(self) -> dict[str, Any]:
        found = {"tokenizer": self.settings.tokenizer, "mask_token": self.corpus.mask_token}
        return found | ({} if self.settings.text is None else {"text": self.settings.text})

    def make_optimizer(self) -> torch.optim.Optimizer:
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        decay = self.settings.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.95))

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        s = self.settings
        warmup = min(s.warmup_steps, s.steps // 5)
        if self.step < warmup:
            return s.learning_rate * (self.step + 1) / warmup
        done = (self.step - warmup) / max(1, s.steps - warmup)
        return s.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def per_step(self) -> int:
        return super().per_step() * self.settings.context

    def batches(self, start: int) -> Iterator[tuple[dict[str, Tensor], float]]:
        """This rank's part of every batch, and the weight of its mean; see :meth:`Task.batch`."""
        rows = launch.share(self.settings.batch_size)
        for number in range(start, self.steps * self.settings.accumulate):
            batch, weight = self.task.batch(number, rows)
            yield self.on_device(batch), weight

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def part(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's texts of a batch, on its device."""
        mine = launch.share(len(batch["idx"]))
        return self.on_device({name: value[mine] for name, value in batch.items()})

    def loss(self, batch: tuple[dict[str, Tensor], float], number: int) -> Tensor:
        inputs, weight = batch
        self.seed_dropout(batch_seed(self.settings.seed, number))
        with self.autocast():
            _, loss = self.network(**inputs)
        loss = loss * weight
        self.meter.add(1, loss)
        return loss

    def evaluate_if_due(self, report: Report) -> bool:
        if self.step % self.settings.evaluate_steps or self.step == self.steps:
            return False
        metrics = self.evaluate()
        self.log.write(step=self.step, **{f"validation_{name}": value for name, value in metrics.items()})
        report.line(f"step {self.step}: {self.judgment(metrics)}")
        return False

    def probe_inputs(self, count: int) -> tuple[Tensor, dict[str, Any]]:
        return next(iter(self.task.validation()))["idx"][:count].to(self.device), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss in nats per target token, and the accuracy, on the validation text."""
        self.model.eval()
        meter = Meter(self.device, ("loss", "accuracy"))
        for batch in self.task.validation():
            batch = self.part(batch)
            targets = batch["targets"]
            with self.autocast():
                logits, mean = self.model(**batch)
            asked = targets != IGNORED_TARGET
            if count := int(asked.sum()):  # without target tokens there is no mean
                meter.add(count, mean.double() * count, (logits.argmax(-1) == targets)[asked].sum())
        return meter.read()

    def baseline(self) -> dict[str, float]:
        """The same metrics for a model that predicts the token frequencies of the training text."""
        frequency = self.corpus.counts().double() + 1
        log_probability = (frequency / frequency.sum()).log()
        targets = torch.cat([batch["targets"].flatten() for batch in self.task.validation()])
        targets = targets[targets != IGNORED_TARGET]
        return {
            "loss": -log_probability[targets].mean().item(),
            "accuracy": (targets == frequency.argmax()).double().mean().item(),
        }

    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def describe(self) -> str:
        corpus, parameters = self.corpus, sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.settings.text or 'the Python manual'}: {corpus.training_tokens:,} training and "
            f"{corpus.validation_tokens:,} validation tokens ({self.settings.tokenizer}); {parameters:,} parameters, "
            f"{self.precision} on {self.device} ({self.precision_reason})"
        )

    def judgment(self, metrics: dict[str, float]) -> str:
        bits = metrics["loss"] / math.log(2) / self.corpus.bytes_per_token
        return (
            f"validation loss {metrics['loss']:.4f} nats per token ({bits:.3f} bits per byte), "
            f"{100 * metrics['accuracy']:.2f} % of tokens right"
        )

    def next_steps(self) -> dict[str, str]:
        folder = shlex.quote(str(self.output))
        return super().next_steps() | {
            f"crate-kernels analyze {folder}": "coding rate and sparsity of every half-step",
            "crate-kernels train-text --text FILE": "a text of your own",
        }

    def finish(self, report: Report, began: float) -> None:
        """Evaluate the model beside a model of token frequencies, write a sample, and save the model."""
        settings, output, metrics = self.settings, self.output, self.evaluate()
        model = self.plain(self.model)
        if model is None:
            return
        path = output / "model.safetensors"
        model.save(path, **self.metadata())
        baseline = self.baseline()
        report.line(self.judgment(metrics))
        report.line(
            f"token frequencies alone: {baseline['loss']:.4f} nats per token, {100 * baseline['accuracy']:.2f} % right"
        )
        sample = printable("".join(self.task.sample(model.eval())))
        report.line(f"\n{sample}\n")
        write_atomically(output / "sample.txt", (sample + "\n").encode())
        pictures = self.plot_probe()
        summary = {
            "validation": metrics,
            "token_frequencies": baseline,
            "bytes_per_token": self.corpus.bytes_per_token,
            "training_seconds": self.seconds,
            "precision": self.precision,
            "precision_reason": self.precision_reason,
            "device": str(self.device),
            "ranks": launch.size(),
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "config": dataclasses.asdict(settings),
            "versions": {"crate_kernels": __version__, "torch": torch.__version__},
            "total_seconds": time.monotonic() - began,
        }
        self.write_summary(summary)
        report.line(
            f"{clock(time.monotonic() - began)} in all; {', '.join(map(str, ['model ' + str(path), *pictures]))}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of :class:`TextConfig`, and ``--resume``."""
    parser.epilog = "Without options: the Python manual that comes with Python, in a few minutes on two cores."
    command.add_arguments(parser, TextTrainer)


def run(args: argparse.Namespace) -> int:
    """Train as the command line says; ends with the metrics on the validation text and a sample."""
    return command.run(args, TextTrainer)
