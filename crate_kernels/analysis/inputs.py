"""Real test data for the model of a checkpoint, from the data set that its file records."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..data.batches import Batching, evaluation_batches
from ..data.image_shards import ShardSplit
from ..data.images import IMAGENET_MEAN, IMAGENET_STD, ImageSource, load
from ..data.text import open_corpus
from ..models import CheckpointError, CrateModel
from ..models.tokenizers import create_tokenizer
from ..models.vision import VisionModel
from ..terminal import count


def normalization(model: VisionModel, metadata: dict) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel ``(C, 1, 1)``, for pixels in 0..1, as recorded in the file.

    If the file does not record them, they are ImageNet's (for one channel, the average of ImageNet's three).
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
    """Test samples as input of the model, and a sentence that describes them.

    Args:
        samples: how many images, or pieces of text.
        data, root: the images, as ``crate-kernels train`` takes them. None takes the data that the file records.
        text: a UTF-8 text file for a language model; the last tenth is read. None takes Python's manual.

    Returns:
        ``(samples, C, H, W)`` float32, normalized; or tokens ``(samples, N)`` int64.

    Raises:
        ValueError: the data is missing, or does not fit the model.
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
    parts, found = [], 0
    _spread(images.test, samples)
    for batch, _ in evaluation_batches(images, Batching(samples, workers=0), size, torch.device("cpu")):
        parts.append(batch)
        found += len(batch)
        if found >= samples:
            break
    mean, std = normalization(model, metadata)
    batch = (torch.cat(parts)[:samples].float() / 255 - mean) / std
    return batch, f"{count(len(batch), 'test image')} of {images.name}, {size[0]} x {size[1]}"


def _spread(split, samples: int) -> None:
    """Reduce a split to ``samples`` images, evenly spread, because folders and some data sets are sorted by class.

    Shards are not sorted and stay as they are.
    """
    if isinstance(split, ShardSplit):
        return
    wanted = min(samples, len(split))
    kept = [i * len(split) // wanted for i in range(wanted)]
    split.images = [split.images[i] for i in kept] if isinstance(split.images, list) else split.images[kept]
    split.labels = split.labels[kept]


def _text(model, metadata, samples, text) -> tuple[Tensor, str]:
    tokenizer = create_tokenizer(metadata.get("tokenizer", "bytes"))
    context = model.config.get("block_size") or model.config.get("max_length")
    if context is None:
        raise ValueError(f"a {type(model).__name__} reads neither images nor text")
    if text is None and metadata.get("text") is not None and Path(metadata["text"]).exists():
        text = metadata["text"]
    if tokenizer.vocab_size > model.config["vocab_size"]:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, "
            f"the model knows {model.config['vocab_size']}"
        )
    corpus = open_corpus(text, tokenizer.name, context, window="the model's window of")
    windows = corpus.validation_windows(context)[:samples]
    source = "Python's manual" if text is None else str(text)
    return windows, f"{count(len(windows), 'piece')} of {context} tokens ({tokenizer.name}) of {source}"
