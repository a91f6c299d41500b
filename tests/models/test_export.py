"""The vision models through torch.export on the eager backend, and to ONNX through the reference equations."""

import importlib.util

import pytest
import torch

from crate_kernels import ops
from crate_kernels.models import CRATE, CrateAlpha, CrateMAE

SMALL = dict(image_size=16, patch_size=8, num_classes=5, dim=16, depth=2, heads=2, dim_head=8)
MAE = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, decoder_depth=1)


def case(name, batch):
    """A model, its inputs for one batch, and the dimensions that may change."""
    torch.manual_seed(0)
    model = {"crate": CRATE, "alpha": CrateAlpha, "mae": CrateMAE}[name](**MAE if name == "mae" else SMALL).eval()
    images, batches = torch.randn(batch, 3, 16, 16), {0: torch.export.Dim("batch", min=1, max=64)}
    if name == "mae":
        return model, (images, 0.75, torch.rand(batch, 4)), (batches, None, batches)
    return model, (images,), (batches,)


@pytest.mark.parametrize("name", ["crate", "alpha", "mae"])
def test_export_keeps_the_operators_and_any_batch(name, tmp_path):
    model, inputs, dynamic = case(name, 2)
    with ops.use_backend("eager"):
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
    called = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("crate.")}
    assert (
        called
        == {
            "crate": {"crate.crate_layer.default"},
            "alpha": {"crate.mssa_block.default", "crate.overcomplete_ista.default"},
            "mae": {"crate.crate_layer.default", "crate.mssa_block.default"},
        }[name]
    )
    torch.export.save(program, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    for batch in (1, 2, 5):
        _, inputs, _ = case(name, batch)
        torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
@pytest.mark.parametrize("name", ["crate", pytest.param("alpha", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_onnx(name, tmp_path):
    import onnxruntime

    model, inputs, dynamic = case(name, 2)
    # The reference backend runs plain torch operations, for which ONNX has operators.
    with ops.use_backend("reference"):
        torch.onnx.export(model, inputs, tmp_path / "model.onnx", dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (2, 3):
        _, (images,), _ = case(name, batch)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)
