"""Rotations leave logits as they are, in float64 to 1e-10, and learned ones stay orthogonal."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import QuantRule, QuantSpec, decoder
from jaxlm.models import Transformer
from jaxlm.quant import rotation
from jaxlm.quant.kurtosis import kurtosis
from jaxlm.quant.learned_rotation import Rotations, cayley_step, learn_rotations, orthonormal
from pallas_kernels.common.errors import UnsupportedError, UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

MODEL = decoder(
  V=32, D=32, F=48, N=4, K=2, H=8, layers=2, tied=True, norm_offset=1, qkv_bias=True, out_bias=True,
  bias=True
)  # fmt: skip
IDS_BT = np.arange(12, dtype=np.int32)[None]


@functools.cache
def drawn(dtype=jnp.float32):
  """Parameters whose gains and biases are not at their first values."""
  params = Transformer(MODEL).init(jax.random.key(0))
  draw = np.random.default_rng(0)
  return jax.tree.map(lambda w: jnp.asarray(w + 0.1 * draw.normal(size=w.shape), dtype), params)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params):
  return Transformer(config).apply(params, IDS_BT)


def turn64(a_TNH, c):
  angles = np.arange(len(a_TNH))[:, None] * c.rope.theta ** (-np.arange(0, c.H, 2) / c.H)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  a, b = a_TNH[..., : c.H // 2], a_TNH[..., c.H // 2 :]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def layer64(config, block, x, norm, linear):
  c, T = config.pattern[0].mixer, len(x)
  h = norm(x, block["mixer_norm"])
  q, k, v = (linear(h, block["mixer"][n]).reshape(T, -1, c.H) for n in "qkv")
  k, v = (np.repeat(a, c.N // c.K, axis=1) for a in (k, v))
  scores = np.einsum("tnh,snh->nts", turn64(q, c), turn64(k, c)) * c.H**-0.5
  shares = np.exp(np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf))
  shares /= shares.sum(-1, keepdims=True)
  x = x + linear(np.einsum("nts,snh->tnh", shares, v).reshape(T, -1), block["mixer"]["o"])
  h = norm(x, block["feedforward_norm"])
  gate, up = (linear(h, block["feedforward"][n]) for n in ("gate", "up"))
  return x + linear(gate / (1 + np.exp(-gate)) * up, block["feedforward"]["down"])


def logits64(config, params, ids):
  """The model in float64 by numpy: what its own compute types cannot show."""
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)

  def norm(x, w):
    unit = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    return unit * (w["weight"] + config.norm_offset)

  def linear(x, part):
    return x @ part["weight"] + part.get("bias", 0)

  stack, x = p["stacks"]["0"]["0"], p["embed"]["weight"][ids]
  for layer in range(config.layers):
    x = layer64(config, jax.tree.map(lambda w, at=layer: w[at], stack), x, norm, linear)
  x = norm(x, p["norm"])
  return x @ (p["embed"]["weight"].T if config.tied else p["head"]["weight"])


@pytest.mark.slow
def test_logits_are_unchanged_to_1e_10_in_float64():
  with jax.enable_x64(True):
    params = drawn(jnp.float64)
    before = logits64(MODEL, params, IDS_BT[0])
    np.testing.assert_allclose(before, logits(MODEL, drawn())[0], atol=2e-4)  # it is this model
    config, folded = rotation.fold_norms(MODEL, params)
    assert not config.tied
    np.testing.assert_allclose(logits64(config, folded, IDS_BT[0]), before, rtol=0, atol=1e-10)
    for draw in (rotation.random_hadamard, rotation.random_orthogonal):
      config, rotated = rotation.rotate(MODEL, params, jax.random.key(1), draw)
      np.testing.assert_allclose(logits64(config, rotated, IDS_BT[0]), before, rtol=0, atol=1e-10)
      moved = rotated["embed"]["weight"] - params["embed"]["weight"]
      assert np.abs(moved).max() > 0.1
    first = params["embed"]["weight"]  # what both published codes do to it, for a LayerNorm alone
    centred = folded | {"embed": {"weight": first - first.mean(1, keepdims=True)}}
    assert np.abs(logits64(config, centred, IDS_BT[0]) - before).max() > 0.01


def test_a_rotated_model_has_the_logits_of_the_first_in_float32():
  params = drawn()
  config, rotated = rotation.rotate(MODEL, params, jax.random.key(1))
  r4 = (QuantRule(match=".*down", spec=QuantSpec(hadamard=48)),)  # 12 x 4, of F
  online = dataclasses.replace(config, quant=r4)
  want = logits(MODEL, params)
  scale = np.abs(want).max()
  chex.assert_trees_all_close(logits(config, rotated), want, atol=1e-5 * scale)
  chex.assert_trees_all_close(logits(online, rotated), want, atol=1e-5 * scale)


def test_what_cannot_be_rotated_is_refused():
  with pytest.raises(UnsupportedError, match="post_norms"):
    rotation.fold_norms(dataclasses.replace(MODEL, post_norms=True), {})
  untied = dataclasses.replace(MODEL, tied=False)
  with pytest.raises(UserError, match="fold the norms first"):
    rotation.rotate_residual(untied, drawn() | {"head": {}}, jnp.eye(32))
  with pytest.raises(UserError, match="fold the norms first"):
    learn_rotations(untied, drawn() | {"head": {}}, None, [], key=jax.random.key(0))
  with pytest.raises(UserError, match="hadamard=36"):
    rotation.random_hadamard(jax.random.key(0), 36)


@pytest.mark.parametrize("n", [16, 24, 20, 28, 40])
def test_hadamard_orders_beyond_powers_of_two_are_orthogonal_and_flatten_outliers(n):
  r_NN = np.asarray(jax.jit(rotation.random_hadamard, static_argnums=1)(jax.random.key(0), n))
  np.testing.assert_allclose(r_NN @ r_NN.T, np.eye(n), atol=1e-6)
  np.testing.assert_allclose(np.abs(r_NN), n**-0.5, rtol=1e-5)
  x_ZN = np.random.default_rng(0).normal(size=(64, n)).astype(np.float32)
  x_ZN[:, 3] *= 30
  assert float(kurtosis(x_ZN)) > 10 and float(kurtosis(x_ZN @ r_NN)) < 3.5


@pytest.mark.parametrize("rate", [0.05, 1.5])
def test_cayley_steps_stay_orthogonal(rate):
  x_NN = rotation.random_orthogonal(jax.random.key(0), 16)
  for seed in range(3):
    gradient = jax.random.normal(jax.random.key(seed), (16, 16))
    moved = jax.jit(cayley_step)(x_NN, gradient, rate)
    assert float(jnp.abs(moved - x_NN).max()) > 0.01
    assert float(jnp.abs(moved @ moved.T - jnp.eye(16)).max()) < 1e-4
    x_NN = orthonormal(moved)
    assert float(jnp.abs(x_NN @ x_NN.T - jnp.eye(16)).max()) < 1e-6


def test_learned_rotations_lower_a_loss_of_the_rotated_weights():
  """From the identity, with an outlier channel in the embedding: its fourth moment falls."""
  config, folded = rotation.fold_norms(MODEL, drawn())
  folded["embed"]["weight"] = folded["embed"]["weight"].at[:, 3].mul(20.0)

  def loss(params, power):
    v = params["stacks"]["0"]["0"]["mixer"]["v"]["weight"]
    return jnp.mean(params["embed"]["weight"] ** power) + jnp.mean(v**power)

  identity = Rotations(jnp.eye(32), [jnp.broadcast_to(jnp.eye(8), (2, 8, 8))])
  options = {"key": jax.random.key(0), "steps": 20, "rate": 0.5}
  learned = learn_rotations(config, folded, loss, [4.0] * 20, start=identity, **options)
  for r in (learned.r1, *learned.r2[0]):
    np.testing.assert_allclose(r @ r.T, np.eye(len(r)), atol=1e-6)

  def loss_of(rotations):
    turned = rotation.rotate_residual(config, folded, rotations.r1)
    return float(loss(rotation.rotate_heads(config, turned, rotations.r2), 4.0))

  assert loss_of(learned) < 0.3 * loss_of(identity)
  assert np.abs(learned.r2[0] - identity.r2[0]).max() > 1e-3
