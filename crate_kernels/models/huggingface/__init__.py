"""The language models as Hugging Face models: ``AutoModel…``, ``save_pretrained``, ``generate``, ``pipeline``.

Importing this module registers the models. It needs the package transformers, which the rest of this package does not::

    import crate_kernels.models.huggingface
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

Every model contains a model of this package as ``crate``. ``wrap`` wraps an existing model and shares its parameters.
An argument that a model does not support raises an error that names the argument.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...extras import needs

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        GenerationMixin,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
except ImportError as error:
    raise ImportError(needs("crate_kernels.models.huggingface", "transformers")) from error

from .. import checkpoint, registry
from ..bert import CrateBert
from .cache import CrateCache as CrateCache
from .configuration import CrateBertHubConfig as CrateBertHubConfig
from .configuration import CrateGPTHubConfig as CrateGPTHubConfig
from .models import CrateBertForMaskedLM as CrateBertForMaskedLM
from .models import CrateBertForSequenceClassification as CrateBertForSequenceClassification
from .models import CrateBertModel as CrateBertModel
from .models import CrateGPTForCausalLM as CrateGPTForCausalLM
from .models import CrateGPTForSequenceClassification as CrateGPTForSequenceClassification
from .models import CrateGPTModel as CrateGPTModel
from .models import wrap as wrap
from .tokenizing import tokenizer as tokenizer


def from_file(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None]:
    """The language model in a file of ``crate-kernels train-text`` or ``CrateModel.save``, and its tokenizer.

    The tokenizer is None if the file does not name one. Model and tokenizer together make a pipeline, or can be saved
    to a folder with ``save_pretrained``::

        model, tokenizer = from_file("runs/text-gpt2/model.safetensors")
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    """
    loaded: Any = registry.load_model(path)
    model = wrap(loaded.eval())
    name = checkpoint.read_metadata(path).get("tokenizer")
    if name is None:
        return model, None
    found = tokenizer(name, masked=isinstance(model.crate, CrateBert))
    found.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = model.config.eos_token_id = model.config.bos_token_id = found.eos_token_id
    if isinstance(model, GenerationMixin):
        generation = model.generation_config
        generation.pad_token_id = generation.eos_token_id = generation.bos_token_id = found.eos_token_id
    return model, found


# The files of `save_pretrained` name these classes, so the Auto classes must know them.
for _config, _classes in (
    (
        CrateGPTHubConfig,
        {
            AutoModel: CrateGPTModel,
            AutoModelForCausalLM: CrateGPTForCausalLM,
            AutoModelForSequenceClassification: CrateGPTForSequenceClassification,
        },
    ),
    (
        CrateBertHubConfig,
        {
            AutoModel: CrateBertModel,
            AutoModelForMaskedLM: CrateBertForMaskedLM,
            AutoModelForSequenceClassification: CrateBertForSequenceClassification,
        },
    ),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _class in _classes.items():
        _auto.register(_config, _class, exist_ok=True)
