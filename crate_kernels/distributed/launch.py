"""The ranks of a run: torchrun's environment, and communication between ranks. A single process is rank 0 of 1.

Every function here also works without a process group, as the only rank. Control messages (decisions, errors) use gloo
from CPU to CPU, even if gradients use NCCL, so that they do not wait for the GPU.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankLost(RuntimeError):
    """Another rank has ended, so this one cannot continue."""

    linger = 5.0
    """Seconds to wait after the message. Meanwhile torchrun ends this rank and names the one that failed first."""


def launched() -> bool:
    """Whether torchrun (or a launcher with its variables) started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the rank that prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def process_group() -> Iterator[bool]:
    """Join the ranks that torchrun started. A single process does nothing.

    Yields:
        Whether torchrun has started the ranks before. It starts them again if one failed or if machines came or left.

    Raises:
        RankLost: a rank ended in the middle of an exchange.
    """
    if not launched() or dist.is_initialized():
        yield False
        return
    store, number, ranks = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(_name_of_start(store, number, ranks), store),
        rank=number,
        world_size=ranks,
    )
    try:
        # torchrun's store keeps this number. The count in the environment knows only failures on the same machine.
        yield agree(lambda: store.add("starts", 1) > 1)
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise RankLost(
            f"rank {number} lost the other ranks: one of them has ended; --resume continues from the last checkpoint"
        ) from error
    # After an error the other ranks may have ended, and an orderly shutdown could wait forever.
    dist.destroy_process_group()


def _name_of_start(store: dist.Store, number: int, ranks: int) -> str:
    """A name that all ranks of this start share, and no rank of an earlier start.

    torchrun keeps its store when it restarts ranks, including the addresses of dead ranks. Its count of restarts
    differs between machines. Rank 0 therefore invents a name. The other ranks recognize a new name by their own marks
    in it.
    """
    mark = uuid.uuid4().hex
    if number == 0:
        store.set("offer", mark)
        store.set(f"{mark}/taken", " ".join(store.get(f"{mark}/{other}").decode() for other in range(1, ranks)))
        return mark
    deadline = time.monotonic() + dist.default_pg_timeout.total_seconds()
    while time.monotonic() < deadline:
        offer = store.get("offer").decode()
        store.set(f"{offer}/{number}", mark)
        if store.check([f"{offer}/taken"]) and mark.encode() in store.get(f"{offer}/taken"):
            return offer
        time.sleep(0.02)
    raise RankLost(f"rank {number} waited too long for rank 0 to start")


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text
        for sign in ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe")
    )


def device(name: str) -> torch.device:
    """The device for ``--device name`` on this rank. With several ranks, each uses the GPU of its local rank.

    Raises:
        ValueError: there are fewer GPUs than ranks, or ``name`` is one GPU for several ranks.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if size() == 1 or not kind.startswith("cuda"):
        return torch.device(kind)
    local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if kind != "cuda":
        raise ValueError(f"--device {name} names one GPU for {size()} ranks: give --device cuda")
    if local >= here:
        raise ValueError(
            f"there are {here} GPUs for at least {local + 1} ranks: lower --nproc-per-node, or --device cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


# -- what the ranks tell each other ------------------------------------------------------------------------------------


def agree(decide: Callable[[], Any]) -> Any:
    """The result of ``decide()`` on every rank. Only rank 0 calls it."""
    if size() == 1:
        return decide()
    box = [decide() if is_main() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def largest(number: int) -> int:
    """The largest ``number`` of all ranks, on every rank. It is cheap enough for every step."""
    if size() == 1:
        return number
    answer = torch.tensor(number)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return int(answer)


def decide_any(yes: bool) -> bool:
    """Whether ``yes`` is true on any rank. All ranks get the answer."""
    return bool(total(torch.tensor(int(yes))))


def differs(value: Any) -> bool:
    """Whether ``value`` differs between ranks."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return any(other != values[0] for other in values)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error on any rank inside the block ends all ranks, with one message on rank 0.

    Raises:
        SystemExit: on all ranks but rank 0, with code 2, because rank 0 prints the message.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        if size() == 1:
            raise
        error = raised
    if size() == 1:
        return
    errors: list[Any] = [None] * size()
    dist.all_gather_object(errors, None if error is None else (type(error).__name__, str(error)))
    if not any(errors):
        return
    if not is_main():
        raise SystemExit(2) from error
    if error is not None:
        raise error
    number, (kind, text) = next((i, e) for i, e in enumerate(errors) if e)
    raise RuntimeError(f"rank {number}: {text or kind}")


def fail(error: Exception) -> None:
    """Raise an error common to all ranks. Only rank 0 prints it."""
    if is_main():
        raise error
    raise SystemExit(2)


def total(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over the ranks, as a new tensor without gradient."""
    if size() == 1:
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor


def gather(rows: Tensor) -> Tensor:
    """The rows ``(n, ...)`` of all ranks, in their order. n may differ between ranks. There is no gradient."""
    if size() == 1:
        return rows
    gathered = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(size())]
    dist.all_gather(gathered, torch.tensor([len(rows)], device=rows.device))
    counts = [int(count) for count in gathered]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim):
        ctx.dim = dim
        parts = [torch.empty_like(x) for _ in range(size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(size(), ctx.dim)[rank()], None


def concatenate(x: Tensor, dim: int) -> Tensor:
    """The tensors ``x`` of all ranks, which have equal shapes, joined along ``dim``.

    Differentiable: the gradient of this rank's part is the sum of its gradients on all ranks. If every rank computes
    the same term from the result, and gradients are averaged over the ranks, the term's gradient is that of one
    process.
    """
    return x if size() == 1 else _Concatenate.apply(x, dim)


# -- a batch, shared out -----------------------------------------------------------------------------------------------


def share(count: int) -> slice:
    """This rank's part of ``count`` samples. The parts are consecutive, in the order of the ranks."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def rand(*shape: int, dim: int, generator: torch.Generator) -> Tensor:
    """Uniform random numbers for this rank's samples along ``dim``: its part of the numbers that one process would
    draw.

    ``generator`` must have the same state on every rank before the call, and has the same state on every rank
    afterwards.
    """
    whole = [n * size() if i == dim else n for i, n in enumerate(shape)]
    return torch.rand(whole, generator=generator).narrow(dim, rank() * shape[dim], shape[dim])
