from .api import attention_maps as attention_maps
from .api import subspace_attention as subspace_attention
from .cached import cached_subspace_attention as cached_subspace_attention
