"""The command ``crate-kernels``: a table of subcommands. A subcommand is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
from typing import NoReturn

from .extras import needs
from .terminal import printable
from .version import __version__

COMMANDS = {
    "train": ("crate_kernels.training.classifier", "train a CRATE classifier on real images"),
    "train-mae": ("crate_kernels.training.mae", "pre-train a CRATE masked autoencoder on real images"),
    "train-dino": ("crate_kernels.training.dino", "pre-train a CRATE backbone by self-distillation"),
    "train-text": ("crate_kernels.training.text", "train a CRATE language model on a text file"),
    "prepare-text": ("crate_kernels.data.prepare_text", "write text files as token shards for train-text"),
    "prepare-images": ("crate_kernels.data.prepare_images", "write labeled images as shards for train"),
    "analyze": ("crate_kernels.analysis.command", "measure coding rate and sparsity, layer by layer"),
    "segment": ("crate_kernels.analysis.segment", "segment images by the attention of a trained model"),
    "report": ("crate_kernels.analysis.report", "write one run as a single HTML file"),
    "export": ("crate_kernels.deployment.command", "write a trained model for ONNX Runtime, OpenVINO or AOTInductor"),
    "plan": ("crate_kernels.distributed.plan", "predict the memory and communication of a run on many GPUs"),
    "bench": ("crate_kernels.bench.command", "measure operators and models, compare and report results"),
    "tune": ("crate_kernels.bench.tune", "measure which backend is fastest on this device, and remember it"),
    "selftest": ("crate_kernels.selftest", "test every kernel on this device"),
    "info": ("crate_kernels.collect_env", "print versions, devices and why each backend can or cannot run"),
}
"""Subcommand -> the module with ``add_arguments(parser)`` and ``run(args)``, and one line of help."""


class Parser(argparse.ArgumentParser):
    """Refuses wrong arguments with one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0; 2 after an expected error; 130 or 143 after a signal."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    rank = os.environ.get("RANK", "0")  # torchrun's
    parser = Parser(
        "crate-kernels",
        description="Train, measure and speed up CRATE, a transformer whose layers are optimization steps.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    try:
        for name, (module, line) in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
            subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
            if name in arguments[:1]:
                importlib.import_module(module).add_arguments(subparser)
        args = parser.parse_args(arguments)
        return importlib.import_module(COMMANDS[args.command][0]).run(args) or 0
    except KeyboardInterrupt as interrupt:
        if rank == "0" and not getattr(interrupt, "reported", False):
            print("interrupted", file=sys.stderr)
        return getattr(interrupt, "code", 128 + signal.SIGINT)
    except Exception as error:
        if "--debug" in arguments or not expected(error):
            raise
        print(
            f"crate-kernels{'' if rank == '0' else f' (rank {rank})'}: {sentence(error)}", file=sys.stderr, flush=True
        )
        time.sleep(getattr(error, "linger", 0.0))  # see crate_kernels.distributed.launch.RankLost
        return 2


def leave(code: int | None) -> NoReturn:
    """End this process with ``code``.

    A rank of torchrun skips the shutdown of the interpreter. During the shutdown a thread of gloo may still hold a
    tensor and would abort the process (github.com/pytorch/pytorch/pull/179291).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def command() -> NoReturn:
    """Run :func:`main`, and end the process with its exit code."""
    code: int | None
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int | None) else 1
    leave(code)


def expected(error: Exception) -> bool:
    """Whether the user can correct an error (a wrong argument, file or installation). Other errors are internal.

    Refusals of files, values and backends have these types and a complete sentence. The excluded subclasses come from
    unexpected failures.
    """
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("crate_kernels")
    defects = (NotImplementedError, RecursionError, UnicodeError)
    return isinstance(error, (OSError, ValueError, TypeError, RuntimeError)) and not isinstance(error, defects)


def sentence(error: Exception) -> str:
    """The message of an error, as one line for the terminal."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return needs("this command", error.name.split(".")[0])
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """``text`` without line breaks and without characters that change the state of a terminal."""
    return printable(" ".join(text.split()))


if __name__ == "__main__":
    command()
