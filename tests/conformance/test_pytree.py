"""Jax: flows and their distributions are pytrees, through jit, vmap, scan, cond and optax."""

import pytest

jax = pytest.importorskip("jax")
dist = pytest.importorskip("numpyro.distributions")

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from numpyro.distributions.transforms import ComposeTransform  # noqa: E402

from numpyro_flows import Compose, FlowDistribution, TransformModule, conditioners, flows  # noqa: E402


def flow(seed=0, make=flows.realnvp, **kwargs):
    built = make(3, 2, (8, 8), key=jax.random.key(seed), **kwargs)
    noise = jax.random.key(seed + 100)
    return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(noise, a.shape) if eqx.is_inexact_array(a) else a, built)


def base():
    return dist.Normal(jnp.zeros(3), 1.0).to_event(1)


def test_distribution_crosses_jit_both_ways():
    q = FlowDistribution(base(), flow())
    x = q.sample(jax.random.key(0), (4,))
    out = jax.jit(lambda q: q)(q)
    assert jnp.allclose(jax.jit(lambda q, x: q.log_prob(x))(q, x), out.log_prob(x))


def test_one_trace_for_new_parameters():
    count = []

    @jax.jit
    def score(q, x):
        count.append(1)
        return q.log_prob(x)

    for seed in range(3):
        score(FlowDistribution(base(), flow(seed)), jnp.ones((4, 3)))
    assert len(count) == 1


def test_vmap_scan_and_cond():
    many = jax.tree.map(lambda *a: jnp.stack(a), flow(0), flow(1))
    x = jnp.ones((4, 3))
    together = eqx.filter_vmap(lambda f: FlowDistribution(base(), f).log_prob(x))(many)
    for seed in range(2):
        assert jnp.allclose(together[seed], FlowDistribution(base(), flow(seed)).log_prob(x))
    _, scanned = jax.lax.scan(lambda c, f: (c, FlowDistribution(base(), f).log_prob(x)), None, many)
    assert jnp.allclose(scanned, together)
    chosen = jax.lax.cond(True, lambda: flow(0), lambda: flow(1))
    assert jnp.allclose(chosen(x), flow(0)(x))


def test_optax_trains_it_on_data():
    data = 1.0 + 2.0 * jax.random.normal(jax.random.key(0), (200, 3))
    params, static = eqx.partition(flow(), eqx.is_inexact_array)
    optimizer = optax.adam(1e-2)

    def loss(p):
        return -FlowDistribution(base(), eqx.combine(p, static)).log_prob(data).mean()

    def step(state, _):
        p, o = state
        value, grad = jax.value_and_grad(loss)(p)
        update, o = optimizer.update(grad, o)
        return (optax.apply_updates(p, update), o), value

    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=300)
    entropy = 3 * (0.5 * jnp.log(2 * jnp.pi * jnp.e) + jnp.log(2.0))
    assert losses[-1] < losses[0] and abs(losses[-1] - entropy) < 0.3


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, marks=[] if name in ("realnvp", "maf", "iaf", "residual", "glow") else [pytest.mark.slow])
        for name, make in flows.FLOWS.items()
    ],
)
def test_numpyro_protocol(make):
    f = flow(make=make)
    assert isinstance(f, TransformModule) and f == f and f != flow(1, make) and hash(f) == hash(f)
    assert eqx.tree_equal(f.inv.inv, f)

    @eqx.filter_jit
    def through_numpyro(f, key):
        narrow = dist.Normal(jnp.zeros(3), 0.5).to_event(1)  # draws that are angles in [-pi, pi) too
        q, fused = dist.TransformedDistribution(narrow, [f]), FlowDistribution(narrow, f)
        y, intermediates = q.sample_with_intermediates(key, (4,))
        composed = ComposeTransform([f, f.inv])
        return {
            "y": (y, fused.sample_and_log_prob(key, (4,))[0], composed(y)),
            "log_prob": (q.log_prob(y), q.log_prob(y, intermediates), fused.log_prob(y)),
            "sampled": (q.log_prob(y), fused.sample_and_log_prob(key, (4,))[1]),
            "zero": (jnp.zeros(4), composed.log_abs_det_jacobian(y, composed(y))),
        }

    for name, (expected, *others) in through_numpyro(f, jax.random.key(0)).items():
        for other in others:
            assert jnp.allclose(other, expected, atol=1e-6), name


def test_own_sample_is_scored_without_a_network_pass(monkeypatch):
    calls = []
    original = conditioners.MLP.__call__
    monkeypatch.setattr(conditioners.MLP, "__call__", lambda *a: calls.append(1) or original(*a))
    q = FlowDistribution(base(), flow())
    y, intermediates = q.sample_with_intermediates(jax.random.key(0), (4,))
    used = len(calls)
    q.log_prob(y, intermediates)
    assert len(calls) == used
    q.log_prob(y)
    assert len(calls) == 2 * used  # inversion and score in one pass


@pytest.mark.parametrize("make", list(flows.FLOWS.values()))
def test_compiled_size_does_not_grow_with_depth(make):
    def equations(depth):
        f = make(4, depth, (8, 8), key=jax.random.key(0))
        params, static = eqx.partition(f, eqx.is_array)
        jaxpr = jax.make_jaxpr(lambda p, x: eqx.combine(p, static).forward_and_log_det(x))(params, jnp.ones((2, 4)))
        return len(jaxpr.jaxpr.eqns)

    assert equations(32) == equations(2)


def test_no_transfer_to_the_host_inside_a_pass():
    f, x = flow(make=flows.nsf), jnp.ones((4, 3))
    run = eqx.filter_jit(lambda f, x: f.inverse_and_log_det(f.forward_and_log_det(x)[0]))
    run(f, x)
    with jax.transfer_guard("disallow"):
        run(f, x)


def test_no_recompilation_between_batches():
    f = flow()
    count = []

    @eqx.filter_jit
    def run(f, x):
        count.append(1)
        return f.forward_and_log_det(x)

    for seed in range(3):
        run(f, jax.random.normal(jax.random.key(seed), (4, 3)))
    assert len(count) == 1


def test_composition_refuses_what_is_not_a_module():
    with pytest.raises(TypeError, match="Compose: layers must be TransformModules"):
        Compose([dist.transforms.ExpTransform()])
