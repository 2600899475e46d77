"""Elementwise monotone maps ``g(x; theta)`` for the coupling, autoregressive and elementwise structures."""

from numpyro_flows.univariate.affine import Additive, Affine
from numpyro_flows.univariate.base import Univariate
from numpyro_flows.univariate.circular import CircularSpline
from numpyro_flows.univariate.gaussian_mixture import GaussianMixtureCDF
from numpyro_flows.univariate.linear_rational import LinearRationalSpline
from numpyro_flows.univariate.monotone_network import MonotoneNetwork
from numpyro_flows.univariate.polynomial import Bernstein, SumOfSquares
from numpyro_flows.univariate.rational_quadratic import RationalQuadraticSpline
from numpyro_flows.univariate.sigmoidal import DeepDenseSigmoidal, DeepSigmoidal
from numpyro_flows.univariate.sinh_arcsinh import SinhArcsinh
from numpyro_flows.univariate.tails import TailTransform

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
