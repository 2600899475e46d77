"""The families of flows, one a file."""

from numpyro_flows.transforms.autoregressive import Autoregressive
from numpyro_flows.transforms.continuous import Continuous
from numpyro_flows.transforms.coupling import Coupling
from numpyro_flows.transforms.elementwise import Elementwise, ElementwiseAffine
from numpyro_flows.transforms.linear import LULinear, TriangularAffine
from numpyro_flows.transforms.permutation import Permutation

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
