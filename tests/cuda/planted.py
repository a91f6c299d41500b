"""Runs one head in a build of the emulator with a planted fault: ``python -m tests.cuda.planted MODULE IN OUT``.

It is a separate process, because Python would confuse a second module of the same name with the first.
"""

import os
import sys
from pathlib import Path

import torch

from . import emulator

VARIABLE = "CRATE_PLANTED_FAULT"
"""The environment variable that names the active fault."""

BARRIER = "if (step == 0) continue;\n            sync_block();"
NO_BARRIER = BARRIER.replace("sync_block", "if (!HERE) sync_block")
FAULTS = {
    "no barrier": ("attention_forward.cuh", BARRIER, NO_BARRIER),
    "no barrier in the backward": ("attention_backward.cuh", BARRIER, NO_BARRIER),
    "too little shared memory": (
        "attention_forward.cuh",
        "rows_bytes(n) + 2 * exchange_bytes",
        "rows_bytes(n) + (HERE ? 1 : 2) * exchange_bytes",
    ),
    "wrong fragment index": (
        "warp_tile.cuh",
        "a[1] = pack<T>(c[0][2], c[0][3]);",
        "a[1] = HERE ? pack<T>(c[0][3], c[0][2]) : pack<T>(c[0][2], c[0][3]);",
    ),
}
"""Name -> the file, the text to replace, and its replacement. ``HERE`` is true if this fault is active."""

CHOICE = f"""#pragma once
#include <cstdlib>
#include <cstring>
inline bool planted(const char* fault) {{
    const char* chosen = std::getenv("{VARIABLE}");
    return chosen && !std::strcmp(chosen, fault);
}}
"""


def plant(sources: Path) -> None:
    """Plant all faults in a copy of the sources. A fault is active while the environment variable names it."""
    headers = sources / "include" / "crate"
    choice = headers / "dispatch.h", "#pragma once\n", CHOICE
    faults = [(headers / f, old, new.replace("HERE", f'planted("{n}")')) for n, (f, old, new) in FAULTS.items()]
    for path, old, new in [choice, *faults]:
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))


def run(kernels: emulator.Kernels, w, grad, o, lse) -> dict:
    """The result of each call, or the machine's error."""
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
    kernels, tensors, results = emulator.Kernels(emulator.load(sys.argv[1])), torch.load(sys.argv[2]), {}
    for fault in ("none", *FAULTS):
        os.environ[VARIABLE] = fault
        results[fault] = run(kernels, *tensors)
    torch.save(results, sys.argv[3])
