"""Elementwise monotone maps ``g(x; theta)`` for the coupling, autoregressive and elementwise structures."""

from pyroflows.univariate.affine import Additive, Affine
from pyroflows.univariate.base import Univariate
from pyroflows.univariate.circular import CircularSpline
from pyroflows.univariate.linear_rational import LinearRationalSpline
from pyroflows.univariate.rational_quadratic import RationalQuadraticSpline
from pyroflows.univariate.tails import TailTransform

__all__ = [
    "Additive",
    "Affine",
    "CircularSpline",
    "LinearRationalSpline",
    "RationalQuadraticSpline",
    "TailTransform",
    "Univariate",
]
