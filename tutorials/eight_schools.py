"""Eight schools (Rubin 1981), centred: from a model to a diagnosed posterior.

    python tutorials/eight_schools.py --backend numpyro
    python tutorials/eight_schools.py --backend pyro

Prints a summary table with a verdict on the fit, and writes ``eight_schools_{backend}.png`` and the posterior itself
(``eight_schools_{backend}.safetensors``).
"""

import argparse

import matplotlib

matplotlib.use("Agg")

Y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def fit_with_numpyro(num_steps=None):
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax import random

    from numpyro_flows import FlowVI

    def model(sigma, y=None):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", len(sigma)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("obs", dist.Normal(theta, sigma), obs=y)

    return FlowVI(model, num_steps=num_steps).run(random.key(0), jnp.array(SIGMA), y=jnp.array(Y))


def fit_with_pyro(num_steps=None):
    import pyro
    import pyro.distributions as dist
    import torch

    from pyroflows import FlowVI

    def model(sigma, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("obs", dist.Normal(theta, sigma), obs=y)

    pyro.set_rng_seed(0)
    return FlowVI(model, num_steps=num_steps).run(torch.tensor(SIGMA), y=torch.tensor(Y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--num-steps", type=int, help="a shorter fit than by default")
    options = parser.parse_args()
    backend = options.backend
    posterior = {"numpyro": fit_with_numpyro, "pyro": fit_with_pyro}[backend](options.num_steps)
    posterior.print_summary()
    posterior.plot().savefig(f"eight_schools_{backend}.png", dpi=120)
    posterior.save(f"eight_schools_{backend}.safetensors")
    print(f"wrote eight_schools_{backend}.png and eight_schools_{backend}.safetensors")


if __name__ == "__main__":
    main()
