"""Models with known answers, in NumPyro."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro import handlers

Y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def conjugate(x):
    theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def inverse_gamma():
    scale = numpyro.sample("scale", dist.InverseGamma(1.0, 0.02))
    numpyro.sample("effect", dist.Normal(0.0, 1.0 + scale))


def gaussian(covariance):
    numpyro.sample("z", dist.MultivariateNormal(jnp.ones(len(covariance)), covariance))


def funnel():
    v = numpyro.sample("v", dist.Normal(0.0, 3.0))
    with numpyro.plate("rows", 9):
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(v / 2)))


def eight_schools(y=Y, sigma=SIGMA):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("obs", dist.Normal(theta, sigma), obs=y)
    numpyro.deterministic("log_tau", jnp.log(tau))


def by_hand(y=Y, noise=0.1 * SIGMA):
    """Non-centred where the data say nearly all of the effects."""
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 3.0))
    with numpyro.plate("schools", 8):
        z = numpyro.sample("z", dist.Normal(0.5, 2.0))
        numpyro.sample("obs", dist.Normal(tau * (z - 0.5) / 2.0, noise), obs=y)


def constrained():
    numpyro.sample("simplex", dist.Dirichlet(jnp.array([2.0, 3.0, 4.0])))
    numpyro.sample("corr", dist.LKJCholesky(3, 2.0))
    numpyro.sample("positive", dist.Gamma(3.0, 2.0))
    numpyro.sample("interval", dist.Beta(2.0, 3.0))
    order = dist.transforms.OrderedTransform()
    numpyro.sample("ordered", dist.TransformedDistribution(dist.Normal(jnp.zeros(3), 1.0).to_event(1), order))


def gamma():
    numpyro.sample("g", dist.Gamma(3.0, 2.0))


def gumbel():
    numpyro.sample("z", dist.Gumbel(0.0, 1.0))


def student(df=3.0):
    with numpyro.plate("elements", 2):
        numpyro.sample("z", dist.StudentT(df, 0.0, 1.0))


def dependent_support():
    a = numpyro.sample("a", dist.Uniform(0.0, 2.0))
    numpyro.sample("b", dist.Uniform(0.0, a))


def crossed(a, b, y):
    """Effects of two ways of grouping."""
    scale_a, scale_b, sigma = (
        numpyro.sample(name, dist.Uniform(0.0, 100.0)) for name in ("scale_a", "scale_b", "sigma")
    )
    mu_a, mu_b = (numpyro.sample(name, dist.Normal(0.0, 10.0)) for name in ("mu_a", "mu_b"))
    with numpyro.plate("of_a", 5):
        effect_a = numpyro.sample("effect_a", dist.Normal(mu_a, scale_a))
    with numpyro.plate("of_b", 8):
        effect_b = numpyro.sample("effect_b", dist.Normal(mu_b, scale_b))
    with numpyro.plate("data", 40):
        numpyro.sample("y", dist.Normal(effect_a[..., a] + effect_b[..., b], sigma), obs=y)


def cut_off():
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.factor("inside", jnp.where(z < 3.0, 0.0, -jnp.inf))


def subsampled_local(x=None):
    with numpyro.plate("data", 10, subsample_size=4):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=jnp.zeros(4))


def subsampled_data():
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", 10, subsample_size=4):
        numpyro.sample("x", dist.Normal(mu, 1.0), obs=jnp.zeros(4))


def discrete():
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("x", dist.Normal(k, 1.0), obs=0.3)


def no_latents():
    numpyro.sample("x", dist.Normal(0.0, 1.0), obs=0.3)


def nan_at_the_start():
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("good", dist.Normal(z, 1.0), obs=0.1)
    numpyro.sample("bad", dist.Normal(z, 1.0), obs=jnp.nan)


def with_param():
    scale = numpyro.param("scale", 1.0)
    numpyro.sample("z", dist.Normal(0.0, scale))


def sometimes_nan():
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.factor("trap", jnp.where(z > 3.0, jnp.sqrt(3.0 - z), 0.0))


def improper(x):
    mean = numpyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    scale = numpyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(mean, scale), obs=x)


def sometimes_singular(x):
    """A correlation ``r``, whose covariance matrix has no Cholesky factor where ``|r| > 1``."""
    r = numpyro.sample("r", dist.Normal(0.0, 1.0))
    one = jnp.ones_like(r)
    factor = jnp.linalg.cholesky(jnp.stack([jnp.stack([one, r], -1), jnp.stack([r, one], -1)], -2))
    factor = factor[..., None, :, :]
    numpyro.factor("x", dist.MultivariateNormal(jnp.zeros(2), scale_tril=factor).log_prob(x).sum(-1))


def bimodal(loc=((-3.0, -3.0), (3.0, 3.0)), scale=((0.5, 0.5), (0.3, 0.8))):
    """Two normals of masses 0.3 and 0.7, far apart unless told otherwise; the log evidence is zero."""
    loc, scale = jnp.asarray(loc), jnp.asarray(scale)
    prior = dist.Normal(0.0, 10.0).expand([loc.shape[-1]]).to_event(1)
    z = numpyro.sample("z", prior)
    terms = dist.Normal(loc, scale).to_event(1).log_prob(z[..., None, :]) + jnp.log(jnp.array([0.3, 0.7]))
    numpyro.factor("modes", logsumexp(terms, -1) - prior.log_prob(z))


def out_of_order():
    """A scale, a log-normal effect and two normal ones; neither the sites' names nor their scales are in order."""
    zeta = numpyro.sample("zeta", dist.HalfNormal(1.0))
    level = numpyro.sample("level", dist.LogNormal(0.5, zeta))
    with numpyro.plate("pair", 2):
        effect = numpyro.sample("effect", dist.Normal(level, 2.0 * zeta))
        numpyro.sample("obs", dist.Normal(effect, 3.0), obs=jnp.array([0.5, -1.0]))


def laplaces():
    """A Laplace prior of fixed location and scale, and one that depends on other latents."""
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
    mean = numpyro.sample("mean", dist.Laplace(0.5, 0.7))
    with numpyro.plate("pair", 2):
        effect = numpyro.sample("effect", dist.Laplace(mean, tau))
        numpyro.sample("obs", dist.Normal(effect, 0.3), obs=jnp.array([0.5, -1.0]))


def lasso(x, y):
    w = numpyro.sample("w", dist.Laplace(jnp.zeros(x.shape[-1]), 0.3).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


VECTOR_TRIL = [[1.0, 0.0], [0.5, 2.0]]


def heavy_vector():
    """A vector with the heavy tails of a multivariate Student-t, and its scale."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("vector", dist.MultivariateStudentT(4.0, jnp.ones(2), scale * jnp.array(VECTOR_TRIL)))


CURVES = [[1.5, -0.5, 0.25], [0.5, 2.0, -1.0]]
CURVE_NOISE = [0.5, 1.0, 2.0]
CURVE_TRIL = [[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.5, 0.4, 0.7]]


def process():
    """Two curves of correlated elements, of unknown level and scale."""
    level, scale = numpyro.sample("level", dist.Normal(0.0, 1.0)), numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("curves", 2):
        curve = numpyro.sample(
            "curve", dist.MultivariateNormal(level * jnp.ones(3), scale_tril=scale * jnp.array(CURVE_TRIL))
        )
        numpyro.sample("obs", dist.Normal(curve, jnp.array(CURVE_NOISE)).to_event(1), obs=jnp.array(CURVES))


def weighted():
    """Latents within scales, masks and nested plates."""
    with handlers.scale(scale=0.5), numpyro.plate("outer", 3):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("inner", 2), handlers.mask(mask=jnp.array([True, False, True])):
            x = numpyro.sample("x", dist.Normal(0.0, scale))
    numpyro.sample("obs", dist.Normal(x.sum(), 1.0), obs=0.5)


def mixed():
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    loc = numpyro.sample("loc", dist.Normal(k, 1.0))
    numpyro.sample("obs", dist.Normal(loc, 1.0), obs=0.5)


def without_theta():
    numpyro.sample("mu", dist.Normal(0.0, 5.0))
    numpyro.sample("tau", dist.HalfCauchy(5.0))


def regression(x, y):
    """A linear regression of closed evidence."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def edge(y):
    top = numpyro.sample("top", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Uniform(0.0, top), obs=y)


def partly_observed(x, mask):
    theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", dist.Normal(theta, 1.0), obs=x, obs_mask=mask)
    numpyro.deterministic("is_high", x > 1.0)
