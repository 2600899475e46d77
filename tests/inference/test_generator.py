"""The generator of random numbers behind NumPyro's fits."""

import numpy as np
import pytest
from scipy import stats

jax = pytest.importorskip("jax")
generator = pytest.importorskip("numpyro_flows.generator")


@pytest.mark.parametrize(
    "key, counter, expected",
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_its_authors(key, counter, expected):
    key, first, second = (np.asarray(words, np.uint32) for words in (key, *counter))
    assert [int(word) for word in generator.threefry(jax.numpy.asarray(key), first, second)] == list(expected)


def test_draws():
    """Uniform words of every width, alike in bulk and one by one; keys that have a common parent are unlike."""
    key = jax.random.key(3, impl=generator.GENERATOR)
    for width, high in ((8, 2**8), (16, 2**16), (32, 2**32), (64, 2**64)):
        words = np.asarray(jax.random.bits(key, (30, 101), f"uint{width}"))
        assert words.dtype == f"uint{width}" and words.shape == (30, 101)
        assert stats.kstest(words.ravel() / high, "uniform").pvalue > 1e-3
    assert len(np.unique(words)) == words.size
    children = jax.random.split(key, (3, 5))
    together = np.asarray(jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (801,))))(children))
    for i, j in ((0, 0), (2, 3)):
        np.testing.assert_allclose(together[i, j], jax.random.normal(children[i, j], (801,)), rtol=1e-6, atol=1e-6)
    assert stats.kstest(together.ravel(), "norm").pvalue > 1e-3
    numbered = [np.asarray(jax.random.normal(jax.random.fold_in(key, n), (801,))) for n in range(15)]
    series = np.concatenate([together.reshape(15, -1), numbered])
    correlations = np.corrcoef(series)[np.triu_indices(30, 1)] * 801**0.5
    assert np.abs(correlations).max() < 5 and correlations.std() == pytest.approx(1, abs=0.15)
    assert jax.random.bits(key, (0, 4)).shape == (0, 4) and jax.random.split(key, 0).shape == (0,)


def test_keys_are_the_same_known_or_traced():
    """A key's children and those of its numbers, by NumPy where the key is known and by a program where it is not."""
    key = jax.random.key(2**32 - 1, impl=generator.GENERATOR)
    for shape in (0, 1, 7, (2, 3)):
        split = lambda k, shape=shape: jax.random.key_data(jax.random.split(k, shape))  # noqa: E731
        np.testing.assert_array_equal(split(key), jax.jit(split)(key))
    for number in (0, 5, 2**31):
        fold = lambda k, n: jax.random.key_data(jax.random.fold_in(k, n))  # noqa: E731
        np.testing.assert_array_equal(fold(key, number), jax.jit(fold)(key, np.uint32(number)))
    keys = jax.random.split(key, 3)
    together = jax.random.key_data(jax.vmap(jax.random.split)(keys))
    np.testing.assert_array_equal(together, [jax.random.key_data(jax.random.split(k)) for k in keys])
