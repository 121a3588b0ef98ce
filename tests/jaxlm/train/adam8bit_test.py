"""Moments in 8 bits: the codebook, its rounding, and how little a few steps differ."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.train import adam8bit


def test_the_codebooks_have_the_published_ends():
  signed, unsigned = adam8bit.codebook(True), adam8bit.codebook(False)
  assert len(np.unique(signed)) == len(np.unique(unsigned)) == 256
  assert (signed[0], signed[-1], unsigned[0]) == (pytest.approx(-0.99297, abs=1e-5), 1, 0)
  assert signed[signed > 0][0] == pytest.approx(5.5e-7, rel=0.01)
  assert unsigned[1] == pytest.approx(3.25e-7, rel=0.01)


def test_codes_are_the_nearest_and_keep_the_sign():
  x_N = (
    jnp.asarray(np.random.default_rng(0).normal(size=512), jnp.float32).at[:2].set([1e-9, -1e-9])
  )
  moment = adam8bit.encode(x_N, True)
  back_N = np.asarray(adam8bit.decode(moment, True))
  assert (np.sign(back_N) == np.sign(x_N)).all()
  unit = np.asarray(x_N / np.repeat(moment.largest, 256))
  book = adam8bit.codebook(True)
  nearest = np.abs(unit[:, None] - book[None]).argmin(1)
  assert (nearest[2:] == np.asarray(moment.codes)[2:]).mean() > 0.99
  zero = adam8bit.encode(jnp.zeros(256), True)
  assert (adam8bit.decode(zero, True) == 0).all()


def test_three_steps_are_close_to_those_of_adam_in_float32_with_a_quarter_of_the_bytes():
  draw = np.random.default_rng(0)
  shapes = {"matrix": (64, 70), "norm": (16,)}
  params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
  roles = {name: name for name in params}
  plain, narrow = (
    optax.scale_by_adam(0.9, 0.95, 1e-8),
    adam8bit.scale_by_adam8bit(0.9, 0.95, 1e-8, roles),
  )
  states = [plain.init(params), narrow.init(params)]
  sums = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
  updates = [jax.jit(rule.update) for rule in (plain, narrow)]
  for _ in range(3):
    grads = {
      name: jnp.asarray(draw.lognormal(0, 0.5, s) * draw.choice([-1, 1], s), jnp.float32)
      for name, s in shapes.items()
    }
    for i in range(2):
      directions, states[i] = updates[i](grads, states[i])
      sums[i] = jax.tree.map(jnp.add, sums[i], directions)
  difference = jnp.abs(sums[0]["matrix"] - sums[1]["matrix"]).mean()
  assert difference / jnp.abs(sums[0]["matrix"]).mean() < 0.02
  np.testing.assert_allclose(sums[0]["norm"], sums[1]["norm"], rtol=1e-5)
  own = (states[1].first["matrix"], states[1].second["matrix"])
  size = sum(x.nbytes for x in jax.tree.leaves(own))
  assert size == 2 * (18 * 256 + 18 * 4)  # 4480 elements in 18 blocks


def test_a_gradient_that_is_not_finite_zeroes_its_own_moments_alone():
  params = {"matrix": jnp.zeros((64, 64))}
  rule = adam8bit.scale_by_adam8bit(0.9, 0.95, 1e-8, {"matrix": "matrix"})
  grads = {"matrix": jnp.ones((64, 64)).at[0, 3].set(jnp.nan)}
  directions, state = jax.jit(rule.update)(grads, rule.init(params))
  assert directions["matrix"][0, 3] == 0 and jnp.isfinite(directions["matrix"]).all()
  assert adam8bit.decode(state.first["matrix"], True)[3] == 0
  np.testing.assert_allclose(directions["matrix"][1], 1.0, rtol=1e-5)
