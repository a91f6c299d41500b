"""Models as files of other runtimes, run and compared."""

import subprocess
import sys

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler

from crate_kernels.deployment import FORMATS, Deployable
from crate_kernels.deployment.formats import OPSET, files

from ..docs.pages import blocks
from .cases import build, expected, inputs_of, needs, visible


def matrix_products(path):
    import onnx

    graph = onnx.load(path).graph
    return sum(node.op_type in ("MatMul", "Gemm") for node in graph.node)


@needs("onnx")
@pytest.mark.filterwarnings("ignore")
def test_onnx_called_directly_on_a_prepared_model(tmp_path):
    import onnxruntime

    model, images = build("crate").prepare_for_inference(), torch.randn(2, 3, 16, 16)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    # The patches and the head; per layer: projection, scores, their use, output, and one product of the ISTA step.
    assert matrix_products(tmp_path / "model.onnx") == 2 + 2 * 5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected(model, (images,)), rtol=1e-4, atol=1e-4)


FILES = [
    pytest.param("onnx", "crate", True, marks=needs("onnx")),
    pytest.param("onnx", "bert", False, marks=needs("onnx")),
    pytest.param("onnx", "gpt", False, marks=[needs("onnx"), pytest.mark.slow]),
    pytest.param("onnx", "alpha", False, marks=[needs("onnx"), pytest.mark.slow]),
    pytest.param("openvino", "crate", True, marks=needs("openvino")),
    pytest.param("openvino", "bert", False, marks=[needs("openvino"), pytest.mark.slow]),
    pytest.param("safetensors", "crate", False),
]


@pytest.mark.parametrize(("kind", "name", "any_size"), FILES)
@pytest.mark.filterwarnings("ignore")
def test_files_give_what_the_model_gives(kind, name, any_size, tmp_path):
    model = build(name)
    path = tmp_path / f"model{FORMATS[kind].suffix}"
    FORMATS[kind].write(model, path, any_size=any_size)
    run = FORMATS[kind].open(path)
    for batch in (2, 1, 3):
        inputs = inputs_of(Deployable(model), batch)
        got, wanted = run(*inputs), expected(model, inputs)
        torch.testing.assert_close(visible(model, inputs, got), visible(model, inputs, wanted), rtol=1e-3, atol=1e-3)
    if any_size:
        images = torch.randn(1, 3, 24, 16)
        torch.testing.assert_close(run(images), expected(model, (images,)), rtol=1e-3, atol=1e-3)
    if kind == "onnx":
        import onnx

        (opset,) = (o.version for o in onnx.load(path).opset_import if o.domain in ("", "ai.onnx"))
        assert opset == OPSET


@needs("aoti")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_packages(tmp_path):
    """In Python, and in the C++ program of docs/deployment.md."""
    model, path = build("crate"), tmp_path / "crate.pt2"
    # What is tested here is not how fast the wrapper runs. One package does not repay headers compiled in advance.
    with torch._inductor.config.patch(
        {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
    ):
        FORMATS["aoti"].write(model, path)
    run = FORMATS["aoti"].open(path)
    for batch in (2, 1, 3):
        (images,) = inputs_of(Deployable(model), batch)
        torch.testing.assert_close(run(images), expected(model, (images,)), rtol=1e-3, atol=1e-3)
    (program,) = (block.text for block in blocks("docs/deployment.md") if block.language == "cpp")
    (tmp_path / "run.cpp").write_text(program.replace("224", "16"))
    (script,) = (block.text for block in blocks("docs/deployment.md") if "g++" in block.text)
    script = script.replace("python", sys.executable).replace("g++", get_cpp_compiler())
    said = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    wanted = expected(model, (torch.full((2, 3, 16, 16), 0.5),))
    got = torch.tensor([float(line) for line in said.splitlines()])
    torch.testing.assert_close(got, wanted.flatten(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kind",
    [pytest.param("onnx", marks=needs("onnx")), pytest.param("openvino", marks=needs("openvino")), "safetensors"],
)
@pytest.mark.filterwarnings("ignore")
def test_half_files_are_half_as_large(kind, tmp_path):
    model = build("crate")
    inputs = inputs_of(Deployable(model), 2)
    wanted = expected(model, inputs)
    sizes, errors = [], []
    for half in (False, True):
        path = tmp_path / f"{half}{FORMATS[kind].suffix}"
        FORMATS[kind].write(model, path, half=half)
        sizes.append(files(path)[-1].stat().st_size)  # of OpenVINO the weights alone
        got = FORMATS[kind].open(path)(*inputs)
        errors.append(float((got - wanted).norm() / wanted.norm()))
    weights = 2 * sum(p.numel() for p in model.parameters())  # bytes that float16 saves
    assert sizes[0] - sizes[1] > 0.8 * weights
    assert errors[0] < 1e-4
    assert errors[0] < errors[1] < 2e-2


def test_half_models_fold_before_they_are_narrowed():
    model = build("crate")
    deployed = Deployable(model, torch.float16)
    for narrow, whole in zip(deployed.model.blocks, model.blocks, strict=True):
        weight = whole.ista.weight.detach()
        assert torch.equal(narrow.ista.folded(), (weight - weight.T @ weight).half())
