"""Optional packages, and the extra of this package that installs each."""

from __future__ import annotations

EXTRA_OF = dict(
    timm="train",
    torchvision="train",
    rich="train",
    matplotlib="train",
    mlxtend="train",
    skimage="train",
    sklearn="train",
    tiktoken="gpt2-tokenizer",
    transformers="huggingface",
    onnx="onnx",
    onnxscript="onnx",
    onnxruntime="onnx",
    openvino="openvino",
    torchao="quantization",
    pyarrow="data",
    webdataset="data",
    fsspec="data",
    datasets="data",
)
"""The extra by the name under which a package is imported."""


def install(extra: str) -> str:
    """How to install ``extra``. No index has this package, so that its sources are needed."""
    return f"pip install '.[{extra}]' in the source folder of crate_kernels"


def needs(what: str, package: str) -> str:
    """The sentence that ``what`` needs ``package``, given by its import name, and how to install it."""
    extra = EXTRA_OF.get(package)
    return f"{what} needs the package {package}: {install(extra) if extra else f'pip install {package}'}"
