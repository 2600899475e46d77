"""The benchmark densities as NumPyro models."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

from . import Posterior, available, available_targets, flatten, load, load_target

__all__ = ["available", "available_targets", "flatten", "get", "get_target"]


def get(name: str) -> Posterior:
    """The posterior called ``name``, with arrays of the default dtype; see ``available``."""
    return load(name, globals(), _array)


def get_target(name: str) -> Posterior:
    """The target with a known log evidence called ``name``; see ``available_targets``."""
    return load_target(name, globals(), _array)


def _array(array: np.ndarray) -> Array:
    return jnp.asarray(array, dtype=float)


def _flat(name: str, support: constraints.Constraint = constraints.real, shape: tuple[int, ...] = ()) -> Array:
    return numpyro.sample(name, dist.ImproperUniform(support, (), shape))


# -- posteriors with reference draws ----------------------------------------------------------------------------------
def kilpisjarvi(x, alpha_loc, alpha_scale, beta_loc, beta_scale, y=None):
    """Simple regression on a predictor far from its origin."""
    alpha = numpyro.sample("alpha", dist.Normal(alpha_loc, alpha_scale))
    beta = numpyro.sample("beta", dist.Normal(beta_loc, beta_scale))
    sigma = _flat("sigma", constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def nes(X, y=None):
    """Linear regression with flat priors."""
    beta = _flat("beta", shape=X.shape[1:])
    sigma = _flat("sigma", constraints.positive)
    with numpyro.plate("data", len(X)):
        numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def kidscore_interaction(X, y=None):
    """Linear regression with flat coefficients and a half-Cauchy noise scale."""
    beta = _flat("beta", shape=X.shape[1:])
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("data", len(X)):
        numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def eight_schools_centered(J, sigma, y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", J):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(J, sigma, y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", J):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * theta_trans)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def autoregression(lags, y=None):
    """AR(K) given its first K values; lags ``(T - K, K)``."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([lags.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("data", len(lags)):
        numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def garch11(sigma1, y):
    """GARCH(1, 1) with flat priors, uniform on the triangle ``alpha1, beta1 > 0, alpha1 + beta1 < 1``."""
    mu = _flat("mu")
    alpha0 = _flat("alpha0", constraints.positive)
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    # beta1 < 1 - alpha1 as a share of it, so that no support depends on a value; d beta1 / d share = 1 - alpha1
    share = numpyro.sample("beta1_share", dist.Uniform(0.0, 1.0))
    numpyro.factor("beta1_jacobian", jnp.log1p(-alpha1))
    beta1 = numpyro.deterministic("beta1", (1 - alpha1) * share)

    def step(variance, y):
        following = alpha0 + alpha1 * (y - mu) ** 2 + beta1 * variance
        return following, variance

    _, variance = lax.scan(step, jnp.full_like(mu, sigma1**2), y)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


def gp_poisson(x, k=None):
    """Poisson regression on a latent Gaussian process, non-centred. The jitter, part of the model, needs float64."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = numpyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    covariance = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + 1e-10 * jnp.eye(len(x))
    f = numpyro.deterministic("f", jnp.linalg.cholesky(covariance) @ f_tilde)
    with numpyro.plate("data", len(x)):
        numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=k)


def lotka_volterra(times, num_steps=5, y=None):
    """Predator and prey: log populations by RK4, ``num_steps`` steps between times; y ``(times, 2)`` from time 0 on.

    By five steps a year log densities are within 0.0016 of those by eighty at 2,000 reference draws.
    """
    loc, scale = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    theta = numpyro.sample("theta", dist.TruncatedNormal(loc, scale, low=0.0).to_event(1))
    z_init = numpyro.sample("z_init", dist.LogNormal(jnp.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))

    # d log u = theta1 - theta2 v, d log v = -theta3 + theta4 u
    rate, slope = theta[jnp.array([0, 2])] * jnp.array([1, -1]), theta[jnp.array([1, 3])] * jnp.array([-1, 1])

    def field(z):
        return rate + slope * jnp.exp(z[::-1])

    def step(z, h):
        k1 = field(z)
        k2 = field(z + h / 2 * k1)
        k3 = field(z + h / 2 * k2)
        k4 = field(z + h * k3)
        z = z + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        return z, z

    start = jnp.log(z_init)
    _, path = lax.scan(step, start, jnp.repeat(jnp.diff(times) / num_steps, num_steps))
    path = jnp.concatenate([start[None], path[num_steps - 1 :: num_steps]])
    numpyro.sample("y", dist.LogNormal(path, sigma).to_event(2), obs=y)


def hmm(y):
    """Two-state hidden Markov model with normal emissions; the first state is uniform."""
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    mu = _flat("mu", constraints.positive_ordered_vector, (2,))
    numpyro.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    logits = jnp.log(jnp.stack([theta1, theta2]))

    def step(state, emission):
        return logsumexp(state[:, None] + logits, axis=0) + emission, None

    emissions = dist.Normal(mu, 1.0).log_prob(y[:, None])
    state, _ = lax.scan(step, jnp.log(0.5) + emissions[0], emissions[1:])
    numpyro.factor("y", logsumexp(state))


def gauss_mix(N, y=None):
    """Mixture of two normals with ordered means."""
    mu = _flat("mu", constraints.ordered_vector, (2,))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(jnp.stack([theta, 1 - theta]))
    with numpyro.plate("data", N):
        numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


def diamonds(X, y=None):
    """Linear regression on correlated, centred predictors."""
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with numpyro.plate("data", len(X)):
        numpyro.sample("y", dist.Normal(intercept + X @ b, sigma), obs=y)


# -- targets with a known evidence ------------------------------------------------------------------------------------
def funnel(dim):
    """Neal's funnel."""
    v = numpyro.sample("v", dist.Normal(0.0, 3.0))
    with numpyro.plate("dimensions", dim - 1):
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(v / 2)))


def logistic_regression(X, scale, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, scale).expand([X.shape[1]]).to_event(1))
    with numpyro.plate("data", len(X)):
        numpyro.sample("y", dist.Bernoulli(logits=X @ w), obs=y)


def seeds(x1, x2, n, r=None):
    """Binomial regression with an over-dispersion effect per plate."""
    a0, a1, a2, a12 = (numpyro.sample(name, dist.Normal(0.0, 10.0)) for name in ("a0", "a1", "a2", "a12"))
    tau = numpyro.sample("tau", dist.Gamma(0.01, 0.01))
    with numpyro.plate("data", len(n)):
        b = numpyro.sample("b", dist.Normal(0.0, lax.rsqrt(tau)))
        numpyro.sample("r", dist.Binomial(n, logits=a0 + a1 * x1 + a2 * x2 + a12 * x1 * x2 + b), obs=r)


def conjugate_regression(X, loc, precision, shape, rate, y=None):
    """Linear regression under the normal-gamma prior; ``precision`` is that of the coefficients per unit of tau."""
    tau = numpyro.sample("tau", dist.Gamma(shape, rate))
    beta = numpyro.sample("beta", dist.Normal(loc, lax.rsqrt(precision * tau)).to_event(1))
    with numpyro.plate("data", len(X)):
        numpyro.sample("y", dist.Normal(X @ beta, lax.rsqrt(tau)), obs=y)


def gauss_modes(loc, scale, log_mass):
    """A mixture of normals, under a factor: the evidence is one. ``loc`` and ``scale`` are ``(modes, dim)``."""
    wide = dist.Normal(jnp.zeros(loc.shape[-1]), 10.0).to_event(1)
    z = numpyro.sample("z", wide)
    terms = dist.Normal(loc, scale).to_event(1).log_prob(z[..., None, :]) + log_mass
    numpyro.factor("modes", logsumexp(terms, -1) - wide.log_prob(z))
