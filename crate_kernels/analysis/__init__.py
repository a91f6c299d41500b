"""Measurements of the objective that CRATE's layers optimize, layer by layer, and of what attention segments."""

from .half_steps import HalfSteps as HalfSteps
from .half_steps import half_steps as half_steps
from .layerwise import Layerwise as Layerwise
from .layerwise import layerwise as layerwise
from .objective import coding_rate as coding_rate
from .objective import effective_rank as effective_rank
from .objective import sparsity as sparsity
from .objective import subspace_coding_rate as subspace_coding_rate
from .objective import subspace_coherence as subspace_coherence
from .plots import plot_half_steps as plot_half_steps
from .plots import plot_layerwise as plot_layerwise
from .probe import LayerwiseProbe as LayerwiseProbe
