"""The part that all training commands share: it turns options into a run and its folder."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from .. import options
from ..distributed import launch
from ..ops import requested_backend, use_backend
from ..runs import checkpoints, folder
from . import config
from .engine import Engine
from .interrupt import Interrupted, Interrupts
from .progress import Report


def add_arguments(parser: argparse.ArgumentParser, trainer: type[Engine]) -> None:
    """All options of the trainer's settings, ``--resume`` and ``--overwrite``."""
    options.add_arguments(parser, trainer.options, trainer.variants())
    config.add_recipe_arguments(parser)
    group = parser.add_argument_group("earlier runs")
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue the run in --output, or the given folder or checkpoint, to the same result",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the run that is already in --output")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The meaning of a command line: checked settings, the folder of the run, and the checkpoint to resume, if any."""

    settings: Any
    output: Path
    state: dict[str, Any] | None = None


def run(args: argparse.Namespace, kind: type[Engine]) -> int:
    """Train with the options of the command line on the ranks that torchrun started. Write all files to the output
    folder."""
    began = time.monotonic()
    with launch.process_group() as again, Interrupts() as interrupts:
        with launch.together():
            chosen = plan(args, kind, again)
        return execute(chosen, kind, interrupts, began)


def execute(chosen: Plan, kind: type[Engine], interrupts: Interrupts, began: float) -> int:
    """Run a plan."""
    settings, output, state = chosen.settings, chosen.output, chosen.state
    if launch.differs(None if state is None else state["step"]):
        launch.fail(ValueError(f"the ranks see different checkpoints in {output}: they must share the folder"))
    with use_backend(settings.backend or requested_backend()):
        with launch.together():
            trainer = kind(settings, output, launch.device(settings.device))
            trainer.interrupts = interrupts
            trainer.check_ranks()
            trainer.check_backend()
            if state is None:
                trainer.initialize()
            else:
                trainer.check_state(state)
        trainer.prepare(state)
        with launch.together():
            if launch.is_main():
                output.mkdir(parents=True, exist_ok=True)
                checkpoints.remove_leftovers(output)
                if state is None:
                    folder.clear(output)
                    folder.write_options(output, dataclasses.asdict(settings))
                else:
                    (output / folder.SUMMARY).unlink(missing_ok=True)
        with Report(trainer.steps, None if launch.is_main() else Console(quiet=True)) as report:
            report.line(trainer.describe() + resume_note(trainer))
            try:
                trainer.fit(report)
                trainer.finish(report, began)
                report.line(
                    "\n".join(["next:", *(f"  {line}  # {text}" for line, text in trainer.next_steps().items())])
                )
            except Interrupted as interrupt:
                report.line(how_to_resume(trainer))
                interrupt.reported = True
                raise
    return 0


def how_to_resume(trainer: Engine) -> str:
    """The message after an interruption: how to resume the run."""
    if checkpoints.find(trainer.output) is None:
        return "interrupted before the first step: there is nothing to resume"
    return (
        f"interrupted after step {trainer.step} of {trainer.steps}; the checkpoint is saved. "
        f"Resume with: crate-kernels {trainer.command} --resume {trainer.output}"
    )


def plan(args: argparse.Namespace, kind: type[Engine], again: bool) -> Plan:
    """The plan that the arguments mean.

    Args:
        again: whether torchrun has started this command before.

    Raises:
        ValueError, CheckpointError: the arguments contradict each other or what is in the folder.
    """
    given = config.given(args, kind.options)
    if given.get("parallel", "auto") != "auto" and not dist.is_initialized():
        raise ValueError(
            f"--parallel {given['parallel']} shares a run out over ranks: start it with torchrun --nproc-per-node 2 "
            f"-m crate_kernels {kind.command} ..."
        )
    if args.resume is not None:
        if args.overwrite:
            raise ValueError("--overwrite replaces a run and --resume continues it: leave one of them out")
        path = Path(args.resume) if args.resume else Path(kind.resolve(given).output)
        return resumed(path, given, kind)
    settings = kind.resolve(given)
    output = Path(settings.output)
    if again:
        # torchrun starts the command again because a rank was lost, so the run in the folder may be this one. It is
        # resumed. If the rank was lost after the end of the run, only the results are written again.
        mine, saved = folder.has_options(output, dataclasses.asdict(settings)), checkpoints.find(output) is not None
        if saved and (mine or not (output / folder.SUMMARY).exists()):
            return resumed(output, given, kind)
        if mine:
            return Plan(settings, output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file, not a folder")
    found = None if args.overwrite else folder.occupied(output)
    if found is not None:
        resume = f"continue it with --resume {output}, " if "unfinished" in found else ""
        raise ValueError(f"{output} holds {found}: {resume}choose another --output, or replace it with --overwrite")
    return Plan(settings, output)


def resumed(path: Path, given: dict[str, Any], kind: type[Engine]) -> Plan:
    """The plan to resume the run at ``path`` (a folder or a checkpoint) with the options ``given``.

    Raises:
        ValueError, CheckpointError: there is no such run, or it is another command's, or an option contradicts it.
    """
    path = checkpoints.locate(path)
    state = checkpoints.load(path)
    if (command := state.get("command", kind.command)) != kind.command:
        raise ValueError(f"{path} belongs to a run of crate-kernels {command}: {kind.command} cannot resume it")
    settings = resumed_settings(state, {"output": str(path.parent)} | given, kind.options)
    output = Path(settings.output)
    if output.resolve() != path.parent.resolve() and (found := folder.occupied(output)) is not None:
        raise ValueError(f"{output} holds {found}, not that of {path}: choose another --output")
    return Plan(settings, output, state)


def resumed_settings(state: dict[str, Any], given: dict[str, Any], kind: type) -> Any:
    """The settings (a ``kind``) of the run in ``state``, changed by options that do not change its result.

    Raises:
        ValueError: an option contradicts the run.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    stored = kind(**{name: value for name, value in state["config"].items() if name in names})
    for name, value in given.items():
        if name in stored.fixed() and getattr(stored, name) != value:
            raise ValueError(
                f"{options.flag(name)} {value} contradicts the run to resume, which has {getattr(stored, name)}"
            )
    settings = dataclasses.replace(stored, **given)
    settings.check(given)
    settings.name_output()
    return settings


def resume_note(trainer: Engine) -> str:
    """The end of the line that describes a run: its layout over ranks, and the step that it resumes from."""
    ranks = ""
    if trainer.sharded or launch.size() > 1:
        ranks = f", {'fsdp' if trainer.sharded else 'ddp'} over {launch.size()} ranks"
    return ranks + (f", resuming from step {trainer.step} of {trainer.steps}" if trainer.step else "")
