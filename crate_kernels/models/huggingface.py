"""The language models as Hugging Face models: ``AutoModel…``, ``save_pretrained``, ``generate``.

Importing this module registers them. It needs the package transformers, which nothing else here does::

    import crate_kernels.models.huggingface
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

A model wraps one of ours in ``.model``; ``wrap`` puts an existing one in, sharing its parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import CrateModel
from .bert import CrateBert
from .generation import ProjectionCache
from .gpt import CrateGPT

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput
except ImportError as error:
    raise ImportError(
        "Hugging Face models need the package transformers: pip install 'crate_kernels[huggingface]'"
    ) from error


class CrateGPTHubConfig(PretrainedConfig):
    """The fields of :class:`crate_kernels.models.CrateGPTConfig`, and what Hugging Face keeps beside them."""

    model_type = "crate_gpt"
    attribute_map = {  # noqa: RUF012 (the base class's own convention)
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
    }

    def __init__(
        self,
        block_size: int = 1024,
        vocab_size: int = 50304,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.0,
        overcomplete: bool = False,
        **options,
    ):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.n_layer, self.n_head, self.n_embd = n_layer, n_head, n_embd
        self.dropout, self.overcomplete = dropout, overcomplete
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
        **options,
    ):
        self.vocab_size, self.token_types = vocab_size, token_types
        # Not max_length: Hugging Face keeps that name for generation.
        self.max_position_embeddings = max_position_embeddings
        self.dim, self.depth, self.heads = dim, depth, heads
        self.dropout, self.emb_dropout = dropout, emb_dropout
        super().__init__(**options)

    def arguments(self) -> dict:
        """The arguments of our constructor, but for ``num_classes``."""
        names = ("vocab_size", "token_types", "dim", "depth", "heads", "dropout", "emb_dropout")
        return {name: getattr(self, name) for name in names} | {"max_length": self.max_position_embeddings}


class _CratePreTrainedModel(PreTrainedModel):
    """What the wrappers share: one of our models as ``model``."""

    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: PretrainedConfig, model: CrateModel | None = None):
        super().__init__(config)
        self.model = self._build(config) if model is None else model
        if not self.model.token_embedding.weight.is_meta:
            # Our constructors have filled the weights. Only those that from_pretrained lays out first have none yet.
            for module in self.modules():
                module._is_hf_initialized = True
        self.post_init()

    @staticmethod
    def _build(config) -> CrateModel:
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        # Called for modules that a checkpoint left out. transformers shields what it has filled from torch.nn.init, so
        # resetting the whole model fills just the rest.
        self.model.reset_parameters()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.token_embedding = value


class CrateGPTForCausalLM(_CratePreTrainedModel, GenerationMixin):
    """:class:`crate_kernels.models.CrateGPT` with Hugging Face's arguments; padding on either side.

    ``generate`` keeps the one-tensor cache, up to ``block_size`` tokens of prompt and continuation together.
    """

    config_class = CrateGPTHubConfig

    @staticmethod
    def _build(config: CrateGPTHubConfig) -> CrateGPT:
        return CrateGPT(**config.arguments())

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # its caches hold keys and values apart

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: ProjectionCache | None = None,
        use_cache: bool = False,
        return_dict: bool | None = None,
        **_,
    ) -> CausalLMOutputWithPast:
        """Predict the token after each.

        Args:
            input_ids: ``(B, N)``; with ``past_key_values`` those that follow what it holds.
            attention_mask: ``(B, N)``, 0 for padding, before or after a text. Positions count real tokens only.
            labels: ``(B, N)``, usually ``input_ids``, -100 where nothing is asked; shifted here.
            past_key_values: what an earlier call with ``use_cache`` returned.
            use_cache: return a cache; logits are then of the last token only, ``(B, 1, vocab_size)``.

        Returns:
            ``loss`` (None without labels), ``logits (B, N, vocab_size)``, ``past_key_values``.
        """
        if past_key_values is not None:
            logits = self.model.step(input_ids, past_key_values)[:, None]
            return _as_asked(CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values), return_dict)
        order = lengths = None
        if attention_mask is not None:
            # Texts to the front: then causality alone hides the padding, and positions begin at 0.
            order = attention_mask.bool().int().argsort(dim=1, descending=True, stable=True)
            lengths = attention_mask.bool().sum(1)
            input_ids = input_ids.gather(1, order)
        if use_cache and labels is None and not torch.is_grad_enabled():
            cache = self.model.new_cache(len(input_ids))
            logits = self.model.step(input_ids, cache, lengths)[:, None]
            return _as_asked(CausalLMOutputWithPast(logits=logits, past_key_values=cache), return_dict)
        features = self.model.forward_features(input_ids)
        if order is not None:
            features = features.gather(1, order.argsort(dim=1)[..., None].expand_as(features))
        logits = self.model.forward_head(features)
        loss = None
        if labels is not None:
            asked = labels[:, 1:]
            if attention_mask is not None:
                # Neither is padding asked for, nor does it answer.
                asked = asked.masked_fill((attention_mask[:, 1:] == 0) | (attention_mask[:, :-1] == 0), -100)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), asked.flatten())
        return _as_asked(CausalLMOutputWithPast(loss=loss, logits=logits), return_dict)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: ProjectionCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        **_,
    ) -> dict:
        new = input_ids if past_key_values is None else input_ids[:, -1:]
        inputs = {"input_ids": new, "past_key_values": past_key_values, "use_cache": use_cache}
        return inputs | {"attention_mask": attention_mask if past_key_values is None else None}


class CrateBertForMaskedLM(_CratePreTrainedModel):
    """:class:`crate_kernels.models.CrateBert` that names masked tokens, with Hugging Face's arguments."""

    config_class = CrateBertHubConfig
    _output = MaskedLMOutput

    @staticmethod
    def _build(config: CrateBertHubConfig) -> CrateBert:
        return CrateBert(**config.arguments())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **_,
    ):
        """``input_ids (B, N)``; ``attention_mask (B, N)``, 0 for padding, after the text; ``labels`` the true tokens
        ``(B, N)``, -100 where nothing is asked, or the classes ``(B,)`` -> ``loss``, ``logits``."""
        lengths = None
        if attention_mask is not None:
            lengths = attention_mask.bool().sum(1)
            front = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
            if not torch.equal(attention_mask.bool(), front):
                raise ValueError("attention_mask: padding must stand after the text (tokenizer.padding_side = 'right')")
        logits, _ = self.model(input_ids, lengths, token_type_ids)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.flatten())
        return _as_asked(self._output(loss=loss, logits=logits), return_dict)


class CrateBertForSequenceClassification(CrateBertForMaskedLM):
    """:class:`crate_kernels.models.CrateBert` with ``config.num_labels`` classes."""

    _output = SequenceClassifierOutput

    @staticmethod
    def _build(config: CrateBertHubConfig) -> CrateBert:
        return CrateBert(**config.arguments(), num_classes=config.num_labels)


def _as_asked(output, return_dict: bool | None):
    return output.to_tuple() if return_dict is False else output


def wrap(model: CrateGPT | CrateBert) -> PreTrainedModel:
    """A Hugging Face model around ``model``; the parameters are shared."""
    options = dict(model.config)
    if isinstance(model, CrateGPT):
        return CrateGPTForCausalLM(CrateGPTHubConfig(**options), model)
    classes = options.pop("num_classes")
    options["max_position_embeddings"] = options.pop("max_length")
    if classes:
        return CrateBertForSequenceClassification(CrateBertHubConfig(**options, num_labels=classes), model)
    return CrateBertForMaskedLM(CrateBertHubConfig(**options), model)


# What `save_pretrained` writes names these classes; with them known, the Auto classes find them.
AutoConfig.register("crate_gpt", CrateGPTHubConfig, exist_ok=True)
AutoConfig.register("crate_bert", CrateBertHubConfig, exist_ok=True)
AutoModelForCausalLM.register(CrateGPTHubConfig, CrateGPTForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(CrateBertHubConfig, CrateBertForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(CrateBertHubConfig, CrateBertForSequenceClassification, exist_ok=True)
