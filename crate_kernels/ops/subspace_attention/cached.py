"""Causal subspace attention of new tokens over a cache: the decode step of generation.

Query, key and value are one tensor, so the cache contains only ``w``. It is half as large as a key-value cache.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .. import backends, checks
from ..operator import traced

TRITON = importlib.util.find_spec("triton") is not None

_trusted: set[tuple[torch.device, torch.dtype]] = set()
"""Devices on which the automatic choice may take Triton's attention kernels. Each is decided once."""


def cached_subspace_attention(
    w: Tensor, cache: Tensor, positions: Tensor, *, block_table: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The rows of causal :func:`subspace_attention` that belong to new tokens, against all tokens so far.

    ``o_i = softmax_j(scale · w_i · cache_j) cache_j`` over ``j <= positions_i``, in every head (arXiv 2306.01129,
    equation 11, row by row).

    On a GPU a Triton kernel runs calls without gradients, with up to 64 new tokens and heads of width 8 to 256. It
    reads each cached token once, as key and as value. All other calls run in stock PyTorch, including those that
    request a backend other than ``triton``.

    Args:
        w: ``(B, M, H, p)``, the projections of the new tokens; float16, bfloat16, float32 or float64.
        cache: ``(B, N, H, p)``, the projections of all tokens in their places, including the new ones.
        positions: ``(B, M)`` int64 in 0..N-1, the places of the new tokens. They may differ between sequences, so
            sequences of different lengths can share a batch. Places of the cache after them have the weight zero.
            Without ``block_table`` these places must hold finite numbers, such as zeros, because zero times NaN is NaN.
        block_table: ``(B, T)`` int32 or int64, for a paged cache. The cache is then a pool ``(blocks, S, H, p)`` that
            all sequences share. Token j of sequence b is in ``cache[block_table[b, j // S], j % S]``, and N is T·S.
            Entries beyond the last position of a sequence may hold anything.
        scale: factor of the scores; ``p ** -0.5`` if None.

    Returns:
        ``(B, M, H, p)`` in the dtype of ``w``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device. The values of ``positions`` and
            ``block_table`` are checked on the CPU only, because a check would stall a GPU. On a GPU the Triton kernel
            replaces a value out of range by the nearest value in range.
    """
    checks.tensor("w", w, ("B", "M", "H", "p"))
    batch, tokens, heads, width = w.shape
    if width < 1:
        raise ValueError(f"w: expected shape (B, M, H, p) with p at least 1, got {tuple(w.shape)}")
    paged = block_table is not None
    checks.tensor("cache", cache, ("blocks", "S", heads, width) if paged else (batch, "N", heads, width), like=w)
    checks.same_dtype(w.dtype, cache=cache)
    checks.tensor("positions", positions, (batch, tokens), like=w, dtypes=(torch.int64,))
    places = cache.shape[1]
    if block_table is not None:
        checks.tensor("block_table", block_table, (batch, "T"), like=w, dtypes=checks.INTEGER)
        places *= block_table.shape[1]
        if not (places and cache.shape[0]):
            raise ValueError(f"cache, block_table: no room in {tuple(cache.shape)} and {tuple(block_table.shape)}")
    checks.values_within("positions", positions, 0, places - 1, "the last place of the cache")
    scale = width**-0.5 if scale is None else checks.number("scale", scale)
    w, cache = backends.cast(backends.autocast_dtype(w), w, cache)
    if _decodes(w, cache):
        from ..triton_kernels.decoding import decode

        return backends.run(decode, w, cache, positions, scale, block_table)
    if block_table is not None:
        cache = _gathered(cache, block_table, positions)
    visible = torch.arange(cache.shape[1], device=w.device) <= positions[..., None]
    keys = cache.transpose(1, 2)
    o = torch.nn.functional.scaled_dot_product_attention(
        w.transpose(1, 2), keys, keys, attn_mask=visible[:, None], scale=scale
    )
    return o.transpose(1, 2)


def _gathered(cache: Tensor, block_table: Tensor, positions: Tensor) -> Tensor:
    """A paged cache as ``(B, N, H, p)``, with zeros beyond the last position of each sequence."""
    size, count = cache.shape[1], block_table.shape[1]
    last = positions.amax(1, keepdim=True) if positions.shape[1] else positions.new_full((len(positions), 1), -1)
    used = torch.arange(count, device=cache.device) <= last // size
    table = torch.where(used, block_table, 0)
    checks.values_within("block_table", table, 0, cache.shape[0] - 1, "the last block of the cache")
    tokens = cache[table].flatten(1, 2)
    seen = torch.arange(tokens.shape[1], device=cache.device) <= last
    return torch.where(seen[..., None, None], tokens, 0)


def _decodes(w: Tensor, cache: Tensor) -> bool:
    """Whether the Triton kernel runs this call."""
    requested = backends.requested_backend()
    wanted = w.device.type == "cuda" if requested is None else requested == "triton"
    if not wanted or not TRITON or traced():
        return False
    from ..triton_kernels.decoding import why_not

    if why_not(w, cache) is not None:
        return False
    kind = w.device, w.dtype
    if requested is None and kind not in _trusted:
        if not backends.trusted("subspace_attention", "triton", (w, cache)):
            return False
        _trusted.add(kind)
    return True
