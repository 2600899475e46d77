"""Every transform and flow once, for both packages. A new one joins all suites by its line here.

``make(p, dim, **k)`` builds it from the package ``p``; ``k`` holds ``key`` in jax and ``context_dim`` where asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

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
    networkless: int = 0  # of its passes, those that hold no conditioner network
    domain: str = "real"  # of its elements: "real", or "circle": angles in [-pi, pi), the same modulo 2 pi
    dims: tuple[int, ...] = (1, 2, 5)  # those it is tried in; the last is where most of the tests look
    statistics: tuple[str, ...] = ()  # what its state holds besides parameters, which no gradient reaches

    def points(self, dim: int, seed: int = 0) -> np.ndarray:
        """Near the origin, around the edge of the splines' box, and far out; on the circle, all around."""
        rng = np.random.default_rng(seed)
        if self.domain == "circle":
            return rng.uniform(-np.pi, np.pi, (14, dim))
        near, edge, far = rng.normal(size=(6, dim)), rng.uniform(-7, 7, (4, dim)), rng.uniform(-100, 100, (4, dim))
        return np.concatenate([near, edge, far])

    def draws(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draws of the base: the standard normal; on the circle, the uniform."""
        return rng.uniform(-np.pi, np.pi, shape) if self.domain == "circle" else rng.normal(size=shape)

    def log_base(self, x: np.ndarray) -> np.ndarray:
        """Log-density of the base."""
        each = -0.5 * x**2 - 0.5 * np.log(2 * np.pi) if self.domain == "real" else np.full_like(x, -np.log(2 * np.pi))
        return each.sum(-1)

    def gap(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """``a - b``, on the circle the short way round."""
        return a - b if self.domain == "real" else (a - b + np.pi) % (2 * np.pi) - np.pi

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
    Case("coupling-spline-tails", lambda p, dim, **k: p.transforms.Coupling(dim, p.univariate.RationalQuadraticSpline(4, 3.0, tails="learnable"), H, **k), reorders=True),
    Case("elementwise-spline-equal-tails", lambda p, dim, **k: p.transforms.Elementwise(dim, p.univariate.RationalQuadraticSpline(tails="equal"), H, **k)),
    Case("autoregressive-linear-rational", lambda p, dim, **k: p.transforms.Autoregressive(dim, p.univariate.LinearRationalSpline(4, 3.0), H, reverse=False, **k), lambda d: (1, d), reorders=True),
    Case("elementwise-linear-rational", lambda p, dim, **k: p.transforms.Elementwise(dim, p.univariate.LinearRationalSpline(tails="learnable"), H, **k)),
    Case("coupling-circular", lambda p, dim, **k: p.transforms.Coupling(dim, p.univariate.CircularSpline(), H, **k), reorders=True, domain="circle"),
    Case("autoregressive-circular", lambda p, dim, **k: p.transforms.Autoregressive(dim, p.univariate.CircularSpline(4), H, **k), lambda d: (1, d), reorders=True, domain="circle"),
    Case("autoregressive-tails", lambda p, dim, **k: p.transforms.Autoregressive(dim, p.univariate.TailTransform(), H, reverse=False, **k), lambda d: (1, d), reorders=True),
    Case("elementwise-tails", lambda p, dim, **k: p.transforms.Elementwise(dim, p.univariate.TailTransform(), H, **k)),
    Case("elementwise-skewness", lambda p, dim, **k: p.transforms.Elementwise(dim, p.univariate.SinhArcsinh(), H, **k)),
    Case("coupling-sigmoidal", lambda p, dim, **k: p.transforms.Coupling(dim, p.univariate.DeepSigmoidal(4), H, **k), reorders=True, numerical=True),
    Case("coupling-bernstein", lambda p, dim, **k: p.transforms.Coupling(dim, p.univariate.Bernstein(6, 4.0), H, **k), reorders=True, numerical=True),
    Case("autoregressive-dense-sigmoidal", lambda p, dim, **k: p.transforms.Autoregressive(dim, p.univariate.DeepDenseSigmoidal(3), H, **k), lambda d: (1, d), reorders=True, numerical=True),
    Case("autoregressive-sum-of-squares", lambda p, dim, **k: p.transforms.Autoregressive(dim, p.univariate.SumOfSquares(2, 3), H, **k), lambda d: (1, d), reorders=True, numerical=True),
    Case("elementwise-monotone-network", lambda p, dim, **k: p.transforms.Elementwise(dim, p.univariate.MonotoneNetwork(4, 32, 3.0), H, **k), numerical=True),
    Case("elementwise-mixture", lambda p, dim, **k: p.transforms.Elementwise(dim, p.univariate.GaussianMixtureCDF(4), H, **k), numerical=True),
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
    Case("planar-layer", lambda p, dim, **k: p.transforms.Planar(dim, H, **k), numerical=True),
    Case("radial-layer", lambda p, dim, **k: p.transforms.Radial(dim, H, **k)),
    Case("sylvester-orthogonal", lambda p, dim, **k: p.transforms.Sylvester(dim, min(dim, 3), hidden_dims=H, **k), numerical=True),
    Case("sylvester-householder", lambda p, dim, **k: p.transforms.Sylvester(dim, min(dim, 3), kind="householder", num_reflections=2, hidden_dims=H, **k), numerical=True),
    Case("sylvester-triangular", lambda p, dim, **k: p.transforms.Sylvester(dim, min(dim, 3), kind="triangular", reverse=True, hidden_dims=H, **k), reorders=True, numerical=True),
    Case("block-autoregressive", lambda p, dim, **k: p.transforms.BlockAutoregressive(dim, (3, 3), hidden_dims=H, reverse=True, **k), lambda d: (1, d), reorders=True, numerical=True),
    Case("residual-layer", lambda p, dim, **k: p.transforms.Residual(dim, H, **k), numerical=True),
    Case("continuous", lambda p, dim, **k: p.transforms.Continuous(dim, (8,), num_steps=6, **k), lambda d: (72, 72), deep=True),
    Case("nice", lambda p, dim, **k: p.flows.nice(dim, 3, H, **k), lambda d: (4, 4), deep=True, networkless=1),
    Case("realnvp", lambda p, dim, **k: p.flows.realnvp(dim, 3, H, **k), lambda d: (3, 3), deep=True),
    Case("realnvp-rotated", lambda p, dim, **k: p.flows.realnvp(dim, 3, H, rotated=True, **k), lambda d: (3, 3), deep=True),
    Case("nsf", lambda p, dim, **k: p.flows.nsf(dim, 3, H, **k), lambda d: (3, 3), deep=True),
    Case("nsf_ar", lambda p, dim, **k: p.flows.nsf_ar(dim, 3, H, **k), lambda d: (3, 3 * d), deep=True),
    Case("maf", lambda p, dim, **k: p.flows.maf(dim, 3, H, **k), lambda d: (3 * d, 3), deep=True),
    Case("iaf", lambda p, dim, **k: p.flows.iaf(dim, 3, H, **k), lambda d: (3, 3 * d), deep=True),
    Case("ttf", lambda p, dim, **k: p.flows.ttf(dim, 3, H, **k), lambda d: (5, 5), deep=True, networkless=2),
    Case("ncsf", lambda p, dim, **k: p.flows.ncsf(dim, 3, H, **k), lambda d: (3, 3), deep=True, domain="circle"),
    Case("naf", lambda p, dim, **k: p.flows.naf(dim, 2, H, num_units=4, **k), lambda d: (2, 2 * d), deep=True, numerical=True),
    Case("unaf", lambda p, dim, **k: p.flows.unaf(dim, 2, H, num_units=3, num_nodes=32, bound=3.0, **k), lambda d: (2, 2 * d), deep=True, numerical=True),
    Case("sospf", lambda p, dim, **k: p.flows.sospf(dim, 2, H, degree=3, **k), lambda d: (2, 2 * d), deep=True, numerical=True),
    Case("bpf", lambda p, dim, **k: p.flows.bpf(dim, 2, H, degree=6, **k), lambda d: (2, 2 * d), deep=True, numerical=True),
    Case("gaussianization", lambda p, dim, **k: p.flows.gaussianization(dim, 2, H, num_components=4, **k), lambda d: (2, 2), deep=True, numerical=True),
    Case("householder", lambda p, dim, **k: p.flows.householder(dim, 2, H, **k), lambda d: (2, 2), deep=True),
    Case("glow", lambda p, dim, **k: p.flows.glow(dim, 2, H[:1], shape=image(dim), **k), lambda d: ((12, 12) if d == 16 else (6, 6)), deep=True, networkless=8, dims=(1, 2, 16)),
    Case("planar", lambda p, dim, **k: p.flows.planar(dim, 3, H, **k), lambda d: (3, 3), deep=True, numerical=True),
    Case("radial", lambda p, dim, **k: p.flows.radial(dim, 3, H, **k), lambda d: (3, 3), deep=True),
    Case("sylvester", lambda p, dim, **k: p.flows.sylvester(dim, 2, H, rank=min(dim, 2), **k), lambda d: (2, 2), deep=True, numerical=True),
    Case("bnaf", lambda p, dim, **k: p.flows.bnaf(dim, 2, (3,), hidden_dims=H, **k), lambda d: (2, 2 * d), deep=True, numerical=True),
    Case("residual", lambda p, dim, **k: p.flows.residual(dim, 3, H, **k), lambda d: (3, 3), deep=True, numerical=True),
    Case("cnf", lambda p, dim, **k: p.flows.cnf(dim, 1, H, num_steps=8, **k), lambda d: (96, 96), deep=True),
]
# fmt: on
BY_NAME = {case.name: case for case in CASES}
FLOWS = [case for case in CASES if case.deep]
CONTEXT_DIM = 3


def param(case: Case, *others: int | bool, slow: bool = False) -> Any:
    """A case as pytest's parameter, alone or with its dimension and whether it has a context, in that order."""
    words = [case.name, *("context" if other is True else str(other) for other in others if other is not False)]
    return pytest.param(case, *others, id="-".join(words), marks=[pytest.mark.slow] if slow else [])
