"""Moments in 8 bits: the codebook, its rounding, and how little a few steps differ."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.train import adam8bit

encode = jax.jit(adam8bit.encode, static_argnums=1)
decode = jax.jit(adam8bit.decode, static_argnums=1)


def test_the_codebooks_have_the_published_ends():
  signed, unsigned = adam8bit.codebook(True), adam8bit.codebook(False)
  assert len(np.unique(signed)) == len(np.unique(unsigned)) == 256
  assert (signed[0], signed[-1], unsigned[0]) == (pytest.approx(-0.99297, abs=1e-5), 1, 0)
  assert signed[signed > 0][0] == pytest.approx(5.5e-7, rel=0.01)
  assert unsigned[1] == pytest.approx(3.25e-7, rel=0.01)


def test_codes_are_the_nearest_and_keep_the_sign():
  x_N = np.random.default_rng(0).normal(size=512).astype(np.float32)
  x_N[:2] = 1e-9, -1e-9
  moment = encode(x_N, True)
  back_N = np.asarray(decode(moment, True))
  assert (np.sign(back_N) == np.sign(x_N)).all()
  unit = x_N / np.repeat(moment.largest, 256)
  book = adam8bit.codebook(True)
  nearest = np.abs(unit[:, None] - book[None]).argmin(1)
  assert (nearest[2:] == np.asarray(moment.codes)[2:]).mean() > 0.99
  zero = encode(np.zeros(256, np.float32), True)
  assert not np.any(decode(zero, True))


def test_three_steps_are_close_to_those_of_adam_in_float32_with_a_quarter_of_the_bytes():
  draw = np.random.default_rng(0)
  shapes = {"matrix": (64, 70), "norm": (16,)}
  params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  roles = {name: name for name in params}
  plain, narrow = (
    optax.scale_by_adam(0.9, 0.95, 1e-8),
    adam8bit.scale_by_adam8bit(0.9, 0.95, 1e-8, roles),
  )
  states = [jax.jit(plain.init)(params), jax.jit(narrow.init)(params)]
  sums = [params, params]
  updates = [jax.jit(rule.update) for rule in (plain, narrow)]
  for _ in range(3):
    grads = {
      name: jnp.asarray(draw.lognormal(0, 0.5, s) * draw.choice([-1, 1], s), jnp.float32)
      for name, s in shapes.items()
    }
    for i in range(2):
      directions, states[i] = updates[i](grads, states[i])
      sums[i] = jax.tree.map(np.add, sums[i], jax.device_get(directions))
  difference = np.abs(sums[0]["matrix"] - sums[1]["matrix"]).mean()
  assert difference / np.abs(sums[0]["matrix"]).mean() < 0.02
  np.testing.assert_allclose(sums[0]["norm"], sums[1]["norm"], rtol=1e-5)
  own = (states[1].first["matrix"], states[1].second["matrix"])
  size = sum(x.nbytes for x in jax.tree.leaves(own))
  assert size == 2 * (18 * 256 + 18 * 4)  # 4480 elements in 18 blocks


def test_a_gradient_that_is_not_finite_zeroes_its_own_moments_alone():
  params = {"matrix": np.zeros((64, 64), np.float32)}
  rule = adam8bit.scale_by_adam8bit(0.9, 0.95, 1e-8, {"matrix": "matrix"})
  grads = {"matrix": np.ones((64, 64), np.float32)}
  grads["matrix"][0, 3] = np.nan
  directions, state = jax.jit(rule.update)(grads, jax.jit(rule.init)(params))
  direction = np.asarray(directions["matrix"])
  assert direction[0, 3] == 0 and np.isfinite(direction).all()
  assert np.asarray(decode(state.first["matrix"], True))[3] == 0
  np.testing.assert_allclose(direction[1], 1.0, rtol=1e-5)
