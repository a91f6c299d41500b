"""Operators for models that people already have: ``fuse`` replaces their CRATE parts, ``unfuse`` puts them back.

``names``        the attribute names that public CRATE code uses
``description``  what a module holds beside its parameters
``watch``        notices changes of it in microseconds
``look``         what a route asks about modules when it decides
``routes``       what recognized modules compute, in operators, and when
``modules``      the class that a recognized module gets
``probe``        tries whether a route computes what the module's own ``forward`` computes
``constants``    measures the numbers of modules that have them in their code
``recognition``  which modules look like parts of CRATE, and which route they take
``api``          applies all of it to a model
"""

from .api import FuseReport as FuseReport
from .api import fuse as fuse
from .api import unfuse as unfuse
