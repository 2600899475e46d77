import gc
import os
import sys
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version

import pytest

# tests compile far longer than they run: without these two a small program takes 1.7 times as long to compile
_XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

# each worker has a core: threads that wait for one another's take twice as long; numpy and torch ask at their import
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    if version("jaxlib").startswith("0.10."):  # others may not know the flags, and stop at what they don't know
        os.environ["XLA_FLAGS"] = f"{_XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
except PackageNotFoundError:
    pass

try:
    import numpyro

    numpyro.enable_x64()
except ImportError:
    pass


_COMPILED = {
    *("conformance", "parity", "theory"),
    *(
        "test_amortised.py",
        "test_auto_flow_numpyro.py",
        "test_density.py",
        "test_evidence.py",
        "test_flow_vi.py",
        "test_posterior.py",
        "test_programs.py",
        "test_refinement.py",
        "test_reparam.py",
        "test_supports.py",
        "test_verdict.py",
    ),
}


_cache = tempfile.TemporaryDirectory(prefix="pyroflows_jax_")


def pytest_configure():
    """What jax has compiled once, it loads: the same fit made again, and what was thrown away for its memory.

    A folder for each worker, since jax does not write it in one stroke.
    """
    settings = {
        "jax_compilation_cache_dir": _cache.name,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)  # of what the tests run as a program of its own
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name, value)


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Where jax compiles far longer than it runs, without its slower optimisations."""
    jax = sys.modules.get("jax")
    if jax is None or not _COMPILED & set(request.path.parts) or request.node.get_closest_marker("optimised"):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def clean_param_store():
    import pyro

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


@pytest.fixture
def no_warnings():
    """A normal run warns of nothing, neither from here nor from the libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Tests of one case stay on one worker, which has what it needs compiled; as do a file's that share its fits.

    pytest 9 does not show xdist 3.8 the groups: hence the older one in ``pyproject.toml``.
    """
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "case" in params:
            item.add_marker(pytest.mark.xdist_group(params["case"].name))
        elif "in_float64" in params:
            item.add_marker(pytest.mark.xdist_group(f"{params['in_float64']}-{item.path.stem}"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Searching all that was imported for garbage, again and again, takes a twentieth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


def _memory():
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


_limit = max(3 * 2**30, _memory() // 4)  # bytes held, beyond which compiled functions are thrown away


def pytest_runtest_teardown(item, nextitem):
    """Thousands of compiled functions would fill the memory of a small machine."""
    global _limit
    del item, nextitem
    jax = sys.modules.get("jax")
    if jax is not None and _resident() > _limit:
        jax.clear_caches()
        gc.collect()
        _limit = _resident() + 2**30  # not all of it goes back to the system


def _resident():
    """Bytes of memory that this process holds."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
