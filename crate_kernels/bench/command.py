"""Measure the operators and models, compare two runs, or render what was measured."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from . import cost, peaks, results

ROOT = Path(__file__).parents[2]
"""The checkout: results and reports live beside the package, in ``benchmarks/`` and ``docs/``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def option(name: str, text: str, **settings) -> None:
        parser.add_argument(name, help=text, **settings)

    option("--suite", "what to measure", choices=(*results.PARTS, "all"), default="all")
    option("--device", "cpu or cuda; CUDA if there is one")
    option("--dtype", "float32, bfloat16 or float16; bfloat16 on CUDA, float32 on the CPU")
    option("--operators", "only these operators, comma-separated")
    option("--sizes", "model sizes, comma-separated: tiny,small,base,large")
    option("--batches", "batch sizes of the models, comma-separated")
    option("--contenders", "only these contenders, comma-separated: reference,eager,triton,cuda,crate_kernels,...")
    option("--threads", "CPU threads", type=int)
    option("--seconds", "aim of seconds for each interleaved measurement", type=float)
    option("--rounds", "least number of rounds of each measurement", type=int)
    option("--limit", "stop after so many seconds and keep what is measured", type=float)
    option("--quick", "tiny shapes and few rounds: tries the path, measures nothing", action="store_true")
    option("--check-only", "run the correctness gate alone, time nothing, write nothing", action="store_true")
    option("--commit", "commit to record where the package is no git checkout")
    option("--results", "folder of the result files", type=Path, default=ROOT / "benchmarks" / "results")
    option("--report", "render docs/benchmarks.md, its plots and the README's table", action="store_true")
    option("--dispatch", "write the table that the automatic backend choice may follow", action="store_true")
    option("--compare", "list what became slower", nargs=2, type=Path, metavar=("OLD", "NEW"))
    option("--relative", "with --compare: compare speed-ups instead of seconds", action="store_true")


def run(args: argparse.Namespace) -> int:
    if args.compare:
        return compare(*args.compare, args.relative)
    if args.report or args.dispatch:
        if args.report:
            from . import report

            for path in report.render(args.results, ROOT):
                print(f"wrote {path}")
        if args.dispatch:
            from . import dispatch

            print(f"wrote {dispatch.write(args.results, ROOT)}")
        return 0
    return measure(args)


def compare(old: Path, new: Path, relative: bool) -> int:
    """Print what became slower beyond the noise; the exit code is 1 if anything did."""
    found = results.slower(results.read(old)["records"], results.read(new)["records"], relative=relative)
    for entry in found:
        operator, family, batch, shape, *rest = results.key(entry["record"])
        print(f"{entry['ratio']:6.2f}x slower  {operator} {family} {' '.join(map(str, rest))} batch {batch} {shape}")
    print(f"{len(found)} became slower beyond the noise")
    return 1 if found else 0


def measure(args: argparse.Namespace) -> int:
    """Run the suites; the exit code is 1 if the gate refused one of the package's own backends."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("--device cuda: torch sees no CUDA device")
        device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype: expected float32, bfloat16 or float16, got {args.dtype!r}")
    deadline = time.monotonic() + (args.limit or float("inf"))
    folder = args.results / results.device_folder(device)
    environment = results.environment(device, args.commit)
    about = f"{environment['device']}, torch {torch.__version__}, {environment['threads']} threads"
    print(f"{about}, commit {environment['commit']}")
    ceilings = None
    if not args.check_only:
        ceilings = peaks.ceilings(device, [dtype], args.quick)
        copy, (product,) = ceilings["copy"] / 1e9, ceilings["product"].values()
        print(f"ceilings: copy {copy:.4g} GB/s, product {product / 1e12:.4g} TFLOP/s {dtype}")
        if device.type == "cpu" and environment["load_average"] > 1:
            print(f"this machine is busy (load {environment['load_average']:.1f}): trust ratios, not seconds")
    wrong = []
    for part in results.PARTS if args.suite == "all" else [args.suite]:
        records: list[dict] = []
        content = dict(part=part, environment=environment, ceilings=ceilings, quick=args.quick, records=records)
        stream = _operators(args, device, dtype, ceilings) if part == "operators" else _models(args, device, dtype)
        for record in stream:
            records.append(record)
            print(line(record), flush=True)
            if record.get("refused") and not record["contender"].startswith(("sdpa", "reference compiled", "timm")):
                wrong.append(record)
            if not args.check_only:
                results.write(folder / f"{part}.json", content)
            if time.monotonic() > deadline:
                print(f"{part}: stopped at the limit of {args.limit:g} s; what was measured is kept")
                break
    for record in wrong:
        print(f"WRONG, not timed: {line(record)}", file=sys.stderr)
    return 1 if wrong else 0


def _listed(text: str | None) -> list[str] | None:
    return [word.strip() for word in text.split(",") if word.strip()] if text else None


def _operators(args, device, dtype, ceilings) -> Iterable[dict]:
    from . import cases, operators

    wanted = _listed(args.operators) or list(cases.OPERATORS)
    unknown = set(wanted) - set(cases.OPERATORS)
    if unknown:
        raise ValueError(f"--operators: unknown {', '.join(sorted(unknown))}; known are {', '.join(cases.OPERATORS)}")
    roof = None
    if ceilings:
        roof = cost.Ceilings(ceilings["copy"], next(iter(ceilings["product"].values())), ceilings["exponentials"])
    seconds = args.seconds or (0.05 if args.quick else 1.0 if device.type == "cpu" else 0.3)
    least = args.rounds or (3 if args.quick else 7)
    for case in cases.cases(device, args.quick):
        if case.operator not in wanted:
            continue
        try:
            yield from operators.run_case(
                case, device, dtype, roof, only=_listed(args.contenders), seconds=seconds,
                rounds=(least, max(least, 5 if args.quick else 60)), check_only=args.check_only,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            about = dict(operator=case.operator, family=case.family, shape=case.shape(), contender="all")
            yield about | {"skipped": "the device has no room for the float64 oracle"}


def _models(args, device, dtype) -> Iterable[dict]:
    from . import models

    on_gpu = device.type == "cuda"
    sizes = ["tiny"] if args.quick else _listed(args.sizes) or (["base", "small", "tiny"])
    unknown = set(sizes) - set(models.SIZES)
    if unknown:
        raise ValueError(f"--sizes: unknown {', '.join(sorted(unknown))}; known are {', '.join(models.SIZES)}")
    default = "1,2" if args.quick else "1,64,256,1024" if on_gpu else "1,8"
    batches = [int(b) for b in _listed(args.batches or default)]
    seconds = args.seconds or (0.1 if args.quick else 2.0 if on_gpu else 20.0)
    least = args.rounds or (3 if args.quick else 7)
    for size in sizes:
        yield from models.run_size(
            size, device, dtype, batches=batches, only=_listed(args.contenders), seconds=seconds,
            rounds=(least, max(least, 5 if args.quick else 40)), quick=args.quick, check_only=args.check_only,
        )  # fmt: skip


def line(record: dict) -> str:
    """One record for the terminal."""
    if "operator" in record:
        shape = record["shape"]
        what = f"{record['operator']} {record['family']} B{shape['batch']} N{shape['tokens']}"
        what += " causal" if shape["causal"] else ""
    else:
        what = f"{record['model']} batch {record['batch']}"
    what += f" · {record.get('direction') or record.get('task') or 'check'} · {record['contender']}"
    what += " (graph)" if record.get("graph") else ""
    for reason in ("refused", "skipped"):
        if reason in record:
            return f"{what}: {reason}: {record[reason]}"
    if "bytes_per_token_channel" in record:
        return f"{what}: {record['bytes_per_token_channel']:.1f} bytes per token-channel and block"
    if "tokens" in record:
        peak = record["peak_memory"]
        return f"{what} N{record['tokens']}: " + ("not counted" if peak is None else f"{peak / 2**30:.2f} GiB")
    if "seconds" not in record:
        return f"{what}: {record['check']} ({100 * record['share_of_budget']:.0f} % of the budget)"
    text = f"{what}: {record['seconds']['p50'] * 1e3:.4g} ms"
    if record.get("speedup"):
        text += f", {record['speedup']['p50']:.2f}x"
    if "percent_of_bound" in record:
        text += f", {record['percent_of_bound']:.0f} % of bound"
    return text
