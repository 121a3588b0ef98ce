"""The product and both gradients against float64, and against what rounding has to cost."""

# Y[M, N] = X[M, K] W[K, N]
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_matmul import fp8_matmul, quantize_blocks, quantize_tiles, scaled_matmul
from tests.pallas_kernels.fp8_matmul.oracle import error, problem, products

SHAPE = (256, 385, 256)  # one for most tests, so that they share compiled programs
ALL_E4M3 = (3.3e-2, 4.1e-2)
RECIPES = (
  ("xla", dict(), ALL_E4M3),
  ("xla", dict(scale="pow2"), ALL_E4M3),
  ("xla", dict(scale="pow2", save="fp8"), ALL_E4M3),
  ("xla", dict(dtype="e5m2"), (6.6e-2, 8.2e-2)),
  ("xla", dict(bwd_dtype="e5m2"), None),
  ("xla", dict(dtype="int8"), None),
  ("reference", dict(), ALL_E4M3),
  ("pallas_tpu", dict(), ALL_E4M3),
  ("reference", dict(dtype="int8"), None),
)
NAMES = ("Y", "dX", "dW")


@functools.partial(jax.jit, static_argnames="options")
def run(x, w, dy, options):
  y, pull_back = jax.vjp(lambda x, w: fp8_matmul(x, w, **dict(options)), x, w)
  return y, *pull_back(dy.astype(y.dtype))


def call(x, w, dy, **options):
  options = dict(allow_emulation=True) | options
  options |= dict(interpret="pallas" in options.get("implementation", ""))
  return run(*map(jnp.asarray, (x, w, dy)), tuple(options.items()))


def exact(x, w, dy):
  x, w, dy = map(np.float64, (x, w, dy))
  return x @ w, dy @ w.T, x.T @ dy


@pytest.mark.parametrize("implementation, recipe, band", RECIPES, ids=str)
def test_products_of_the_codes(implementation, recipe, band):
  """Sums are float32's, and the codes are the recipe's, in the forward and the backward pass.

  Against unquantised products the error lies in a band: a smaller one would mean that something
  was not quantised.
  """
  given = problem(*SHAPE)
  got = call(*given, implementation=implementation, **recipe)
  for name, ours, of_codes, want in zip(NAMES, got, products(*given, **recipe), exact(*given)):
    assert ours.dtype == jnp.float32 and error(ours, of_codes) < 1e-6, name
    if band is not None:
      assert band[0] < error(ours, want) < band[1], name
      calc_diff = 1 - 2 * np.sum(ours * want) / np.sum(np.square(ours) + np.square(want))
      assert calc_diff < (band[1] / ALL_E4M3[1]) ** 2 * 1e-3, name


def test_bfloat16():
  """Inputs are rounded before, Y and dX after; the weight's gradient is float32 with its weight."""
  x, w, dy = problem(*SHAPE)
  x = jnp.asarray(x, jnp.bfloat16)
  dy = jnp.asarray(dy, jnp.bfloat16)
  got = call(x, w, dy, implementation="xla")
  assert [array.dtype for array in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
  want = products(x, w, dy)
  for ours, theirs, low, high in zip(got, want, (1e-3, 1e-3, 0), (2.5e-3, 2.5e-3, 1e-6)):
    assert low <= error(ours, theirs) < high
  assert run(x, jnp.asarray(w, jnp.bfloat16), dy, (("allow_emulation", True),))[2].dtype == x.dtype


@pytest.mark.parametrize("M, K, N", [(1, 129, 5), (129, 1, 3), (5, 128, 1)])
def test_smallest_sizes(M, K, N):
  given = problem(M, K, N)
  for ours, want in zip(call(*given, implementation="xla"), products(*given)):
    assert error(ours, want) < 1e-6


def test_empty_matrices():
  for sizes in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
    y, dx, dw = call(*problem(*sizes))
    chex.assert_trees_all_equal((y, dx, dw), jax.tree.map(jnp.zeros_like, (y, dx, dw)))


def test_an_outlier_spoils_its_tile_alone():
  """1e6 in a column of half of the rows, which meets a row of W that is 0.

  With one scale for all the clean rows would be lost, with one a row all of the dirty ones.
  """
  x, w, dy = problem(*SHAPE)
  x[:128, 7] = 1e6
  w[7] = 0
  y = call(x, w, dy, implementation="xla")[0]
  want = np.float64(x) @ np.float64(w)
  assert 3.3e-2 < error(y[128:], want[128:]) < 4.1e-2
  assert 0.5 < error(y[:128], want[:128]) < 0.65  # a third of the sum is lost: 3^-1/2


@pytest.mark.parametrize("amplitude", [1e-20, 1e30])
def test_amplitudes(amplitude):
  x, w, dy = problem(*SHAPE)
  got = call(x * amplitude, w, dy, implementation="xla")
  for ours, want in zip(got, exact(np.float64(x) * amplitude, w, dy)):
    assert 3e-2 < error(ours, want) < 4.5e-2


def test_nan_reaches_what_depends_on_it_and_nothing_else():
  x, w, dy = problem(*SHAPE)
  x[17, 130] = np.nan
  for options in (dict(), dict(dtype="int8")):
    y, dx, dw = map(np.isnan, call(x, w, dy, implementation="xla", **options))
    assert y[17].all() and not np.delete(y, 17, axis=0).any()
    assert dw[130].all() and not np.delete(dw, 130, axis=0).any()
    assert not dx.any()


def test_infinity_and_transposed_inputs():
  x, w, dy = problem(*SHAPE)
  x[3, 4] = np.inf
  y, dx, dw = map(np.isnan, call(np.asfortranarray(x), w.T.copy().T, dy, implementation="xla"))
  assert y[3].all() and not np.delete(y, 3, axis=0).any()
  assert dw[4].all() and not np.delete(dw, 4, axis=0).any() and not dx.any()


def test_more_axes_and_the_same_bits_twice():
  x, w, dy = problem(*SHAPE)
  flat = call(x, w, dy, implementation="xla")
  y, dx, dw = call(x.reshape(2, 128, -1), w, dy.reshape(2, 128, -1), implementation="xla")
  chex.assert_trees_all_equal(flat, call(x, w, dy, implementation="xla"))
  chex.assert_trees_all_equal(flat, (y.reshape(256, -1), dx.reshape(256, -1), dw))


def test_under_vmap():
  arrays = [np.stack(pair) for pair in zip(problem(40, 130, 20), problem(40, 130, 20, seed=1))]
  got = jax.vmap(lambda *args: call(*args))(*map(jnp.asarray, arrays))
  for i in range(2):
    for ours, want in zip(got, products(*(array[i] for array in arrays))):
      assert error(ours[i], want) < 1e-6


def test_codes_can_be_multiplied_alone():
  """The three products of `fp8_matmul` from codes that were made once."""

  @jax.jit
  def multiply(x, w, dy):
    weights = quantize_blocks(w)
    product = functools.partial(scaled_matmul, allow_emulation=True)
    return (
      product(quantize_tiles(x, 1), weights),
      product(quantize_tiles(dy, 1), weights, axes=(1, 1)),
      product(quantize_tiles(x, 0), quantize_tiles(dy, 0), axes=(0, 0)),
    )

  given = problem(*SHAPE)
  for ours, theirs in zip(multiply(*given), call(*given, implementation="xla")):
    chex.assert_trees_all_equal(ours, theirs)
