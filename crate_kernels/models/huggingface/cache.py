"""The one-tensor cache as Hugging Face's ``past_key_values``."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from ..generation import ProjectionCache
from ..gpt import CrateGPT


class CrateCache(Cache):
    """The one-tensor cache of :class:`~crate_kernels.models.generation.ProjectionCache` as ``past_key_values``.

    The cache grows with the tokens. Padding is not stored.

    Attributes:
        projections: the stored tokens; None before the first call.
    """

    is_compileable = False

    def __init__(self):
        super().__init__(layers=[])
        self.projections: ProjectionCache | None = None
        self._seen = 0

    def __repr__(self) -> str:
        return f"CrateCache({self._seen} tokens)"

    def __len__(self) -> int:
        return 0 if self.projections is None else len(self.projections.w)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens of each sequence, padding included."""
        return self._seen

    def get_max_length(self) -> int:
        return -1  # the value in transformers for a cache without its own limit

    get_max_cache_shape = get_max_length

    def room_for(self, crate: CrateGPT, batch: int, new: int) -> ProjectionCache:
        """The projections, with space for ``new`` additional tokens of each of ``batch`` sequences."""
        if self.projections is None:
            self.projections = crate.new_cache(batch, new)
        elif len(self.projections.lengths) != batch:
            raise ValueError(
                f"past_key_values: holds {len(self.projections.lengths)} sequences, but input_ids has {batch}"
            )
        needed = self.projections.longest + new
        if needed > crate.block_size:
            raise ValueError(
                f"past_key_values: {needed} tokens with the new ones, but block_size (max_position_embeddings) is"
                f" {crate.block_size}"
            )
        self.projections.reserve(needed, most=crate.block_size)
        self._seen += new
        return self.projections

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of every sequence; the number is negative, or 0 for none."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected 0 or a negative number of tokens, got {tokens_to_remove}")
        if tokens_to_remove and self.projections is not None:
            self.projections.forget(-tokens_to_remove)
            self._seen += tokens_to_remove

    def reset(self) -> None:
        self.projections, self._seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.projections is not None:
            rows = torch.arange(len(self.projections.lengths), device=self.projections.lengths.device)
            self.projections.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.projections is not None:
            self.projections.reorder_cache(indices.to(self.projections.lengths.device))

    def activate_past_recording(self) -> None:
        """Nothing to do: the cache can always be cropped."""
