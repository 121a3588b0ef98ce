"""B and W together are the full backward pass: the same gradients, and no work done twice."""

# B batch, T positions, D model, F feed-forward, N heads, H head width

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.pipeline.split_backward import split_backward

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

B, T, D, F, N = 2, 16, 32, 96, 2
REMATS = {
  "none": lambda block: block,
  "full": jax.checkpoint,
  "dots": lambda block: jax.checkpoint(
    block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}


def block(w, x_BTD, segments_BT):
  """Attends within segments and feeds forward, as a layer of a decoder does."""
  z_BTD = x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + 1e-6)
  q, k, v = jnp.einsum("btd,pdnh->pbtnh", z_BTD, w["qkv"])
  allowed = (segments_BT[:, :, None] == segments_BT[:, None]) & jnp.tri(T, dtype=bool)[None]
  a = jnp.where(allowed[:, None], jnp.einsum("btnh,bsnh->bnts", q, k), -1e30)
  o = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(a), v)
  x_BTD = x_BTD + jnp.einsum("btnh,nhd->btd", o, w["o"])
  return x_BTD + (jax.nn.silu(x_BTD @ w["gate"]) * (x_BTD @ w["up"])) @ w["down"]


def two_blocks(remat):
  def stage(layers, x_BTD, segments_BT):
    for layer in (jax.tree.map(lambda w: w[0], layers), jax.tree.map(lambda w: w[1], layers)):
      x_BTD = REMATS[remat](block)(layer, x_BTD, segments_BT)
    return x_BTD

  return stage


def arguments():
  draw = np.random.default_rng(0)
  shapes = {"qkv": (3, D, N, D // N), "o": (N, D // N, D), "gate": (D, F), "up": (D, F)}
  shapes["down"] = (F, D)
  layers = {name: draw.normal(size=(2, *shape)) / 8 for name, shape in shapes.items()}
  segments_BT = np.arange(T)[None] // np.array([[8], [5]])
  x_BTD, dy_BTD = draw.normal(size=(2, B, T, D))
  return jax.tree.map(jnp.asarray, (layers, x_BTD, segments_BT, dy_BTD))


def flops(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
  "remat", [pytest.param(r, marks=pytest.mark.slow if r == "dots" else ()) for r in REMATS]
)
def test_parts_are_the_backward_pass(remat):
  stage = two_blocks(remat)
  layers, x, segments, dy = arguments()
  parts = split_backward(stage, layers, x, segments)

  @jax.jit
  def by_parts(layers, x, segments, dy):
    y, stash = parts.forward(layers, x, segments)
    chex.assert_trees_all_equal_shapes_and_dtypes(tuple(stash), parts.stash)
    dx, crossing = parts.input_gradient(layers, segments, stash, dy)
    chex.assert_trees_all_equal_shapes_and_dtypes(tuple(crossing), parts.crossing)
    return y, dx, parts.weight_gradient(layers, segments, [stash[i] for i in parts.kept], crossing)

  @jax.jit
  def whole(layers, x, segments, dy):
    y, pull_back = jax.vjp(lambda w, x: stage(w, x, segments), layers, x)
    dw, dx = pull_back(dy)
    return y, dx, dw

  got, want = (jax.device_get(f(layers, x, segments, dy)) for f in (by_parts, whole))
  scales = jax.tree.map(lambda g: np.abs(g).max(), want)
  got, want = (jax.tree.map(np.divide, outs, scales) for outs in (got, want))
  chex.assert_trees_all_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("remat", REMATS)
def test_no_work_is_done_twice(remat):
  stage = two_blocks(remat)
  layers, x, segments, _ = arguments()
  parts = split_backward(stage, layers, x, segments)
  _, stash = jax.eval_shape(parts.forward, layers, x, segments)
  _, crossing = jax.eval_shape(parts.input_gradient, layers, segments, stash, x)
  kept = [stash[i] for i in parts.kept]

  def pull_back_of(layers, x, segments):
    return jax.vjp(lambda w, x: stage(w, x, segments), layers, x)[1]

  pull_back = jax.eval_shape(pull_back_of, layers, x, segments)
  full = flops(lambda pull_back, dy: pull_back(dy), pull_back, x)
  B = flops(parts.input_gradient, layers, segments, stash, x)
  W = flops(parts.weight_gradient, layers, segments, kept, crossing)
  assert B + W <= 1.03 * full
  assert W > 0.3 * full  # not all of it is in B


def test_bytes_of_a_micro_batch():
  layers, x, segments, _ = arguments()
  bytes_of = {}
  for remat in ("none", "full"):
    parts = split_backward(two_blocks(remat), layers, x, segments)
    bytes_of[remat] = parts.bytes_until_input_gradient, parts.bytes_until_weight_gradient
  until_B, until_W = bytes_of["none"]
  assert until_W < until_B
  until_B, until_W = bytes_of["full"]
  assert until_B == 2 * x.nbytes  # the input of each block alone
  assert until_W > 4 * until_B  # what B recomputes W is given
