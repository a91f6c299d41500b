"""Models as programs of standard torch operations: values, products, and what may change from call to call."""

import pytest
import torch

from crate_kernels import ops
from crate_kernels.deployment import Deployable, dynamic_shapes, program
from crate_kernels.models import CRATE
from crate_kernels.nn import CrateBlock

from .cases import MODELS, SMALL, build, expected, inputs_of, visible

PRODUCTS = {torch.ops.aten.linear.default, torch.ops.aten.matmul.default, torch.ops.aten.mm.default}


@pytest.mark.parametrize("name", MODELS)
def test_programs_are_plain_torch_for_any_batch(name, tmp_path):
    model = build(name)
    deployed = Deployable(model)
    exported = program(deployed)
    assert not [n.target for n in exported.graph.nodes if str(n.target).startswith(("crate.", "mkldnn."))]
    torch.export.save(exported, tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (2, 1, 5):
        inputs = inputs_of(deployed, batch)
        wanted = expected(model, inputs)
        for got in (run(*inputs), deployed(*inputs)):
            torch.testing.assert_close(
                visible(model, inputs, got), visible(model, inputs, wanted), rtol=1e-4, atol=1e-4
            )


def test_texts_of_any_length():
    deployed = Deployable(build("gpt"))
    run = program(deployed).module()
    for length in (1, 2, 7, 12):
        idx = torch.randint(31, (2, length), generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(run(idx), deployed(idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["crate", "alpha", "mae"])
def test_images_of_any_size(name):
    model = build(name)
    deployed = Deployable(model)
    run = program(deployed, any_size=True).module()
    assert dynamic_shapes(deployed, any_size=True)[0].keys() == {0, 2, 3}
    for height, width in ((16, 16), (16, 24), (32, 16), (40, 48)):
        images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))
        torch.testing.assert_close(run(images), expected(model, (images,)), rtol=1e-4, atol=1e-4)


def test_a_prepared_step_is_one_product_and_an_unprepared_one_three():
    model, images = build("crate"), torch.randn(2, 3, 16, 16)
    wanted = expected(model, (images,))
    for prepared in (False, True):
        model = build("crate")
        if prepared:
            model.prepare_for_inference()
        exported = torch.export.export(model, (images,))
        products = [node for node in exported.graph.nodes if node.target in PRODUCTS]
        # The patches, and per layer projection, output and ISTA; the head. Attention is one node of its own.
        assert len(products) == 1 + 2 * (2 + (1 if prepared else 3)) + 1
        torch.testing.assert_close(exported.module()(images), wanted, rtol=1e-4, atol=1e-4)


def test_a_program_follows_weights_that_changed_after_preparing():
    model, images = build("crate").prepare_for_inference(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model.blocks[0].ista.weight.mul_(0.5)
    exported = torch.export.export(model, (images,))
    torch.testing.assert_close(exported.module()(images), expected(model, (images,)), rtol=1e-4, atol=1e-4)
    for assign in (False, True):
        model = build("crate").prepare_for_inference()
        model.load_state_dict({key: 0.5 * value for key, value in model.state_dict().items()}, assign=assign)
        exported = torch.export.export(model, (images,))
        torch.testing.assert_close(exported.module()(images), expected(model, (images,)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["alpha", "mae"])
def test_a_requested_backend_stays_in_the_program(name, tmp_path):
    """The operators of this package, and for the autoencoder the whole of it: masks, decoder and loss."""
    model = build(name)

    def inputs(batch):
        images = torch.randn(batch, 3, 16, 16)
        return (images, 0.75, torch.rand(batch, 4)) if name == "mae" else (images,)

    batches = {0: torch.export.Dim("batch", min=1, max=64)}
    with ops.use_backend("eager"):
        exported = torch.export.export(
            model, inputs(2), dynamic_shapes=(batches, None, batches) if name == "mae" else (batches,)
        )
    called = {str(node.target) for node in exported.graph.nodes if str(node.target).startswith("crate.")}
    assert (
        called
        == {
            "alpha": {"crate.mssa_block.default", "crate.overcomplete_ista.default"},
            "mae": {"crate.crate_layer.default", "crate.mssa_block.default"},
        }[name]
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 5):
        given = inputs(batch)
        torch.testing.assert_close(run(*given), model(*given))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_of_torch_jit_are_plain_torch():
    model, images = build("crate").prepare_for_inference(), torch.randn(2, 3, 16, 16)
    with pytest.warns(Warning, match=r"Trace|deprecated"):
        traced = torch.jit.trace(model, (images,), check_trace=False)
    assert "crate::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images), expected(model, (images,)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, dict(output_bias=False), dict(causal=True), dict(mssa_step_size=0.5)])
def test_layers_of_every_kind(options):
    torch.manual_seed(0)
    block = CrateBlock(16, 2, 8, **options).double().eval()
    z, lengths = torch.randn(3, 7, 16, dtype=torch.float64), torch.tensor([7, 1, 4])
    for given in (None, lengths):
        run = torch.export.export(block, (z, given)).module()
        with ops.use_backend("reference"):
            wanted = block(z, given)
        seen = slice(None) if given is None else torch.arange(7) < lengths[:, None]
        torch.testing.assert_close(run(z, given)[seen], wanted[seen], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_hides_what_lies_beyond_the_lengths(causal):
    torch.manual_seed(0)
    w, value, lengths = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8), torch.tensor([2, 5])
    w[0, 3], value[0, 4] = torch.nan, torch.inf

    class Attention(torch.nn.Module):
        def forward(self, w, value, lengths):
            own = ops.subspace_attention(w, value, lengths=lengths, causal=causal)
            return own, ops.subspace_cross_attention(w, w, value, lengths=lengths)

    run = torch.export.export(Attention(), (w, value, lengths)).module()
    with ops.use_backend("reference"):
        wanted = Attention()(w, value, lengths)
    for got, truth in zip(run(w, value, lengths), wanted, strict=True):
        torch.testing.assert_close(got[0, :2], truth[0, :2])
        torch.testing.assert_close(got[1], truth[1])


def test_frozen_compiled_models_fold_once():
    model, images = CRATE(**SMALL | dict(depth=1), num_classes=5).prepare_for_inference(), torch.randn(2, 3, 16, 16)
    wanted = expected(model, (images,))
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(images), wanted, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
