"""A model as a program of standard torch operations: tensors in, one tensor out, dictionaries folded."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..models import CrateBert, CrateDINO, CrateGPT, CrateModel
from ..models.vision import VisionModel
from ..nn import KeepsFolded


class Deployable(nn.Module):
    """A copy of a model, prepared for inference, with the inputs and the output that a runtime gets.

    | model | inputs | output |
    |---|---|---|
    | `CRATE`, `CrateAlpha` | images `(B, C, H, W)` | logits `(B, classes)`, or features `(B, dim)` without a head |
    | `CrateMAE` | images `(B, C, H, W)` | the encoder's tokens `(B, 1 + patches, dim)` |
    | `CrateDINO` | images `(B, C, H, W)` | the teacher's features `(B, dim)` |
    | `CrateGPT` | tokens `(B, N)` int64 | logits `(B, N, vocabulary)` |
    | `CrateBert` | tokens `(B, N)`, lengths `(B,)`, both int64 | logits `(B, N, vocabulary)`, or `(B, classes)` |

    Args:
        model: a model of this package.
        dtype: of the weights and of the arithmetic. Images and outputs are float32 with every dtype.

    Raises:
        TypeError: the model is not one of the table.
    """

    def __init__(self, model: CrateModel, dtype: torch.dtype = torch.float32):
        super().__init__()
        model = model.backbone if isinstance(model, CrateDINO) else model
        if not isinstance(model, VisionModel | CrateGPT | CrateBert):
            raise TypeError(f"model: expected a model of this package, got {type(model).__name__}")
        self.model = copy.deepcopy(model).requires_grad_(False).prepare_for_inference()
        self.dtype = dtype
        if dtype != torch.float32:
            # First fold, then narrow: the fold of a narrowed dictionary would be rounded twice.
            dictionaries = [module for module in self.model.modules() if isinstance(module, KeepsFolded)]
            folded = [module.folded() for module in dictionaries]
            self.model.to(dtype)
            for module, matrix in zip(dictionaries, folded, strict=True):
                if matrix is not None:
                    module.keep(matrix.to(dtype))
        self.train(False)

    @property
    def names(self) -> list[str]:
        """Names of the inputs."""
        if isinstance(self.model, VisionModel):
            return ["images"]
        return ["tokens", "lengths"] if isinstance(self.model, CrateBert) else ["tokens"]

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output of the table above."""
        model = self.model
        if isinstance(model, VisionModel):
            tokens = model.forward_features(inputs[0].to(self.dtype))
            return (model.forward_head(tokens) if hasattr(model, "head") else tokens).float()
        if isinstance(model, CrateBert):
            tokens, lengths = inputs
            return model.forward_head(model.forward_features(tokens, lengths)).float()
        return model.forward_head(model.forward_features(inputs[0])).float()


def longest_text(model: CrateGPT | CrateBert) -> int:
    """The most tokens of one text."""
    return model.config.get("block_size") or model.config["max_length"]


def example(model: Deployable, batch: int = 2, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    """Random inputs of ``model``: normal images of its size, or tokens of half its longest text."""
    inner = model.model
    if isinstance(inner, VisionModel):
        return (torch.randn(batch, inner.in_chans, *inner.image_size, generator=generator),)
    length = max(2, longest_text(inner) // 2)
    tokens = torch.randint(inner.vocab_size, (batch, length), generator=generator)
    return (tokens, torch.full((batch,), length)) if isinstance(inner, CrateBert) else (tokens,)


def dynamic_shapes(model: Deployable, *, any_size: bool = False) -> tuple[dict, ...]:
    """The sizes that may change from call to call, in the form that ``torch.export`` takes.

    The number of images or texts may change, and the length of texts up to the model's longest text.

    Args:
        any_size: the height and width of images may change too, in whole patches, with at least two patches each.
    """
    Dim = torch.export.Dim
    batch = {0: Dim("batch", min=1)}
    inner = model.model
    if isinstance(inner, VisionModel):
        if not any_size:
            return (batch,)
        height, width = inner.patch_embedding.patch_size
        return (batch | {2: height * Dim("rows", min=2), 3: width * Dim("columns", min=2)},)
    texts = batch | {1: Dim("length", min=1, max=longest_text(inner))}
    return (texts, batch) if isinstance(inner, CrateBert) else (texts,)


def program(model: Deployable, *, any_size: bool = False) -> torch.export.ExportedProgram:
    """``model`` through ``torch.export``: standard ATen operators only, and one product for every ISTA step.

    ``any_size`` is as for :func:`dynamic_shapes`.
    """
    with torch.no_grad():
        return torch.export.export(model, example(model), dynamic_shapes=(dynamic_shapes(model, any_size=any_size),))
