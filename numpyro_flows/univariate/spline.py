"""What the monotone splines share: knots in a box, the choice of a piece, and linear tails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_flows.univariate.base import Univariate, soft_clip

TAILS = ("linear", "learnable", "equal")


class Spline(Univariate):
    """Maps ``[-bound, bound]`` onto itself by ``num_bins`` pieces, and goes on linearly outside.

    Params, all raw: ``num_bins`` bin widths, ``num_bins`` heights, the slopes at the knots (see ``tails``), and what
    the pieces of a subclass take besides. Bins have sizes in proportion to ``sigmoid(raw)`` plus a constant that gives
    them their least size; log-slopes are softly limited to ``+-max_log_slope``. So the inverse stays accurate in
    float32 whatever the parameters.

    :param num_bins: number of pieces, at least 2.
    :param bound: half the width of the spline's box.
    :param min_size: least width and height of a bin, as a share of the box; less than ``1 / num_bins``.
    :param max_log_slope: limit of the log-slopes at the knots.
    :param tails: ``"linear"``: the identity outside the box (``num_bins - 1`` slopes); ``"learnable"``: the two outer
        slopes are parameters as well, and the map goes on with them (``num_bins + 1``); ``"equal"``: they are one
        parameter (``num_bins``).
    """

    num_bins: int = eqx.field(static=True, default=8)
    bound: float = eqx.field(static=True, default=5.0)
    min_size: float = eqx.field(static=True, default=1e-2)
    max_log_slope: float = eqx.field(static=True, default=2.0)
    tails: str = eqx.field(static=True, default="linear")

    extras = 0  # further raw parameters of a piece

    def __check_init__(self) -> None:
        check_spline(type(self).__name__, self.num_bins, self.bound, self.min_size, self.tails)

    @property
    def num_params(self) -> int:
        return (3 + self.extras) * self.num_bins + num_outer(self.tails)

    def _blocks(self, params: Array) -> list[Array]:
        """Raw widths, heights, slopes, and the extras, each with its bins along the second-to-last axis."""
        k = self.num_bins
        sizes = [k, k, k + num_outer(self.tails), *[k] * self.extras]
        return jnp.split(params, np.cumsum(sizes)[:-1], -2)

    def _forward(self, u: Array, piece: tuple[Array, ...]) -> tuple[Array, Array]:
        """Value and log-slope within the piece."""
        raise NotImplementedError

    def _inverse(self, u: Array, piece: tuple[Array, ...]) -> tuple[Array, Array]:
        """Value and log-slope of the inverse within the piece."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        return _apply(self, False, _expanded(x, params), params)

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        return _apply(self, True, _expanded(y, params), params)

    def _evaluate(self, inverse: bool, x: Array, start: list, size: list, picked: list) -> tuple[Array, Array]:
        """Value and log-slope at ``x`` where its piece is known, the tails included."""
        u = jnp.clip(x, -self.bound, self.bound)  # the slope beyond the edge is that on the edge
        slopes = [jnp.exp(soft_clip(raw, self.max_log_slope)) for raw in picked[:2]]
        y, log_det = (self._inverse if inverse else self._forward)(u, (*start, *size, *slopes, *picked[2:]))
        # beyond the edge as it is by definition: a small piece's rounding would be felt there
        if self.tails == "linear":
            return y + (x - u), jnp.where(x == u, log_det, 0)
        edge = jnp.where(u > 0, slopes[1], slopes[0])
        edge = 1 / edge if inverse else edge
        return y + (x - u) * edge, jnp.where(x == u, log_det, jnp.log(edge))


def _expanded(x: Array, params: Array) -> Array:
    """``x`` of the shape of the result, one derivative for each of its elements: :func:`_apply_jvp` relies on it."""
    return jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, params.shape[:-2] + params.shape[-1:]))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _apply(spline: Spline, inverse: bool, x: Array, params: Array) -> tuple[Array, Array]:
    found = _search(spline, inverse, jnp.clip(x, -spline.bound, spline.bound), params)
    return spline._evaluate(inverse, x, found.start, found.size, found.picked)


@_apply.defjvp
def _apply_jvp(spline: Spline, inverse: bool, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """A gradient keeps the derivatives by what describes the piece: two numbers for each, whatever the spline."""
    search = partial(_search, spline, inverse)
    (x, params), (dx, dparams) = primals, tangents
    u = jnp.clip(x, -spline.bound, spline.bound)
    found, dfound = jax.jvp(search, (u, params), (jnp.zeros_like(u), dparams))
    piece, dpiece = (x, found.start, found.size, found.picked), (dx, dfound.start, dfound.size, dfound.picked)
    outputs, pull = jax.vjp(partial(spline._evaluate, inverse), *piece)
    one, zero = jnp.ones_like(outputs[0]), jnp.zeros_like(outputs[0])

    def along(direction: tuple[Array, Array]) -> Array:
        terms = jax.tree.map(jnp.multiply, pull(direction), dpiece)
        return sum(jax.tree.leaves(terms), start=zero)

    return outputs, (along((one, zero)), along((zero, one)))


class _Found(NamedTuple):
    """What the search for a piece finds, all of the shape of ``u``; pairs are of x and of y."""

    bin: Array  # of the piece, as a float
    start: list[Array]
    size: list[Array]
    total: list[Array]  # of the weights of which the sizes are shares
    picked: list[Array]  # the raw slopes at both ends, the extras


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _search(spline: Spline, inverse: bool, u: Array, params: Array) -> _Found:
    """Runs along the bins one by one: elementwise in ``u``, so that it compiles to one loop over memory."""
    k, bound = spline.num_bins, spline.bound
    widths, heights, slopes, *extras = ([b[..., i, :] for i in range(b.shape[-2])] for b in spline._blocks(params))
    weights = [[jax.nn.sigmoid(raw) + least_weight(k, spline.min_size) for raw in rows] for rows in (widths, heights)]
    total = [sum(rows[1:], start=rows[0]) for rows in weights]
    sizes = [[w * (2 * bound / t) for w in rows] for rows, t in zip(weights, total, strict=True)]
    zero = jnp.zeros_like(slopes[0])
    # a raw slope of zero is slope one, which is also that of the two outer knots of linear tails
    knots = {"linear": [zero, *slopes, zero], "learnable": slopes, "equal": [*slopes, slopes[0]]}[spline.tails]
    tables = [*sizes, knots, knots[1:], *extras]

    index, found = jnp.zeros_like(u), [table[0] for table in tables]
    start, edge = [jnp.full_like(u, -bound)] * 2, [jnp.zeros_like(zero)] * 2
    for i in range(1, k):
        edge = [e + size[i - 1] for e, size in zip(edge, sizes, strict=True)]
        beyond = u >= edge[inverse] - bound
        index = jnp.where(beyond, i, index)
        start = [jnp.where(beyond, e - bound, s) for e, s in zip(edge, start, strict=True)]
        found = [jnp.where(beyond, table[i], f) for table, f in zip(tables, found, strict=True)]
    like = jnp.broadcast_shapes(u.shape, zero.shape)
    index, start, found, total = jax.tree.map(lambda a: jnp.broadcast_to(a, like), (index, start, found, total))
    return _Found(index, start, found[:2], total, found[2:])


@_search.defjvp
def _search_jvp(spline: Spline, inverse: bool, primals: tuple, tangents: tuple) -> tuple[_Found, _Found]:
    """Every quantity is a sum over bins with weights of 0 and 1, so the gradient is one elementwise pass over them."""
    (u, params), (_, dparams) = primals, tangents
    found = _search(spline, inverse, u, params)
    blocks, dblocks = spline._blocks(params), spline._blocks(dparams)
    index = found.bin[..., None, :]

    def total(values: Array, chosen: Callable[[Array], Array]) -> Array:
        rows = jnp.arange(values.shape[-2], dtype=index.dtype)[:, None]
        return jnp.where(chosen(rows), values, 0).sum(-2)

    dstart, dsize, dtotal = [], [], []
    for n in (0, 1):
        weight = jax.nn.sigmoid(blocks[n])
        dweight = weight * (1 - weight) * dblocks[n]
        scale, every = 1 / found.total[n], jnp.broadcast_to(dweight.sum(-2), found.bin.shape)
        left, within = total(dweight, lambda j: j < index), total(dweight, lambda j: j == index)
        dstart.append(scale * (2 * spline.bound * left - (found.start[n] + spline.bound) * every))
        dsize.append(scale * (2 * spline.bound * within - found.size[n] * every))
        dtotal.append(every)
    first = index - 1 if spline.tails == "linear" else index
    second = (first + 1) % spline.num_bins if spline.tails == "equal" else first + 1
    picked = [total(dblocks[2], partial(jnp.equal, end)) for end in (first, second)]
    picked += [total(block, lambda j: j == index) for block in dblocks[3:]]
    return found, _Found(jnp.zeros_like(found.bin), dstart, dsize, dtotal, picked)


def num_outer(tails: str) -> int:
    """Slopes that are parameters, less the number of bins."""
    return {"linear": -1, "learnable": 1, "equal": 0}[tails]


def check_spline(owner: str, num_bins: int, bound: float, min_size: float, tails: str) -> None:
    """Raises a ``ValueError`` that names the argument which no spline can have."""
    if num_bins < 2:
        raise ValueError(f"{owner}: num_bins must be at least 2, but got {num_bins}.")
    if not bound > 0:
        raise ValueError(f"{owner}: bound must be positive, but got {bound}.")
    if not 0 < min_size * num_bins < 1:
        raise ValueError(
            f"{owner}: min_size must lie between 0 and 1 / num_bins = {1 / num_bins:.3g}, but got {min_size}."
        )
    if tails not in TAILS:
        raise ValueError(f"{owner}: tails must be one of {list(TAILS)}, but got {tails!r}.")


def least_weight(num_bins: int, min_size: float) -> float:
    """What to add to weights in ``(0, 1)`` so that none is less than ``min_size`` of their sum."""
    return min_size * (num_bins - 1) / (1 - num_bins * min_size)
