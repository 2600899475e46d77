"""The families of flows, one a file."""

from pyroflows.transforms.autoregressive import Autoregressive
from pyroflows.transforms.coupling import Coupling
from pyroflows.transforms.elementwise import Elementwise, ElementwiseAffine
from pyroflows.transforms.linear import LULinear, TriangularAffine
from pyroflows.transforms.permutation import Permutation
from pyroflows.transforms.rotated import Rotated

__all__ = [
    "Autoregressive",
    "Coupling",
    "Elementwise",
    "ElementwiseAffine",
    "LULinear",
    "Permutation",
    "Rotated",
    "TriangularAffine",
]
