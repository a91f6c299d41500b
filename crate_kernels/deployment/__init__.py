"""Models for places without this package: files for ONNX Runtime, OpenVINO and AOTInductor, and eight-bit weights.

``program`` turns a model into a torch program without this package's operators. ``formats`` writes and runs files.
``quantization`` narrows weights. ``command`` is ``crate-kernels export``.
"""

from .formats import FORMATS as FORMATS
from .formats import Format as Format
from .program import Deployable as Deployable
from .program import dynamic_shapes as dynamic_shapes
from .program import example as example
from .program import program as program
from .quantization import SCHEMES as SCHEMES
from .quantization import linear_copy as linear_copy
from .quantization import quantize as quantize
