"""The CRATE model family."""

from .base import CrateModel as CrateModel
from .bert import CrateBert as CrateBert
from .checkpoint import CheckpointError as CheckpointError
from .crate import CRATE as CRATE
from .crate import CRATE_base as CRATE_base
from .crate import CRATE_base_patch8 as CRATE_base_patch8
from .crate import CRATE_large as CRATE_large
from .crate import CRATE_small as CRATE_small
from .crate import CRATE_small_patch8 as CRATE_small_patch8
from .crate import CRATE_tiny as CRATE_tiny
from .crate import CRATE_tiny_patch8 as CRATE_tiny_patch8
from .gpt import CrateGPT as CrateGPT
from .gpt import CrateGPTConfig as CrateGPTConfig
from .gpt import crate_gpt2 as crate_gpt2
from .gpt import crate_lm as crate_lm
from .registry import create_model as create_model
from .registry import load_model as load_model
