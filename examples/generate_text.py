"""Train a small causal CRATE on your own text, byte by byte, and let it continue a prompt.

    python examples/generate_text.py BOOK.txt --prompt "It was "

``crate-kernels train-text`` does the same with checkpoints, GPT-2's tokenizer and larger models.
"""

import argparse
import sys
from pathlib import Path

import torch

from crate_kernels.models import CrateGPT
from crate_kernels.models.generation import stream_text
from crate_kernels.models.tokenizers import ByteTokenizer


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--steps", type=int, default=2000, help="the default takes one to two minutes")
    parser.add_argument("--tokens", type=int, default=200, help="bytes to generate")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    tokenizer = ByteTokenizer()
    tokens = torch.tensor(tokenizer.encode(args.text.read_text()))
    model = CrateGPT(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=4, n_head=4, n_embd=96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 200)  # small models need the warm-up
        starts = torch.randint(len(tokens) - 64, (12, 1))
        windows = tokens[starts + torch.arange(65)]
        _, loss = model(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            print(f"step {step + 1}: loss {loss.item():.2f} nats per byte")

    # Generation stores one tensor per layer. Other transformers store a key and a value.
    model.eval()
    text = args.prompt
    print(f"\n{text}", end="")
    for piece in stream_text(model, tokenizer, args.prompt, args.tokens, temperature=0.7, seed=0):
        text += piece
        print(piece, end="")
        sys.stdout.flush()
    print()
    return text


if __name__ == "__main__":
    main()
