"""The residual stream under autocast, in every family: its dtype, and errors compared with the reference equations."""

import copy

import pytest
import torch

from crate_kernels import ops
from crate_kernels.agreement import relative
from crate_kernels.bench.models import saved_bytes
from crate_kernels.models import CRATE, CrateAlpha, CrateBert, CrateDINO, CrateGPT, CrateMAE
from crate_kernels.nn import CrateBlock

from ..ops.oracle import skip_without

VISION = dict(image_size=32, patch_size=8, dim=96, depth=4, heads=4, dim_head=24)
LANGUAGE = dict(block_size=24, vocab_size=101, n_layer=4, n_head=4, n_embd=96)
MASKED_LANGUAGE = dict(max_length=24, vocab_size=101, depth=4, heads=4, dim=96, emb_dropout=0.0)


def images():
    return torch.randn(2, 3, 32, 32)


def texts():
    return torch.randint(101, (2, 24))


def call(model, x):
    return model(x)


def prediction(model, x):
    return model(x, noise=torch.linspace(0, 1, 32, dtype=x.dtype).view(2, 16))[1]


def next_tokens(model, x):
    return model.forward_head(model.forward_features(x))


FAMILIES = {
    "vision": (lambda **options: CRATE(num_classes=10, **VISION, **options), images, call),
    "alpha": (lambda **options: CrateAlpha(num_classes=10, **VISION, **options), images, call),
    "mae": (
        lambda **options: CrateMAE(32, 8, embed_dim=96, depth=2, num_heads=4, decoder_depth=2, **options),
        images,
        prediction,
    ),
    "dino": (
        lambda **options: CrateDINO(hidden=64, bottleneck=32, prototypes=48, **VISION, **options),
        images,
        lambda model, x: model.student([x]),
    ),
    "bert": (
        lambda **options: CrateBert(**MASKED_LANGUAGE, **options),
        texts,
        lambda model, x: model(x, torch.tensor([24, 17]))[0],
    ),
    "gpt": (lambda **options: CrateGPT(**LANGUAGE, **options), texts, next_tokens),
    "overcomplete": (lambda **options: CrateGPT(overcomplete=True, **LANGUAGE, **options), texts, next_tokens),
}
"""Family -> (its model, its inputs, the output that is compared)."""


def outcome(family, model, x, backend, autocast=True):
    """The output, the gradients of all parameters, and the dtypes of the inputs and outputs of the blocks."""
    stream = []
    handles = [
        m.register_forward_hook(lambda _, args, out: stream.append((args[0].dtype, out.dtype)))
        for m in model.modules()
        if isinstance(m, CrateBlock)
    ]
    with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = FAMILIES[family][2](model, x)
    for handle in handles:
        handle.remove()
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).cos().to(out.dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((out * weights).sum(), trained, allow_unused=True)
    return [out.detach(), *(g for g in gradients if g is not None)], stream


def errors(got, exact):
    """The relative error of the output, and that of all gradients together."""
    each = torch.tensor([relative(a, b) for a, b in zip(got, exact, strict=True)])
    return torch.stack([each[0], each[1:].square().mean().sqrt()])


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_stream_and_errors_are_those_of_the_reference(family):
    build, inputs, _ = FAMILIES[family]
    backends = ["eager", "cpu"]
    ratios = {backend: [] for backend in backends}
    for seed in range(8):
        torch.manual_seed(seed)
        model, x = build(), inputs()
        double = x.double() if x.is_floating_point() else x
        exact, _ = outcome(family, copy.deepcopy(model).double(), double, "reference", autocast=False)
        reference, stream = outcome(family, model, x, "reference")
        for backend in backends:
            skip_without(backend)
            got, own = outcome(family, model, x, backend)
            assert own == stream
            assert [t.dtype for t in got] == [t.dtype for t in reference]
            ratios[backend].append(errors(got, exact) / errors(reference, exact))
    for ratio in ratios.values():
        # The geometric mean over the seeds, for the output and for the gradients.
        assert (torch.stack(ratio).log().mean(0).exp() < 1.3).all()
    wide = [dtype for dtypes in stream for dtype in dtypes]
    assert (torch.bfloat16 in wide) == (family == "overcomplete")


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_stream_on_request(family):
    build, inputs, _ = FAMILIES[family]
    torch.manual_seed(0)
    model, x = build(residual_dtype=torch.bfloat16), inputs()
    assert model.residual_dtype == torch.bfloat16
    assert "residual_dtype" not in model.config
    double = x.double() if x.is_floating_point() else x
    exact, stream = outcome(family, copy.deepcopy(model).double(), double, "reference", autocast=False)
    assert {dtype for dtypes in stream for dtype in dtypes} == {torch.float64}
    for backend in (None, "reference"):
        narrow, stream = outcome(family, model, x, backend)
        assert {out for _, out in stream} == {torch.bfloat16}
        assert (errors(narrow, exact) < torch.tensor([0.1, 0.5])).all()
        model.residual_dtype = None
        wide, stream = outcome(family, model, x, backend)
        assert stream[0][0] == torch.float32
        if family != "overcomplete":
            assert {out for _, out in stream} == {torch.float32}
        assert errors(narrow, exact)[0] > errors(wide, exact)[0]
        model.residual_dtype = torch.bfloat16
    # A pure model is what it was.
    _, stream = outcome(family, model.bfloat16(), x.bfloat16() if x.is_floating_point() else x, None, autocast=False)
    assert {dtype for dtypes in stream for dtype in dtypes} == {torch.bfloat16}


def test_narrow_stream_of_layers_that_run_as_modules():
    """Half-steps that no operator computes keep the stream's dtype, too."""
    torch.manual_seed(0)
    block = CrateBlock(16, 2, 8, qk_norm=True, rotary=100.0, learnable="channel")
    z = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(z).dtype == torch.float32
        block.residual_dtype = torch.bfloat16
        assert block(z).dtype == torch.bfloat16


def test_bytes_saved_for_the_backward():
    torch.manual_seed(0)
    model = CRATE(num_classes=10, **VISION)
    z = torch.randn(8, 65, 96, requires_grad=True)
    saved = {}
    for name, backend, dtype in (
        ("reference", "reference", None),
        ("wide", None, None),
        ("narrow", None, torch.bfloat16),
    ):
        model.residual_dtype = dtype
        two, three = (saved_bytes(model.blocks[:depth], z, torch.bfloat16, backend) for depth in (2, 3))
        saved[name] = (three - two) / z.numel()
    # The input of the layer, in the stream's dtype; w, o and the tokens between the halves in bfloat16.
    assert 4 + 3 * 2 <= saved["wide"] < 4 + 3 * 2 + 0.5
    assert 2 + 3 * 2 <= saved["narrow"] < 2 + 3 * 2 + 0.5
    assert saved["reference"] > 30


@pytest.mark.parametrize("bad", ["bfloat16", torch.int32, 16])
def test_other_dtypes_are_refused(bad):
    with pytest.raises(TypeError, match="residual_dtype: expected None or a floating dtype"):
        CRATE(num_classes=10, residual_dtype=bad, **VISION)
