"""The TPU kernels in the simulator of a TPU: races, poisoned memory, grid order, cores.

What was not written is NaN there, reads out of bounds raise, and two accesses to one place that
nothing orders are recorded.
"""

# Y[M, N] = X[M, K] W[K, N]
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul.codes import FORMATS
from pallas_kernels.fp8_matmul.quantize_tpu import quantize
from tests.pallas_kernels.fp8_matmul import oracle
from tests.pallas_kernels.fp8_matmul.quantize_test import BLOCKS, hard_numbers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_in_less_time")]


@pytest.mark.parametrize("cores, seed", [(1, 0), (2, 1)])
def test_products(cores, seed):
  """Several tiles along every axis, all of them ragged."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where races are recorded

  simulator = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    random_seed=seed,  # of the order of parallel grid axes
    num_cores_or_threads=cores,
    dma_execution_mode="on_wait" if seed else "eager",
  )
  options = dict(dtype="int8") if seed else dict()
  given = oracle.problem(300, 385, 270)

  @jax.jit
  def run(x, w, dy):
    how = dict(implementation="pallas_tpu", interpret=simulator)
    y, pull_back = jax.vjp(lambda x, w: fp8_matmul(x, w, **how, **options), x, w)
    return y, *pull_back(dy)

  try:
    got = jax.block_until_ready(run(*given))
    assert not interpret_pallas_call.races.races_found
  except Exception:
    pltpu.reset_tpu_interpret_mode_state()
    raise
  for ours, want in zip(got, oracle.products(*given, **options)):
    assert oracle.error(ours, want) < 1e-6


@pytest.mark.parametrize("given", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_codes_bit_for_bit(block, transposed, given):
  """The quantisers' kernels give the codes and the scales of numpy; a zero may lose its sign."""
  x = jnp.asarray(hard_numbers(), given)
  form = FORMATS["e4m3fn"]
  got = jax.jit(lambda x: quantize(x, block, form, "f32", True, transposed))(x)
  codes, scales, _ = oracle.quantize(x, block, "e4m3fn", "f32")
  np.testing.assert_array_equal(np.isfinite(got.scales), np.isfinite(scales))
  finite = np.isfinite(scales)
  np.testing.assert_array_equal(np.asarray(got.scales)[finite], scales[finite])
  number = finite.repeat(block[0], 0).repeat(block[1], 1)[:300, :400]
  ours, theirs = np.float32(got.codes)[number], np.float32(codes)[number]
  np.testing.assert_array_equal(ours, theirs)
