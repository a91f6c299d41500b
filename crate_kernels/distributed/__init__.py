"""CRATE on several devices, with torch.distributed."""

from .ring_attention import ring_subspace_attention as ring_subspace_attention
from .tensor_parallel import clip_grad_norm_ as clip_grad_norm_
from .tensor_parallel import tensor_parallel as tensor_parallel
