"""Models with known answers, in Pyro."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def conjugate(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def inverse_gamma():
    scale = pyro.sample("scale", dist.InverseGamma(1.0, 0.02))
    pyro.sample("effect", dist.Normal(0.0, 1.0 + scale))


def gaussian(covariance):
    pyro.sample("z", dist.MultivariateNormal(torch.ones(len(covariance)).to(covariance), covariance))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 9):
        pyro.sample("x", dist.Normal(0.0, torch.exp(v / 2)))


def eight_schools(y=None, sigma=None):
    dtype = torch.get_default_dtype()
    y, sigma = (Y if y is None else y).to(dtype), (SIGMA if sigma is None else sigma).to(dtype)
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, sigma), obs=y)
    pyro.deterministic("log_tau", torch.log(tau))


def by_hand(y=None, noise=None):
    """Non-centred where the data say nearly all of the effects."""
    dtype = torch.get_default_dtype()
    y, noise = (Y if y is None else y).to(dtype), (0.1 * SIGMA if noise is None else noise).to(dtype)
    tau = pyro.sample("tau", dist.LogNormal(0.0, 3.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.5, 2.0))
        pyro.sample("obs", dist.Normal(tau * (z - 0.5) / 2.0, noise), obs=y)


def constrained():
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(2.0)))
    pyro.sample("positive", dist.Gamma(3.0, 2.0))
    pyro.sample("interval", dist.Beta(2.0, 3.0))
    order = dist.transforms.OrderedTransform()
    pyro.sample("ordered", dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [order]))


def gamma():
    pyro.sample("g", dist.Gamma(3.0, 2.0))


def gumbel():
    pyro.sample("z", dist.Gumbel(0.0, 1.0))


def student(df=3.0):
    with pyro.plate("elements", 2):
        pyro.sample("z", dist.StudentT(df, 0.0, 1.0))


def dependent_support():
    a = pyro.sample("a", dist.Uniform(0.0, 2.0))
    pyro.sample("b", dist.Uniform(0.0, a))


def crossed(a, b, y):
    """Effects of two ways of grouping."""
    scale_a, scale_b, sigma = (pyro.sample(name, dist.Uniform(0.0, 100.0)) for name in ("scale_a", "scale_b", "sigma"))
    mu_a, mu_b = (pyro.sample(name, dist.Normal(0.0, 10.0)) for name in ("mu_a", "mu_b"))
    with pyro.plate("of_a", 5):
        effect_a = pyro.sample("effect_a", dist.Normal(mu_a, scale_a))
    with pyro.plate("of_b", 8):
        effect_b = pyro.sample("effect_b", dist.Normal(mu_b, scale_b))
    with pyro.plate("data", 40):
        pyro.sample("y", dist.Normal(effect_a[..., a] + effect_b[..., b], sigma), obs=y)


def cut_off():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("inside", torch.where(z < 3.0, 0.0, -torch.inf))


def subsampled_local(x=None):
    with pyro.plate("data", 10, subsample_size=4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(4))


def subsampled_data():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=4):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.zeros(4))


def random_data():
    pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=torch.randn(()))


def random_sites():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0)) if mu > 0 else 3.0
    pyro.sample("x", dist.Normal(mu + z, 1.0), obs=torch.tensor(0.3))


def one_at_a_time(runs):
    """A standard normal; notes its runs."""
    runs.append(pyro.sample("z", dist.Normal(0.0, 1.0)).item())


def discrete():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(0.3))


def no_latents():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))


def nan_at_the_start():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("good", dist.Normal(z, 1.0), obs=torch.tensor(0.1))
    pyro.sample("bad", dist.Normal(z, 1.0, validate_args=False), obs=torch.tensor(float("nan")))


def with_param():
    scale = pyro.param("scale", torch.tensor(1.0))
    pyro.sample("z", dist.Normal(0.0, scale))


def sometimes_nan():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("trap", torch.where(z > 3.0, torch.sqrt(3.0 - z), 0.0))


def improper(x):
    mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, scale), obs=x)


def sometimes_singular(x):
    """A correlation ``r``, whose covariance matrix has no Cholesky factor where ``|r| > 1``."""
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    one = torch.ones_like(r)
    factor = torch.linalg.cholesky(torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -2))
    factor = factor[..., None, :, :]
    pyro.factor("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor).log_prob(x).sum(-1))


def bimodal(loc=((-3.0, -3.0), (3.0, 3.0)), scale=((0.5, 0.5), (0.3, 0.8))):
    """Two normals of masses 0.3 and 0.7, far apart unless told otherwise; the log evidence is zero."""
    loc, scale = torch.as_tensor(loc), torch.as_tensor(scale)
    prior = dist.Normal(0.0, 10.0).expand([loc.shape[-1]]).to_event(1)
    z = pyro.sample("z", prior)
    terms = dist.Normal(loc, scale).to_event(1).log_prob(z[..., None, :]) + torch.log(torch.tensor([0.3, 0.7]))
    pyro.factor("modes", torch.logsumexp(terms, -1) - prior.log_prob(z))


def out_of_order():
    """A scale, a log-normal effect and two normal ones; neither the sites' names nor their scales are in order."""
    zeta = pyro.sample("zeta", dist.HalfNormal(torch.tensor(1.0)))
    level = pyro.sample("level", dist.LogNormal(0.5, zeta))
    with pyro.plate("pair", 2):
        effect = pyro.sample("effect", dist.Normal(level, 2.0 * zeta))
        pyro.sample("obs", dist.Normal(effect, 3.0), obs=torch.tensor([0.5, -1.0]))


def laplaces():
    """A Laplace prior of fixed location and scale, and one that depends on other latents."""
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    mean = pyro.sample("mean", dist.Laplace(0.5, 0.7))
    with pyro.plate("pair", 2):
        effect = pyro.sample("effect", dist.Laplace(mean, tau))
        pyro.sample("obs", dist.Normal(effect, 0.3), obs=torch.tensor([0.5, -1.0]))


def lasso(x, y):
    w = pyro.sample("w", dist.Laplace(torch.zeros(x.shape[-1]), 0.3).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


VECTOR_TRIL = [[1.0, 0.0], [0.5, 2.0]]


def heavy_vector():
    """A vector with the heavy tails of a multivariate Student-t, and its scale."""
    scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0)))
    pyro.sample(
        "vector",
        dist.MultivariateStudentT(
            4.0, torch.ones(2).to(scale), scale[..., None, None] * torch.tensor(VECTOR_TRIL).to(scale)
        ),
    )


CURVES = [[1.5, -0.5, 0.25], [0.5, 2.0, -1.0]]
CURVE_NOISE = [0.5, 1.0, 2.0]
CURVE_TRIL = [[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.5, 0.4, 0.7]]


def process():
    """Two curves of correlated elements, of unknown level and scale."""
    level, scale = pyro.sample("level", dist.Normal(0.0, 1.0)), pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("curves", 2):
        curve = pyro.sample(
            "curve", dist.MultivariateNormal(level * torch.ones(3), scale_tril=scale * torch.tensor(CURVE_TRIL))
        )
        pyro.sample("obs", dist.Normal(curve, torch.tensor(CURVE_NOISE)).to_event(1), obs=torch.tensor(CURVES))


def weighted():
    """Latents within scales, masks and nested plates."""
    with poutine.scale(scale=0.5), pyro.plate("outer", 3):
        scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0)))
        with pyro.plate("inner", 2), poutine.mask(mask=torch.tensor([True, False, True])):
            x = pyro.sample("x", dist.Normal(0.0, scale))
    pyro.sample("obs", dist.Normal(x.sum(), 1.0), obs=torch.tensor(0.5))


def mixed():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    loc = pyro.sample("loc", dist.Normal(k, 1.0))
    pyro.sample("obs", dist.Normal(loc, 1.0), obs=torch.tensor(0.5))


def without_theta():
    pyro.sample("mu", dist.Normal(0.0, 5.0))
    pyro.sample("tau", dist.HalfCauchy(5.0))


def regression(x, y):
    """A linear regression of closed evidence."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]).to(x), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def edge(y):
    top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Uniform(0.0, top), obs=y)


def partly_observed(x, mask):
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        x = pyro.sample("x", dist.Normal(theta, 1.0), obs=x, obs_mask=mask)
    pyro.deterministic("is_high", x > 1.0)
