"""A layer composed of the two block implementations of one backend, for backends without a kernel for whole layers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor


def compose(
    mssa_block: ModuleType, ista_block: ModuleType, *, narrow: bool = False
) -> tuple[Callable, Callable, Callable]:
    """Compose ``why_not``, ``forward`` and ``backward`` of the layer, with the signatures in ``op.py``.

    ``narrow``: ``ista_block.backward`` takes the stream in the dtype in which it was saved.
    """

    def why_not(z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, ista_norm_weight, ista_norm_bias,
                weight, folded, lengths, *numbers) -> str | None:  # fmt: skip
        attention = (z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, lengths, *numbers)
        rows = z.flatten(0, 1)
        return mssa_block.why_not(*attention) or ista_block.why_not(rows, ista_norm_weight, ista_norm_bias, weight)

    def forward(
        z: Tensor,
        mssa_norm_weight: Tensor,
        mssa_norm_bias: Tensor,
        u_weight: Tensor,
        out_weight: Tensor | None,
        out_bias: Tensor | None,
        ista_norm_weight: Tensor,
        ista_norm_bias: Tensor,
        weight: Tensor,
        folded: Tensor | None,
        lengths: Tensor | None,
        heads: int,
        scale: float,
        causal: bool,
        mssa_step_size: float,
        step_size: float,
        lambd: float,
        mssa_eps: float,
        ista_eps: float,
        save: bool,
    ) -> tuple[Tensor, ...]:
        """-> ``out (B, N, d)`` and what ``op.py`` lists; ``between`` is the stream between the halves."""
        between, w, o, lse, mssa_mean, mssa_rstd = mssa_block.forward(
            z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, lengths,
            heads, scale, causal, mssa_step_size, mssa_eps,
        )  # fmt: skip
        out, ista_mean, ista_rstd = ista_block.forward(
            between.flatten(0, 1), ista_norm_weight, ista_norm_bias, weight, folded, step_size, lambd, ista_eps
        )
        if save:
            between = between.to(u_weight.dtype)
            ista_mean, ista_rstd = ista_mean.view(mssa_mean.shape), ista_rstd.view(mssa_mean.shape)
        return out.view(z.shape), w, o, lse, mssa_mean, mssa_rstd, between, ista_mean, ista_rstd

    def backward(
        grad: Tensor,
        z: Tensor,
        mssa_norm_weight: Tensor,
        mssa_norm_bias: Tensor,
        u_weight: Tensor,
        out_weight: Tensor | None,
        out_bias: Tensor | None,
        ista_norm_weight: Tensor,
        ista_norm_bias: Tensor,
        weight: Tensor,
        folded: Tensor | None,
        lengths: Tensor | None,
        out: Tensor,
        w: Tensor,
        o: Tensor,
        lse: Tensor,
        mssa_mean: Tensor,
        mssa_rstd: Tensor,
        between: Tensor,
        ista_mean: Tensor,
        ista_rstd: Tensor,
        scale: float,
        causal: bool,
        mssa_step_size: float,
        step_size: float,
        mssa_eps: float,
        ista_eps: float,
    ) -> tuple[Tensor | None, ...]:
        """-> the gradients that ``op.py`` lists."""
        between = between.flatten(0, 1)
        dbetween, *ista_gradients = ista_block.backward(
            grad.flatten(0, 1), between if narrow else between.to(z.dtype), ista_norm_weight, ista_norm_bias, weight,
            folded, out.flatten(0, 1), ista_mean.flatten(), ista_rstd.flatten(), step_size, ista_eps,
        )  # fmt: skip
        gradients = mssa_block.backward(
            dbetween.view(z.shape), z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, lengths,
            w, o, lse, mssa_mean, mssa_rstd, scale, causal, mssa_step_size, mssa_eps,
        )  # fmt: skip
        return *gradients, *ista_gradients

    return why_not, forward, backward
