"""The families of flows, one a file."""

from pyroflows.transforms.autoregressive import Autoregressive
from pyroflows.transforms.continuous import Continuous
from pyroflows.transforms.coupling import Coupling
from pyroflows.transforms.elementwise import Elementwise, ElementwiseAffine
from pyroflows.transforms.linear import LULinear, TriangularAffine
from pyroflows.transforms.permutation import Permutation

__all__ = [
    "Autoregressive",
    "Continuous",
    "Coupling",
    "Elementwise",
    "ElementwiseAffine",
    "LULinear",
    "Permutation",
    "TriangularAffine",
]
