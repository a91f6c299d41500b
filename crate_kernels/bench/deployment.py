"""Deployment runtimes for comparison: the reference model in ONNX Runtime and in OpenVINO, on the CPU."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..ops import use_backend


def missing(package: str) -> str | None:
    """The reason why an implementation that needs ``package`` cannot run; None if it can."""
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"


class Deployed(nn.Module):
    """A model in another runtime. The first call with a new shape builds it for that shape."""

    def __init__(self, model: nn.Module, build: Callable[[Path], Callable]):
        super().__init__()
        self._source = (model,)  # a tuple, so that the model's parameters are not registered here
        self._build = build
        self._running: dict[torch.Size, Callable] = {}

    def forward(self, images: Tensor) -> Tensor:
        """``images (B, C, H, W)`` -> logits ``(B, classes)``."""
        if images.shape not in self._running:
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), use_backend("reference"):
                path = Path(folder) / "model.onnx"
                example = torch.zeros(images.shape)
                torch.onnx.export(
                    self._source[0], (example,), path, dynamo=True, input_names=["images"], external_data=False,
                    verbose=False,
                )  # fmt: skip
                self._running[images.shape] = self._build(path)
        return torch.from_numpy(self._running[images.shape](images.numpy()))


def onnx_runtime(model: nn.Module) -> Deployed:
    """The model in ONNX Runtime, with as many threads as torch."""

    def build(path: Path) -> Callable:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})[0]

    return Deployed(model, build)


def openvino(model: nn.Module, precision: str) -> Deployed:
    """The model in OpenVINO, with as many threads as torch. ``precision``: ``"f32"`` or ``"bf16"``."""

    def build(path: Path) -> Callable:
        import openvino

        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.compile_model(path, "CPU", options)
        return lambda images: compiled(images)[0].copy()

    return Deployed(model, build)
