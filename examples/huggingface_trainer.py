"""Train a causal CRATE with the Trainer of Hugging Face, byte by byte, and load what it saved.

    python examples/huggingface_trainer.py BOOK.txt --output runs/trainer

It needs ``pip install '.[huggingface]' accelerate``. ``CrateBertForMaskedLM`` trains in the same way.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from crate_kernels.data.text import python_manual
from crate_kernels.models.huggingface import CrateGPTForCausalLM, CrateGPTHubConfig
from crate_kernels.models.tokenizers import ByteTokenizer

CONTEXT = 64


def windows(text):
    """Consecutive pieces of the text. The model shifts the labels itself."""
    tokens = torch.tensor(ByteTokenizer().encode(text))
    return [
        {"input_ids": piece, "labels": piece} for piece in tokens[: len(tokens) // CONTEXT * CONTEXT].split(CONTEXT)
    ]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, nargs="?", help="a text file; default: the manual that comes with Python")
    parser.add_argument("--output", default="runs/trainer")
    parser.add_argument("--bytes", type=int, help="read only this many bytes of the text")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    pieces = windows((args.text.read_text() if args.text else python_manual())[: args.bytes])
    config = CrateGPTHubConfig(block_size=CONTEXT, vocab_size=257, n_layer=2, n_head=4, n_embd=64)
    trainer = Trainer(
        model=CrateGPTForCausalLM(config),
        args=TrainingArguments(
            args.output, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=4e-3, warmup_steps=20,
            logging_steps=20, report_to=[], save_strategy="no", seed=0,
        ),
        train_dataset=pieces[:-16],
        eval_dataset=pieces[-16:],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    AutoModelForCausalLM.from_pretrained(args.output)
    print(f"{before:.2f} nats per byte before, {after:.2f} after an epoch; the model is in {args.output}")
    return before, after


if __name__ == "__main__":
    main()
