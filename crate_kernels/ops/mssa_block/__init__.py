from .api import mssa_block as mssa_block
