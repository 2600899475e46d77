"""Elementwise monotone maps ``g(x; theta)`` for the coupling, autoregressive and elementwise structures."""

from numpyro_flows.univariate.affine import Additive, Affine
from numpyro_flows.univariate.base import Univariate
from numpyro_flows.univariate.circular import CircularSpline
from numpyro_flows.univariate.linear_rational import LinearRationalSpline
from numpyro_flows.univariate.rational_quadratic import RationalQuadraticSpline
from numpyro_flows.univariate.tails import TailTransform

__all__ = [
    "Additive",
    "Affine",
    "CircularSpline",
    "LinearRationalSpline",
    "RationalQuadraticSpline",
    "TailTransform",
    "Univariate",
]
