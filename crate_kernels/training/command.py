"""The command part of every training command: options in, a run's folder out."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from ..distributed import launch
from ..ops import requested_backend, use_backend
from . import checkpoints, config
from .engine import Engine
from .progress import Report


def add_arguments(parser: argparse.ArgumentParser, trainer: type[Engine]) -> None:
    """All options of the trainer's settings, and ``--resume``."""
    config.add_arguments(parser, trainer.options)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue the run in --output, or the given folder or state, to the same result",
    )


def run(args: argparse.Namespace, kind: type[Engine]) -> int:
    """Train as the command line says, on as many ranks as torchrun started; every file lands in the output folder."""
    began = time.monotonic()
    with launch.process_group() as again:
        with launch.together():
            settings, output, state = plan(args, kind, again)
        if launch.differs(None if state is None else state["step"]):
            launch.fail(ValueError(f"the ranks see different states in {output}: they must share the folder"))
        with use_backend(settings.backend or requested_backend()):
            with launch.together():
                trainer = kind(settings, output, launch.device(settings.device))
                trainer.check_ranks()
                if state is None:
                    trainer.initialise()
                else:
                    trainer.check_state(state)
            trainer.prepare(state)
            with launch.together():
                if launch.is_main():
                    output.mkdir(parents=True, exist_ok=True)
                    checkpoints.remove_leftovers(output)
                    if state is None:
                        # Started again before its first state, the run must not take an older one's for its own. The
                        # summary goes last: without it the older one would pass for unfinished.
                        checkpoints.discard(output)
                    (output / "summary.json").unlink(missing_ok=True)
            with Report(trainer.steps, None if launch.is_main() else Console(quiet=True)) as report:
                report.line(trainer.describe() + resume_note(trainer))
                try:
                    trainer.fit(report)
                except KeyboardInterrupt:
                    if checkpoints.find(output) is not None:
                        report.line(
                            f"continue with --resume {output}; it holds the state of at most "
                            f"{settings.checkpoint_seconds:g} s ago"
                        )
                    raise
            trainer.finish(report, began)
    return 0


def plan(args: argparse.Namespace, kind: type[Engine], again: bool) -> tuple[Any, Path, dict[str, Any] | None]:
    """The settings of the run that the arguments mean, its folder, and the state it goes on from, if any.

    Args:
        again: whether torchrun repeats a command that it has started before.
    """
    options = config.given(args, kind.options)
    if options.get("parallel", "auto") != "auto" and not dist.is_initialized():
        raise ValueError(
            f"--parallel {options['parallel']} shares a run out over ranks: start it with torchrun --nproc-per-node 2 "
            f"-m crate_kernels {kind.command} ..."
        )
    if args.resume is None:
        settings = kind.resolve(options)
        output = folder(settings)
        found, finished = checkpoints.find(output), (output / "summary.json").exists()
        options = dataclasses.asdict(settings)
        if found is None or (finished and not (again and checkpoints.load(found)["config"] == options)):
            return settings, output, None
        # What is finished and started again lost a rank after its end: it only writes its results once more.
        if not again:
            raise ValueError(f"{output} holds an unfinished run: continue it with --resume {output}, or choose another")
        # Nobody said --resume: only a run of the very same settings may be gone on with.
        path = output
    else:
        path = Path(args.resume) if args.resume else folder(kind.resolve(options))
    path = checkpoints.locate(path)
    state = checkpoints.load(path)
    if (command := state.get("command", kind.command)) != kind.command:
        raise ValueError(f"{path} belongs to a run of crate-kernels {command}: {kind.command} cannot go on with it")
    options.setdefault("output", str(path.parent))
    settings = checkpoints.resumed_config(state, options, kind.options)
    output = folder(settings)
    if output.resolve() != path.parent.resolve() and checkpoints.find(output) is not None:
        raise ValueError(f"{output} holds another run than {path}: choose another --output")
    return settings, output, state


def folder(settings: Any) -> Path:
    """The output folder, with the names of data set or model in it."""
    values = dataclasses.asdict(settings)
    if "data" in values:
        values["data"] = Path(values["data"]).name
    template = values.pop("output")
    try:
        return Path(template.format(**values))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"--output {template}: {error} in braces is no option of this command") from error


def resume_note(trainer: Engine) -> str:
    """The end of the line that describes a run: how it is laid out, and where it goes on."""
    ranks = ""
    if trainer.sharded or launch.size() > 1:
        ranks = f", {'fsdp' if trainer.sharded else 'ddp'} over {launch.size()} ranks"
    return ranks + (f", going on from step {trainer.step} of {trainer.steps}" if trainer.step else "")
