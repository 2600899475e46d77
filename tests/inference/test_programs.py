"""FlowVI in NumPyro is compiled once for all data sets of a shape, where the model lets it."""

import pickle

import numpy as np
import pytest
from scipy import stats

numpyro = pytest.importorskip("numpyro")
jax = pytest.importorskip("jax")
dist = numpyro.distributions
numpyro_flows = pytest.importorskip("numpyro_flows")
programs = pytest.importorskip("numpyro_flows.programs")
generator = pytest.importorskip("numpyro_flows.generator")

QUICK = {"num_steps": 200, "num_particles": 64, "num_starts": 1, "progress_bar": False}
N = 12
DATA = np.random.default_rng(0).normal(1.5, 1.0, (2, N))


def model(x):
    theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", N):
        numpyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def evidence(x, loc=0.0, scale=1.0):
    return stats.multivariate_normal.logpdf(x, np.full(N, loc), scale**2 * np.eye(N) + 4.0)


def fit(vi, x):
    return vi.run(jax.random.key(0), x).log_evidence().value


def test_other_data_compile_nothing():
    vi = numpyro_flows.FlowVI(model, **QUICK)
    assert fit(vi, DATA[0]) == pytest.approx(evidence(DATA[0]), abs=0.02)
    sizes = {name: run._cache_size() for name, run in vi._programs._compiled.items()}
    for x in (DATA[1], -DATA[1]):
        assert fit(vi, x) == pytest.approx(evidence(x), abs=0.02)
    assert {name: run._cache_size() for name, run in vi._programs._compiled.items()} == sizes
    assert len(sizes) > 5 and not vi.compiles_anew


def test_distributions_have_their_parts_in_one_order():
    """NumPyro's come in that of a set, by which jax's cache on disk would not know a program in the next process."""
    module = numpyro_flows.distributions

    def parts(distribution):
        yield distribution
        for leaf in jax.tree.leaves(distribution.tree_flatten()[0], is_leaf=lambda x: isinstance(x, dist.Distribution)):
            if isinstance(leaf, dist.Distribution):
                yield from parts(leaf)

    key = jax.random.key(0)
    bases = [module.standard_base(2), module.standard_base(2, 5.0), module.LocScaleBase(2).distribution()]
    bases += [factory(2, key=key).distribution() for factory in (module.FlexibleBase, module.ResampledBase)]
    bases.append(module.MixtureBase(2, 3, key=key).distribution())
    found = {type(part).__name__: part.gather_pytree_data_fields() for base in bases for part in parts(base)}
    assert len(found) >= 5 and all(list(fields) == sorted(fields) for fields in found.values()), found


def test_a_model_may_look_at_its_data():
    def looks(x):
        theta = numpyro.sample("theta", dist.Normal(3.0 if x.mean() > 0 else -3.0, 2.0))
        with numpyro.plate("rows", N):
            numpyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    vi = numpyro_flows.FlowVI(looks, **QUICK)
    for x, loc in ((DATA[0], 3.0), (-DATA[0], -3.0)):
        assert fit(vi, x) == pytest.approx(evidence(x, loc), abs=0.02)
    assert vi.compiles_anew


def test_a_model_that_is_another_within_a_program():
    def differs(x):
        theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
        with numpyro.plate("rows", N):
            numpyro.sample("x", dist.Normal(theta, 2.0 if isinstance(x, np.ndarray) else 1.0), obs=x)

    vi = numpyro_flows.FlowVI(differs, **QUICK)
    assert fit(vi, DATA[0]) == pytest.approx(evidence(DATA[0], scale=2.0), abs=0.02)
    assert vi.compiles_anew


def test_static_arguments_are_told_apart_by_type():
    run = programs.Programs()

    def halved(x, n):
        return x / 2 if n is True else x * n

    x = np.ones(2)
    np.testing.assert_array_equal(run(halved, x, 1), x)
    np.testing.assert_array_equal(run(halved, x, True), x / 2)


def test_quick_keys():
    typed, raw = jax.random.key(3), jax.random.PRNGKey(3)
    a, b = (programs.quick_key(key) for key in (typed, raw))
    assert jax.random.key_impl(a) == generator.GENERATOR == jax.random.key_impl(pickle.loads(pickle.dumps(a)))
    assert (jax.random.key_data(a) == jax.random.key_data(b)).all() and programs.quick_key(a) is a
    other = jax.random.key(3, impl="rbg")
    assert programs.quick_key(other) is other


def test_posteriors_of_one_amortised_guide_share_them():
    def summary(x):
        return jax.numpy.stack([x.mean(-1), x.std(-1)], -1)

    vi = numpyro_flows.AmortisedFlowVI(model, encoder=summary, num_steps=50, progress_bar=False)
    vi.fit(jax.random.key(0), DATA[0])
    sizes = []
    for x in DATA:
        posterior = vi.run(jax.random.key(1), x)
        assert np.isfinite(posterior.elbo.value)
        sizes.append([run._cache_size() for run in posterior._programs._compiled.values()])
    assert sizes[0] == sizes[1] and sizes[0]
