"""The families of flows, one a file."""

from pyroflows.transforms.autoregressive import Autoregressive
from pyroflows.transforms.block_autoregressive import BlockAutoregressive
from pyroflows.transforms.coupling import Coupling
from pyroflows.transforms.elementwise import Elementwise, ElementwiseAffine
from pyroflows.transforms.linear import LULinear, TriangularAffine
from pyroflows.transforms.permutation import Permutation
from pyroflows.transforms.planar import Planar, Radial
from pyroflows.transforms.residual import Residual
from pyroflows.transforms.sylvester import Sylvester

__all__ = [
    "Autoregressive",
    "BlockAutoregressive",
    "Coupling",
    "Elementwise",
    "ElementwiseAffine",
    "LULinear",
    "Permutation",
    "Planar",
    "Radial",
    "Residual",
    "Sylvester",
    "TriangularAffine",
]
