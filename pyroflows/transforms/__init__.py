"""The families of flows, one a file."""

from pyroflows.transforms.autoregressive import Autoregressive
from pyroflows.transforms.block_autoregressive import BlockAutoregressive
from pyroflows.transforms.block_coupling import BlockCoupling
from pyroflows.transforms.continuous import Continuous
from pyroflows.transforms.coupling import Coupling
from pyroflows.transforms.elementwise import Elementwise, ElementwiseAffine
from pyroflows.transforms.image import ImageCoupling, InvertibleConv1x1, Leading, Squeeze
from pyroflows.transforms.linear import DenseLinear, LULinear, TriangularAffine
from pyroflows.transforms.low_rank import LowRankLinear
from pyroflows.transforms.normalisation import ActNorm, BatchNorm, initialised, with_batch_statistics
from pyroflows.transforms.orthogonal import Householder, Orthogonal, QRLinear
from pyroflows.transforms.permutation import Permutation
from pyroflows.transforms.planar import Planar, Radial
from pyroflows.transforms.residual import Residual
from pyroflows.transforms.rotated import Rotated
from pyroflows.transforms.sylvester import Sylvester

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
