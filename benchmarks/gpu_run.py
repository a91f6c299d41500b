"""One GPU run: build, test, sanitize, measure. It needs only the standard library, and runs from a checkout.

    python benchmarks/gpu_run.py OUT                           every stage but tune, within ten minutes
    python benchmarks/gpu_run.py OUT --stages operators        some stages, which then share the ten minutes
    python benchmarks/gpu_run.py OUT --stages build,tune,operators,models   with the choices that fit this GPU
    python benchmarks/gpu_run.py OUT --dry-run                 the same commands with tiny shapes on the CPU

A stage that fails or runs out of time does not stop the next one. OUT gets one log for each group of stages,
``operators.json``, ``models.json`` and ``summary.json``. The script prints the summary as a table at the end. It
downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 570
"""Seconds for all stages together. A stage may use the time that earlier stages did not use, but no time of later
stages."""
LOG_BYTES = 1 << 20
"""Largest log in bytes. The beginning of a longer log is cut off."""


NO_TESTS = 5
"""pytest's exit code if no test was selected."""


@dataclass
class Stage:
    """One command and its time limit in seconds.

    ``missing`` is the reason why the command cannot run here, or None. An ``optional`` stage runs only if ``--stages``
    names it.
    """

    name: str
    log: str
    limit: float
    command: list[str]
    missing: str | None = None
    environment: dict[str, str] | None = None
    optional: bool = False


def stages(out: Path, dry: bool, commit: str) -> list[Stage]:
    python, device = sys.executable, "cpu" if dry else "cuda"
    package = [python, "-m", "crate_kernels"]
    bench = [*package, "bench", "--device", device, "--results", str(out / "results")]
    bench += ["--commit", commit] if commit else []
    bench += ["--quick"] if dry else []
    tests = [python, "-m", "pytest", "-q", "-x" if dry else "--maxfail=20", "-p", "no:cacheprovider"]
    no_pytest = None if _importable("pytest") else "pytest is not installed"
    parallel = ["-n", "8"] if _importable("xdist") else []
    sanitizer = shutil.which("compute-sanitizer")
    # A dry run has no sanitizer and no kernels to check. It still runs the command that would be checked.
    checked = [*bench, "--suite", "operators", "--check-only"]
    checked += [] if "--quick" in bench else ["--quick"]

    tuned = ["--seconds", "0.3"]
    if dry:
        tuned = ["--seconds", "0.01", "--model", "crate_tiny", "--batch", "1", "--image-size", "32"]

    def hardware(folder: str, *chosen: str) -> Stage:
        path = ROOT / "tests" / folder
        missing = None if path.is_dir() and any(path.rglob("test_*.py")) else f"there are no tests in tests/{folder}"
        chosen = ("--collect-only",) if dry else chosen
        return Stage(f"tests-{folder}", "tests.log", 40, [*tests, str(path), *chosen], no_pytest or missing)

    def sanitized(tool: str) -> Stage:
        prefix = [] if dry else [sanitizer or "", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        chosen = [] if dry else ["--implementations", "triton,cuda"]
        missing = None if dry or sanitizer else "compute-sanitizer is not on the path"
        # Without torch's caching allocator every tensor is a separate allocation, and memcheck can see its end.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Stage(f"sanitizer-{tool}", "sanitizer.log", 20, [*prefix, *checked, *chosen], missing, alone)

    build = None if (ROOT / "setup.py").exists() else "there is no setup.py, so no extension to build"
    build_environment = (
        {"CRATE_KERNELS_SKIP_CUDA": "1"} if dry else {"CRATE_KERNELS_FORCE_BUILD": "1"} | _architecture()
    )
    return [
        Stage("environment", "environment.log", 15, [python, "-m", "crate_kernels.collect_env"]),
        Stage("build", "build.log", 90, [python, "setup.py", "build_ext", "--inplace"], build, build_environment),
        Stage("selftest", "tests.log", 50, [*package, "selftest", "--all"]),
        hardware("cuda", "-m", "gpu"),
        # These stages run on the present GPU. Compilation for other chips needs no GPU and can happen elsewhere.
        hardware("triton", "--ignore", str(ROOT / "tests" / "triton" / "test_compile.py"), *parallel),
        hardware("ops", "-m", "gpu"),
        *map(sanitized, ("memcheck", "racecheck", "initcheck")),
        Stage("tune", "bench.log", 180, [*package, "tune", "--device", device, *tuned], optional=True),
        Stage("operators", "bench.log", 120, [*bench, "--suite", "operators"]),
        Stage("models", "bench.log", 110, [*bench, "--suite", "models", *([] if dry else ["--sizes", "base"])]),
    ]


def _architecture() -> dict[str, str]:
    """Compile only for the present GPU, unless the environment says otherwise, to save minutes."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ or not shutil.which("nvidia-smi"):
        return {}
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return {"TORCH_CUDA_ARCH_LIST": answer[0]} if answer else {}


def _importable(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def run(stage: Stage, out: Path, limit: float) -> dict:
    """Run one stage -> its line of the summary. At the time limit its process group is ended."""
    if stage.missing:
        return {"stage": stage.name, "outcome": "skipped", "seconds": 0.0, "last": stage.missing}
    start, path = time.monotonic(), out / stage.log
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= stage.environment or {}
    with path.open("ab") as log:
        log.write(f"\n== {stage.name}: {' '.join(stage.command)}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            stage.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    lines = [line for line in path.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
    outcome = {None: "out of time", 0: "passed"}.get(code, f"failed ({code})")
    if code == NO_TESTS and "pytest" in stage.command:
        outcome = "skipped"
    seconds = round(time.monotonic() - start, 1)
    return {"stage": stage.name, "outcome": outcome, "seconds": seconds, "last": (lines or [""])[-1][:160]}


def _end(process: subprocess.Popen) -> None:
    """End the processes that a stage left running: its process group, first with SIGTERM, then with SIGKILL."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(timeout=5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def collect(out: Path, summary: list[dict]) -> None:
    """Keep few and small files: results beside the logs, and only the end of long logs."""
    for path in (out / "results").rglob("*.json"):
        path.replace(out / path.name)
    shutil.rmtree(out / "results", ignore_errors=True)
    for log in out.glob("*.log"):
        content = log.read_bytes()
        if len(content) > LOG_BYTES:
            log.write_bytes(content[-LOG_BYTES:])
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def main(arguments: list[str] | None = None, make: Callable[..., list[Stage]] = stages) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that is written")
    parser.add_argument(
        "--stages", help="only these stages, separated by commas; a prefix selects all stages that begin with it"
    )
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for all stages together")
    parser.add_argument("--commit", default="", help="commit to record if the checkout has no .git")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = make(out, args.dry_run, args.commit)
    if args.stages:
        prefixes = tuple(word.strip() for word in args.stages.split(","))
        found = [stage for stage in found if stage.name.startswith(prefixes)]
        if not found:
            parser.error(f"--stages: none begins with {' or '.join(prefixes)}")
    else:
        found = [stage for stage in found if not stage.optional]
    end, summary = time.monotonic() + args.total, []
    for index, stage in enumerate(found):
        later = sum(other.limit for other in found[index + 1 :] if not other.missing)
        print(f"{stage.name} ...", flush=True)
        summary.append(run(stage, out, max(stage.limit, end - time.monotonic() - later)))
        collect(out, summary)
    print()
    for line in summary:
        print(f"{line['stage']:20} {line['outcome']:14} {line['seconds']:7.1f} s  {line['last']}")
    return 0 if all(line["outcome"] in ("passed", "skipped") for line in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
