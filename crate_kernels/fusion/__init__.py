"""Operators for models that already exist: ``fuse`` replaces their CRATE parts, ``unfuse`` restores them.

``names``        the attribute names in public CRATE code
``description``  the content of a module besides its parameters
``watch``        detects changes of a module in microseconds
``look``         the questions that a route asks about modules when it decides
``routes``       what recognized modules compute with operators, and when
``modules``      the class of a fused module
``probe``        tests whether a route computes the same as the module's own ``forward``
``constants``    measures step sizes and thresholds that are numbers in the code
``recognition``  which modules look like parts of CRATE, and which route they take
``api``          applies all of this to a model
"""

from .api import FuseReport as FuseReport
from .api import fuse as fuse
from .api import unfuse as unfuse
