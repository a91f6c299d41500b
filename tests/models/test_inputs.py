"""Inputs that do not belong to a model, the same for every family: one sentence that names the argument."""

import numpy as np
import pytest
import torch

from crate_kernels import nn as layers
from crate_kernels.analysis import half_steps, layerwise
from crate_kernels.distributed import tensor_parallel
from crate_kernels.models import CRATE, CrateAlpha, CrateBert, CrateDINO, CrateGPT, CrateMAE, load_model

VISION = dict(image_size=16, patch_size=8, num_classes=0, dim=16, depth=1, heads=2, dim_head=8)
IMAGES, TOKENS = torch.randn(2, 3, 16, 16), torch.randint(20, (2, 5))
IMAGE_MODELS = {
    "CRATE": lambda: CRATE(**VISION),
    "alpha": lambda: CrateAlpha(**VISION),
    "MAE": lambda: CrateMAE(16, 8, embed_dim=16, depth=1, num_heads=2, decoder_depth=1),
    "DINO": lambda: CrateDINO(hidden=8, bottleneck=8, prototypes=8, **VISION),
}
TEXT_MODELS = {
    "GPT": lambda: CrateGPT(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16),
    "LM": lambda: CrateGPT(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16, overcomplete=True),
    "BERT": lambda: CrateBert(vocab_size=20, max_length=8, dim=16, depth=1, heads=2),
}


@pytest.mark.parametrize("build", IMAGE_MODELS.values(), ids=IMAGE_MODELS)
def test_images_of_another_kind_dtype_or_device_are_named(build):
    model = build()
    with pytest.raises(TypeError, match=r"images: expected a torch\.Tensor, got ndarray"):
        model(IMAGES.numpy())
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(
            TypeError, match=f"images: has dtype {dtype}, but the model's parameters have torch.float32"
        ):
            model(IMAGES.to(dtype))
    with pytest.raises(TypeError, match=r"images: has dtype torch\.float32.* have torch\.float64"):
        build().double()(IMAGES)
    with pytest.raises(ValueError, match="images: is on meta, but the model is on cpu"):
        model(IMAGES.to("meta"))
    with pytest.raises(ValueError, match="images: is on cpu, but the model is on meta"):
        build().to("meta")(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES.bfloat16())
        with pytest.raises(TypeError, match=r"images: has dtype torch\.float64"):
            model(IMAGES.double())


@pytest.mark.parametrize("build", TEXT_MODELS.values(), ids=TEXT_MODELS)
def test_tokens_of_another_kind_or_device_are_named(build):
    model = build()
    for value in (TOKENS.tolist(), TOKENS.numpy(), "text"):
        with pytest.raises(TypeError, match=f"idx: expected a torch.Tensor, got {type(value).__name__}"):
            model(value)
    with pytest.raises(ValueError, match="idx: is on meta, but the model is on cpu"):
        model(TOKENS.to("meta"))
    with pytest.raises(ValueError, match="targets: is on meta, but idx is on cpu"):
        model(TOKENS, targets=TOKENS.to("meta"))


NOT_A_FLAG = "expected True or False, got 'no'"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CrateGPT(overcomplete="no"), f"overcomplete: {NOT_A_FLAG}"),
        (lambda: CrateAlpha(clipa="no", **VISION), f"clipa: {NOT_A_FLAG}"),
        (lambda: CrateMAE(16, 8, norm_pix_loss="no"), f"norm_pix_loss: {NOT_A_FLAG}"),
        (lambda: CrateDINO(**VISION | dict(num_classes=10)), "num_classes: the backbone has no classifier"),
        (lambda: layers.MSSA(16, causal="no"), f"causal: {NOT_A_FLAG}"),
        (lambda: layers.MSSA(16, scale=float("nan")), "scale: expected a finite number, got nan"),
        (lambda: layers.MSSA(16, rotary=-1), "rotary: expected a positive base, got -1"),
        (lambda: layers.ISTA(16, step_size="a"), "step_size: expected a number, got str"),
        (lambda: layers.OvercompleteISTA(16, lambd=-1), "lambd: expected at least 0.0, got -1"),
        (lambda: layers.OvercompleteISTA(16, tied="no"), f"tied: {NOT_A_FLAG}"),
        (lambda: layers.CrateBlock(16.0, 2), "dim: expected an integer, got float"),
        (lambda: layers.CrateBlock(16, 2, shrink="a"), "shrink: expected a number, got str"),
        (lambda: layers.CrateBlock(16, 2, eps=-1), "eps: expected at least 0.0, got -1"),
        (lambda: layers.CrateDecoderBlock(16, 2, eps=-1), "eps: expected at least 0.0, got -1"),
        (lambda: layers.MSSA(16)(torch.randn(5, 16)), r"x: expected shape \(B, N, d\), got \(5, 16\)"),
        (lambda: layers.MSSA(16)(IMAGES.numpy()), r"x: expected a torch\.Tensor, got ndarray"),
        (lambda: half_steps(CRATE(**VISION), IMAGES[:0]), "the batch holds no sample to measure"),
        (lambda: layerwise(CRATE(**VISION), IMAGES[:0]), "the batch holds no sample to measure"),
        (lambda: IMAGE_MODELS["MAE"]()(IMAGES, mask_ratio="a"), "mask_ratio: expected a number, got str"),
        (lambda: IMAGE_MODELS["MAE"]()(IMAGES, noise=[1]), r"noise: expected a torch\.Tensor, got list"),
        (lambda: tensor_parallel(CRATE(**VISION), None), "mesh: expected a .*DeviceMesh, got NoneType"),
        (lambda: load_model("."), "no checkpoint at ., which is a folder; name a file in it"),
    ],
)
def test_wrong_arguments_are_refused_where_they_are_given(build, message):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(top_k=2.5), "top_k: expected an integer, got float"),
        (dict(top_p="a"), "top_p: expected a number, got str"),
        (dict(seed="a"), "seed: expected an integer, got str"),
        (dict(seed=1.5), "seed: expected an integer, got float"),
        (dict(idx="abc"), "prompts: expected integers.*; got str; a tokenizer makes them of texts"),
        (dict(idx=None), "prompts: expected integers.*; got NoneType"),
        (dict(idx=[[1.5]]), r"prompts: expected integers.*; got torch\.float32"),
        (dict(idx=TOKENS.float()), r"prompts: expected integers.*; got torch\.float32"),
        (dict(idx=[[]]), "prompts: .*at least one token in each"),
    ],
)
def test_generation_refuses_what_it_would_round_or_ignore(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TEXT_MODELS["GPT"]().generate(**dict(idx=TOKENS, max_new_tokens=1) | options)


def test_prompts_may_be_numpy_arrays_and_caches_need_whole_sizes():
    model = TEXT_MODELS["GPT"]()
    assert len(model.generate(np.array([[1, 2]]), 2, seed=0)[0]) == 4
    with pytest.raises(ValueError, match="batch: expected at least 0, got -1"):
        model.new_cache(-1)
    with pytest.raises(TypeError, match="capacity: expected an integer, got float"):
        model.new_cache(1, 8.0)
