"""The training loop of every command: ranks, steps, checkpoints, logs. A trainer defines its batches and its loss.

Step ``i`` of a run depends only on the seed and ``i``, and not on the number of ranks. ``--batch-size`` is the batch of
all ranks together. Each rank takes its part of the batch and of the random numbers drawn for it. Gradients are means
over the ranks. Only dropout draws its own random numbers on each rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..analysis import LayerwiseProbe
from ..data.batches import seed_for
from ..distributed import launch, sharding
from ..models import CrateModel
from ..models.checkpoint import write_atomically
from ..ops import cpu_kernels
from ..runs import checkpoints
from ..runs.folder import SUMMARY, Description
from ..runs.logs import MetricsLog
from ..version import __version__
from .interrupt import Interrupted, Interrupts
from .progress import Report, clock


class Engine:
    """A model in training, on one rank or several.

    A subclass sets ``model``, ``steps`` and ``meter`` in its constructor, which must not communicate.

    Args:
        settings: a subclass of :class:`~crate_kernels.training.config.EngineOptions`.
        output: the folder for all files of the run.
        device: of model and batches.
    """

    command: ClassVar[str]
    """Name of the subcommand. Only this command resumes its checkpoints."""
    options: ClassVar[type]
    """The dataclass of the settings."""
    unit = "images"
    """The unit in which the speed is reported."""
    has_unused_parameters = False
    """Whether the loss leaves out some of the parameters."""
    entries: ClassVar[tuple[str, ...]] = ()
    """Methods of the model that the trainer calls directly, besides ``forward``."""

    model: CrateModel
    steps: int
    meter: Meter

    def __init__(self, settings: Any, output: Path, device: torch.device):
        self.settings, self.output, self.device = settings, output, device
        self.step, self.seconds = 0, 0.0
        self.precision, self.precision_reason = choose_precision(settings.precision, device)
        self.sharded = False
        self.interrupts = Interrupts()

    # -- what a subclass defines ---------------------------------------------------------------------------------------

    @classmethod
    def resolve(cls, options: dict[str, Any]) -> Any:
        """The checked settings of a new run with the given ``options``."""
        raise NotImplementedError

    @classmethod
    def variants(cls) -> dict[str, Any]:
        """The settings whose defaults the help shows, by label; "" is the bare command."""
        return {"": cls.resolve({})}

    def initialize(self) -> None:
        """Load the weights that a new run starts from. A resumed run does not call it."""

    @property
    def trained(self) -> nn.Module:
        """The module that :meth:`loss` calls as ``self.network``."""
        return self.model

    def roots(self) -> list[nn.Module]:
        """The modules that are called as a whole. Together they hold all sharded parameters."""
        return [self.model]

    def make_optimizer(self) -> torch.optim.Optimizer:
        raise NotImplementedError

    def batches(self, start: int) -> Iterator[Any]:
        """This rank's part of every batch of the run, from batch number ``start`` on."""
        raise NotImplementedError

    def loss(self, batch: Any, number: int) -> Tensor:
        """The loss of batch ``number`` of the run: a mean whose mean over the ranks is the loss of the whole batch.

        It also adds to ``meter``. Whatever it draws at random depends on the seed and ``number`` alone.
        """
        raise NotImplementedError

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        raise NotImplementedError

    def set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()

    def after_step(self) -> None:
        """Work after the optimizer's step, such as an update of a moving average."""

    def evaluate_if_due(self, report: Report) -> bool:
        """Evaluate the model if an evaluation is due. Return whether to save a checkpoint now."""
        return False

    def probe_inputs(self, count: int) -> tuple[Tensor, dict[str, Any]]:
        """``count`` input samples for the model, and further arguments. Called once; all measurements use these
        samples."""
        raise NotImplementedError

    def per_step(self) -> int:
        """Number of ``unit`` in a step."""
        return self.settings.batch_size * self.settings.accumulate

    def metrics(self) -> dict[str, float]:
        """The metrics of the steps since the last log entry; at least the loss."""
        metrics = self.meter.read()
        self.meter.reset()
        return metrics

    def position(self) -> dict[str, float]:
        """The position of the run, besides the step, for the log."""
        return {}

    def describe(self) -> str:
        """One line that describes the run."""
        raise NotImplementedError

    def finish(self, report: Report, began: float) -> None:
        """Evaluate and save the trained model. Every rank calls it; ranks other than 0 may return early."""
        raise NotImplementedError

    def next_steps(self) -> dict[str, str]:
        """Commands to try after this run -> what each of them shows."""
        return {f"crate-kernels report {shlex.quote(str(self.output))}": "one page with everything about this run"}

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def check_ranks(self) -> None:
        """Raise ValueError for settings that these ranks cannot run."""
        s, ranks = self.settings, launch.size()
        if s.batch_size % ranks:
            raise ValueError(
                f"--batch-size {s.batch_size} is the batch of all ranks together: {ranks} ranks do not divide it"
            )
        if s.parallel == "fsdp" and getattr(s, "compile", False) and dist.is_initialized():
            raise ValueError("--compile is not supported with --parallel fsdp: leave one of them out")
        if s.tensorboard and launch.is_main():
            _summary_writer()

    def check_backend(self) -> None:
        """Raise ValueError if ``--backend`` names one that cannot run this model here."""
        name = self.settings.backend
        if name is None:
            return
        inputs, keywords = self.probe_inputs(1)
        try:
            with torch.no_grad(), self.autocast():
                self.model.eval()(inputs[:1], **keywords)
        except RuntimeError as error:
            raise ValueError(f"--backend {name} cannot run this model here: {error}") from error

    def prepare(self, state: dict[str, Any] | None = None) -> None:
        """Distribute the model over the ranks, make the optimizer, and load ``state`` if there is one."""
        s = self.settings
        if state is not None and state["precision"] != self.precision:
            self.precision, self.precision_reason = state["precision"], "as in the run to resume"
        self.plain_type = type(self.model)
        if s.activation_checkpointing:
            sharding.checkpoint_activations(self.trained)
        network: Any = torch.compile(self.trained) if getattr(s, "compile", False) else self.trained
        if dist.is_initialized() and s.parallel == "fsdp":
            sharding.shard(self.roots(), self.device, self.entries)
            self.sharded = True
        elif launch.size() > 1:
            network = sharding.copy_to_ranks(network, self.device, self.has_unused_parameters)
        self.network = network
        self.optimizer = self.make_optimizer()
        if state is not None:
            self.load_state(checkpoints.restore(state, self.sharded_like))

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @staticmethod
    def seed_dropout(seed: int) -> None:
        """Seed torch's generators: rank 0 like a single process, every other rank with another seed."""
        torch.manual_seed(seed if launch.is_main() else seed_for(seed, launch.rank()))

    def plain(self, model: CrateModel) -> CrateModel | None:
        """``model`` on rank 0 as a single process has it: not sharded, without checkpointing. Every rank calls it."""
        if not self.sharded and not self.settings.activation_checkpointing:
            return model if launch.is_main() else None
        state = sharding.whole_state(model)
        if not launch.is_main():
            return None
        plain = self.plain_type(**model.config).to(self.device)
        plain.load_state_dict(state)
        return plain.train(model.training)

    # -- checkpoint ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything on which the next step depends. Every rank calls it."""
        return {
            "version": __version__,
            "command": self.command,
            "config": dataclasses.asdict(self.settings),
            "precision": self.precision,
            "description": dataclasses.asdict(
                Description(self.plain_type.__name__, self.model.config, self.metadata())
            ),
            "data": self.fingerprint(),
            "step": self.step,
            "seconds": self.seconds,
            "meter": launch.total(self.meter.totals).cpu(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def fingerprint(self) -> str:
        """A description of the data with a digest."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """Metadata about the data, for the model's file. Other commands read it."""
        raise NotImplementedError

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if the checkpoint ``state`` belongs to a run on other data."""
        then, now = state["data"], self.fingerprint()
        if then != now:
            raise ValueError(f"the run to resume reads other data: {then} there, {now} here")

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned, here or on another number of ranks."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        if launch.is_main() and "meter" in state:
            self.meter.totals = state["meter"].to(self.device)

    def sharded_like(self, keys: tuple) -> Tensor | None:
        """The tensor of the model that has the sharding of the checkpoint's tensor at ``keys``."""
        match keys:
            case ("model", name):
                return self.model.state_dict().get(name)
            case ("optimizer", "state", number, _):
                return [p for group in self.optimizer.param_groups for p in group["params"]][number]
        return None

    def save_state(self) -> None:
        """Save a checkpoint unless weights are not finite; the previous checkpoint then stays."""
        if launch.decide_any(not sharding.is_finite(self.model)):
            self.diverged("some weights are not finite numbers")
        checkpoints.save_run(self.output, self.state())

    def diverged(self, what: str) -> None:
        launch.fail(ValueError(f"{what} at step {self.step}; a lower --learning-rate may help"))

    # -- training ------------------------------------------------------------------------------------------------------

    def fit(self, report: Report) -> None:
        """Train from the present step to the last, writing logs and checkpoints.

        Raises:
            Interrupted: a signal arrived. The step in progress is finished and a checkpoint saved.
        """
        with self.interrupts.deferred():
            self._fit(report)

    def _fit(self, report: Report) -> None:
        s = self.settings
        self.log = MetricsLog(self.output / "metrics.jsonl", self.step)
        self.start_probe()
        batches = self.batches(self.step * s.accumulate)
        before, first, started = self.seconds, self.step, time.monotonic()
        logged = kept = self.step
        marked = saved = started
        if not self.step:
            self.measure()
        while self.step < self.steps:
            self.train_step(batches)
            now = time.monotonic()
            self.seconds = before + now - started
            if self.step % s.log_steps == 0 or self.epoch_ends() or self.step == self.steps:
                metrics = self.metrics()
                if not math.isfinite(metrics["loss"]):
                    self.diverged(f"the loss is {metrics['loss']}")
                rate = (self.step - logged) * self.per_step() / (now - marked)
                left = (now - started) / (self.step - first) * (self.steps - self.step)
                logged, marked = self.step, now
                self.log.write(
                    step=self.step, **self.position(), **metrics, learning_rate=self.learning_rate(),
                    **{f"{self.unit}_per_second": rate},
                )  # fmt: skip
                report.show(self.step, self.status(metrics, rate, left))
            self.measure()
            keep = self.evaluate_if_due(report)
            if keep:
                marked = time.monotonic()
                self.seconds = before + marked - started
            due = launch.is_main() and time.monotonic() - saved >= s.checkpoint_seconds
            wish = launch.largest(self.interrupts.received or int(due))
            if keep or wish:
                self.save_state()
                saved, kept = time.monotonic(), self.step
            if wish > 1:  # the number of a signal that one of the ranks received
                raise Interrupted(wish)
        if kept != self.step:
            self.save_state()

    def epoch_ends(self) -> bool:
        """Whether the last step ended an epoch that the log should show."""
        return False

    def status(self, metrics: dict[str, float], rate: float, left: float) -> str:
        return f"step {self.step}  loss {metrics['loss']:.4f}  {rate:.0f} {self.unit}/s  {clock(left)} left"

    def train_step(self, batches: Iterator[Any]) -> None:
        """One optimizer step."""
        s = self.settings
        self.model.train()
        for i in range(s.accumulate):
            # While gradients accumulate, DDP need not exchange them. FSDP must, because each rank holds only its shard.
            wait = isinstance(self.network, nn.parallel.DistributedDataParallel) and i < s.accumulate - 1
            with self.network.no_sync() if wait else contextlib.nullcontext():
                (self.loss(next(batches), self.step * s.accumulate + i) / s.accumulate).backward()
        if s.clip_grad:
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], s.clip_grad)
        self.set_learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.after_step()

    # -- measurement, layer by layer -----------------------------------------------------------------------------------

    def start_probe(self) -> None:
        """Open the probe's file: a new one, or the one of the resumed run. Only rank 0 has files."""
        every, self.probe = self.settings.layerwise_steps, None
        self.probed: tuple[Tensor, dict[str, Any]] | None = None
        if not every or not (launch.is_main() or self.sharded):
            return
        path = writer = None
        if launch.is_main():
            path = self.output / "layerwise.jsonl"
            if not self.step:
                path.unlink(missing_ok=True)
            if self.settings.tensorboard:
                writer = _summary_writer()(self.output, purge_step=self.step)
        self.probe = LayerwiseProbe(path, every=every, writer=writer)

    def measure(self) -> None:
        """Run the probe if a measurement is due. All ranks of a sharded model run it, on the same samples."""
        if self.probe is None or self.step % self.probe.every:
            return
        if self.probed is None:
            inputs, keywords = self.probe_inputs(self.probe.samples)
            self.probed = inputs.clone(), keywords  # a slice would keep the whole batch in memory
        inputs, keywords = self.probed
        with sharding.gathered(self.model):
            self.probe.step(self.step, self.model, inputs, **keywords)

    def plot_probe(self) -> list[Path]:
        """Plot the probe's measurements, on rank 0 at the end."""
        if self.probe is None or not self.probe.records:
            return []
        if self.probe.writer is not None:
            self.probe.writer.close()
        return [self.probe.plot(self.output / "layerwise_training.png", title=f"{self.command}: layer by layer")]

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.output / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def _summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """``"fp32"`` or ``"bf16"``, and why.

    The automatic choice depends on the device alone, so that the same command gives the same weights: bf16 on a GPU
    that computes in it, else fp32.
    """
    if wanted != "auto":
        return wanted, "as asked for"
    if device.type != "cuda":
        if cpu_kernels.ISA in ("amx", "avx512_bf16"):  # products in bf16: the choice is left to the user
            return "fp32", "automatic; --precision bf16 may be faster on this processor"
        return "fp32", "automatic: bf16 is for GPUs"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is not None and capability < (8, 0):
        return "fp32", f"automatic: this GPU, of compute capability {capability[0]}.{capability[1]}, has no bf16"
    return "bf16", "automatic: this GPU computes in bf16"


class Meter:
    """Means over the samples of all ranks. The sums stay on the device until they are read.

    Args:
        device: where the values come from.
        names: of the values.
    """

    def __init__(self, device: torch.device, names: Sequence[str] = ("loss",)):
        self.names = tuple(names)
        self.totals = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)

    def reset(self) -> None:
        self.totals.zero_()

    @torch.no_grad()
    def add(self, count: int, *sums: Tensor) -> None:
        """Add ``count`` samples; ``sums`` are the sums of each value over them."""
        self.totals += torch.stack([*(value.detach().double() for value in sums), self.totals.new_tensor(count)])

    def read(self) -> dict[str, float]:
        """The means over the samples of all ranks. Every rank must call it."""
        *sums, count = launch.total(self.totals).tolist()
        return {name: value / max(count, 1) for name, value in zip(self.names, sums, strict=True)}
