"""Runs every kernel of one build of the emulator and saves what it wrote: ``python sanitized.py MODULE OUT.npz``.

Without torch, so that the process can run under a preloaded AddressSanitizer.
"""

import importlib.util
import sys

import numpy as np

WIDTHS = (16, 80, 128)
"""The narrowest head, the widest, and one that is no power of two: all widths are instances of the same templates."""


def bfloat16(values):
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)


def run(module) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    out = {}
    for width in WIDTHS:
        for tokens in (1, 65, 197, 257):
            shape, causal = (1, tokens, 1, width), tokens == 65
            lengths = np.array([tokens - tokens // 3], np.int32) if tokens == 197 else None
            spread = 4 if tokens == 257 else 1  # online softmax
            w, grad = bfloat16(spread * draw.standard_normal(shape)), bfloat16(draw.standard_normal(shape))
            o, dw = np.zeros(shape, np.int16), np.zeros(shape, np.int16)
            lse = np.zeros((1, 1, tokens), np.float32)
            options = module.Options(shuffle_seed=3)
            module.attention_forward("bfloat16", w, o, lse, lengths, width**-0.5, causal, options)
            module.attention_backward("bfloat16", w, grad, o, lse, dw, lengths, width**-0.5, causal, options)
            out |= {f"o-{width}-{tokens}": o, f"lse-{width}-{tokens}": lse, f"dw-{width}-{tokens}": dw}
    for rows, columns in ((1, 8), (9, 200), (6, 2048)):
        z, grad, forward = (bfloat16(draw.standard_normal((rows, columns))) for _ in range(3))
        weight, bias = draw.standard_normal((2, columns)).astype(np.float32)
        x, gated, dz = np.zeros((3, rows, columns), np.int16)
        mean, rstd = np.zeros((2, rows), np.float32)
        partial, sums = np.zeros((2, 3, columns), np.float32), np.zeros(3 * columns, np.float32)
        module.layer_norm_forward("bfloat16", z, weight, bias, x, None, mean, rstd, grad, forward, gated, None, 1e-5, 2)
        module.layer_norm_backward("bfloat16", gated, z, mean, rstd, weight, grad, dz, partial)
        module.reduce_rows(partial.reshape(2, -1), sums)
        results = {"x": x, "g": gated, "dz": dz, "sums": sums}
        z, grad, forward = draw.standard_normal((3, rows, columns)).astype(np.float32)
        x, gated = np.zeros((2, rows, columns), np.int16)
        x_wide, gated_wide, dz = np.zeros((3, rows, columns), np.float32)
        wide = x, x_wide, mean, rstd, grad, forward, gated, gated_wide
        module.layer_norm_forward("bfloat16", z, weight, bias, *wide, 1e-5, 2)
        module.layer_norm_backward("bfloat16", gated_wide, z, mean, rstd, weight, grad, dz, partial)
        results |= {"x wide": x_wide, "g wide": gated_wide, "dz wide": dz}
        out |= {f"{name}-{columns}": value.copy() for name, value in results.items()}
    return out


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("crate_simt", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    np.savez(sys.argv[2], **run(module))
