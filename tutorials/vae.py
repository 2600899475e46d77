"""A variational autoencoder (Kingma & Welling 2014) with flows for its prior and its posterior, beside the plain one.

    python tutorials/vae.py --backend numpyro
    python tutorials/vae.py --backend pyro

The data are simulated images of a line at a random angle: one circular number, which a normal prior of the latents
cannot hold without a seam. With flows, the prior is learned (Chen et al. 2017), and an image's posterior is a flow
whose context is the encoder's output (Rezende & Mohamed 2015). Prints the ELBO of images not seen in training.
"""

import argparse
import time

import numpy as np

SIZE, LATENTS, CONTEXT = 10, 2, 16  # pixels a side; numbers of an image's latent vector and of its encoding
TRAINING, HELD_OUT, BATCH, STEPS, RATE = 2000, 1000, 128, 1200, 2e-3
PARTICLES = 50  # draws of the posterior of each image by which the held-out ELBO is estimated


def images(n: int, seed: int) -> np.ndarray:
    """Black and white images ``(n, SIZE**2)`` of a line through the middle, with a few wrong pixels."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, np.pi, (n, 1, 1))
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    distance = np.abs(np.cos(angle) * x + np.sin(angle) * y)
    bright = distance < 1
    return (bright ^ (rng.random(bright.shape) < 0.02)).reshape(n, -1).astype("float32")


def train_with_numpyro(with_flows: bool) -> float:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO

    from numpyro_flows import (
        Compose,
        ConditionalFlowDistribution,
        FlowDistribution,
        conditioners,
        encoders,
        flow_module,
        flows,
        transforms,
        univariate,
    )

    keys = iter(jax.random.split(jax.random.key(0), 5))
    encoder = encoders.MLPEncoder(SIZE**2, CONTEXT, key=next(keys))
    decoder = conditioners.MLP(LATENTS, (64, 64), SIZE**2, zero=False, key=next(keys))
    location_and_scale = transforms.Elementwise(
        LATENTS, univariate.Affine(), (), context_dim=CONTEXT, key=next(keys)
    )  # of an image's latents: on its own the normal posterior of the plain VAE
    prior, posterior = Compose([]), Compose([location_and_scale])
    if with_flows:
        prior = flows.nsf(LATENTS, num_layers=4, key=next(keys))
        inner = flows.realnvp(LATENTS, num_layers=4, context_dim=CONTEXT, key=next(keys))
        posterior = Compose([inner, location_and_scale])
    base = dist.Normal(jnp.zeros(LATENTS), 1.0).to_event(1)

    def model(x):
        density = FlowDistribution(base, flow_module("prior", prior))
        network = flow_module("decoder", decoder)
        with numpyro.plate("images", len(x)):
            z = numpyro.sample("z", density)
            numpyro.sample("x", dist.Bernoulli(logits=network(z)).to_event(1), obs=x)

    def guide(x):
        context = flow_module("encoder", encoder)(x)
        density = ConditionalFlowDistribution(base, flow_module("posterior", posterior))
        with numpyro.plate("images", len(x)):
            numpyro.sample("z", density.condition(context))

    svi = SVI(model, guide, numpyro.optim.Adam(RATE), Trace_ELBO())
    x = jnp.asarray(images(TRAINING, seed=1))
    batches = jax.random.randint(jax.random.key(1), (STEPS, BATCH), 0, TRAINING)
    state = svi.init(jax.random.key(2), x[:BATCH])
    state, _ = jax.jit(lambda state: jax.lax.scan(lambda s, rows: svi.update(s, x[rows]), state, batches))(state)
    held_out = jnp.asarray(images(HELD_OUT, seed=2))
    elbo = Trace_ELBO(num_particles=PARTICLES)
    return -float(elbo.loss(jax.random.key(3), svi.get_params(state), model, guide, held_out)) / HELD_OUT


def train_with_pyro(with_flows: bool) -> float:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO

    from pyroflows import (
        Compose,
        ConditionalFlowDistribution,
        FlowDistribution,
        conditioners,
        encoders,
        flows,
        transforms,
        univariate,
    )

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    encoder = encoders.MLPEncoder(SIZE**2, CONTEXT)
    decoder = conditioners.MLP(LATENTS, (64, 64), SIZE**2, zero=False)
    location_and_scale = transforms.Elementwise(
        LATENTS, univariate.Affine(), (), context_dim=CONTEXT
    )  # of an image's latents: on its own the normal posterior of the plain VAE
    prior, posterior = Compose([]), Compose([location_and_scale])
    if with_flows:
        prior = flows.nsf(LATENTS, num_layers=4)
        posterior = Compose([flows.realnvp(LATENTS, num_layers=4, context_dim=CONTEXT), location_and_scale])
    base = dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1)

    def model(x):
        density = FlowDistribution(base, pyro.module("prior", prior))
        network = pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", density)
            pyro.sample("x", dist.Bernoulli(logits=network(z)).to_event(1), obs=x)

    def guide(x):
        context = pyro.module("encoder", encoder)(x)
        density = ConditionalFlowDistribution(base, pyro.module("posterior", posterior))
        with pyro.plate("images", len(x)):
            pyro.sample("z", density.condition(context))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": RATE}), Trace_ELBO())
    x, held_out = torch.from_numpy(images(TRAINING, seed=1)), torch.from_numpy(images(HELD_OUT, seed=2))
    for _ in range(STEPS):
        svi.step(x[torch.randint(TRAINING, (BATCH,))])
    elbo = Trace_ELBO(num_particles=PARTICLES)
    with torch.no_grad():
        return -elbo.loss(model, guide, held_out) / HELD_OUT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    train = {"numpyro": train_with_numpyro, "pyro": train_with_pyro}[parser.parse_args().backend]
    print("| prior and posterior | held-out ELBO (nats an image) | seconds |\n|---|---|---|")
    for name, with_flows in (("normal", False), ("flows", True)):
        begin = time.perf_counter()
        elbo = train(with_flows)
        print(f"| {name} | {elbo:.2f} | {time.perf_counter() - begin:.0f} |")


if __name__ == "__main__":
    main()
