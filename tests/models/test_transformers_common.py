"""transformers' own common model tests on the models of this package, if their source is present.

The installed package does not contain them. The source distribution does. Unpack it and name its folder of tests::

    pip download --no-deps --no-binary :all: transformers && tar xzf transformers-*.tar.gz
    pip install parameterized
    CRATE_KERNELS_TRANSFORMERS_TESTS=transformers-5.23.0/tests \\
        python -m pytest -o addopts= tests/models/test_transformers_common.py

``test_huggingface.py`` checks the same promises without it.
"""

import importlib
import os
import sys
import types
import unittest

import pytest
import torch

FOLDER = os.environ.get("CRATE_KERNELS_TRANSFORMERS_TESTS")
if not FOLDER:
    pytest.skip("needs the tests in transformers' source distribution", allow_module_level=True)

from transformers.models.auto import modeling_auto  # noqa: E402

from crate_kernels.models.huggingface import (  # noqa: E402
    CrateBertForMaskedLM,
    CrateBertForSequenceClassification,
    CrateBertHubConfig,
    CrateBertModel,
    CrateGPTForCausalLM,
    CrateGPTForSequenceClassification,
    CrateGPTHubConfig,
    CrateGPTModel,
)


def common_tests():
    """The module ``test_modeling_common``; the two mixins that the source distribution lacks stay empty."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [os.path.abspath(FOLDER)]
    sys.modules[package.__name__] = package
    for parent, module, mixin in (
        ("exporters", "test_export", "ExportTesterMixin"),
        ("generation", "test_utils", "GenerationTesterMixin"),
    ):
        for name in (f"transformers_tests.{parent}", f"transformers_tests.{parent}.{module}"):
            sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], mixin, type(mixin, (), {}))
    return importlib.import_module("transformers_tests.test_modeling_common")


common = common_tests()
# The common tests look up by these tables which inputs a class takes.
modeling_auto.MODEL_MAPPING_NAMES.update(crate_gpt="CrateGPTModel", crate_bert="CrateBertModel")
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["crate_gpt"] = "CrateGPTForCausalLM"
modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES["crate_bert"] = "CrateBertForMaskedLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.update(
    crate_gpt="CrateGPTForSequenceClassification", crate_bert="CrateBertForSequenceClassification"
)

VOCABULARY = 99


class Sizes:
    """A tiny configuration and its inputs, in the form of the common tests."""

    is_training = True
    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 4, 7, 16, 2, 2
    vocab_size, num_labels = VOCABULARY, 3

    def __init__(self, parent):
        self.parent = parent

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, VOCABULARY, (self.batch_size, self.seq_length), generator=generator)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class GPTSizes(Sizes):
    def get_config(self):
        return CrateGPTHubConfig(
            block_size=32, vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=16, num_labels=3, pad_token_id=0
        )


class BertSizes(Sizes):
    def get_config(self):
        return CrateBertHubConfig(
            vocab_size=VOCABULARY, max_position_embeddings=32, dim=16, depth=2, heads=2, emb_dropout=0.0, num_labels=3
        )


class GPTTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    test_can_init_all_missing_weights_before_2023 = True
    all_model_classes = (CrateGPTModel, CrateGPTForCausalLM, CrateGPTForSequenceClassification)

    def setUp(self):
        self.model_tester = GPTSizes(self)


class BertTest(common.ModelTesterMixin, unittest.TestCase):
    test_can_init_all_missing_weights_before_2023 = True
    all_model_classes = (CrateBertModel, CrateBertForMaskedLM, CrateBertForSequenceClassification)

    def setUp(self):
        self.model_tester = BertSizes(self)
