"""The configurations: the arguments of this package's constructors, and the fields that Hugging Face adds."""

from __future__ import annotations

from transformers import PretrainedConfig


class CrateGPTHubConfig(PretrainedConfig):
    """The fields of :class:`crate_kernels.models.CrateGPTConfig`, and the fields that Hugging Face adds."""

    model_type = "crate_gpt"
    attribute_map = {  # noqa: RUF012 (the base class's own convention)
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        block_size: int = 1024,
        vocab_size: int = 50304,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.0,
        overcomplete: bool = False,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **options,
    ):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.n_layer, self.n_head, self.n_embd = n_layer, n_head, n_embd
        self.dropout, self.overcomplete, self.use_cache = dropout, overcomplete, use_cache
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        super().__init__(**options)

    def arguments(self) -> dict:
        """The arguments of our constructor."""
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "overcomplete")
        return {name: getattr(self, name) for name in names}


class CrateBertHubConfig(PretrainedConfig):
    """The arguments of :class:`crate_kernels.models.CrateBert`; ``num_labels`` is its ``num_classes``."""

    model_type = "crate_bert"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "type_vocab_size": "token_types",
    }

    def __init__(
        self,
        vocab_size: int = 50265,
        max_position_embeddings: int = 512,
        token_types: int = 2,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        dropout: float = 0.0,
        emb_dropout: float = 0.1,
        pad_token_id: int | None = None,
        **options,
    ):
        self.vocab_size, self.token_types = vocab_size, token_types
        # Not max_length: Hugging Face keeps that name for generation.
        self.max_position_embeddings = max_position_embeddings
        self.dim, self.depth, self.heads = dim, depth, heads
        self.dropout, self.emb_dropout, self.pad_token_id = dropout, emb_dropout, pad_token_id
        super().__init__(**options)

    def arguments(self) -> dict:
        """The arguments of this package's constructor, without ``num_classes``."""
        names = ("vocab_size", "token_types", "dim", "depth", "heads", "dropout", "emb_dropout")
        return {name: getattr(self, name) for name in names} | {"max_length": self.max_position_embeddings}
