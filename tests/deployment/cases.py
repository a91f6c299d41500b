"""Small models of every kind, their inputs, and the outputs that they should give."""

import pytest
import torch

from crate_kernels import ops
from crate_kernels.deployment import FORMATS, example
from crate_kernels.models import CRATE, CrateAlpha, CrateBert, CrateDINO, CrateGPT, CrateMAE

SMALL = dict(image_size=16, patch_size=8, dim=16, depth=2, heads=2, dim_head=8)
TEXT = dict(vocab_size=31, dropout=0.0)
MODELS = {
    "crate": lambda: CRATE(**SMALL, num_classes=5),
    "crate-features": lambda: CRATE(**SMALL, num_classes=0, pool="mean"),
    "alpha": lambda: CrateAlpha(**SMALL, num_classes=5),
    "mae": lambda: CrateMAE(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, decoder_depth=1),
    "dino": lambda: CrateDINO(**SMALL, hidden=8, bottleneck=4, prototypes=4),
    "gpt": lambda: CrateGPT(block_size=12, n_layer=2, n_head=2, n_embd=16, **TEXT),
    "lm": lambda: CrateGPT(block_size=12, n_layer=1, n_head=2, n_embd=16, overcomplete=True, **TEXT),
    "bert": lambda: CrateBert(max_length=12, dim=16, depth=2, heads=2, **TEXT),
    "bert-classes": lambda: CrateBert(max_length=12, dim=16, depth=1, heads=2, num_classes=3, **TEXT),
}


def needs(name):
    missing = FORMATS[name].missing()
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # not the default values, and attention far from uniform
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def expected(model, inputs):
    """The output from the model itself, through the reference equations."""
    with ops.use_backend("reference"), torch.no_grad():
        if isinstance(model, CrateGPT):
            return model.forward_head(model.forward_features(*inputs))
        if isinstance(model, CrateBert):
            return model(*inputs)[0]
        return model.forward_features(*inputs) if isinstance(model, CrateMAE) else model(*inputs)


def inputs_of(deployed, batch, seed=1):
    inputs = example(deployed, batch, torch.Generator().manual_seed(seed))
    if len(inputs) == 2:  # texts of different lengths
        inputs = (inputs[0], torch.arange(batch) % inputs[0].shape[1] + 1)
    return inputs


def visible(model, inputs, output):
    """The output without the positions of padding."""
    if isinstance(model, CrateBert) and not model.num_classes:
        return output[torch.arange(output.shape[1]) < inputs[1][:, None]]
    return output
