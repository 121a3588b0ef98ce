"""Keeps Adam's moments in 8 bits, by blocks of 256 (Dettmers et al. 2021, arXiv 2110.02861)."""

# N elements of one parameter, filled up to whole blocks of 256

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels.common.errors import UnsupportedError
from sharding.rules import is_sharded

BLOCK = 256
LEAST_ELEMENTS = 4096
"""smaller parameters, and embeddings, keep their moments in float32"""


class Moment(NamedTuple):
  """Holds one moment of one parameter in 2 bytes an element with its twin, and 8/256 for scales."""

  codes: jax.Array
  """uint8 [N], places in the codebook"""
  largest: jax.Array
  """float32 [N / 256]"""


class Adam8State(NamedTuple):
  """Holds the number of updates and, for each parameter, its moments: `Moment` or float32."""

  count: jax.Array  # type: ignore[assignment]  # int32
  first: Any
  second: Any


@functools.cache
def codebook(signed: bool) -> np.ndarray:
  """Returns the 256 sorted values of the dynamic tree, section 2.2 (create_dynamic_map)."""
  values = [0.0, 1.0]
  for exponent in range(7):
    bounds = np.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1)
    middles = (bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (exponent - 6)
    values += [*middles, *(-middles if signed else ())]
  return np.sort(np.array(values, np.float32))


def encode(x_N: jax.Array, signed: bool) -> Moment:
  """Returns the nearest codes, of two equally near ones the lower.

  With signs a code never has another sign than its value: it moves one away from zero.
  """
  blocks = x_N.reshape(-1, BLOCK)
  largest = jnp.max(jnp.abs(blocks), axis=1)
  unit = blocks / jnp.where(largest > 0, largest, 1.0)[:, None]
  book = codebook(signed)
  middles = (book[:-1] + book[1:]) / 2
  codes = jnp.searchsorted(jnp.asarray(middles), unit, side="left").astype(jnp.int32)
  if signed:
    sign = jnp.sign(unit)
    codes = codes + jnp.where(jnp.sign(jnp.asarray(book)[codes]) != sign, sign, 0).astype(jnp.int32)
  return Moment(codes.astype(jnp.uint8).reshape(-1), largest)


def decode(moment: Moment, signed: bool) -> jax.Array:
  """Returns the float32 values [N] that codes stand for."""
  unit = jnp.asarray(codebook(signed))[moment.codes].reshape(-1, BLOCK)
  return (unit * moment.largest[:, None]).reshape(-1)


def scale_by_adam8bit(b1: float, b2: float, eps: float, roles: Any) -> optax.GradientTransformation:
  """Returns Adam whose moments are rounded after each step; updates use them before rounding.

  Where a gradient is not finite, its moments become zero and its direction is zero. Raises
  UnsupportedError on a mesh of several devices.
  """

  def is_small(role: str, w: jax.Array) -> bool:
    return role == "embedding" or w.size < LEAST_ELEMENTS

  def init(params: Any) -> Adam8State:
    if is_sharded():
      raise UnsupportedError("optimizer.name='adam8bit': is written for one device, not for a mesh")

    def zero(role: str, w: jax.Array, signed: bool) -> Any:
      if is_small(role, w):
        return jnp.zeros(w.shape, jnp.float32)
      return encode(jnp.zeros(math.ceil(w.size / BLOCK) * BLOCK, jnp.float32), signed)

    first = jax.tree.map(functools.partial(zero, signed=True), roles, params)
    second = jax.tree.map(functools.partial(zero, signed=False), roles, params)
    return Adam8State(jnp.int32(0), first, second)

  def update(grads: Any, state: Adam8State, params: Any = None) -> tuple[Any, Adam8State]:
    count = state.count + 1

    def step(role: str, g: jax.Array, first: Any, second: Any) -> tuple[jax.Array, Any, Any]:
      good = jnp.isfinite(g)
      g = jnp.where(good, g, 0.0)
      if is_small(role, g):
        m, v = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g * g
        m, v = jnp.where(good, m, 0.0), jnp.where(good, v, 0.0)
        return m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps), m, v
      flat, good_N = (_fill(x) for x in (g, good))
      m = jnp.where(good_N, b1 * decode(first, True) + (1 - b1) * flat, 0.0)
      v = jnp.where(good_N, b2 * decode(second, False) + (1 - b2) * flat * flat, 0.0)
      direction = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
      return direction[: g.size].reshape(g.shape), encode(m, True), encode(v, False)

    out = jax.tree.map(step, roles, grads, state.first, state.second)
    pick = lambda i: jax.tree.map(lambda _, three: three[i], roles, out)  # noqa: E731
    return pick(0), Adam8State(count, pick(1), pick(2))

  return optax.GradientTransformation(init, update)


def _fill(x: jax.Array) -> jax.Array:
  """Returns the elements in one row, filled up with zeros to whole blocks."""
  return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK))
