"""The kernels in the simulator of a TPU, and compiled ahead of time for four of them."""

# T rows, K inner, N outer size of a matrix, E groups
import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.chips import CORES
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.schedule.compiler import compile_for
from tests.pallas_kernels.grouped_matmul.values_test import SIZES, problem, relative, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_in_less_time")]


@pytest.mark.parametrize("cores, seed", [(1, 0), (2, 1)])
def test_simulated(cores, seed):
  """Codes, three tiles of rows of which groups share two; the same bits twice."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where races are recorded

  simulator = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    random_seed=seed,
    num_cores_or_threads=cores,
    dma_execution_mode="on_wait" if seed else "eager",
  )
  arrays = problem()
  sizes_E = jnp.asarray(list(SIZES.values())[0], jnp.int32)
  dtype = ("e4m3fn", "int8")[seed]

  @jax.jit
  def gradients(x_TK, w_EKN, dy_TN, sizes_E):
    multiply = functools.partial(
      grouped_matmul,
      group_sizes_E=sizes_E,
      dtype=dtype,
      implementation="pallas_tpu",
      interpret=simulator,
    )
    y_TN, pull_back = jax.vjp(multiply, x_TK, w_EKN)
    return y_TN, *pull_back(dy_TN)

  try:
    got = jax.block_until_ready(gradients(*arrays, sizes_E))
    again = jax.block_until_ready(gradients(*arrays, sizes_E))
    assert not interpret_pallas_call.races.races_found
  except Exception:
    pltpu.reset_tpu_interpret_mode_state()
    raise
  chex.assert_trees_all_equal(got, again)
  for ours, theirs in zip(got, run(*arrays, sizes_E, dtype, "reference")):
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("chip", CORES)
def test_compiled(chip):
  """Forward and both gradients.

  The memory is a padded copy of the rows, the float32 gradient, and of codes the matrices' in two
  orientations.
  """
  pytest.importorskip("libtpu")
  T, K, N, E = (2048, 1024, 512, 16) if chip == "v5e" else (512, 512, 256, 8)
  shapes = ((T, K), jnp.bfloat16), ((E, K, N), jnp.bfloat16), ((E,), jnp.int32)
  args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  for dtype in (None, "e4m3fn" if chip == "tpu7x" else "int8"):

    def loss(x_TK, w_EKN, sizes_E, dtype=dtype):
      y_TN = grouped_matmul(x_TK, w_EKN, sizes_E, dtype=dtype, implementation="pallas_tpu")
      return jnp.sum(jnp.sin(y_TN.astype(jnp.float32)))

    memory = compile_for(jax.grad(loss, (0, 1)), args, chip).memory_analysis()
    float32_gradient, padded = 4 * E * K * N, 4 * (T + 128 * E) * (K + N)
    codes = 0 if dtype is None else 2 * E * K * N
    assert memory.temp_size_in_bytes < float32_gradient + codes + padded
