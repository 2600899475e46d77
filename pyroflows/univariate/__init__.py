"""Elementwise monotone maps ``g(x; theta)`` for the coupling, autoregressive and elementwise structures."""

from pyroflows.univariate.affine import Additive, Affine
from pyroflows.univariate.base import Univariate
from pyroflows.univariate.circular import CircularSpline
from pyroflows.univariate.gaussian_mixture import GaussianMixtureCDF
from pyroflows.univariate.linear_rational import LinearRationalSpline
from pyroflows.univariate.monotone_network import MonotoneNetwork
from pyroflows.univariate.polynomial import Bernstein, SumOfSquares
from pyroflows.univariate.rational_quadratic import RationalQuadraticSpline
from pyroflows.univariate.sigmoidal import DeepDenseSigmoidal, DeepSigmoidal
from pyroflows.univariate.sinh_arcsinh import SinhArcsinh
from pyroflows.univariate.tails import TailTransform

__all__ = [
    "Additive",
    "Affine",
    "Bernstein",
    "CircularSpline",
    "DeepDenseSigmoidal",
    "DeepSigmoidal",
    "GaussianMixtureCDF",
    "LinearRationalSpline",
    "MonotoneNetwork",
    "RationalQuadraticSpline",
    "SinhArcsinh",
    "SumOfSquares",
    "TailTransform",
    "Univariate",
]
