"""The models. A base model contains a model of this package as ``crate``. A model with a head contains a base model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
)

from ...ops import checks
from ..base import CrateModel
from ..bert import CrateBert
from ..gpt import CrateGPT
from .cache import CrateCache
from .configuration import CrateBertHubConfig, CrateGPTHubConfig


class _CratePreTrainedModel(PreTrainedModel):
    """Base of all wrappers. Base models have ``crate``. Models with a head have a base model as ``model``."""

    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrateBlock", "OvercompleteCrateBlock"]  # noqa: RUF012

    @property
    def crate(self) -> Any:
        """The model of this package inside."""
        return self.model.crate

    def _init_weights(self, module: Any) -> None:
        if any(module is ours for ours in self.crate.modules()):
            # The module lacks weights that the checkpoint left out. transformers protects the weights that it has
            # loaded from torch.nn.init, so resetting the whole model fills only the missing ones. One reset is enough.
            self.crate.reset_parameters()
            _keep_weights(self.crate)
        else:  # the head, or the embedding of a resized vocabulary
            nn.init.normal_(module.weight, std=0.02)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.crate.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.crate.token_embedding = value

    def resize_token_embeddings(self, *arguments, **options) -> nn.Embedding:
        embedding = super().resize_token_embeddings(*arguments, **options)
        self.crate.vocab_size = self.crate.config["vocab_size"] = embedding.num_embeddings
        if (head := getattr(self.crate, "head", None)) is not None:
            # As in torch, the biases of new tokens are zero, and those of dropped tokens are cut off.
            bias = nn.functional.pad(head.bias.data, (0, embedding.num_embeddings - len(head.bias)))
            head.bias = nn.Parameter(bias, requires_grad=head.bias.requires_grad)
        return embedding


class _BaseModel(_CratePreTrainedModel):
    """A model without a head. It runs ``crate`` layer by layer, to return what Hugging Face requests."""

    crate: Any

    def __init__(self, config: PretrainedConfig, crate: CrateModel | None = None, build: Callable | None = None):
        super().__init__(config)
        self.crate = (build or self._build)(config) if crate is None else crate
        self.layers = nn.ModuleList(_Layer() for _ in self.crate.blocks)
        if crate is not None:
            _keep_weights(self)
        self.post_init()

    @staticmethod
    def _build(config) -> CrateModel:
        raise NotImplementedError

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """``input_ids (B, N)`` or ``inputs_embeds (B, N, d)`` -> token embeddings ``(B, N, d)``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one of them")
        if inputs_embeds is None:
            checks.model_input("input_ids", input_ids, self.crate.token_embedding.weight)
            assert input_ids is not None
            checks.tensor("input_ids", input_ids, dtypes=checks.INTEGER)
            if input_ids.dim() != 2 or not input_ids.shape[1]:
                raise ValueError(f"input_ids: expected shape (B, N), N at least 1, got {tuple(input_ids.shape)}")
            checks.indices("input_ids", input_ids, self.crate.vocab_size, "the last token of the vocabulary")
            return self.crate.token_embedding(input_ids)
        width = self.config.hidden_size
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width or not inputs_embeds.shape[1]:
            raise ValueError(f"inputs_embeds: expected shape (B, N, {width}), got {tuple(inputs_embeds.shape)}")
        return inputs_embeds

    def _positions(self, position_ids: Tensor | None, tokens: Tensor) -> Tensor | None:
        """``position_ids (N,)``, ``(1, N)`` or ``(B, N)`` -> ``(B, N)``, checked."""
        if position_ids is None:
            return None
        batch, new = tokens.shape[:2]
        if (
            position_ids.dim() not in (1, 2)
            or position_ids.shape[-1] != new
            or len(position_ids.view(-1, new))
            not in (
                1,
                batch,
            )
        ):
            raise ValueError(f"position_ids: expected shape ({batch}, {new}), got {tuple(position_ids.shape)}")
        most = self.config.max_position_embeddings
        if position_ids.device.type == "cpu" and not (int(position_ids.min()) >= 0 and int(position_ids.max()) < most):
            raise ValueError(f"position_ids: expected positions in 0..{most - 1}")
        return position_ids.view(-1, new).expand(batch, new)

    def _run(self, tokens: Tensor, padding: _Padding, lengths, run, hidden_states: bool, attentions: bool):
        """Run all layers. ``run(i, tokens)`` is the i-th layer.

        Returns the tokens with the real tokens in front, as in the input. Hidden states (a list, or None) and attention
        maps (a list, or None) have the tokens in their original places.
        """
        hidden: list[Tensor] | None = [] if hidden_states else None
        maps: list[Tensor] | None = [] if attentions else None
        for i, (layer, block) in enumerate(zip(self.layers, self.crate.blocks, strict=True)):
            if hidden is not None:
                # The returned tensor lies on the path to the output, so that gradients reach it.
                hidden.append(padding.back(tokens))
                tokens = padding.front(hidden[-1])
            if maps is None:
                tokens = layer(tokens, run=partial(run, i))
            else:
                tokens, attention = layer(tokens, run=partial(_with_maps, block, padding, lengths))
                maps.append(attention)
        return tokens, hidden, maps

    @property
    def _recomputes(self) -> bool:
        return self.training and any(layer.gradient_checkpointing for layer in self.layers)


class _Layer(GradientCheckpointingLayer):
    """Lets transformers switch on gradient checkpointing. It has no parameters, and runs the layer that it is given."""

    def forward(self, tokens: Tensor, run: Callable[[Tensor], Any]) -> Any:
        return run(tokens)


def _with_maps(block: Any, padding: _Padding, lengths: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One layer, computed through its attention maps ``(B, H, N, N)``, and these maps with tokens in their original
    places."""
    seen = []

    def edit(maps: Tensor) -> Tensor:
        seen.append(padding.back(padding.back(maps, 2), 3))
        return padding.front(padding.front(seen[0], 2), 3)

    mixed = block.mssa.with_maps(block.mssa_norm(tokens), lengths, edit=edit)
    return block.sparsify(tokens + mixed), seen[0]


class _Padding:
    """Moves the real tokens of each row to the front, in their order, and back. ``lengths`` then describe the padding.

    Args:
        mask: ``(B, N)`` bool, False for padding; None if there is no padding.
    """

    def __init__(self, mask: Tensor | None):
        self.lengths = None if mask is None else mask.sum(1)
        self._order = None if mask is None else mask.int().argsort(dim=1, descending=True, stable=True)

    def front(self, x: Tensor, dim: int = 1) -> Tensor:
        """``x (B, …)``. Its dimension ``dim`` counts the tokens."""
        return x if self._order is None else _take(x, self._order, dim)

    def back(self, x: Tensor, dim: int = 1) -> Tensor:
        """The inverse of :meth:`front`."""
        return x if self._order is None else _take(x, self._order.argsort(dim=1), dim)


def _take(x: Tensor, order: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    return x.gather(dim, order.view(shape).expand_as(x))


def _checked_mask(attention_mask: Tensor | None, batch: int, past: int, new: int) -> Tensor | None:
    """``attention_mask (B, past + N)`` -> ``(B, N)`` bool for the new tokens; None if there is no mask."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, past + new):
        with_past = f" ({past} tokens in past_key_values and {new} new ones)" if past else ""
        raise ValueError(
            f"attention_mask: expected shape ({batch}, {past + new}){with_past}, got {tuple(attention_mask.shape)}"
        )
    return attention_mask[:, past:].bool()


def _check_real(attention_mask: Tensor | None) -> None:
    """Raise ValueError if a row of ``attention_mask (B, N)`` has no real token. Only masks on the CPU are checked."""
    if attention_mask is None or attention_mask.dim() != 2 or not checks.readable(attention_mask):
        return
    real = attention_mask.bool().any(dim=1)
    if not bool(real.all()):
        raise ValueError(f"attention_mask: row {int(real.int().argmin())} has no real token, only padding")


def _keep_weights(model: nn.Module) -> None:
    """Mark weights as loaded, so that transformers does not initialize them."""
    module: Any
    for module in model.modules():
        module._is_hf_initialized = True


def _as_asked(output, config: PretrainedConfig, return_dict: bool | None):
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _or(value, default):
    return default if value is None else value


class CrateGPTModel(_BaseModel):
    """:class:`crate_kernels.models.CrateGPT` without its head, with Hugging Face's arguments."""

    config_class = CrateGPTHubConfig

    @staticmethod
    def _build(config: CrateGPTHubConfig) -> CrateGPT:
        return CrateGPT(**config.arguments())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CrateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """The last layer's tokens.

        Args:
            input_ids: ``(B, N)``. With ``past_key_values``, the tokens that follow those in the cache.
            attention_mask: ``(B, N)``, or ``(B, past + N)`` with ``past_key_values``; 0 for padding, which may stand
                anywhere.
            position_ids: ``(B, N)``, ``(1, N)`` or ``(N,)``. By default real tokens count from 0, or from the number of
                real tokens in ``past_key_values``.
            past_key_values: the result of an earlier call, or a new :class:`CrateCache`. The new tokens are stored in
                it. If it already contains tokens, the call has no gradients.
            inputs_embeds: ``(B, N, n_embd)``, replaces the embeddings of ``input_ids``.
            use_cache: return a cache. The default is the configuration's value, but False if gradients are recorded or
                attention maps are requested.
            output_attentions: return the attention maps. The layers are then computed from them. Not possible with a
                cache.
            output_hidden_states: return the input of every layer, and the last layer's tokens.

        Returns:
            ``last_hidden_state (B, N, n_embd)``, ``past_key_values``, ``hidden_states``: ``n_layer + 1`` of
            ``(B, N, n_embd)``, ``attentions``: ``n_layer`` of ``(B, H, N, N)``; None for those that are not requested.
        """
        config, crate = self.config, self.crate
        output_attentions = _or(output_attentions, config.output_attentions)
        output_hidden_states = _or(output_hidden_states, config.output_hidden_states)
        default = config.use_cache and not torch.is_grad_enabled() and not output_attentions
        use_cache = _or(use_cache, default) and not self._recomputes
        if past_key_values is not None and not isinstance(past_key_values, CrateCache):
            raise TypeError(f"past_key_values: expected a CrateCache, got {type(past_key_values).__name__}")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past and self._recomputes:
            raise ValueError("past_key_values: gradient checkpointing in training cannot continue a cache")
        if output_attentions and (use_cache or past):
            raise ValueError("output_attentions: not available with a cache; pass all tokens, and use_cache=False")

        tokens = self._embed(input_ids, inputs_embeds)
        batch, new = tokens.shape[:2]
        mask = _checked_mask(attention_mask, batch, past, new)
        if past_key_values is None:  # with a cache, a piece of a text may consist of padding only
            _check_real(attention_mask)
        positions = self._positions(position_ids, tokens)
        cache = places = None
        if use_cache or past:
            past_key_values = CrateCache() if past_key_values is None else past_key_values
            cache = past_key_values.room_for(crate, batch, new)
            places = cache.begin(new)
        elif new > crate.block_size:
            raise ValueError(f"input_ids: {new} tokens, but block_size (max_position_embeddings) is {crate.block_size}")
        padding = _Padding(mask)

        with torch.set_grad_enabled(torch.is_grad_enabled() and not past):
            if positions is None:
                # Without explicit positions, the places in the cache are the positions.
                positions = torch.arange(new, device=tokens.device) if places is None else places
            else:
                positions = padding.front(positions)
            tokens = crate.dropout(padding.front(tokens) + crate.position_embedding(positions))

            def run(i: int, tokens: Tensor) -> Tensor:
                return crate.blocks[i](tokens) if cache is None else crate.cached_layer(i, tokens, cache, places)

            tokens, hidden, maps = self._run(tokens, padding, None, run, output_hidden_states, output_attentions)
            if cache is not None:
                cache.end(torch.full_like(cache.lengths, new) if padding.lengths is None else padding.lengths)
            tokens = padding.back(crate.norm(tokens))
        output = BaseModelOutputWithPast(
            last_hidden_state=tokens,
            past_key_values=past_key_values,
            hidden_states=None if hidden is None else (*hidden, tokens),
            attentions=None if maps is None else tuple(maps),
        )
        return _as_asked(output, config, return_dict)


class CrateBertModel(_BaseModel):
    """:class:`crate_kernels.models.CrateBert` without its head, with Hugging Face's arguments."""

    config_class = CrateBertHubConfig

    @staticmethod
    def _build(config: CrateBertHubConfig) -> CrateBert:
        return CrateBert(**config.arguments(), num_classes=None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """The last layer's tokens.

        Args:
            input_ids: ``(B, N)``.
            attention_mask: ``(B, N)``, 0 for padding, which may stand anywhere.
            token_type_ids: ``(B, N)``, which of two texts a token belongs to; 0 by default.
            position_ids: ``(B, N)``, ``(1, N)`` or ``(N,)``; 0 to N - 1 by default.
            inputs_embeds: ``(B, N, dim)`` in place of the embeddings of ``input_ids``.
            output_attentions: return the attention maps. The layers are then computed from them.
            output_hidden_states: return the input of every layer, and the last layer's tokens.

        Returns:
            ``last_hidden_state (B, N, dim)``, ``hidden_states``: ``depth + 1`` of ``(B, N, dim)``, ``attentions``:
            ``depth`` of ``(B, H, N, N)``; None for those that are not requested.
        """
        config, crate = self.config, self.crate
        output_attentions = _or(output_attentions, config.output_attentions)
        output_hidden_states = _or(output_hidden_states, config.output_hidden_states)
        tokens = self._embed(input_ids, inputs_embeds)
        batch, count = tokens.shape[:2]
        if token_type_ids is not None and token_type_ids.shape != (batch, count):
            raise ValueError(f"token_type_ids: expected shape ({batch}, {count}), got {tuple(token_type_ids.shape)}")
        positions = self._positions(position_ids, tokens)
        padding = _Padding(_checked_mask(attention_mask, batch, 0, count))
        _check_real(attention_mask)
        # A text without real tokens still has a row. Its first token attends to itself, and its result is never used.
        lengths = None if padding.lengths is None else padding.lengths.clamp(min=1)
        tokens = padding.front(crate.add_embeddings(tokens, positions, token_type_ids))

        def run(i: int, tokens: Tensor) -> Tensor:
            return crate.blocks[i](tokens, lengths)

        tokens, hidden, maps = self._run(tokens, padding, lengths, run, output_hidden_states, output_attentions)
        tokens = padding.back(tokens)
        output = BaseModelOutput(
            last_hidden_state=tokens,
            hidden_states=None if hidden is None else (*hidden, tokens),
            attentions=None if maps is None else tuple(maps),
        )
        return _as_asked(output, config, return_dict)


class _WithHead(_CratePreTrainedModel):
    """A model with a head. The base model is ``model``."""

    _base: type[_BaseModel]

    def __init__(self, config: PretrainedConfig, crate: CrateModel | None = None):
        super().__init__(config)
        self.model = self._base(config, crate, self._build)
        self._add_head()
        self.post_init()

    _build: Callable | None = None
    """Builds this package's model of a configuration, with its head; None if the head is a separate module."""

    def _add_head(self) -> None:
        pass

    @property
    def crate(self) -> Any:
        """The model of this package inside."""
        return self.model.crate


class CrateGPTForCausalLM(_WithHead, GenerationMixin):
    """:class:`crate_kernels.models.CrateGPT` with Hugging Face's arguments; padding on either side.

    ``generate`` keeps the one-tensor cache, up to ``block_size`` tokens of prompt and continuation together.
    """

    config_class = CrateGPTHubConfig
    accepts_loss_kwargs = True  # the trainer of transformers passes num_items_in_batch
    _base = CrateGPTModel

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # transformers' caches store keys and values separately

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, mode, batch_size: int, max_cache_length: int, *more
    ) -> None:
        if max_cache_length > self.crate.block_size:  # the model does not read the last token of the text
            raise ValueError(
                f"max_new_tokens, max_length: the text would have {max_cache_length + 1} tokens, but the model takes "
                f"{self.crate.block_size} (max_position_embeddings)"
            )
        _check_real(model_kwargs.get("attention_mask"))
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: this model has its own cache, got {generation_config.cache_implementation!r}"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = CrateCache()

    def prepare_inputs_for_generation(
        self, *args, inputs_embeds=None, tokenizer=None, assistant_tokenizer=None, **kwargs
    ):
        # generate passes on the tokenizers that it got for stop_strings; forward has no use for them. It looks for
        # inputs_embeds in this signature.
        return super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CrateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others: Tensor | None,
    ) -> CausalLMOutputWithPast:
        """Predict the next token after each token.

        Args:
            labels: ``(B, N)``, usually ``input_ids``; -100 is ignored. This method shifts them. Padding is neither a
                target nor an input of a target.
            logits_to_keep: number of last tokens whose logits are returned, or indices of tokens; 0 for all.
            num_items_in_batch: the loss is the sum over all labels divided by this number. Default: the number of
                labels.
            others: ``shift_labels (B, N)``, labels that are already shifted, instead of ``labels``. It is no named
                parameter, because the trainer of transformers would require every parameter whose name contains "label"
                in each batch.

        All further arguments: see :meth:`CrateGPTModel.forward`.

        Returns:
            ``loss`` (None without labels), ``logits (B, N, vocab_size)``, and what the model without head returns.
        """
        shift_labels = others.pop("shift_labels", None)
        if others:
            raise TypeError(f"forward() got an unexpected keyword argument {next(iter(others))!r}")
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            output_attentions, output_hidden_states, True,
        )  # fmt: skip
        tokens = output.last_hidden_state
        keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.crate.forward_head(tokens[:, keep])
        loss = None
        if shift_labels is None and labels is not None:
            _check_labels("labels", labels, tokens.shape[:2])
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            if attention_mask is not None:
                real = attention_mask[:, -labels.shape[1] :].bool()
                shift_labels[:, :-1].masked_fill_(~(real[:, 1:] & real[:, :-1]), -100)
        if shift_labels is not None:
            if logits.shape[:2] != tokens.shape[:2]:
                raise ValueError("logits_to_keep: a loss needs the logits of all tokens")
            _check_labels("shift_labels", shift_labels, tokens.shape[:2])
            loss = _token_loss(logits, shift_labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return _as_asked(output, self.config, return_dict)


class CrateGPTForSequenceClassification(_WithHead):
    """Classifies a text or rates it (regression, several labels), by a Linear layer on the last real token's output.

    ``config.problem_type`` and ``config.num_labels`` choose the loss, as in every model of transformers.
    """

    config_class = CrateGPTHubConfig
    _base = CrateGPTModel

    def _add_head(self) -> None:
        self.score = nn.Linear(self.config.hidden_size, self.config.num_labels, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CrateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutputWithPast:
        """Classify each text.

        Args:
            attention_mask: ``(B, N)``, 0 for padding. Without it ``config.pad_token_id`` marks padding, if it is set.
            labels: classes ``(B,)``, or numbers ``(B, num_labels)``.
            others: other arguments, see :meth:`CrateGPTModel.forward`.

        Returns:
            ``loss`` (None without labels), ``logits (B, num_labels)``, and what the model without head returns.
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            output_attentions, output_hidden_states, True,
        )  # fmt: skip
        tokens = output.last_hidden_state
        places = torch.arange(tokens.shape[1], device=tokens.device)
        if attention_mask is None:
            last = places[-1:].expand(len(tokens))
        else:
            last = (attention_mask[:, -len(places) :].bool() * places).amax(1)
        logits = self.score(tokens[torch.arange(len(tokens), device=tokens.device), last])
        output = SequenceClassifierOutputWithPast(
            loss=None if labels is None else _class_loss(self, logits, labels),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return _as_asked(output, self.config, return_dict)


def _check_labels(name: str, labels: Tensor, shape: torch.Size) -> None:
    if labels.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(labels.shape)}")


def _token_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """Cross-entropy of ``logits (B, N, V)`` and ``labels (B, N)``; labels of -100 are ignored."""
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="mean" if items is None else "sum"
    )
    return total if items is None else total / items


def _class_loss(model: PreTrainedModel, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, mean squared error or binary cross-entropy, as ``config.problem_type`` says."""
    if len(labels) != len(logits):
        raise ValueError(f"labels: expected {len(logits)} rows, got {tuple(labels.shape)}")
    return model.loss_function(labels=labels, pooled_logits=logits, config=model.config)


class CrateBertForMaskedLM(_WithHead):
    """:class:`crate_kernels.models.CrateBert` that predicts masked tokens, with Hugging Face's arguments."""

    config_class = CrateBertHubConfig
    accepts_loss_kwargs = True
    _base = CrateBertModel
    _output: type = MaskedLMOutput

    @staticmethod
    def _build(config: CrateBertHubConfig) -> CrateBert:
        return CrateBert(**config.arguments())

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        _check_labels("labels", labels, logits.shape[:2])
        return _token_loss(logits, labels, items)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Predict the masked tokens, or classify or rate each text.

        Args:
            labels: the true tokens ``(B, N)``; -100 is ignored. For a classifier: classes ``(B,)``, or numbers
                ``(B, num_labels)``.
            num_items_in_batch: as for :meth:`CrateGPTForCausalLM.forward`; not for a classifier.
            others: other arguments, see :meth:`CrateBertModel.forward`.

        Returns:
            ``loss`` (None without labels), ``logits (B, N, vocab_size)`` or ``(B, num_labels)``, and what the model
            without head returns.
        """
        output = self.model(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states, True,
        )  # fmt: skip
        logits = self.crate.forward_head(output.last_hidden_state)
        output = self._output(
            loss=None if labels is None else self._loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return _as_asked(output, self.config, return_dict)


class CrateBertForSequenceClassification(CrateBertForMaskedLM):
    """:class:`crate_kernels.models.CrateBert` that classifies or rates a text (regression, several labels).

    ``config.problem_type`` and ``config.num_labels`` choose the loss, as in every model of transformers.
    """

    accepts_loss_kwargs = False
    _output = SequenceClassifierOutput

    @staticmethod
    def _build(config: CrateBertHubConfig) -> CrateBert:
        return CrateBert(**config.arguments(), num_classes=config.num_labels)

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        if items is not None:
            raise ValueError("num_items_in_batch: a classifier's loss is the mean over its texts")
        return _class_loss(self, logits, labels)


def wrap(model: CrateGPT | CrateBert) -> PreTrainedModel:
    """A Hugging Face model around ``model``. Both share the parameters.

    Raises:
        TypeError: ``model`` is not a language model of this package.
    """
    if not isinstance(model, CrateGPT | CrateBert):
        raise TypeError(
            f"wrap: takes a CrateGPT or a CrateBert, got {type(model).__name__}; vision models are timm's, see"
            " crate_kernels.models.timm_registry"
        )
    options = dict(model.config)
    if isinstance(model, CrateGPT):
        wrapped = CrateGPTForCausalLM(CrateGPTHubConfig(**options), model)
    else:
        classes = options.pop("num_classes")
        options["max_position_embeddings"] = options.pop("max_length")
        if classes is None:
            wrapped = CrateBertModel(CrateBertHubConfig(**options), model)
        elif classes:
            wrapped = CrateBertForSequenceClassification(CrateBertHubConfig(**options, num_labels=classes), model)
        else:
            wrapped = CrateBertForMaskedLM(CrateBertHubConfig(**options), model)
    return wrapped.train(model.training)
