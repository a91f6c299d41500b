"""Operators for models that people already have: ``fuse`` replaces their CRATE parts, ``unfuse`` puts them back.

``names``        the attribute names that public CRATE code uses
``recognition``  which modules look like parts of CRATE, and which operators they might equal
``constants``    measures the numbers of modules that have them in their code
``probe``        tries whether a module computes what the operators compute
``routes``       the classes that replace a module's ``forward``, and when they take the operators
``api``          applies all of them to a model
"""

from .api import FuseReport as FuseReport
from .api import fuse as fuse
from .api import unfuse as unfuse
