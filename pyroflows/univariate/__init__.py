"""Elementwise monotone maps ``g(x; theta)`` for the coupling, autoregressive and elementwise structures."""

from pyroflows.univariate.affine import Additive, Affine
from pyroflows.univariate.base import Univariate
from pyroflows.univariate.gaussian_mixture import GaussianMixtureCDF
from pyroflows.univariate.monotone_network import MonotoneNetwork
from pyroflows.univariate.polynomial import Bernstein, SumOfSquares
from pyroflows.univariate.rational_quadratic import RationalQuadraticSpline
from pyroflows.univariate.sigmoidal import DeepDenseSigmoidal, DeepSigmoidal

__all__ = [
    "Additive",
    "Affine",
    "Bernstein",
    "DeepDenseSigmoidal",
    "DeepSigmoidal",
    "GaussianMixtureCDF",
    "MonotoneNetwork",
    "RationalQuadraticSpline",
    "SumOfSquares",
    "Univariate",
]
