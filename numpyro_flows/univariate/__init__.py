"""Elementwise monotone maps ``g(x; theta)`` for the coupling, autoregressive and elementwise structures."""

from numpyro_flows.univariate.affine import Additive, Affine
from numpyro_flows.univariate.base import Univariate
from numpyro_flows.univariate.rational_quadratic import RationalQuadraticSpline

__all__ = ["Additive", "Affine", "RationalQuadraticSpline", "Univariate"]
