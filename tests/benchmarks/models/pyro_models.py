"""The benchmark densities as Pyro models.

Each also runs on a batch of draws, with the latents' batch axis to the left of the model's plates: matrix products stay
inside an event (``to_event``), so that a batch of regressions is one product, and everything else is in plates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from . import Posterior, available, available_targets, flatten, load, load_target

__all__ = ["available", "available_targets", "flatten", "get", "get_target"]


def get(name: str) -> Posterior:
    """The posterior called ``name``, with tensors of the default dtype; see ``available``."""
    return load(name, globals(), _tensor)


def get_target(name: str) -> Posterior:
    """The target with a known log evidence called ``name``; see ``available_targets``."""
    return load_target(name, globals(), _tensor)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.as_tensor(array, dtype=torch.get_default_dtype())


class Flat(dist.ImproperUniform):
    """Improper flat prior that can be drawn from: Pyro's initialisation strategies and ``Predictive`` start by a draw.

    The draw, a standard normal on the unconstrained space, is feasible and means nothing.
    """

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        to_support = biject_to(self.support)
        shape = (*sample_shape, *self.batch_shape, *to_support.inverse_shape(self.event_shape))
        return to_support(torch.randn(shape))


def _flat(name: str, support: constraints.Constraint = constraints.real, shape: Sequence[int] = ()) -> Tensor:
    return pyro.sample(name, Flat(support, (), shape))


# -- posteriors with reference draws ----------------------------------------------------------------------------------
def kilpisjarvi(x, alpha_loc, alpha_scale, beta_loc, beta_scale, y=None):
    """Simple regression on a predictor far from its origin."""
    alpha = pyro.sample("alpha", dist.Normal(alpha_loc, alpha_scale))
    beta = pyro.sample("beta", dist.Normal(beta_loc, beta_scale))
    sigma = _flat("sigma", constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def nes(X, y=None):
    """Linear regression with flat priors."""
    beta = _flat("beta", shape=X.shape[1:])
    sigma = _flat("sigma", constraints.positive)
    pyro.sample("y", dist.Normal(beta @ X.T, sigma[..., None]).to_event(1), obs=y)


def kidscore_interaction(X, y=None):
    """Linear regression with flat coefficients and a half-Cauchy noise scale."""
    beta = _flat("beta", shape=X.shape[1:])
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    pyro.sample("y", dist.Normal(beta @ X.T, sigma[..., None]).to_event(1), obs=y)


def eight_schools_centered(J, sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", J):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(J, sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", J):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def autoregression(lags, y=None):
    """AR(K) given its first K values; lags ``(T - K, K)``."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([lags.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    loc = alpha[..., None] + beta @ lags.T
    pyro.sample("y", dist.Normal(loc, sigma[..., None]).to_event(1), obs=y)


def garch11(sigma1, y):
    """GARCH(1, 1) with flat priors, uniform on the triangle ``alpha1, beta1 > 0, alpha1 + beta1 < 1``."""
    mu = _flat("mu")
    alpha0 = _flat("alpha0", constraints.positive)
    alpha1 = pyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    # beta1 < 1 - alpha1 as a share of it, so that no support depends on a value; d beta1 / d share = 1 - alpha1
    share = pyro.sample("beta1_share", dist.Uniform(0.0, 1.0))
    pyro.factor("beta1_jacobian", torch.log1p(-alpha1))
    beta1 = pyro.deterministic("beta1", (1 - alpha1) * share, event_dim=0)

    mu, alpha0, alpha1, power = mu[..., None], alpha0[..., None], alpha1[..., None], beta1[..., None]
    variance = torch.cat([torch.full_like(mu, sigma1**2), alpha0 + alpha1 * (y[:-1] - mu) ** 2], -1)
    # v[t] = c[t] + beta1 v[t-1] by doubling: after k rounds each entry holds its last 2^k terms
    lag = 1
    while lag < len(y):
        variance = variance + power * torch.nn.functional.pad(variance[..., :-lag], (lag, 0))
        power, lag = power**2, 2 * lag
    pyro.sample("y", dist.Normal(mu, variance.sqrt()).to_event(1), obs=y)


def gp_poisson(x, k=None):
    """Poisson regression on a latent Gaussian process, non-centred. The jitter, part of the model, needs float64."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = pyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    rho, alpha = rho[..., None, None], alpha[..., None, None]
    covariance = alpha**2 * (-0.5 * ((x[:, None] - x) / rho) ** 2).exp() + 1e-10 * torch.eye(len(x))
    # a covariance that is not positive definite spoils its own draw and not the batch
    cholesky, info = torch.linalg.cholesky_ex(covariance)
    cholesky = torch.where((info > 0)[..., None, None], torch.nan, cholesky)
    f = pyro.deterministic("f", (cholesky @ f_tilde[..., None])[..., 0], event_dim=1)
    pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)


def lotka_volterra(times, num_steps=5, y=None):
    """Predator and prey: log populations by RK4, ``num_steps`` steps between times; y ``(times, 2)`` from time 0 on.

    By five steps a year log densities are within 0.0016 of those by eighty at 2,000 reference draws.
    """
    prior = dist.Normal(torch.tensor([1.0, 0.05, 1.0, 0.05]), torch.tensor([0.5, 0.05, 0.5, 0.05]))
    theta = _flat("theta", constraints.positive, (4,))
    pyro.factor("theta_prior", (prior.log_prob(theta) - torch.log1p(-prior.cdf(torch.zeros(())))).sum(-1))
    z_init = pyro.sample("z_init", dist.LogNormal(np.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))

    # d log u = theta1 - theta2 v, d log v = -theta3 + theta4 u
    rate, slope = theta[..., [0, 2]] * theta.new_tensor([1, -1]), theta[..., [1, 3]] * theta.new_tensor([-1, 1])

    def field(z):
        return torch.addcmul(rate, slope, z.flip(-1).exp())

    z = z_init.log()
    path = [z]
    for h in (times.diff() / num_steps).unbind():
        for _ in range(num_steps):
            k1 = field(z)
            k2 = field(z + h / 2 * k1)
            k3 = field(z + h / 2 * k2)
            k4 = field(z + h * k3)
            z = z + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        path.append(z)
    pyro.sample("y", dist.LogNormal(torch.stack(path, -2), sigma[..., None, :]).to_event(2), obs=y)


def hmm(y):
    """Two-state hidden Markov model with normal emissions; the first state is uniform."""
    theta1 = pyro.sample("theta1", dist.Dirichlet(torch.ones(2)))
    theta2 = pyro.sample("theta2", dist.Dirichlet(torch.ones(2)))
    mu = _flat("mu", constraints.positive_ordered_vector, (2,))
    pyro.factor("mu_prior", dist.Normal(torch.tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
    logits = torch.stack([theta1, theta2], -2).log()
    # DiscreteHMM moves before it emits: a uniform first move leaves the first emission's state uniform
    logits = torch.stack([torch.zeros_like(logits)] + [logits] * (len(y) - 1), -3)
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), logits, dist.Normal(mu[..., None, :], 1.0)), obs=y)


def gauss_mix(N, y=None):
    """Mixture of two normals with ordered means."""
    mu = _flat("mu", constraints.ordered_vector, (2,))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    with pyro.plate("data", N):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


def diamonds(X, y=None):
    """Linear regression on correlated, centred predictors."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    loc = intercept[..., None] + b @ X.T
    pyro.sample("y", dist.Normal(loc, sigma[..., None]).to_event(1), obs=y)


# -- targets with a known evidence ------------------------------------------------------------------------------------
def funnel(dim):
    """Neal's funnel."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("dimensions", dim - 1):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def logistic_regression(X, scale, y=None):
    w = pyro.sample("w", dist.Normal(0.0, scale).expand([X.shape[1]]).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=w @ X.T).to_event(1), obs=y)


def seeds(x1, x2, n, r=None):
    """Binomial regression with an over-dispersion effect per plate."""
    a0, a1, a2, a12 = (pyro.sample(name, dist.Normal(0.0, 10.0)) for name in ("a0", "a1", "a2", "a12"))
    tau = pyro.sample("tau", dist.Gamma(0.01, 0.01))
    with pyro.plate("data", len(n)):
        b = pyro.sample("b", dist.Normal(0.0, tau.rsqrt()))
        pyro.sample("r", dist.Binomial(n, logits=a0 + a1 * x1 + a2 * x2 + a12 * x1 * x2 + b), obs=r)


def conjugate_regression(X, loc, precision, shape, rate, y=None):
    """Linear regression under the normal-gamma prior; ``precision`` is that of the coefficients per unit of tau."""
    tau = pyro.sample("tau", dist.Gamma(shape, rate))[..., None]
    beta = pyro.sample("beta", dist.Normal(loc, (precision * tau).rsqrt()).to_event(1))
    pyro.sample("y", dist.Normal(beta @ X.T, tau.rsqrt()).to_event(1), obs=y)


def gauss_modes(loc, scale, log_mass):
    """A mixture of normals, under a factor: the evidence is one. ``loc`` and ``scale`` are ``(modes, dim)``."""
    wide = dist.Normal(torch.zeros(loc.shape[-1]).to(loc), 10.0).to_event(1)
    z = pyro.sample("z", wide)
    terms = dist.Normal(loc, scale).to_event(1).log_prob(z[..., None, :]) + log_mass
    pyro.factor("modes", torch.logsumexp(terms, -1) - wide.log_prob(z))
