"""The families of flows, one a file."""

from numpyro_flows.transforms.autoregressive import Autoregressive
from numpyro_flows.transforms.block_autoregressive import BlockAutoregressive
from numpyro_flows.transforms.block_coupling import BlockCoupling
from numpyro_flows.transforms.continuous import Continuous
from numpyro_flows.transforms.coupling import Coupling
from numpyro_flows.transforms.elementwise import Elementwise, ElementwiseAffine
from numpyro_flows.transforms.image import ImageCoupling, InvertibleConv1x1, Leading, Squeeze
from numpyro_flows.transforms.linear import DenseLinear, LULinear, TriangularAffine
from numpyro_flows.transforms.low_rank import LowRankLinear
from numpyro_flows.transforms.normalisation import ActNorm, BatchNorm, initialised, with_batch_statistics
from numpyro_flows.transforms.orthogonal import Householder, Orthogonal, QRLinear
from numpyro_flows.transforms.permutation import Permutation
from numpyro_flows.transforms.planar import Planar, Radial
from numpyro_flows.transforms.residual import Residual
from numpyro_flows.transforms.rotated import Rotated
from numpyro_flows.transforms.sylvester import Sylvester

__all__ = [
    "ActNorm",
    "Autoregressive",
    "BatchNorm",
    "BlockAutoregressive",
    "BlockCoupling",
    "Continuous",
    "Coupling",
    "DenseLinear",
    "Elementwise",
    "ElementwiseAffine",
    "Householder",
    "ImageCoupling",
    "InvertibleConv1x1",
    "LULinear",
    "Leading",
    "LowRankLinear",
    "Orthogonal",
    "Permutation",
    "Planar",
    "QRLinear",
    "Radial",
    "Residual",
    "Rotated",
    "Squeeze",
    "Sylvester",
    "TriangularAffine",
    "initialised",
    "with_batch_statistics",
]
