"""File formats of other runtimes: how each is written, and how Python runs a file."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..models import CrateModel, load_model
from .program import Deployable, program

OPSET = 20
"""Opset version of the ONNX files."""

Run = Callable[..., Tensor]

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: ending of its files.
        needs: requirements for writing and running it: packages, or ``"a C++ compiler"``.
        write: ``(model, path, half=False, any_size=False, metadata={}) -> None``. ``metadata`` describes the data of
            the checkpoint; ONNX and safetensors files store it.
        open: ``path -> run``. ``run(*inputs) -> output`` takes and returns torch tensors on the CPU.
    """

    suffix: str
    needs: tuple[str, ...]
    write: Callable[..., None]
    open: Callable[[Path], Run]

    def missing(self) -> list[str]:
        """The requirements that are not installed."""
        return [need for need in self.needs if not _installed(need)]


COMPILER = "a C++ compiler"


def _installed(need: str) -> bool:
    if need != COMPILER:
        return importlib.util.find_spec(need) is not None
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


def deployable(model: CrateModel, half: bool) -> Deployable:
    """The copy of ``model`` that becomes a program. ``half`` gives it float16 weights."""
    return Deployable(model, torch.float16 if half else torch.float32)


def write_onnx(
    model: CrateModel, path: Path, half: bool = False, any_size: bool = False, metadata: Mapping[str, Any] = NOTHING
) -> None:
    """Write an ONNX file with the weights inside, of opset :data:`OPSET`."""
    copied = deployable(model, half)
    written = torch.onnx.export(
        program(copied, any_size=any_size), (), input_names=copied.names, output_names=["output"],
        opset_version=OPSET, dynamo=True, external_data=False, optimize=True, verbose=False,
    )  # fmt: skip
    written.model.metadata_props["crate_kernels"] = json.dumps(_kept(metadata))
    written.save(path)


def open_onnx(path: Path) -> Run:
    """Open the file in ONNX Runtime, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def write_openvino(
    model: CrateModel, path: Path, half: bool = False, any_size: bool = False, metadata: Mapping[str, Any] = NOTHING
) -> None:
    """Write OpenVINO's two files, ``.xml`` and ``.bin``, from ONNX. ``half`` narrows the weights, not the
    arithmetic."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        write_onnx(model, Path(folder) / "model.onnx", any_size=any_size)
        converted = openvino.convert_model(Path(folder) / "model.onnx")
        openvino.save_model(converted, path, compress_to_fp16=half)


def open_openvino(path: Path) -> Run:
    """Open the files in OpenVINO, with as many threads as torch and arithmetic in float32."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", options)

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(compiled([tensor.numpy() for tensor in inputs])[0].copy())

    return run


def write_aoti(
    model: CrateModel, path: Path, half: bool = False, any_size: bool = False, metadata: Mapping[str, Any] = NOTHING
) -> None:
    """Write a package of AOTInductor: machine code for this processor and for torch's present number of threads."""
    torch._inductor.aoti_compile_and_package(
        program(deployable(model, half), any_size=any_size), package_path=str(path)
    )


def open_aoti(path: Path) -> Run:
    """Open the package in Python."""
    return torch._inductor.aoti_load_package(str(path))


def write_safetensors(
    model: CrateModel, path: Path, half: bool = False, any_size: bool = False, metadata: Mapping[str, Any] = NOTHING
) -> None:
    """Write the weights in this package's format, for :func:`crate_kernels.models.load_model`. They are not folded."""
    deployable(model, half).model.save(path, **_kept(metadata))


def open_safetensors(path: Path) -> Run:
    """The model of the file, run by this package in float32."""
    return torch.no_grad()(Deployable(load_model(path)))


def _kept(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name not in ("model", "config")}


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), write_onnx, open_onnx),
    "openvino": Format(".xml", ("onnx", "onnxscript", "openvino"), write_openvino, open_openvino),
    "aoti": Format(".pt2", (COMPILER,), write_aoti, open_aoti),
    "safetensors": Format(".safetensors", (), write_safetensors, open_safetensors),
}
"""Name -> format."""


def files(path: Path) -> list[Path]:
    """The file at ``path``, and the file beside it that holds OpenVINO's weights."""
    return [file for file in (path, path.with_suffix(".bin")) if file == path or path.suffix == ".xml"]


def size(path: Path) -> int:
    """Bytes of all :func:`files`."""
    return sum(file.stat().st_size for file in files(path))
