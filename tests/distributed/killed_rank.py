"""``python -m crate_kernels``, but SIGKILL ends rank 1 at step ``KILL_AT``, unless torchrun has restarted it."""

import os
import signal

from crate_kernels.cli import command
from crate_kernels.training.engine import Engine

train_step = Engine.train_step


def step(self, batches):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and self.step == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    train_step(self, batches)


Engine.train_step = step
command()
