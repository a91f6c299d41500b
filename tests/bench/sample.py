"""A small pair of result files in the format of the suites. Their ratios can be computed by hand."""

ENVIRONMENT = {
    "versions": {"crate_kernels": "0", "python": "3", "torch": "2.11.0"},
    "commit": "abc",
    "threads": 2,
    "device": "A processor",
    "capability": "cpu",
}
PEAKS = {"copy": 1e10, "product": {"float32": 1e11}, "exponentials": 1e9}


def spread(middle, noise=0.02):
    return {"p20": middle * (1 - noise), "p50": middle, "p80": middle * (1 + noise)}


def operator(implementation, seconds, *, name="subspace_attention", tokens=197, dim=128, direction="both", **more):
    shape = dict(batch=2, tokens=tokens, heads=2, width=dim // 2, causal=False, dim=dim)
    return {
        "operator": name, "family": "CRATE-B/16", "shape": shape, "dtype": "float32", "implementation": implementation,
        "direction": direction, "seconds": spread(seconds), "rounds": 9, "speedup": spread(0.01 / seconds),
        "tflops": 0.05, "gbytes_per_second": 3.0, "cost": {"flops": 5e8, "bytes": 3e7, "exponentials": 1e5},
        "bound": 0.005, "limited_by": "product", "percent_of_bound": 100 * 0.005 / seconds, "peak_memory": None,
        "graph": False, "cold_cache": False, "share_of_budget": 0.5, "check": "output",
    } | more  # fmt: skip


def model(implementation, seconds, task="forward"):
    return {
        "model": "CRATE-T", "family": "vision", "shape": {"dim": 384}, "dtype": "float32", "task": task, "batch": 8,
        "implementation": implementation, "seconds": spread(seconds), "rounds": 9, "images_per_second": 8 / seconds,
        "speedup": spread(0.9 / seconds), "speedup_over_compiled": spread(0.8 / seconds), "peak_memory": None,
        "graph": False, "check": "output",
    }  # fmt: skip


def operators():
    records = [
        operator("reference", 0.010),
        operator("eager", 0.008),
        operator("sdpa flash", 0.006),
        {"operator": "subspace_attention", "family": "CRATE-B/16", "shape": operator("x", 1)["shape"],
         "dtype": "float32", "implementation": "cuda", "skipped": "no kernel yet"},
    ]  # fmt: skip
    return {"format": 1, "part": "operators", "environment": ENVIRONMENT, "peaks": PEAKS, "records": records}


def models():
    saved = [
        {"model": "CRATE-T", "family": "vision", "shape": {"dim": 384}, "dtype": "float32", "batch": 8,
         "task": "saved for backward", "implementation": implementation, "bytes_per_token_channel": each}
        for implementation, each in (("reference", 48.4), ("crate_kernels", 16.1))
    ]  # fmt: skip
    timed = [model(*pair, task=task) for task in ("forward", "training step") for pair in
             (("reference", 0.9), ("reference compiled", 0.8), ("crate_kernels", 0.6), ("timm ViT", 1.5))]  # fmt: skip
    timed.append(model("crate_kernels prepared", 0.5))
    return {"format": 1, "part": "models", "environment": ENVIRONMENT, "peaks": PEAKS, "records": saved + timed}
