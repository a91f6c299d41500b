"""Tensor parallelism: every rank holds some heads of the attention and some rows of the dictionary.

CRATE is split in the same places as a transformer, but with half the matrices. MSSA has one projection for query, key
and value, and an ISTA step multiplies by one matrix twice. With the rows ``W_i`` and the channels ``x_i`` of rank i::

    MSSA    w_i = x U_iᵀ                  out = Σ_i attention(w_i) W_out,iᵀ + b
    ISTA    r_i = x_i − x W_iᵀ            out = relu(x + η (Σ_i r_i W_i) − η λ)        since x W − x Wᵀ W = r W
    ODL     z_i = relu(η (x D_i − λ))     r = x − Σ_i z_i D_iᵀ,   out = Σ_i relu(z_i + η (r D_i − λ)) D1_iᵀ

Every rank has whole tokens, and each Σ_i is one all-reduce of them. Attention runs on the local heads through
:func:`crate_kernels.ops.subspace_attention`, with its kernels. Parameters become DTensors of torch, so optimizers,
FSDP2 on the other dimension of the mesh, and torch.distributed.checkpoint can handle them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInputOutput,
    RowwiseParallel,
    parallelize_module,
)

from ..nn import ISTA, MSSA, CrateDecoderBlock, OvercompleteISTA, TransposedProjection
from ..ops import backends


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split every CRATE layer of ``model`` over the ranks of ``mesh``, in place.

    Everything else (embeddings, LayerNorms, head) stays whole and is copied from the first rank. Afterwards every rank
    must get the same batch. Outputs and gradients are those of one device up to rounding.

    Args:
        model: a model of any family of this package, or a module that contains :class:`~crate_kernels.nn.MSSA`,
            :class:`~crate_kernels.nn.ISTA` or their relatives. Call this function before ``fully_shard`` or DDP, and
            before you create the optimizer.
        mesh: a mesh of one dimension, or ``mesh["tensor"]`` of a larger one.

    Returns:
        ``model``. ``state_dict()`` holds DTensors where a parameter is split.

    Raises:
        TypeError: ``mesh`` is no DeviceMesh.
        ValueError: a layer cannot be split over this many ranks. The model is then unchanged.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.mesh_dim_names or mesh.ndim}; take mesh['tensor']")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("model: is sharded already; call tensor_parallel once, and before fully_shard")
    plan = {name: STYLES[type(module)]() for name, module in model.named_modules() if type(module) in STYLES}
    if not any(isinstance(style, CrateStyle) for style in plan.values()):
        raise ValueError("model: holds no MSSA, ISTA or OvercompleteISTA of crate_kernels.nn")
    for name, style in plan.items():
        if isinstance(style, CrateStyle):
            style.check(model.get_submodule(name), mesh.size(), name)
    for name, style in plan.items():
        # The modules are split one at a time, because a plan cannot name the model itself.
        parallelize_module(model.get_submodule(name), mesh, style)
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            dist.broadcast(tensor.detach(), group_src=0, group=mesh.get_group())
    return model


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """:func:`torch.nn.utils.clip_grad_norm_` for parameters of which some are DTensors, or which have several meshes.

    Returns:
        The norm of all gradients before clipping: a plain scalar, the same on every rank.
    """
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    norms = [
        nn.utils.get_total_norm([p.grad for p in group if p.grad is not None], norm_type) for group in groups.values()
    ]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


class CrateStyle(ParallelStyle):
    """Base class of the styles. It refuses a module that cannot be divided, and splits the others."""

    def check(self, module: nn.Module, ranks: int, name: str = "") -> None:
        """Raise ValueError, beginning with the module's ``name``, if it cannot be split over ``ranks``."""
        if (reason := self.why_not(module, ranks)) is not None:
            raise ValueError(f"{name or type(module).__name__}: {reason}")

    def why_not(self, module: Any, ranks: int) -> str | None:
        """The reason, in one sentence, why ``module`` cannot be split over ``ranks``; None if it can."""
        raise NotImplementedError

    def split(self, module: Any, mesh: DeviceMesh) -> None:
        """Shard the parameters, and make the module compute with the shards."""
        raise NotImplementedError

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        self.check(module, mesh.size())
        self.split(module, mesh)
        return module

    def _shard(self, module: nn.Module, mesh: DeviceMesh, **dimensions: int) -> None:
        for name, dimension in dimensions.items():
            if (parameter := getattr(module, name)) is not None:
                shard = distribute_tensor(parameter, mesh, [Shard(dimension)], src_data_rank=self.src_data_rank)
                module.register_parameter(name, nn.Parameter(shard, requires_grad=parameter.requires_grad))


class MSSAParallel(CrateStyle):
    """Splits :class:`~crate_kernels.nn.MSSA` by heads: the projection by rows, the output projection by columns, with
    one all-reduce after it. The bias is whole and added once. A tied output is split with the projection."""

    def why_not(self, module: MSSA, ranks: int) -> str | None:
        heads = module.heads
        if isinstance(module.output, nn.Identity) and ranks > 1:
            return "the only head spans the whole width, and there is no output projection to split"
        if ranks > heads:
            return f"{heads} heads cannot be shared out over {ranks} ranks; use at most {heads}"
        if heads % ranks:
            return f"{ranks} ranks do not divide the {heads} heads"
        if module.dropout:
            return f"dropout = {module.dropout} would differ between the ranks; build the model with dropout=0"
        return None

    def split(self, module: MSSA, mesh: DeviceMesh) -> None:
        if isinstance(module.output, TransposedProjection):
            output: ParallelStyle = PrepareModuleInputOutput(
                input_layouts=Shard(-1),
                desired_input_layouts=Shard(-1),
                output_layouts=Partial(),
                desired_output_layouts=Replicate(),
            )
        else:
            output = RowwiseParallel()
        plan: dict[str, ParallelStyle] = {"projection": ColwiseParallel(), "output": output}
        if isinstance(module.output, nn.Identity):
            del plan["output"]
        parallelize_module(module, mesh, plan, src_data_rank=self.src_data_rank)
        module.heads //= mesh.size()
        module.__class__ = _SplitMSSA
        if module.qk_norm is not None:
            gain: Any = module.qk_norm
            gain.mesh = mesh
            gain.__class__ = _SharedRMSNorm


class ISTAParallel(CrateStyle):
    """Splits :class:`~crate_kernels.nn.ISTA` by the rows of W: one matrix, sharded once, with one all-reduce."""

    def why_not(self, module: ISTA, ranks: int) -> str | None:
        dim = module.weight.shape[0]
        return f"{ranks} ranks do not divide the {dim} rows of the dictionary" if dim % ranks else None

    def split(self, module: ISTA, mesh: DeviceMesh) -> None:
        self._shard(module, mesh, weight=0)
        module._folded = None
        module.__class__ = _SplitISTA


class OvercompleteISTAParallel(CrateStyle):
    """Splits :class:`~crate_kernels.nn.OvercompleteISTA` by the atoms of its dictionaries, with two all-reduces."""

    def why_not(self, module: OvercompleteISTA, ranks: int) -> str | None:
        atoms = module.D.shape[1]
        return f"{ranks} ranks do not divide the {atoms} atoms of the dictionary" if atoms % ranks else None

    def split(self, module: OvercompleteISTA, mesh: DeviceMesh) -> None:
        self._shard(module, mesh, D=1, D1=1)
        if isinstance(module.step_size, Tensor) and module.step_size.dim():
            self._shard(module, mesh, step_size=0, lambd=0)
        module.__class__ = _SplitOvercompleteISTA


class DictionaryParallel(CrateStyle):
    """Splits the dictionary of :class:`~crate_kernels.nn.CrateDecoderBlock` by its rows, with one all-gather, because
    the next LayerNorm needs whole tokens. The block's attention has its own style."""

    def why_not(self, module: CrateDecoderBlock, ranks: int) -> str | None:
        dim = module.dictionary.weight.shape[0]
        return f"{ranks} ranks do not divide the {dim} rows of the dictionary" if dim % ranks else None

    def split(self, module: CrateDecoderBlock, mesh: DeviceMesh) -> None:
        style = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(module.dictionary, mesh, style, src_data_rank=self.src_data_rank)


class SharedDropout(ParallelStyle):
    """For :class:`torch.nn.Dropout` of whole tokens: the first rank draws the mask and sends it to the other ranks."""

    def _apply(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        module.mesh = mesh
        module.__class__ = _SharedDropout
        return module


STYLES: dict[type[nn.Module], type[ParallelStyle]] = {
    MSSA: MSSAParallel,
    ISTA: ISTAParallel,
    OvercompleteISTA: OvercompleteISTAParallel,
    CrateDecoderBlock: DictionaryParallel,
    nn.Dropout: SharedDropout,
}
"""Module -> the style that splits it."""


# -- the modules on their shards: what they become, so that names, hooks and keys stay what they were ----------------


class _SplitMSSA(MSSA):
    fusible: ClassVar[bool] = False  # an all-reduce comes between the output projection and the residual


class _SplitISTA(ISTA):
    weight: Any  # a DTensor
    fusible: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        mesh, weight = self.weight.device_mesh, self.weight.to_local()
        low, weight = backends.cast(backends.autocast_dtype(x), x, weight)  # the sum has the dtype of x
        shared, rows = _shared(low, mesh), weight.shape[0]
        residual = shared.narrow(-1, mesh.get_local_rank() * rows, rows) - shared @ weight.T
        return torch.relu(x + self.step_size * (_summed(residual @ weight, mesh) - self.lambd))


class _SplitOvercompleteISTA(OvercompleteISTA):
    D: Any  # DTensors
    D1: Any

    def forward(self, x: Tensor) -> Tensor:
        mesh, D = self.D.device_mesh, self.D.to_local()
        D1 = D if self.D1 is None else self.D1.to_local()
        x, D, D1 = backends.cast(backends.autocast_dtype(x), x, D, D1)
        step_size, lambd = (self._local(value, mesh) for value in (self.step_size, self.lambd))
        codes = torch.relu(step_size * (_shared(x, mesh) @ D - lambd))
        residual = x - _summed(codes @ D.T, mesh)
        codes = torch.relu(codes + step_size * (_shared(residual, mesh) @ D - lambd))
        return _summed(codes @ D1.T, mesh)

    @staticmethod
    def _local(value: float | Tensor, mesh: DeviceMesh) -> float | Tensor:
        if isinstance(value, DTensor):
            return value.to_local()
        return _shared(value, mesh) if isinstance(value, Tensor) else value


class _SharedRMSNorm(nn.RMSNorm):
    mesh: DeviceMesh

    def forward(self, w: Tensor) -> Tensor:
        # The heads of all ranks share one gain.
        return nn.functional.rms_norm(w, self.normalized_shape, _shared(self.weight, self.mesh), self.eps)


class _SharedDropout(nn.Dropout):
    mesh: DeviceMesh

    def forward(self, tokens: Tensor) -> Tensor:
        if not (self.training and self.p):
            return tokens
        mask = nn.functional.dropout(torch.ones_like(tokens, requires_grad=False), self.p)
        return tokens * distribute_tensor(mask, self.mesh, [Replicate()]).to_local()


def _shared(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """``x``, complete on every rank, as input of a partial sum. Its gradients are summed over the ranks."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _summed(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """``Σ part`` over the ranks. Every rank gets the complete sum."""
    return (
        DTensor.from_local(part, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
    )
