"""Run a test function on several gloo processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import socket

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

# What the ranks import, and what takes them longer than most tests. A server imports it once, and forks every rank.
IMPORTS = [
    "crate_kernels.fusion",
    "tests.distributed.trainers",
    "torch._dynamo",  # every optimizer imports it before its first step
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


def run_on_ranks(size: int, function, *arguments) -> None:
    """Call ``function(*arguments)`` on ``size`` ranks; a failure on any of them fails the test with its traceback."""
    multiprocessing.set_forkserver_preload(IMPORTS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_rank, (size, port, function, arguments), nprocs=size, start_method="forkserver")


def _rank(rank: int, size: int, port: int, function, arguments) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
    # Skip the shutdown of the interpreter: a thread of gloo that still holds a tensor would abort it.
    os._exit(0)
