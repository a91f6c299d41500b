"""Sharded tensors in a folder, by torch.distributed.checkpoint. Every rank writes its part; any number of ranks can
read.

Reading executes no pickled code. torch's reader unpickles the folder's table of contents without restrictions. The
reader here accepts only the classes that such a table needs.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_PLAIN = {("torch.serialization", "_get_layout"), ("torch", "Size"), ("torch", "device"), ("pathlib", "PosixPath"),
          ("pathlib", "PurePosixPath"), ("collections", "OrderedDict"), ("builtins", "set")}  # fmt: skip
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")


class _Contents(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        value = None
        if module in _MODULES or (module, name) in _PLAIN or module == "torch":
            value = super().find_class(module, name)
        # The two modules provide only data classes and enumerations. torch provides only its dtypes and similar
        # constants.
        is_data = isinstance(value, type) and (hasattr(value, "__dataclass_fields__") or hasattr(value, "__members__"))
        if (module, name) in _PLAIN or isinstance(value, torch.dtype) or (module in _MODULES and is_data):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a table of contents")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *arguments, **keywords) -> Metadata:
        with open(Path(self.path, ".metadata"), "rb") as file:
            metadata = _Contents(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def disk_error(error: BaseException | None) -> OSError | None:
    """The disk error that caused an error of torch's writer. The writer itself reports only an unexpected file
    position."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__context__
    return error


class _Writer(dcp.FileSystemWriter):
    def write_data(self, *arguments, **keywords):
        try:
            return super().write_data(*arguments, **keywords)
        except Exception as error:
            # The cause of an error is not sent to the other ranks, so the error itself must name it.
            raise disk_error(error) or error from None


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors`` into ``folder``. Every rank must call this function.

    Raises:
        OSError: a rank could not write.
    """
    try:
        dcp.save(tensors, storage_writer=_Writer(folder))
    except CheckpointException as error:  # it is not a subclass of Exception
        cause = next(iter(error.failures.values()))[0]
        raise (cause if isinstance(cause, OSError) else OSError(f"{type(cause).__name__}: {cause}")) from error


def read(folder: Path, names: Iterable[str], like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Read the tensors ``names``, each sharded like the tensor ``like(name)``, or whole on the CPU if that is None.

    Raises:
        ValueError: a tensor is missing, damaged, or has another shape.
    """
    try:
        reader = _Reader(folder)
        table = reader.read_metadata().state_dict_metadata
        tensors = {}
        for name in names:
            entry, template = table[name], like(name)
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{name} is not a tensor")
            if template is None or template.shape != entry.size:
                tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
            else:
                tensors[name] = torch.empty_like(template, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process may read, too
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, EOFError, pickle.UnpicklingError, KeyError, RuntimeError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise ValueError(f"{folder} is damaged or incomplete: {(str(cause) or repr(cause)).splitlines()[0]}") from error
    return tensors
