"""The kernels in the simulators of their chips: races, poisoned memory, grid order, cores.

A simulator fills what was not written with NaN, raises on reads out of bounds, and records two
accesses to one place that nothing orders.
"""

# N tokens, D model, V vocabulary
import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_in_less_time")]
PLAIN = dict(softcap=None, temperature=1.0, label_smoothing=0.0, z_loss=0.0)
ALL = dict(softcap=4.0, temperature=0.7, label_smoothing=0.1, z_loss=0.01)
needs_gpu_simulator = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"),
  reason=f"the GPU simulator came with jax 0.11, this is {jax.__version__}",
)


def problem(N, D, V, dtype):
  rng = np.random.default_rng(0)
  e_ND = jnp.asarray(rng.normal(size=(N, D)), dtype)
  c_VD = jnp.asarray(rng.normal(size=(V, D)) / np.sqrt(D), dtype)
  bias_V = jnp.asarray(rng.normal(size=V), jnp.float32)
  labels_N = jnp.asarray(rng.integers(0, V, N), jnp.int32).at[3].set(-100)
  return e_ND, c_VD, bias_V, labels_N


def value_and_gradients(arrays, layout="vd", **options):
  """The summed loss and the gradients of E, C ([V, D] in either layout) and b."""

  def loss(e_ND, c_VD, bias_V, labels_N):
    c = c_VD if layout == "vd" else c_VD.T
    return linear_cross_entropy(
      e_ND, c, labels_N, bias_V=bias_V, reduction="sum", classifier_layout=layout, **options
    )

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays)


@functools.cache
def expected(N, D, V, dtype, options):
  arrays = problem(N, D, V, jnp.dtype(dtype))
  return value_and_gradients(arrays, implementation="reference", **dict(options))


def assert_close(got, want, loss, gradients):
  """Compares the loss and, by the norm of the difference, each gradient."""
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_close(got[0], want[0], rtol=loss)
  for ours, theirs in zip(got[1], want[1]):
    ours, theirs = np.float64(ours), np.float64(theirs)
    assert np.linalg.norm(ours - theirs) < gradients * np.linalg.norm(theirs)


def simulated_on_tpu(shape, cores, seed, options, **rest):
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where races are recorded

  simulator = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    random_seed=seed,  # of the order of parallel grid axes
    num_cores_or_threads=cores,
    dma_execution_mode="on_wait" if seed else "eager",
  )
  arrays = problem(*shape, jnp.float32)
  try:
    got = value_and_gradients(
      arrays, implementation="pallas_tpu", interpret=simulator, **options, **rest
    )
    jax.block_until_ready(got)
    assert not interpret_pallas_call.races.races_found
  except Exception:
    pltpu.reset_tpu_interpret_mode_state()
    raise
  assert_close(got, expected(*shape, "float32", tuple(options.items())), 1e-6, 1e-5)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_tpu_kernels(cores, seed):
  """Two blocks of rows; three tiles of the vocabulary, which two cores share unevenly."""
  simulated_on_tpu((256, 24, 384), cores, seed, ALL)


@pytest.mark.parametrize("cores", [1, 2])
def test_tpu_kernels_with_ragged_rows_and_the_other_layout(cores):
  simulated_on_tpu((200, 24, 384), cores, 0, PLAIN, layout="dv")


def test_tpu_kernels_where_filters_skip_every_product():
  """Tiles that a filter skips are copied, so that gradients of the weights are still written."""
  simulator = pltpu.InterpretParams(detect_races=True, random_seed=0, num_cores_or_threads=2)
  options = dict(interpret=simulator, implementation="pallas_tpu", filter_e=10.0, filter_c=10.0)
  _, gradients = value_and_gradients(problem(256, 24, 384, jnp.float32), **options)
  chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


@needs_gpu_simulator
@pytest.mark.parametrize(
  "shape, layout, options",
  [((256, 64, 128), "vd", ALL), ((512, 192, 640), "vd", PLAIN), ((512, 64, 256), "dv", ALL)],
  ids=["one tile, all options", "many tiles", "the other layout"],
)
def test_gpu_kernels(shape, layout, options):
  simulator = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="error")
  own = dict(implementation="pallas_gpu", interpret=simulator, layout=layout)
  got = value_and_gradients(problem(*shape, jnp.bfloat16), **own, **options)
  # Gradients of the logits are rounded to bfloat16 before the products, and the results again.
  assert_close(got, expected(*shape, "bfloat16", tuple(options.items())), 1e-6, 4e-3)


@needs_gpu_simulator
def test_gpu_kernels_under_vmap():
  """Two problems in one launch, as in a sweep that trains several models together."""
  simulator = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="error")
  one = problem(256, 64, 128, jnp.bfloat16)
  both = jax.tree.map(lambda array: jnp.stack([array, jnp.roll(array, 5, axis=0)]), one)

  def run(**options):
    return jax.vmap(lambda *arrays: value_and_gradients(arrays, **ALL, **options))(*both)

  got = run(implementation="pallas_gpu", interpret=simulator)
  want = run(implementation="reference")
  for i in range(2):
    assert_close(*(jax.tree.map(operator.itemgetter(i), tree) for tree in (got, want)), 1e-6, 4e-3)
