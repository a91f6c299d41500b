"""Names, sizes and constructor arguments of every family."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from crate_kernels import models
from crate_kernels.models import create_model
from crate_kernels.models.registry import FACTORIES
from crate_kernels.nn import ISTA, MSSA, OvercompleteISTA

GUIDES = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("guide", ["models_vision.md", "models_language.md"])
def test_the_guides_name_every_model_and_its_parameters(guide):
    text = (GUIDES / guide).read_text()
    listed = dict(re.findall(r"^\| `(crate_\w+)` \|.*?([\d,]+) \|$", text, re.MULTILINE))
    with torch.device("meta"):
        counted = {
            name: f"{sum(p.numel() for p in create_model(name).parameters() if p.requires_grad):,}"
            for name in FACTORIES
            if ("_patch" in name) == (guide == "models_vision.md")
        }
    assert listed == counted


SMALL = {
    "CRATE": dict(image_size=8, patch_size=4, num_classes=3, dim=8, depth=1, heads=2, dim_head=4),
    "CrateAlpha": dict(image_size=8, patch_size=4, num_classes=3, dim=8, depth=1, heads=2, dim_head=4),
    "CrateMAE": dict(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, decoder_depth=1),
    "CrateDINO": dict(
        image_size=8, patch_size=4, dim=8, depth=1, heads=2, dim_head=4, hidden=8, bottleneck=4, prototypes=4
    ),
    "CrateGPT": dict(block_size=8, vocab_size=8, n_layer=1, n_head=2, n_embd=8),
    "CrateBert": dict(vocab_size=8, max_length=8, dim=8, depth=1, heads=2),
}
MAY_BE_ZERO = {"num_classes", "prototypes"}
SIZES = [(family, name) for family, options in SMALL.items() for name in options]


@pytest.mark.parametrize(("family", "name"), SIZES)
def test_sizes_out_of_range_are_refused_by_name(family, name):
    options = SMALL[family]
    for value in (-1, 0, 2.5, "4"):
        if value == 0 and name in MAY_BE_ZERO:
            continue
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            getattr(models, family)(**options | {name: value})
    model = getattr(models, family)(**options | {name: np.int64(options[name])})
    assert json.loads(json.dumps(model.config))[name] == options[name]


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("CRATE", "channels", 0),
        ("CRATE", "dropout", 1.5),
        ("CRATE", "emb_dropout", -0.1),
        ("CRATE", "ista", -0.1),
        ("CrateMAE", "in_chans", 0),
        ("CrateMAE", "decoder_num_heads", 0),
        ("CrateMAE", "lambd", -1.0),
        ("CrateGPT", "dropout", float("nan")),
        ("CrateBert", "emb_dropout", 2),
        ("CrateBert", "num_classes", -1),
        ("CrateBert", "token_types", 0),
    ],
)
def test_other_arguments_are_refused_by_name(family, name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        getattr(models, family)(**SMALL[family] | {name: value})


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        (MSSA, "dim", dict(dim=0)),
        (MSSA, "heads", dict(dim=8, heads=0, dim_head=None)),
        (MSSA, "dim_head", dict(dim=8, dim_head=0)),
        (MSSA, "dropout", dict(dim=8, dropout=-1.0)),
        (ISTA, "dim", dict(dim=-1)),
        (OvercompleteISTA, "expansion", dict(dim=8, expansion=0)),
    ],
)
def test_modules_refuse_by_name(module, name, options):
    with pytest.raises(ValueError, match=f"^{name}: "):
        module(**options)
