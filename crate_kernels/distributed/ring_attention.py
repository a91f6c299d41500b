"""Subspace attention over a sequence that is split over several ranks (context parallelism).

Every rank holds consecutive tokens, in the order of the ranks. Shards travel around the ring. In R − 1 steps each rank
sees the tokens of all other ranks, and holds one of their shards at a time.

Attention has one operand, so one tensor is sent. In the forward ``w`` travels; a ring of keys and values sends two
tensors. In the backward ``w`` and the output's gradient ``g`` travel with two scalars per row (log-normalizer and
delta). A token is a query and a key to every other token. Every rank computes both parts of the gradient of its own
tokens. A ring of keys and
values sends four tensors: k, v and their gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import backends, checks
from ..ops.subspace_attention import blocked


def ring_subspace_attention(
    w: Tensor,
    value: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`crate_kernels.ops.subspace_attention` of a sequence that is split over the ranks of ``group``.

    The result equals attention over the concatenation of ``w`` over the ranks, restricted to this rank's tokens. With
    shards of n tokens and R ranks, each rank sends ``(R − 1)·B·n·H·p`` elements forward and ``(R − 1)·B·n·H·(2p + 2)``
    backward. A separate value adds one ``p`` in each.

    Args:
        w: ``(B, n, H, p)``, this rank's projected tokens. n may differ between ranks; B, H and p may not.
        value: ``(B, n, H, p)`` or None, see :func:`crate_kernels.ops.subspace_attention`.
        scale: factor of the scores; ``p ** -0.5`` if None.
        causal: token i sees only tokens j <= i of the whole sequence.
        group: the ranks that share the sequence; all of them if None.

    Returns:
        ``(B, n, H, p)``, this rank's rows of the result. Differentiable.

    Raises:
        TypeError, ValueError: as for :func:`crate_kernels.ops.subspace_attention`.
        RuntimeError: torch.distributed is not initialized.
    """
    checks.tensor("w", w, ("B", "n", "H", "p"))
    if value is not None:
        checks.tensor("value", value, tuple(w.shape), like=w)
        checks.same_dtype(w.dtype, value=value)
    if not dist.is_initialized():
        raise RuntimeError("ring_subspace_attention: call torch.distributed.init_process_group first")
    scale = w.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale)
    w, value = backends.cast(backends.autocast_dtype(w), w, value)
    return _RingAttention.apply(w, value, scale, bool(causal), _Ring(w, group))


class _Ring:
    """The ranks in ring order, and the number of tokens of each."""

    def __init__(self, w: Tensor, group: dist.ProcessGroup | None):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        gathered = [torch.empty(4, dtype=torch.int64, device=w.device) for _ in range(self.size)]
        dist.all_gather(gathered, torch.tensor(w.shape, device=w.device), group=group)
        shapes = [tuple(shape.tolist()) for shape in gathered]
        self.tokens: list[int] = [shape[1] for shape in shapes]
        if any((s[0], *s[2:]) != (w.shape[0], *w.shape[2:]) for s in shapes) or min(self.tokens) < 1:
            raise ValueError(f"w: expected the same B, H, p and at least one token on every rank, got shapes {shapes}")

    def exchange(self, mine: list[Tensor]):
        """Yield ``(owner, its tensors)`` of every other rank, the nearest lower rank first. The next tensors are in
        flight.

        The tensors are ``(B, H, rows, width)``; the rows may differ between ranks.
        """
        current = [t.contiguous() for t in mine]
        for step in range(1, self.size):
            owner = (self.rank - step) % self.size
            arriving = [t.new_empty((*t.shape[:2], self.tokens[owner], *t.shape[3:])) for t in current]
            send_to = self._global((self.rank + 1) % self.size)
            receive_from = self._global((self.rank - 1) % self.size)
            transfers = [dist.P2POp(dist.isend, t, send_to, self.group) for t in current]
            transfers += [dist.P2POp(dist.irecv, t, receive_from, self.group) for t in arriving]
            pending = dist.batch_isend_irecv(transfers)
            if step > 1:
                yield (owner + 1) % self.size, current
            for transfer in pending:
                transfer.wait()
            current = arriving
        if self.size > 1:
            yield (self.rank + 1) % self.size, current

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, value, scale, causal, ring):
        q = w.transpose(1, 2)
        v = q if value is None else value.transpose(1, 2)
        o, lse = blocked.attend(q, q, v, scale, _past_only(q) if causal else None)
        # Partial results are merged in the accumulator's precision and rounded once.
        o = o.to(lse.dtype)
        for owner, (k, *other) in ring.exchange([q] if value is None else [q, v]):
            if causal and owner > ring.rank:
                continue
            part, part_lse = blocked.attend(q, k, other[0] if other else k, scale)
            merged = torch.logaddexp(lse, part_lse)
            o = o * (lse - merged).exp()[..., None] + part * (part_lse - merged).exp()[..., None]
            lse = merged
        o = o.to(w.dtype)
        ctx.scale, ctx.causal, ctx.ring = scale, causal, ring
        ctx.save_for_backward(w, value, o, lse)
        return o.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, grad):
        w, value, o, lse = ctx.saved_tensors
        q, g = w.transpose(1, 2), grad.transpose(1, 2)
        v = q if value is None else value.transpose(1, 2)
        delta = (g * o).sum(-1, dtype=lse.dtype)
        mine = (q, v, g, lse, delta)
        past = _past_only(q) if ctx.causal else None
        future = _past_only(q, transposed=True) if ctx.causal else None
        dw, dv = blocked.attend_backward(*mine, *mine, ctx.scale, past, future)
        scalars = torch.stack([lse, delta], dim=-1)
        everything = [q, g, scalars] if value is None else [q, g, scalars, v]
        for owner, (k, g_other, scalars_other, *other) in ctx.ring.exchange(everything):
            lse_other, delta_other = scalars_other.unbind(-1)
            values = other[0] if other else k
            # With a causal mask, the tokens of lower ranks are only keys, and those of higher ranks only queries.
            hidden = _all if ctx.causal and owner > ctx.ring.rank else None
            hidden_other = _all if ctx.causal and owner < ctx.ring.rank else None
            part_w, part_v = blocked.attend_backward(
                *mine, k, values, g_other, lse_other, delta_other, ctx.scale, hidden, hidden_other
            )
            dw += part_w
            dv += part_v
        if value is None:
            return (dw + dv).to(w.dtype).transpose(1, 2), None, None, None, None
        return dw.to(w.dtype).transpose(1, 2), dv.to(w.dtype).transpose(1, 2), None, None, None


def _past_only(q: Tensor, transposed: bool = False) -> blocked.Mask:
    index = torch.arange(q.shape[2], device=q.device)
    future = index[None, :] > index[:, None]
    future = future.mT if transposed else future
    return lambda rows: future[rows]


def _all(rows: slice) -> Tensor:
    return torch.ones((), dtype=torch.bool)
