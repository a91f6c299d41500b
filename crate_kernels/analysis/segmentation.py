"""Masks from attention maps of a vision model that was trained without masks.

All functions work on plain tensors and therefore with any transformer. :func:`class_attention` and :func:`keys` get
these tensors from the vision models of this package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..models.vision import VisionModel


@torch.no_grad()
def class_attention(model: VisionModel, images: Tensor, layer: int = -1) -> Tensor:
    """The attention of the class token to each patch: ``images (B, C, H, W)`` -> ``(B, heads, rows, columns)``.

    This is the first row of a layer's attention maps without its first entry. Each map therefore sums to less than 1.
    """
    maps = model.get_attention(images, layer)[:, :, 0, 1:]
    return maps.unflatten(-1, model.patch_embedding.grid(images))


@torch.no_grad()
def keys(model: VisionModel, images: Tensor, layer: int = -1) -> Tensor:
    """A layer's projected patches, all heads side by side: ``images (B, C, H, W)`` -> ``(B, N, heads·p)``.

    CRATE has one projection for query, key and value. MaskCut's keys are therefore this projection.
    """
    layers = range(len(model.blocks))
    if layer not in (*layers, *(i - len(model.blocks) for i in layers)):
        raise ValueError(f"layer: expected one of {-len(model.blocks)}..{len(model.blocks) - 1}, got {layer}")
    tokens = model.embed(images)
    for block in model.blocks[:layer]:
        tokens = block(tokens)
    block = model.blocks[layer]
    return block.mssa.project(block.mssa_norm(tokens)).flatten(2)[:, 1:]


def attention_mask(attention: Tensor, mass: float = 0.6) -> Tensor:
    """The smallest set of patches with a share ``mass`` of each map: ``(..., rows, columns)`` -> bool, the same shape.

    This thresholding is from "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294, section
    4.2.2).
    """
    if not 0 < mass < 1:
        raise ValueError(f"mass: expected a share between 0 and 1, got {mass}")
    flat = attention.flatten(-2)
    values, order = flat.sort(dim=-1, descending=True)
    share = values / values.sum(dim=-1, keepdim=True)
    before = share.cumsum(dim=-1) - share  # the share of all larger patches
    return torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, before < mass).view_as(attention)


def normalized_cut(affinity: Tensor) -> Tensor:
    """The relaxed normalized cut of a graph: the second eigenvector of ``(D − W) x = μ D x``, ``D = diag(Σ_j W_ij)``.

    The sign of the values splits the nodes in two ("Normalized cuts and image segmentation", Shi and Malik, 2000).

    Args:
        affinity: W ``(N, N)``, symmetric with positive row sums, N >= 2. Computed in float64.

    Returns:
        ``(N,)`` float64, of unknown sign.
    """
    if affinity.dim() != 2 or affinity.shape[0] != affinity.shape[1] or affinity.shape[0] < 2:
        raise ValueError(f"affinity: expected shape (N, N) with N >= 2, got {tuple(affinity.shape)}")
    affinity = affinity.double()
    scale = affinity.sum(dim=1).rsqrt()
    # y = D^½ x turns this into an ordinary symmetric problem. The second smallest eigenvector of I − M is the second
    # largest of M.
    vectors = torch.linalg.eigh(scale[:, None] * affinity * scale).eigenvectors
    return scale * vectors[:, -2]


def object_masks(
    features: Tensor, grid: tuple[int, int], count: int = 3, threshold: float = 0.2, center: bool = False
) -> Tensor:
    """Up to ``count`` objects, by repeated normalized cuts. Each cut leaves out the patches of earlier objects.

    This is MaskCut of "Cut and Learn for Unsupervised Object Detection and Instance Segmentation" (arXiv 2301.11320,
    section 3.1). Patches belong together if their features have a cosine of at least ``threshold``. The object is the
    side of the cut with the eigenvector's largest entry. If that side contains three or more corners of the image, the
    object is the other side. The mask is the connected part of the object around its strongest patch.

    Args:
        features: ``(N, d)``, of the patches row by row, N = rows·columns.
        grid: (rows, columns).
        count: the largest number of masks.
        threshold: least cosine of patches that belong together, in -1..1.
        center: subtract the mean feature first. Features with a common part have cosines near 1.

    Returns:
        bool ``(found, rows, columns)``, disjoint. There are fewer than ``count`` masks if nothing is left to cut.
    """
    rows, columns = grid
    if features.dim() != 2 or features.shape[0] != rows * columns:
        raise ValueError(
            f"features: expected shape ({rows * columns}, d) for a grid of {grid}, got {tuple(features.shape)}"
        )
    features = features.double()
    unit = normalize(features - features.mean(dim=0) if center else features, dim=-1)
    affinity = (unit @ unit.T >= threshold).double().clamp_min(1e-5)
    affinity.fill_diagonal_(1)
    left = torch.ones(rows * columns, dtype=torch.bool, device=features.device)
    masks: list[Tensor] = []
    while len(masks) < count and left.sum() > 1:
        remaining = affinity[left][:, left]
        if remaining.min() == 1:
            break  # all patches belong together: nothing to cut
        vector = normalized_cut(remaining)
        # Patches of earlier objects get the average value, which is not extreme for either side.
        whole = vector.mean().repeat(rows * columns)
        whole[left] = vector
        mask = _object_side(whole.view(rows, columns), left.view(rows, columns))
        masks.append(mask)
        left &= ~mask.flatten()
    return torch.stack(masks) if masks else torch.zeros(0, rows, columns, dtype=torch.bool, device=features.device)


def _object_side(vector: Tensor, left: Tensor) -> Tensor:
    vector = vector - vector[left].mean()
    if vector.flatten()[vector.abs().argmax()] < 0:
        vector = -vector
    corners = (vector > 0)[[0, 0, -1, -1], [0, -1, 0, -1]]
    if corners.sum() >= 3:
        vector = -vector
    return connected_part((vector > 0) & left, int(vector.masked_fill(~left, -torch.inf).argmax()))


def connected_part(mask: Tensor, seed: int) -> Tensor:
    """The part of ``mask (rows, columns)`` that is connected with patch number ``seed`` by horizontal or vertical
    neighbors."""
    part = torch.zeros_like(mask)
    part.view(-1)[seed] = True
    while True:
        grown = part.clone()
        grown[1:] |= part[:-1]
        grown[:-1] |= part[1:]
        grown[:, 1:] |= part[:, :-1]
        grown[:, :-1] |= part[:, 1:]
        grown &= mask
        if (grown | part).equal(part):
            return part & mask
        part = grown | part


def principal_components(features: Sequence[Tensor], count: int = 3) -> list[Tensor]:
    """The leading principal components of the patches, with the same axes for all images, scaled to 0..1 for display.

    Args:
        features: one ``(N_i, d)`` for each image. Images may differ in size.
        count: number of components.

    Returns:
        One ``(N_i, count)`` for each image, float32.
    """
    together = torch.cat(list(features)).double()
    together = together - together.mean(dim=0)
    if min(together.shape) < count:
        raise ValueError(f"count: {tuple(together.shape)} features have no {count} components")
    projected = together @ torch.linalg.svd(together, full_matrices=False).Vh[:count].T
    # Outliers are clipped: otherwise a few extreme patches would make all others gray.
    low, high = projected.quantile(0.01, dim=0), projected.quantile(0.99, dim=0)
    scaled = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    return list(scaled.split([len(f) for f in features]))


def intersection_over_union(masks: Tensor, truth: Tensor) -> Tensor:
    """``|A ∩ B| / |A ∪ B|`` of bool masks ``(..., H, W)`` -> ``(...)`` float32; 1 where both are empty."""
    if masks.dtype != torch.bool or truth.dtype != torch.bool:
        raise ValueError(f"masks and truth: expected bool, got {masks.dtype} and {truth.dtype}")
    both = (masks & truth).flatten(-2).sum(-1)
    either = (masks | truth).flatten(-2).sum(-1)
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge maps on the grid of patches ``(..., rows, columns)`` to pixels ``(..., height, width)``: bilinear,
    float32."""
    flat = maps.float().reshape(-1, 1, *maps.shape[-2:])
    return torch.nn.functional.interpolate(flat, size=size, mode="bilinear").view(*maps.shape[:-2], *size)
