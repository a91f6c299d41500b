from .api import subspace_attention as subspace_attention
