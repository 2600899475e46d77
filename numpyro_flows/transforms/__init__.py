"""The families of flows, one a file."""

from numpyro_flows.transforms.autoregressive import Autoregressive
from numpyro_flows.transforms.block_autoregressive import BlockAutoregressive
from numpyro_flows.transforms.coupling import Coupling
from numpyro_flows.transforms.elementwise import Elementwise, ElementwiseAffine
from numpyro_flows.transforms.linear import LULinear, TriangularAffine
from numpyro_flows.transforms.permutation import Permutation
from numpyro_flows.transforms.planar import Planar, Radial
from numpyro_flows.transforms.residual import Residual
from numpyro_flows.transforms.sylvester import Sylvester

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
