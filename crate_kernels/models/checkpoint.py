"""Weights in files: safetensors as the native format, and the layouts of public checkpoints.

A layout is a table from public key prefixes to the names of this package. ``{i}`` stands for the number of a layer.

Reading a file never runs code from it. torch rebuilds tensors and plain containers. Every other object in the file,
such as the command-line arguments that a trainer saved beside the weights, becomes an empty :class:`Skipped`.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import json
import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model", "model_state_dict", "teacher", "student", "checkpoint")
"""Keys under which checkpoints hold the weights beside an epoch, an optimizer and the like, the preferred key first.

``teacher`` and ``student`` are the networks of DINO's trainer, which evaluates the teacher.
"""

PREFIXES = ("module.", "_orig_mod.")
"""The prefixes that DistributedDataParallel and torch.compile put before every key."""

METADATA_KEY = "crate_kernels"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model. The message names the keys and shapes that differ."""


class KeyMap:
    """The mapping between the names of a public layout and the names of this package, in both directions.

    Args:
        table: public prefix -> our prefix. A prefix maps its own name and every name below it (``prefix.weight``).
        ignored: patterns of public keys without information (mask buffers, unused tables). They are dropped.
        transposed: patterns of public keys whose matrices are the transposes of ours.
        tied: public key -> the public key of the same tensor. Either is read, and both are written.
    """

    def __init__(
        self,
        table: Mapping[str, str],
        ignored: Iterable[str] = (),
        transposed: Iterable[str] = (),
        tied: Mapping[str, str] | None = None,
    ):
        self._to_native = [(_pattern(public), native) for public, native in _longest_first(table.items())]
        self._to_public = [
            (_pattern(native), public) for native, public in _longest_first((n, p) for p, n in table.items())
        ]
        self._ignored = [re.compile(pattern) for pattern in ignored]
        self._transposed = [re.compile(pattern) for pattern in transposed]
        self._tied = dict(tied or {})

    def native(self, key: str) -> str | None:
        """Our name of a public key; None if the layout does not know it."""
        return _translate(key, self._to_native)

    def public(self, key: str) -> str | None:
        """The public name of one of our keys; None if the layout does not know it."""
        return _translate(key, self._to_public)

    def ignores(self, key: str) -> bool:
        return any(pattern.fullmatch(key) for pattern in self._ignored)

    def oriented(self, key: str, value: Tensor) -> Tensor:
        """The tensor of a public key in the other layout: its transpose (a view) where the layouts differ."""
        return value.T if any(pattern.fullmatch(key) for pattern in self._transposed) else value

    def tie(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A public state dictionary with the tied keys added, if ``state`` has the original."""
        return {**state, **{key: state[original] for key, original in self._tied.items() if original in state}}

    def untie(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A public state dictionary without the tied keys, or an error if one differs from its original."""
        state = dict(state)
        for key, original in self._tied.items():
            if key in state:
                value = state.pop(key)
                if not torch.equal(state.setdefault(original, value), value):
                    raise CheckpointError(f"{key} and {original} differ, but this architecture ties them")
        return state

    def recognizes(self, keys: Iterable[str]) -> bool:
        """Whether any key is a public name and not also one of ours."""
        return any(self.native(key) not in (None, key) for key in keys)


def _longest_first(pairs):
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def _pattern(prefix: str) -> re.Pattern:
    return re.compile(re.escape(prefix).replace(r"\{i\}", r"(\d+)") + r"(\..+)?")


def _translate(key: str, table) -> str | None:
    for pattern, target in table:
        if match := pattern.fullmatch(key):
            *numbers, rest = match.groups()
            return target.format(i=numbers[0] if numbers else None) + (rest or "")
    return None


def read_metadata(path: str | os.PathLike) -> dict:
    """The metadata that :func:`write` wrote into a safetensors file; empty for other safetensors files."""
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))


class Skipped:
    """Placeholder for an object in a file that is neither a tensor nor a plain container. It has no content.

    torch's unpickler calls it instead of the object's class or function, which is never imported.
    """

    def __new__(cls, *arguments, **options):
        return super().__new__(cls)

    def __init__(self, *arguments, **options):
        pass

    def __setstate__(self, state):
        pass


class SkippedMapping(Skipped):
    """Placeholder for an object of a subclass of ``dict``. Its items are read into an ordinary dictionary."""

    def __new__(cls, *arguments, **options):
        return OrderedDict()  # only this type gets both items and attributes from torch's unpickler


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """The weights in a file, unwrapped, and the metadata about the model (empty for files of other programs).

    Objects other than tensors and plain containers are skipped without being imported, unless the caller has given
    their classes to :func:`torch.serialization.add_safe_globals`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated or of another format, holds no weights, or cannot be read without
            running code from it; the message names the class or function that the file asks for.
    """
    path = Path(path)
    if not path.is_file():
        folder = ", which is a folder; name a file in it, such as model.safetensors" if path.is_dir() else ""
        raise FileNotFoundError(f"no checkpoint at {path}{folder}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path), read_metadata(path)
        content = _unpickle(path)
    except Exception as error:
        raise CheckpointError(f"{path} {_refusal(path, error)}") from error
    return unwrap(content, str(path)), {}


def _unpickle(path: Path):
    """The object in a file of torch.save. Every unknown class in it is replaced by :class:`Skipped`."""
    # torch handles the names that it knows. Classes that the user has allowed are loaded as such.
    names = _pickled_names(path) - {_full_name(item) for item in torch.serialization.get_safe_globals()}
    mappings = {"collections.defaultdict"}
    while True:
        stand_ins: list[Any] = [
            (_stand_in(name, SkippedMapping if name in mappings else Skipped), name) for name in sorted(names)
        ]
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # Whether a class is a mapping becomes known only when the file puts items into it.
            found = re.search(r"Can only SETITEMS? for .* got <class '([^']+)'>", str(error))
            if found is None or found[1] in mappings or found[1] not in names:
                raise
            mappings.add(found[1])


def _stand_in(name: str, base: type[Skipped]) -> type[Skipped]:
    module, _, short = name.rpartition(".")
    return type(short, (base,), {"__module__": module})


def _full_name(item) -> str:
    return item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"


def _pickled_names(path: Path) -> set[str]:
    """The classes and functions that a file of torch.save names, read from the pickle without executing it."""
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                # The file has three small pickles that describe it, then the object.
                return {name for _ in range(4) for name in _globals(file)}
            with zipfile.ZipFile(file) as archive:
                records = [record for record in archive.namelist() if record.endswith("data.pkl")]
                return {name for record in records for name in _globals(archive.read(record))}
    except (ValueError, OSError, zipfile.BadZipFile):
        return set()  # not a file of torch.save: torch.load reports the error


def _globals(source) -> set[str]:
    written = (str(argument).split(" ") for code, argument, _ in pickletools.genops(source) if code.name == "GLOBAL")
    # Files contain the module names of Python 2. torch translates them like the standard library.
    found = (_compat_pickle.NAME_MAPPING.get((module, name), (module, name)) for module, name in written)
    return {f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}" for module, name in found}


def _refusal(path: Path, error: Exception) -> str:
    """The reason why a file cannot be read, to follow its name. torch's advice to unpickle with code is left out."""
    text = re.sub(r"\x1b\[\d*m", "", str(error)).strip()
    if "TorchScript" in text:
        return "is a TorchScript archive: load it with torch.jit.load and save its state_dict()"
    if "persistent_load" in text:
        return "holds a pickled module, which cannot be read without running code from it: save its state_dict()"
    if named := re.search(r"GLOBAL (\S+)|got <class '([^']+)'>", text):
        name = named[1] or named[2]
        if "is blocked" in text:
            return f"asks for {name}, which no checkpoint needs: the file is damaged or malicious"
        return (
            f"cannot be read without running code from it: it asks for {name}. Save the weights alone, as"
            f" torch.save(model.state_dict(), path), or, if you trust {name}, allow it before reading:"
            f" torch.serialization.add_safe_globals([{name}])"
        )
    kind = "safetensors file" if path.suffix == ".safetensors" else "checkpoint of tensors and plain containers"
    # Other errors come from the inside of the unpickler and say nothing about the file.
    tells = isinstance(error, (pickle.UnpicklingError, RuntimeError, OSError, safetensors.SafetensorError))
    detail = f": {text.splitlines()[0]}" if tells and text and "weights_only" not in text else ""
    return f"is not a readable {kind} ({path.stat().st_size} bytes; truncated, or of another format){detail}"


def unwrap(content, source: str = "checkpoint") -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without the prefixes of wrapper modules.

    If the keys are ``backbone.…`` and ``head.…``, as in files of DINO's trainer, only the backbone is returned.

    Raises:
        CheckpointError: there is no state dict. The message describes the content instead.
    """
    while isinstance(content, Mapping) and (
        wrapper := next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    ):
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{source} holds no state dict (a mapping of names to tensors); found {_contents(content)}"
        )
    state = strip_prefixes(content)
    if "backbone" in (parts := {key.partition(".")[0] for key in state}) and parts <= {"backbone", "head"}:
        state = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
    return state


def _contents(content) -> str:
    if not isinstance(content, Mapping):
        return _kind(content)
    others = [f"{key} ({_kind(value)})" for key, value in content.items() if not isinstance(value, Tensor)]
    return _some(others, 8) or "an empty mapping"


def _kind(value) -> str:
    if isinstance(value, Skipped):
        kind = type(value)
        return f"an object of {kind.__module__}.{kind.__qualname__}, which is not read; of a module, save state_dict()"
    return type(value).__name__


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the prefixes that all keys share because a wrapper module was saved."""
    state = dict(state)
    while state and (prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def write(path: str | os.PathLike, state: Mapping[str, Tensor], metadata: Mapping) -> None:
    """Write weights as safetensors, atomically: the file is complete or missing, even after a power failure.

    Raises:
        CheckpointError: the weights are split over ranks.
    """
    if any(hasattr(value, "full_tensor") for value in state.values()):
        raise CheckpointError(
            "the weights are split over ranks; gather them first, with get_model_state_dict of"
            " torch.distributed.checkpoint.state_dict and full_state_dict=True"
        )
    # The format stores no aliases, so tied weights and views are copied into separate tensors.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    payload = safetensors.torch.save(tensors, metadata={METADATA_KEY: json.dumps(dict(metadata))})
    write_atomically(path, payload)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Add the file's name to disk errors in the block, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_atomically(path: str | os.PathLike, payload: bytes | Callable[[BinaryIO], object]) -> None:
    """Replace a file's content atomically: write another file, flush it to disk, and rename it.

    ``payload`` is the content, or a function that writes the content to an open file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            payload(file) if callable(payload) else file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_native(state: Mapping[str, Tensor], model: nn.Module, layout: KeyMap | None, strict: bool) -> dict[str, Tensor]:
    """``state``, in either layout, under our names. The function checks that it fits ``model``.

    Differences are reported in the names of the layout of ``state``.
    """
    state = strip_prefixes(state)
    wanted = model.state_dict()
    name = dict.fromkeys(wanted)
    if layout is not None and layout.recognizes(state):
        name = {key: layout.public(key) for key in wanted}
        state = {key: layout.oriented(key, v) for key, v in layout.untie(state).items() if not layout.ignores(key)}
    else:
        name = {key: key for key in wanted}
    native = {public: key for key, public in name.items() if public is not None}

    missing = [n or key for key, n in name.items() if n not in state]
    unexpected = [key for key in state if key not in native]
    shapes = [
        f"{key}: file {tuple(value.shape)}, model {tuple(wanted[native[key]].shape)}"
        for key, value in state.items()
        if key in native and value.shape != wanted[native[key]].shape
    ]
    if shapes or (strict and (missing or unexpected)):
        problems = []
        if len(missing) == len(wanted):
            problems.append("none of the model's keys is in it; it belongs to another architecture")
        for title, entries in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("shapes that differ", shapes),
        ):
            if entries:
                problems.append(f"{title} ({len(entries)}): {_some(entries)}")
        raise CheckpointError(f"the checkpoint does not fit this {type(model).__name__}: " + "; ".join(problems))
    return {native.get(key, key): value for key, value in state.items()}


def _some(entries: list[str], most: int = 12) -> str:
    return ", ".join(entries[:most]) + (f", and {len(entries) - most} more" if len(entries) > most else "")


def to_public(model: nn.Module, layout: KeyMap) -> dict[str, Tensor]:
    """The model's weights under the public layout's names: the same tensors, or views of them."""
    public = {str(layout.public(key)): value for key, value in model.state_dict().items()}
    return layout.tie({key: layout.oriented(key, value) for key, value in public.items()})
