"""Runs one head through a build of the emulator with a planted fault: ``python -m tests.cuda.planted MODULE IN OUT``.

In a process of its own, because Python would take a second module of the same name for the first.
"""

import sys

import torch

from . import emulator


def run(kernels: emulator.Kernels, w, grad, o, lse) -> dict:
    """What each call returned, or the machine's error."""
    calls = {
        "forward": lambda: kernels.attention(w)[0],
        "backward": lambda: kernels.attention_backward(grad, w, o, lse)[0],
        "shuffled": lambda: [kernels.attention(w, shuffle_seed=s, check_races=False)[0] for s in range(1, 5)],
    }
    results = {}
    for name, call in calls.items():
        try:
            results[name] = call()
        except kernels.module.SimtError as error:
            results[name] = str(error)
    return results


if __name__ == "__main__":
    torch.save(run(emulator.Kernels(emulator.load(sys.argv[1])), *torch.load(sys.argv[2])), sys.argv[3])
