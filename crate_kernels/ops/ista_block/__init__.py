from .api import ista_block as ista_block
