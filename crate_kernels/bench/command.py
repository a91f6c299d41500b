"""Measure the operators and models, compare two runs, or render the results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import options
from ..options import option
from ..terminal import count
from . import cost, peaks, results

DTYPES = ("float32", "bfloat16", "float16")
FOREIGN = ("sdpa", "reference compiled", "timm", "ONNX Runtime", "OpenVINO")
"""Baselines. A wrong result of a baseline is listed as refused, and the run still succeeds."""
OF_OPERATORS = ("with --suite operators or all", lambda s: s.suite != "models")
OF_MODELS = ("with --suite models or all", lambda s: s.suite != "operators")
RENDERING = {"results", "report", "dispatch", "relative", "predict", "target"}
"""Options that do not measure."""
SIZED = ("with --suite models or all, and without --quick", lambda s: s.suite != "operators" and not s.quick)


@dataclass
class Settings:
    """The options of ``bench``."""

    suite: str = option(
        "all", "what to measure: operators, models, the host time of a layer (overhead), or all of them",
        choices=(*results.PARTS, "all"),
    )  # fmt: skip
    device: str = option("auto", "cpu or cuda; auto takes CUDA if there is a device")
    dtype: str | None = option(
        None, "float32, bfloat16 or float16; default: bfloat16 on CUDA and float32 on the CPU", choices=DTYPES
    )
    operators: str | None = option(None, "only these operators, separated by commas", only=OF_OPERATORS)
    sizes: str | None = option(None, "only these sizes of models, separated by commas: tiny,small,base,large",
                               only=SIZED)  # fmt: skip
    batches: str | None = option(None, "batch sizes of the models, separated by commas", only=OF_MODELS)
    implementations: str | None = option(
        None, "only these implementations, separated by commas: reference,eager,triton,cuda,crate_kernels and others"
    )
    threads: int | None = option(None, "CPU threads", least=1, most=4096)
    seconds: float | None = option(None, "target duration of each interleaved measurement", above=0)
    rounds: int | None = option(None, "smallest number of rounds of each measurement", least=1, most=100_000)
    limit: float | None = option(None, "stop after this many seconds and keep the finished measurements", above=0)
    quick: bool = option(False, "run everything with tiny shapes and few rounds; the times have no meaning")
    check_only: bool = option(False, "check the results of all implementations, time nothing, write nothing")
    commit: str | None = option(None, "commit to record, if the package is not in a git checkout")
    results: str = option("benchmarks/results", "folder of the result files")
    report: bool = option(
        False,
        "render the results: in a checkout docs/benchmarks.md and the README's table, elsewhere a page of its own",
    )
    predict: bool = option(
        False, "predict the times of the Triton kernels from their machine code, without a GPU; with --report in a "
        "checkout also write the tables into docs/triton.md"
    )  # fmt: skip
    target: str = option("sm_90", "architecture of the prediction", only=("with --predict", lambda s: s.predict))
    dispatch: bool = option(False, "in a checkout: write the table that the automatic backend choice may follow")
    relative: bool = option(
        False, "compare speed-ups instead of seconds", only=("with --compare", lambda s: s.compare is not None)
    )
    compare: tuple[Path, Path] | None = None

    @property
    def renders(self) -> bool:
        return self.report or self.dispatch or self.predict or self.compare is not None

    def check(self, given: Iterable[str]) -> None:
        """Raise ValueError for an option that is misspelled or does not apply."""
        from . import cases, models

        options.check(self, given)
        options.check_device(self.device)
        if self.renders and (idle := set(given) - RENDERING):
            names = ", ".join(sorted(map(options.flag, idle)))
            raise ValueError(f"{names} applies only without --report, --dispatch, --predict and --compare")
        if self.predict and (idle := set(given) & {"results", "dispatch", "relative"}):
            raise ValueError(f"{', '.join(sorted(map(options.flag, idle)))} applies only without --predict")
        listed(self.operators, "operators", cases.OPERATORS)
        listed(self.sizes, "sizes", models.SIZES)
        listed(self.implementations, "implementations", (*cases.IMPLEMENTATIONS, *models.IMPLEMENTATIONS))
        for batch in listed(self.batches, "batches") or ():
            if not batch.isascii() or not batch.isdigit() or not 1 <= int(batch[:9]) <= 1 << 20:
                raise ValueError(f"--batches must be whole numbers from 1 to {1 << 20}, got {batch}")


def listed(text: str | None, name: str, known: Iterable[str] = ()) -> list[str] | None:
    """The comma-separated words in the value of an option; None if the option is not given.

    Raises:
        ValueError: the list is empty, or a word is not ``known``.
    """
    if text is None:
        return None
    words, known = [word.strip() for word in text.split(",") if word.strip()], list(known)
    if not words:
        raise ValueError(f"{options.flag(name)} must name at least one, got {text!r}")
    if known and (unknown := [word for word in words if word not in known]):
        raise ValueError(f"{options.flag(name)}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser, Settings)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="list what became slower")


def run(args: argparse.Namespace) -> int:
    given = options.given(args, Settings)
    settings = Settings(**given, compare=args.compare and tuple(args.compare))
    settings.check(given)
    if settings.compare is not None:
        return compare(*settings.compare, settings.relative)
    if settings.predict:
        return predict(settings)
    if settings.renders:
        return render(settings)
    return measure(settings)


def predict(settings: Settings) -> int:
    """Print the predicted times of the Triton kernels, or write them into the page of the current checkout."""
    from . import predict, report

    text = predict.text(settings.target)
    page = Path.cwd() / "docs" / "triton.md"
    if settings.report:
        replaced = report.between(page.read_text(), predict.MARKERS, text) if page.is_file() else None
        if replaced is None:
            raise ValueError(f"--predict --report writes {page}: run it in the root of a checkout")
        page.write_text(replaced)
        print(f"wrote {page}")
    else:
        print(text)
    return 0


def render(settings: Settings) -> int:
    """Write the results into the pages of the current checkout, or beside the result files."""
    from . import dispatch, report

    folder, here = Path(settings.results), Path.cwd()
    if not results.read_all(folder):
        raise ValueError(f"--results {folder} holds no result files")
    if settings.report:
        written = report.render(folder, here) if report.is_checkout(here) else report.render_page(folder)
        for path in written:
            print(f"wrote {path}")
    if settings.dispatch:
        if not (here / dispatch.TARGET).is_file():
            raise ValueError(f"--dispatch writes {dispatch.TARGET}: run it in the root of a checkout")
        print(f"wrote {dispatch.write(folder, here)}")
    return 0


def compare(old: Path, new: Path, relative: bool) -> int:
    """Print the cases that became slower by more than the noise. The exit code is then 1."""
    for path in (old, new):
        if not path.is_file():
            raise ValueError(f"--compare: no result file {path}")
    found = results.slower(results.read(old)["records"], results.read(new)["records"], relative=relative)
    for entry in found:
        operator, family, batch, shape, *rest = results.key(entry["record"])
        print(f"{entry['ratio']:6.2f}x slower  {operator} {family} {' '.join(map(str, rest))} batch {batch} {shape}")
    print(f"{len(found)} became slower beyond the noise")
    return 1 if found else 0


def measure(settings: Settings) -> int:
    """Run the suites. The exit code is 1 if one of the package's own backends gives wrong results."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    dtype = getattr(torch, settings.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    deadline = time.monotonic() + (settings.limit or float("inf"))
    folder = Path(settings.results) / results.device_folder(device)
    environment = results.environment(device, settings.commit)
    about = f"{environment['device']}, torch {torch.__version__}, {count(environment['threads'], 'thread')}"
    print(f"{about}, commit {environment['commit']}")
    peak_rates = None
    if not settings.check_only and settings.suite != "overhead":
        peak_rates = peaks.measure(device, [dtype], settings.quick)
        copy, (product,) = peak_rates["copy"] / 1e9, peak_rates["product"].values()
        print(f"measured peaks: copy {copy:.4g} GB/s, product {product / 1e12:.4g} TFLOP/s {dtype}")
        if device.type == "cpu" and environment["load_average"] > 1:
            print(f"this machine is busy (load {environment['load_average']:.1f}): rely on ratios, not on seconds")
    wrong = []
    for part in results.PARTS if settings.suite == "all" else [settings.suite]:
        records: list[dict] = []
        content = dict(part=part, environment=environment, peaks=peak_rates, quick=settings.quick, records=records)
        if part == "operators":
            stream = _operators(settings, device, dtype, peak_rates)
        elif part == "models":
            stream = _models(settings, device, dtype)
        else:
            stream = _overhead(settings)
        for record in stream:
            records.append(record)
            print(line(record), flush=True)
            if record.get("refused") and not record["implementation"].startswith(FOREIGN):
                wrong.append(record)
            if not settings.check_only:
                results.write(folder / f"{part}.json", content)
            if time.monotonic() > deadline:
                print(f"{part}: stopped at the limit of {settings.limit:g} s; the finished measurements are saved")
                break
        if records and not settings.check_only:
            print(f"wrote {folder / f'{part}.json'}")
    for record in wrong:
        print(f"WRONG, not timed: {line(record)}", file=sys.stderr)
    return 1 if wrong else 0


def _operators(settings: Settings, device: torch.device, dtype: torch.dtype, peak_rates: dict | None) -> Iterable[dict]:
    from . import cases, operators

    wanted = listed(settings.operators, "operators") or list(cases.OPERATORS)
    roof = None
    if peak_rates:
        roof = cost.Peaks(peak_rates["copy"], next(iter(peak_rates["product"].values())), peak_rates["exponentials"])
    seconds = settings.seconds or (0.05 if settings.quick else 1.0 if device.type == "cpu" else 0.3)
    least = settings.rounds or (3 if settings.quick else 7)
    for case in cases.cases(device, settings.quick):
        if case.operator not in wanted:
            continue
        try:
            yield from operators.run_case(
                case, device, dtype, roof, only=listed(settings.implementations, "implementations"), seconds=seconds,
                rounds=(least, max(least, 5 if settings.quick else 60)), check_only=settings.check_only,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            about = dict(operator=case.operator, family=case.family, shape=case.shape(), implementation="all")
            yield about | {"skipped": "the device has no memory for the float64 reference"}


def _models(settings: Settings, device: torch.device, dtype: torch.dtype) -> Iterable[dict]:
    from . import models

    on_gpu = device.type == "cuda"
    sizes = ["tiny"] if settings.quick else listed(settings.sizes, "sizes") or ["base", "small", "tiny"]
    default = "1,2" if settings.quick else "1,64,256,1024" if on_gpu else "1,8"
    batches = [int(b) for b in listed(settings.batches or default, "batches") or ()]
    seconds = settings.seconds or (0.1 if settings.quick else 2.0 if on_gpu else 20.0)
    least = settings.rounds or (3 if settings.quick else 7)
    for size in sizes:
        yield from models.run_size(
            size, device, dtype, batches=batches, only=listed(settings.implementations, "implementations"),
            seconds=seconds, rounds=(least, max(least, 5 if settings.quick else 40)), quick=settings.quick,
            check_only=settings.check_only,
        )  # fmt: skip


def _overhead(settings: Settings) -> Iterable[dict]:
    from . import overhead

    if settings.check_only:  # the suite compares every implementation with plain torch before it times one
        return
    seconds = settings.seconds or (0.02 if settings.quick else 2.0)
    yield from overhead.measure(seconds, compiled=not settings.quick)


def line(record: dict) -> str:
    """One record for the terminal."""
    if "microseconds" in record:
        what = f"a layer · {record['task']} · {record['implementation']}"
        return f"{what}: {record['microseconds']:.0f} µs of the host, {record['ratio']:.2f} of plain torch"
    if "operator" in record:
        shape = record["shape"]
        what = f"{record['operator']} {record['family']} B{shape['batch']} N{shape['tokens']}"
        what += " causal" if shape["causal"] else ""
    else:
        what = f"{record['model']} batch {record['batch']}"
    what += f" · {record.get('direction') or record.get('task') or 'check'} · {record['implementation']}"
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
        share = record.get("share_of_budget")  # a model of another architecture has no budget
        return f"{what}: {record['check']}" + ("" if share is None else f" ({100 * share:.0f} % of the budget)")
    text = f"{what}: {record['seconds']['p50'] * 1e3:.4g} ms"
    if record.get("speedup"):
        text += f", {record['speedup']['p50']:.2f}x"
    if "percent_of_bound" in record:
        text += f", {record['percent_of_bound']:.0f} % of bound"
    return text
