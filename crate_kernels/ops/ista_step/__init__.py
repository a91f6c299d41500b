from .api import fold as fold
from .api import ista_step as ista_step
