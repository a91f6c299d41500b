"""What the machine code of the CUDA C++ kernels holds: the rows of :mod:`.compile_report` for a built library.

    python -m crate_kernels.bench.compile_report --cuda crate_kernels/_cuda.so [--targets sm_90]

The attention kernels exist for heads of up to 208 tokens and for larger ones. Their shared memory is that of heads of
197 and of 257 tokens (209 where 257 do not fit), and their blocks have as many threads as the larger heads need. The
blocks of LayerNorm have their most threads, which 2048 columns need. Their few bytes of shared memory are left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..ops import cuda_kernels, libraries
from . import machine_code
from .compilation import TARGETS, Launch

TOKENS = {208: (197,), 272: (257, 209)}
"""Most tokens of a build of the attention kernels -> tokens of the head that is reported: the first that fits."""
FORMATS = {"4bf16": "bfloat16", "4fp16": "float16", "f": "float32"}


def rows(library: Path, targets: list[str]) -> list[dict[str, Any]]:
    """One row for each kernel and target of the library, as :func:`.compile_report.compile_case` gives them."""
    opened = libraries.open_library(library, "cuda", cuda_kernels.INTERFACE, cuda_kernels.FUNCTIONS)
    found = []
    for kernel in machine_code.library(library):
        if kernel.target not in targets:
            continue
        name, case, shared = kernel.symbol, "", 0
        if attention := re.search(r"Attention(Forward|Backward)INS_(4[bf]\w16)ELi(\d+)ELi(\d+)E", kernel.symbol):
            direction, kind, width, most = attention.groups()
            for tokens in TOKENS[int(most)]:
                shared = opened.crate_cuda_attention_shared_bytes(int(direction == "Backward"), int(width), tokens)
                if shared <= TARGETS[kernel.target].program_shared * 1024:
                    break
            else:
                continue  # the backend refuses all heads of this build on such a device
            name, case = f"attention_{direction.lower()}", f"{FORMATS[kind]} p={width} N={tokens}"
        elif norm := re.search(r"LayerNorm(Forward|Backward)I(?:NS_)?(4bf16|4fp16|f)(E?)(.)", kernel.symbol):
            direction, kind, _, stream = norm.groups()
            name, case = f"layer_norm_{direction.lower()}", FORMATS[kind]
            if direction == "Forward" and stream == "f":
                case += ", float32 stream"
        elif "reduce_rows" in kernel.symbol:
            name, case = "reduce_rows", "float32"
        launch = Launch(
            kernel.target, name, 0, {}, {}, shared, kernel.threads // 32, kernel.program, kernel.registers, kernel.local
        )
        row: dict[str, Any] = {"target": kernel.target, "case": case, "kernel": name, "num_warps": launch.warps}
        found.append(row | launch.report())
    order = list(TARGETS)
    return sorted(found, key=lambda row: (order.index(row["target"]), row["kernel"], row["case"]))


def version(library: Path) -> dict[str, str]:
    """The compiler that the library's record names; its counts hold for that version."""
    record = json.loads((library.parent / "_build.json").read_text())["cuda"]
    return {"nvcc": record["compiler"].rpartition("nvcc ")[2]}
