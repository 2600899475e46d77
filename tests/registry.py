"""Every transform and flow once, for both packages. A new one joins all suites by its line here.

``make(p, dim, **k)`` builds it from the package ``p``; ``k`` holds ``key`` in jax and ``context_dim`` where asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

H = (8, 8)  # hidden widths: small, so that the suites are fast


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[..., Any]
    passes: Callable[[int], tuple[int, int]] = lambda dim: (1, 1)  # network passes forward, inverse
    context: bool = True  # whether it takes a context
    deep: bool = False  # a stack of layers: weights are perturbed by sd / sqrt(fan-in), as training leaves them
    reorders: bool = False  # starts at the identity but for the order of the elements
    numerical: bool = False  # an inverse by root finding: a round trip to 1e-6, and convergence is read on the host
    min_dim: int = 1  # the least dim it can be built for
    networkless: int = 0  # of its passes, those that hold no conditioner network


# fmt: off
CASES = [
    Case("coupling-additive", lambda p, dim, **k: p.transforms.Coupling(dim, p.univariate.Additive(), H, **k), reorders=True),
    Case("coupling-affine", lambda p, dim, **k: p.transforms.Coupling(dim, p.univariate.Affine(), H, **k), reorders=True),
    Case("coupling-spline", lambda p, dim, **k: p.transforms.Coupling(dim, p.univariate.RationalQuadraticSpline(), H, **k), reorders=True),
    Case("coupling-in-place", lambda p, dim, **k: p.transforms.Coupling(dim, p.univariate.Affine(), H, split=dim - 1, swap=False, **k), reorders=True),
    Case("autoregressive-affine", lambda p, dim, **k: p.transforms.Autoregressive(dim, p.univariate.Affine(), H, **k), lambda d: (1, d), reorders=True),
    Case("autoregressive-spline", lambda p, dim, **k: p.transforms.Autoregressive(dim, p.univariate.RationalQuadraticSpline(), H, reverse=False, **k), lambda d: (1, d), reorders=True),
    Case("elementwise-affine", lambda p, dim, **k: p.transforms.Elementwise(dim, p.univariate.Affine(), H, **k)),
    Case("elementwise-spline", lambda p, dim, **k: p.transforms.Elementwise(dim, p.univariate.RationalQuadraticSpline(5, 3.0), H, **k)),
    Case("location-scale", lambda p, dim, **k: p.transforms.ElementwiseAffine(dim), context=False),
    Case("triangular", lambda p, dim, **k: p.transforms.TriangularAffine(dim), context=False),
    Case("lu", lambda p, dim, **k: p.transforms.LULinear(dim), context=False),
    Case("permutation", lambda p, dim, **k: p.transforms.Permutation.random(dim, 1), lambda d: (0, 0), context=False, reorders=True),
    Case("continuous", lambda p, dim, **k: p.transforms.Continuous(dim, (8,), num_steps=6, **k), lambda d: (72, 72), deep=True),
    Case("nice", lambda p, dim, **k: p.flows.nice(dim, 3, H, **k), lambda d: (4, 4), deep=True, networkless=1),
    Case("realnvp", lambda p, dim, **k: p.flows.realnvp(dim, 3, H, **k), lambda d: (3, 3), deep=True),
    Case("nsf", lambda p, dim, **k: p.flows.nsf(dim, 3, H, **k), lambda d: (3, 3), deep=True),
    Case("nsf_ar", lambda p, dim, **k: p.flows.nsf_ar(dim, 3, H, **k), lambda d: (3, 3 * d), deep=True),
    Case("maf", lambda p, dim, **k: p.flows.maf(dim, 3, H, **k), lambda d: (3 * d, 3), deep=True),
    Case("iaf", lambda p, dim, **k: p.flows.iaf(dim, 3, H, **k), lambda d: (3, 3 * d), deep=True),
    Case("cnf", lambda p, dim, **k: p.flows.cnf(dim, 1, H, num_steps=8, **k), lambda d: (96, 96), deep=True),
]
# fmt: on
BY_NAME = {case.name: case for case in CASES}
FLOWS = [case for case in CASES if case.deep]
CONTEXT_DIM = 3
