"""A checkpoint's model, and the real test data that its file names."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..data.batches import Batching, evaluation_batches
from ..data.image_shards import ShardSplit
from ..data.images import IMAGENET_MEAN, IMAGENET_STD, ImageSource, load
from ..data.text import open_corpus
from ..models import CheckpointError, CrateModel, create_model, load_model
from ..models.checkpoint import read
from ..models.tokenizers import create_tokenizer
from ..models.vision import VisionModel

RUN_FILES = ("model.safetensors", "best.safetensors")
"""What a training run leaves in its folder: the finished model, or the best one so far."""


def open_model(path: str | os.PathLike, name: str | None = None) -> tuple[CrateModel, dict]:
    """The model in a native file or in a run's folder, in evaluation mode, and the file's metadata.

    Args:
        path: a safetensors file, a folder that ``crate-kernels train`` wrote, or with ``name`` a public checkpoint.
        name: registered name of the model whose weights these are, for files that do not say.

    Raises:
        CheckpointError, FileNotFoundError: there is no model; the message says what was looked for.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / file for file in RUN_FILES if (path / file).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path} holds no finished model (neither {' nor '.join(RUN_FILES)})")
        path = found
    if name is None:
        model = load_model(path)
        return model.eval(), read(path)[1]
    state, metadata = read(path)
    if metadata.get("config"):
        raise CheckpointError(f"{path} says itself which model it holds ({metadata['model']}); leave --model out")
    model = create_model(name)
    model.load_state_dict(state)
    return model.eval(), metadata


def normalisation(model: VisionModel, metadata: dict) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel ``(C, 1, 1)`` of pixels in 0..1, as the file records them.

    Without a record: ImageNet's, or their average for one channel.
    """
    channels = model.patch_embedding.channels
    values = []
    for key, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        recorded = metadata.get(key) or (default if channels == 3 else [sum(default) / 3] * channels)
        if len(recorded) != channels:
            raise CheckpointError(f"the file records {key} {recorded} for a model of {channels} channels")
        values.append(torch.tensor(recorded).view(-1, 1, 1))
    return values[0], values[1]


def real_inputs(
    model: CrateModel,
    metadata: dict,
    samples: int,
    *,
    data: str | None = None,
    root: str | None = None,
    text: str | None = None,
) -> tuple[Tensor, str]:
    """Test samples as the model takes them, and a line that says what they are.

    Args:
        samples: how many images, or pieces of text.
        data, root: the images, as ``crate-kernels train`` takes them; ``data`` is what the file records if None.
        text: a UTF-8 text file for a language model, whose last tenth is read; Python's manual if None.

    Returns:
        ``(samples, C, H, W)`` float32, normalised; or tokens ``(samples, N)`` int64.

    Raises:
        ValueError: the data is not there, or does not fit the model.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if isinstance(model, VisionModel):
        if text is not None:
            raise ValueError(f"{type(model).__name__} reads images, not text: give --data")
        return _images(model, metadata, samples, data, root)
    if data is not None:
        raise ValueError(f"{type(model).__name__} reads text, not images: give --text")
    return _text(model, metadata, samples, text)


def _images(model, metadata, samples, data, root) -> tuple[Tensor, str]:
    data = data or metadata.get("data")
    if data is None:
        raise ValueError("the file does not say what the model was trained on: give --data")
    size = model.image_size
    # Crops of photographs are made in the size that the model sees.
    images = load(ImageSource(data, root, size[0]))
    channels = model.patch_embedding.channels
    if images.channels != channels:
        raise ValueError(f"{data} has images of {images.channels} channels, the model takes {channels}")
    parts, count = [], 0
    _spread(images.test, samples)
    for batch, _ in evaluation_batches(images, Batching(samples, workers=0), size, torch.device("cpu")):
        parts.append(batch)
        count += len(batch)
        if count >= samples:
            break
    mean, std = normalisation(model, metadata)
    batch = (torch.cat(parts)[:samples].float() / 255 - mean) / std
    return batch, f"{len(batch)} test images of {images.name}, {size[0]} x {size[1]}"


def _spread(split, samples: int) -> None:
    """Keep so many images of a split, evenly spread: folders and some data sets are sorted by class. Shards are not."""
    if isinstance(split, ShardSplit):
        return
    count = min(samples, len(split))
    kept = [i * len(split) // count for i in range(count)]
    split.images = [split.images[i] for i in kept] if isinstance(split.images, list) else split.images[kept]
    split.labels = split.labels[kept]


def _text(model, metadata, samples, text) -> tuple[Tensor, str]:
    tokenizer = create_tokenizer(metadata.get("tokenizer", "bytes"))
    context = model.config.get("block_size") or model.config["max_length"]
    if tokenizer.vocab_size > model.config["vocab_size"]:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, "
            f"the model knows {model.config['vocab_size']}"
        )
    windows = open_corpus(text, tokenizer.name, context).validation_windows(context)[:samples]
    source = "Python's manual" if text is None else str(text)
    return windows, f"{len(windows)} pieces of {context} tokens ({tokenizer.name}) of {source}"
