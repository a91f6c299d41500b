"""White-box measurement: the objective that CRATE's layers optimise, layer by layer."""

from .layerwise import Layerwise as Layerwise
from .layerwise import layerwise as layerwise
from .objective import coding_rate as coding_rate
from .objective import sparsity as sparsity
from .objective import subspace_coding_rate as subspace_coding_rate
from .plots import plot_layerwise as plot_layerwise
