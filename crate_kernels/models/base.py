"""Base class of all models: the configuration, and loading and saving of weights in either layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..nn import CrateBlock, prepare_for_inference
from ..ops import checks
from . import checkpoint


def _plain(value):
    """Convert an argument to a form that JSON can store: NumPy's numbers become Python's."""
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


class CrateModel(nn.Module):
    """Base of the models. A subclass sets ``layout`` and passes its constructor arguments as ``config``."""

    layout: checkpoint.KeyMap | None = None
    """The public checkpoint layout of this family."""

    if TYPE_CHECKING:
        # To a type checker every submodule of a torch module is ``Tensor | Module``.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.config = {name: _plain(value) for name, value in config.items()}

    @property
    def residual_dtype(self) -> torch.dtype | None:
        """The dtype of the residual stream (the tokens between layers) under autocast. It can be set at any time.

        None keeps the dtype of the embedding, as in the public code: float32 for float32 parameters. ``torch.bfloat16``
        saves memory, and each half of a layer then rounds the stream: ``docs/numerics.md`` has both errors. The option
        has no effect without autocast, and files do not record it.

        Raises:
            TypeError: (when set) the value is neither None nor a floating dtype.
        """
        return next((m.residual_dtype for m in self.modules() if isinstance(m, CrateBlock)), None)

    @residual_dtype.setter
    def residual_dtype(self, dtype: torch.dtype | None) -> None:
        checks.residual_dtype(dtype)
        for module in self.modules():
            if isinstance(module, CrateBlock):
                module.residual_dtype = dtype

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """Like :meth:`torch.nn.Module.load_state_dict`, but also accepts the public layout of the family and the
        prefixes of wrappers.

        Raises:
            CheckpointError: (a RuntimeError) keys or shapes differ; the message names them in the layout of
            ``state_dict``.
        """
        native = checkpoint.to_native(state_dict, self, self.layout, strict)
        return super().load_state_dict(native, strict=strict, assign=assign)

    def load_checkpoint(self, path: str | os.PathLike, strict: bool = True) -> Self:
        """Load weights from a safetensors file or a public ``.pth`` (wrapper dictionaries included) and return self.

        No pickled code is executed.
        """
        state, _ = checkpoint.read(path)
        self.load_state_dict(state, strict=strict)
        return self

    def save(self, path: str | os.PathLike, **metadata) -> None:
        """Write the weights as safetensors, atomically, with the metadata for
        :func:`crate_kernels.models.load_model`."""
        header = {"model": type(self).__name__, "config": self.config, **metadata}
        checkpoint.write(path, self.state_dict(), header)

    def upstream_state_dict(self) -> dict[str, Tensor]:
        """The weights under the keys of the public code, bit for bit."""
        if self.layout is None:
            raise NotImplementedError(f"{type(self).__name__} has no public checkpoint layout")
        return checkpoint.to_public(self, self.layout)

    def prepare_for_inference(self, *, cuda_graph: bool = False) -> Self:
        """Evaluation mode with cached folded matrices, see :func:`crate_kernels.nn.prepare_for_inference`."""
        return prepare_for_inference(self, cuda_graph=cuda_graph)
