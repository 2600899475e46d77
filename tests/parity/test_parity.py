"""The twins agree: same weights, same numbers; same names, same signatures; files travel both ways."""

import dataclasses
import inspect
from functools import partial

import numpy as np
import pytest

from tests import backends
from tests.registry import BY_NAME, CASES, CONTEXT_DIM, param

# a network with a context does all that one without does, and more
VARIANTS = [param(case, True) for case in CASES if case.context]
VARIANTS += [param(case, False, slow=case.context) for case in CASES]


@pytest.fixture(scope="module")
def twins():
    return backends.get("torch"), backends.get("jax")


def same_weights(twins, case, context, dtype="float64"):
    torch, jax = twins
    state = torch.state(torch.build(case, case.dim, context, dtype=dtype))
    moved = backends.perturbed(state, 0.3, case.deep)
    return [b.with_state(b.build(case, case.dim, context, seed=1, dtype=dtype), moved) for b in (torch, jax)], moved


def inputs(case, with_context, dtype="float64"):
    """Points and their context."""
    x = case.points(case.dim).astype(dtype)
    context = np.random.default_rng(0).normal(size=(len(x), CONTEXT_DIM)).astype(dtype) if with_context else None
    return x, context


def assert_same_numbers(twins, case, with_context, dtype, tolerance):
    x, context = inputs(case, with_context, dtype)
    flows, state = same_weights(twins, case, with_context, dtype)
    assert {n: v.shape for n, v in twins[1].state(flows[1]).items()} == {n: v.shape for n, v in state.items()}
    for inverse in (False, True):
        (y, log_det), (y_jax, log_det_jax) = (b.run(f, x, context, inverse) for b, f in zip(twins, flows, strict=True))
        # relative to the size of what went in: rounding of |x| = 100 in float32 is 4e-6
        slack = tolerance * max(1.0, np.abs(y).max(), np.abs(x).max())
        np.testing.assert_array_less(np.abs(case.gap(y_jax, y)), slack + tolerance * np.abs(y))
        np.testing.assert_allclose(log_det_jax, log_det, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("case, with_context", VARIANTS)
def test_same_numbers(twins, case, with_context):
    assert_same_numbers(twins, case, with_context, "float64", 1e-10)


# the gradient of a stack is that of its layers
GRADIENTS = [param(c, c.context, slow=c.deep and c.name not in ("realnvp", "iaf", "continuous")) for c in CASES]


@pytest.mark.parametrize("case, with_context", GRADIENTS)
def test_same_gradients(twins, case, with_context):
    flows, state = same_weights(twins, case, with_context)
    x, context = inputs(case, with_context)
    (params, by_x), (params_jax, by_x_jax) = (
        b.gradients(f, x, context, False) for b, f in zip(twins, flows, strict=True)
    )
    scale = max(1.0, np.abs(by_x).max(), *(np.abs(v).max(initial=0) for v in params.values()))
    np.testing.assert_allclose(by_x_jax, by_x, atol=1e-10 * scale)
    statistics = {name for name in state if name.endswith(case.statistics)}
    assert params.keys() - statistics == params_jax.keys() - statistics
    for name, value in params.items():
        np.testing.assert_allclose(params_jax[name], value, atol=1e-10 * scale, err_msg=name)


# a stack has the rounding of its layers, a layer with a network that of its map; and that each package's float32 agrees
# with its float64 is tested of all
ALONE = [c.name for c in CASES if not c.deep and (not c.context or c.name.startswith("elementwise"))]


@pytest.mark.parametrize("case", [param(case, slow=case.name not in ALONE) for case in CASES])
def test_same_numbers_in_float32(twins, case):
    assert_same_numbers(twins, case, False, "float32", 1e-5)


@pytest.mark.parametrize("name", ["realnvp", "iaf", "lu"])
def test_files_travel(twins, name, tmp_path):
    (torch_flow, jax_flow), state = same_weights(twins, BY_NAME[name], False)
    for writer, flow, reader in [(*twins[:1], torch_flow, twins[1]), (twins[1], jax_flow, twins[0])]:
        path = tmp_path / f"{writer.name}.safetensors"
        writer.serialization.save(path, writer.serialization.state_dict(flow), {"what": name})
        tensors, metadata = reader.serialization.load(path)
        assert metadata == {"what": name}
        read = reader.state(reader.with_state(reader.build(BY_NAME[name], 5, seed=3), tensors))
        for key, value in state.items():
            np.testing.assert_array_equal(read[key], value)


def test_files_that_do_not_fit_are_refused(twins, tmp_path):
    for backend in twins:
        flow = backend.build(BY_NAME["realnvp"], 5)
        state = backend.state(flow)
        first = next(iter(state))
        with pytest.raises(ValueError, match=f"missing.*{first}"):
            backend.with_state(flow, {k: v for k, v in state.items() if k != first})
        with pytest.raises(ValueError, match="unknown"):
            backend.with_state(flow, {**state, "extra": state[first]})
        with pytest.raises(ValueError, match="of shape"):
            backend.with_state(flow, {**state, first: np.zeros((1, 1))})
        with pytest.raises(FileNotFoundError):
            backend.serialization.load(tmp_path / "none")
        (tmp_path / "text").write_text("no tensors in here")
        with pytest.raises(ValueError, match="not a safetensors file"):
            backend.serialization.load(tmp_path / "text")


ROOMS = [
    "amortised", "calibration", "centering", "conditioners", "density", "diagnosis", "distributions", "elbo",
    "encoders", "evidence", "flows", "guides", "guides.hierarchical",
    "inference", "initialization", "log_density", "noncentering", "numerical", "posterior", "prior_predictive",
    "reparam", "reversible", "serialization", "training", "transform_module", "transforms", "univariate",
]  # fmt: skip
# where the ecosystems differ: random keys are arguments in jax; torch modules and guides hold their parameters, their
# methods take the model's arguments, training is in place, and gradients end where tensors say so; jax differentiates a
# function of one draw, where torch has batched methods; torch asks on the host whether a search may end, where jax has
# a loop of its own; torch's vmap has to be helped, and its linear layers where a bias has batch axes; jax has weights
# drawn together, for every draw is compiled, and rounds matrix products on GPUs; what jax compiles for all data sets is
# a function of a non-centring without the model's arguments, and of these
ECOSYSTEM = {"key", "rng_key", "params", "prefix", "intermediates", "args", "kwargs"}
OWN = {
    "Ascent",
    "Gradient",
    "differentiable",
    "first_weights",
    "flow_module",
    "full_precision",
    "held_fixed",
    "parameters",
    "readable",
    "settled",
    "start_of",
    "is_eager",
    "linear",
    "takes_custom_gradients",
    "triangular_fixed_point",
    "batched",
    "copies",
    "first_state",
    "settle",
    "train",
    "update",
    "ByGammas",
    "NotRaising",
    "Widening",
    "AmortisedFlowVI.infer_many",
    "forward",
    "forward_and_log_density",
    "hessian",
    "inverse",
    "log_densities",
    "noncentering_of",
    "normal_priors",
    "value_and_grad",
    "with_density",
    "FlowPosterior.__init__",
    "LogDensity.__init__",
    "LogDensity.hessian",
    "LogDensity.value_and_grad",
}
OWN_DEFAULTS = {"deterministic"}  # Pyro's MCMC gives the latents alone, and its Predictive conditions on all it gets


@pytest.mark.parametrize("room", ROOMS)
def test_same_names_and_signatures(twins, room):
    here, there = (
        {
            name: value
            for name, value in vars(__import__(f"{b.pkg.__name__}.{room}", fromlist=["x"])).items()
            if not name.startswith("_") and getattr(value, "__module__", "").startswith(f"{b.pkg.__name__}.{room}")
        }
        for b in twins
    )
    assert set(here) - OWN == set(there) - OWN
    for name in set(here) - OWN:
        a, b = here[name], there[name]
        if inspect.isclass(a):
            methods = {
                m for m in vars(a) if inspect.isfunction(vars(a)[m]) and (not m.startswith("_") or m == "__init__")
            }
            methods -= {"forward", "clear_cache", "with_cache", "expand", "apply"}  # protocols of torch and Pyro
            for method in sorted(methods):
                if f"{name}.{method}" in OWN or dataclasses.is_dataclass(b) and method == "__init__":
                    continue
                assert hasattr(b, method), f"{name}.{method}"
                same_signature(getattr(a, method), getattr(b, method), f"{name}.{method}")
        elif inspect.isfunction(a):
            same_signature(a, b, name)


def same_signature(a, b, name):
    parameters = [
        [
            (p.name, p.kind, p.name in OWN_DEFAULTS or comparable(p.default))
            for p in inspect.signature(f).parameters.values()
            if p.name not in ECOSYSTEM
        ]
        for f in (a, b)
    ]
    assert parameters[0] == parameters[1], name


def comparable(default):
    """A default in a form that is the same in both packages; ``None`` for what only an ecosystem knows."""
    if isinstance(default, tuple):
        return tuple(map(comparable, default))
    if isinstance(default, partial):
        return default.func.__name__, default.args, default.keywords
    return default if isinstance(default, bool | int | float | str) else None
