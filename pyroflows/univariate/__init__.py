"""Elementwise monotone maps ``g(x; theta)`` for the coupling, autoregressive and elementwise structures."""

from pyroflows.univariate.affine import Additive, Affine
from pyroflows.univariate.base import Univariate
from pyroflows.univariate.rational_quadratic import RationalQuadraticSpline

__all__ = ["Additive", "Affine", "RationalQuadraticSpline", "Univariate"]
