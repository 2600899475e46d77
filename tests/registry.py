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
    dims: tuple[int, ...] = (1, 2, 5)  # those it is tried in; the last is where most of the tests look
    statistics: tuple[str, ...] = ()  # what its state holds besides parameters, which no gradient reaches

    @property
    def dim(self) -> int:
        return self.dims[-1]


IMAGES = {4: (1, 2, 2), 8: (2, 2, 2), 16: (1, 4, 4)}  # images of a size; of the others, one pixel


def image(dim: int) -> tuple[int, int, int]:
    return IMAGES.get(dim, (dim, 1, 1))


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
    Case("coupling-mask", lambda p, dim, **k: p.transforms.Coupling(dim, p.univariate.Affine(), H, mask=[i % 2 for i in range(dim)], **k)),
    Case("block-coupling", lambda p, dim, **k: p.transforms.BlockCoupling(dim, p.univariate.Affine(), H, **k), lambda d: (min(2, max(1, d - 1)),) * 2),
    Case("block-coupling-spline", lambda p, dim, **k: p.transforms.BlockCoupling(dim, p.univariate.RationalQuadraticSpline(), H, blocks=[range(2, dim), *([i] for i in reversed(range(min(2, dim))))], **k), lambda d: (min(2, d),) * 2),
    Case("autoregressive-ordering", lambda p, dim, **k: p.transforms.Autoregressive(dim, p.univariate.Affine(), H, reverse=False, ordering=[*range(dim // 2, dim), *range(dim // 2)], **k), lambda d: (1, d)),
    Case("plu", lambda p, dim, **k: p.transforms.LULinear(dim, [*range(1, dim), 0]), context=False, reorders=True),
    Case("qr", lambda p, dim, **k: p.transforms.QRLinear(dim), context=False),
    Case("householder-map", lambda p, dim, **k: p.transforms.Householder(dim, 4, H, **k)),
    Case("orthogonal-exp", lambda p, dim, **k: p.transforms.Orthogonal(dim), context=False),
    Case("orthogonal-cayley", lambda p, dim, **k: p.transforms.Orthogonal(dim, "cayley"), context=False),
    Case("low-rank", lambda p, dim, **k: p.transforms.LowRankLinear(dim, min(dim, 2)), context=False),
    Case("dense", lambda p, dim, **k: p.transforms.DenseLinear(dim), context=False),
    Case("act-norm", lambda p, dim, **k: p.transforms.ActNorm(image(dim)), context=False, dims=(1, 2, 8)),
    Case("batch-norm", lambda p, dim, **k: p.transforms.BatchNorm(image(dim)), context=False, dims=(1, 2, 8), statistics=("running_mean", "running_log_var")),
    Case("squeeze", lambda p, dim, **k: p.transforms.Squeeze(image(dim)), lambda d: (0, 0), context=False, reorders=True, dims=(4, 16)),
    Case("conv1x1", lambda p, dim, **k: p.transforms.InvertibleConv1x1(image(dim)), context=False, dims=(1, 2, 8)),
    Case("image-coupling", lambda p, dim, **k: p.transforms.ImageCoupling(image(dim), p.univariate.Affine(), H, **k), reorders=True, dims=(1, 2, 8)),
    Case("leading", lambda p, dim, **k: p.transforms.Leading(p.transforms.Coupling(max(1, dim - 2), p.univariate.Affine(), H, swap=False, **k), max(1, dim - 2))),
    Case("nice", lambda p, dim, **k: p.flows.nice(dim, 3, H, **k), lambda d: (4, 4), deep=True, networkless=1),
    Case("realnvp", lambda p, dim, **k: p.flows.realnvp(dim, 3, H, **k), lambda d: (3, 3), deep=True),
    Case("nsf", lambda p, dim, **k: p.flows.nsf(dim, 3, H, **k), lambda d: (3, 3), deep=True),
    Case("nsf_ar", lambda p, dim, **k: p.flows.nsf_ar(dim, 3, H, **k), lambda d: (3, 3 * d), deep=True),
    Case("maf", lambda p, dim, **k: p.flows.maf(dim, 3, H, **k), lambda d: (3 * d, 3), deep=True),
    Case("iaf", lambda p, dim, **k: p.flows.iaf(dim, 3, H, **k), lambda d: (3, 3 * d), deep=True),
    Case("householder", lambda p, dim, **k: p.flows.householder(dim, 2, H, **k), lambda d: (2, 2), deep=True),
    Case("glow", lambda p, dim, **k: p.flows.glow(dim, 2, H[:1], shape=image(dim), **k), lambda d: ((12, 12) if d == 16 else (6, 6)), deep=True, networkless=8, dims=(1, 2, 16)),
]
# fmt: on
BY_NAME = {case.name: case for case in CASES}
FLOWS = [case for case in CASES if case.deep]
CONTEXT_DIM = 3
