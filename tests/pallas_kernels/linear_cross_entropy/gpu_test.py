"""The Hopper kernel on a Hopper GPU, against the reference: values, gradients, repetition."""

# N tokens, D model, V vocabulary
import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
OPTIONS = {
  "plain": dict(),
  "softcap": dict(softcap=4.0),
  "temperature": dict(temperature=0.7),
  "label smoothing": dict(label_smoothing=0.1),
  "z-loss": dict(z_loss=0.01),
  "all": dict(softcap=4.0, temperature=0.7, label_smoothing=0.1, z_loss=0.01),
}
SHAPES = [(256, 64, 128), (1024, 576, 4096), (2048, 2304, 32_000)]


def problem(N, D, V, dtype, scale=1.0):
  keys = jax.random.split(jax.random.key(0), 5)
  e_ND = (scale * jax.random.normal(keys[0], (N, D))).astype(dtype)
  c_VD = (jax.random.normal(keys[1], (V, D)) / D**0.5).astype(dtype)
  labels_N = jax.random.randint(keys[2], (N,), 0, V).at[::7].set(-100)
  return e_ND, c_VD, jax.random.normal(keys[3], (V,)), labels_N, jax.random.uniform(keys[4], (N,))


def value_and_gradients(arrays, **options):
  """The loss, a function of lse as well, and the gradients of E, C and b."""

  def loss(e_ND, c_VD, bias_V, labels_N, weights_N):
    value, lse_N = linear_cross_entropy(
      e_ND, c_VD, labels_N, bias_V=bias_V, weights_N=weights_N, return_lse=True, **options
    )
    return value + 1e-3 * jnp.mean(jnp.tanh(lse_N)), lse_N

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)


def assert_close(got, want):
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_close(got[0], want[0], rtol=1e-5)
  for ours, theirs in zip(got[1], want[1]):
    ours, theirs = np.float64(ours), np.float64(theirs)
    assert np.linalg.norm(ours - theirs) < 4e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
  arrays = problem(*SHAPES[1], jnp.bfloat16)
  got = value_and_gradients(arrays, implementation="pallas_gpu", **OPTIONS[name])
  assert_close(got, value_and_gradients(arrays, implementation="reference", **OPTIONS[name]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_shapes(shape, dtype):
  arrays = problem(*shape, dtype)
  got = value_and_gradients(arrays, implementation="pallas_gpu")
  assert_close(got, value_and_gradients(arrays, implementation="reference"))


def test_large_logits_stay_finite():
  arrays = problem(*SHAPES[1], jnp.bfloat16, scale=200.0)
  got = value_and_gradients(arrays, implementation="pallas_gpu")
  assert_close(got, value_and_gradients(arrays, implementation="reference"))
  chex.assert_tree_all_finite(got)


def test_losses_of_single_tokens():
  e_ND, c_VD, _, labels_N, _ = problem(*SHAPES[1], jnp.bfloat16)
  per_token = lambda name: linear_cross_entropy(  # noqa: E731
    e_ND, c_VD, labels_N, reduction="none", implementation=name
  )
  chex.assert_trees_all_close(per_token("pallas_gpu"), per_token("reference"), rtol=1e-5, atol=1e-5)


def test_repeats_bit_for_bit():
  arrays = problem(*SHAPES[2], jnp.bfloat16)
  first = value_and_gradients(arrays, implementation="pallas_gpu")
  for _ in range(3):
    chex.assert_trees_all_equal(value_and_gradients(arrays, implementation="pallas_gpu"), first)


def test_the_other_layout():
  e_ND, c_VD, *rest = problem(*SHAPES[1], jnp.bfloat16)
  run = functools.partial(value_and_gradients, (e_ND, c_VD.T, *rest), classifier_layout="dv")
  assert_close(run(implementation="pallas_gpu"), run(implementation="reference"))


def test_several_problems_under_vmap():
  one = problem(*SHAPES[0], jnp.bfloat16)
  both = jax.tree.map(lambda array: jnp.stack([array, jnp.roll(array, 5, axis=0)]), one)

  def run(name):
    return jax.vmap(lambda *arrays: value_and_gradients(arrays, implementation=name))(*both)

  got, want = run("pallas_gpu"), run("reference")
  for i in range(2):
    assert_close(*(jax.tree.map(operator.itemgetter(i), tree) for tree in (got, want)))


def test_it_is_the_default_for_large_vocabularies():
  arrays = problem(1024, 64, 8192, jnp.bfloat16)
  named = value_and_gradients(arrays, implementation="pallas_gpu")
  chex.assert_trees_all_equal(value_and_gradients(arrays), named)
